"""From a config to a mixture that is read piece by piece: experts are the stored tensors under new names, and no model lies in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

from thetau._lazy import torch
from thetau.checkpoint import FLOATS, Source, Spec, dtype_name, layer_of
from thetau.checkpoint.arranged import Arranged, Piece
from thetau.checkpoint.config import config_for
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.memory import MemorySource
from thetau.engine.executor import Engine
from thetau.engine.patchwork import Patch, Patchwork
from thetau.errors import AlignmentError, CheckpointError, RecipeError, nearest
from thetau.recipes.mergekit.moe.gates import Drawn, Gates
from thetau.recipes.mergekit.moe.schema import DRAWN, Expert, MoeRecipe, read_moe
from thetau.recipes.mergekit.moe.targets import COMMON, DENSE, PARTS, TARGETS, Config, Target
from thetau.recipes.mergekit.reference import Reference
from thetau.vectors import Combination

NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
COMPARED = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "hidden_act")
OLD_BUFFER = "rotary_emb.inv_freq"
_KEYS = frozenset({"experts", "shared_experts", "experts_per_token", "gate_mode"})
_SHOWN = 4


def is_moe(document: Any) -> bool:
    """Whether a recipe's content is a `mergekit-moe` config.

    Examples:
        >>> is_moe({"base_model": "a", "experts": [{"source_model": "b"}]})
        True
        >>> is_moe({"base_model": "a", "models": [{"model": "b"}], "merge_method": "ties"})
        False
    """
    return isinstance(document, Mapping) and bool(_KEYS & set(document)) and "merge_method" not in document


def moe(
    document: Mapping[str, Any],
    where: str = "recipe",
    folder: Path | None = None,
    *,
    seed: int = 0,
    engine: Engine | None = None,
    allow_same: bool = False,
) -> Patchwork:
    """The mixture that a `mergekit-moe` config describes, lazily: headers and configs are read, gates are made when the first row is wanted.

    Args:
        document: the config's content.
        where: what messages call it.
        folder: where relative paths start that exist there.
        seed: of random gates and noise, unless the config has a `seed` of its own, as a recorded one has.
        engine: the memory budget that the base must run in, a layer at a time.
        allow_same: let all experts be the same model with gates from prompts, as mergekit does on request.

    Raises:
        RecipeError: the config says something wrong, or no kind of mixture can be made of these models; all problems together.
        CheckpointError: a model cannot be opened.
        AlignmentError: models do not fit each other, or hold tensors that the mixture has no place for.
        ThetauError: running the base over the prompts does not fit the memory budget.
    """
    recipe = read_moe(document, where, folder, seed=seed, allow_same=allow_same)
    models = _open(recipe)
    target = _target(recipe, models, where)
    plan = _Plan(recipe, models, target)
    plan.check()
    return plan.patchwork(engine or Engine())


@final
@dataclass(frozen=True)
class _Model:
    """An opened model and its config; empty where it has none."""

    source: Source
    config: Config

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))


def _open(recipe: MoeRecipe) -> dict[Reference, _Model]:
    """Every model that the recipe names, each once."""
    found: dict[Reference, _Model] = {}
    for reference in (recipe.base_model, *(expert.source_model for _, expert in recipe.everyone)):
        if reference not in found:
            combination = reference.open()
            if not combination.is_model:
                raise AlignmentError(f"{reference}: is a task vector, and an expert must be a model. Add it to its base first.")
            source = Patchwork.of(combination, label=str(reference))
            found[reference] = _Model(source, config_for(source))
    base = found[recipe.base_model]
    if not base.config:
        raise CheckpointError(
            f"{recipe.base_model}: has no config.json, which the mixture's is made from. Put it beside the weights."
        )
    return found


def _target(recipe: MoeRecipe, models: Mapping[Reference, _Model], where: str) -> Target:
    """The kind of mixture: the one asked for, or the first that can be made of these models, Mixtral before others.

    Raises:
        RecipeError: there is none; the message says of each why not.
    """
    asked = recipe.architecture.lower() if recipe.architecture else ""
    candidates = [one for one in TARGETS if any(spelling.startswith(asked) for spelling in one.spellings)]
    if not candidates:
        known = [one.spellings[0] for one in TARGETS]
        raise RecipeError(
            [f"architecture: must be one of {', '.join(known)}. Got {recipe.architecture!r}.{nearest(asked, known)}"], where
        )
    refusals = {one.name: _refusal(one, recipe, models[recipe.base_model].family) for one in candidates}
    found = next((one for one in candidates if not refusals[one.name]), None)
    if found is None:
        raise RecipeError([f"architecture: no {name}: {' '.join(said)}" for name, said in refusals.items()], where)
    return found


def _refusal(target: Target, recipe: MoeRecipe, family: str) -> list[str]:
    said = []
    fewest, most = target.shares
    count = len(recipe.shared_experts)
    if family not in target.families:
        said.append(f"it can be made of {' or '.join(target.families)} models, the base's `model_type` is {family!r}.")
    if not fewest <= count <= most:
        takes = "no shared expert" if not most else "exactly one shared expert" if fewest else "at most one shared expert"
        said.append(f"it has {takes}. Got {count}.")
    elif count:
        prompted = all(expert.positive_prompts for expert in recipe.shared_experts)
        if target.shared_gate and not prompted and recipe.gate_mode not in DRAWN:
            said.append("its shared expert has a gate, so with this `gate_mode` it needs `positive_prompts`. Got none.")
        if not target.shared_gate and prompted:
            said.append("its shared expert has no gate. Leave its prompts out.")
    return said


class _Plan:
    """One mixture: which tensor comes from where."""

    def __init__(self, recipe: MoeRecipe, models: Mapping[Reference, _Model], target: Target) -> None:
        self.recipe, self.models, self.target = recipe, models, target
        self.base = models[recipe.base_model]
        self.layers = int(self.base.config.get("num_hidden_layers") or 0)
        self.holds = [*COMMON, *target.holds]

    # What must fit.

    def check(self) -> None:
        """Compare configs, layer counts, names and shapes.

        Raises:
            AlignmentError: all that does not fit.
        """
        problems = self._of_base()
        for place, expert in self.recipe.everyone:
            problems += self._of_expert(place, expert)
        if problems:
            raise AlignmentError("\n".join(problems))

    def _of_base(self) -> list[str]:
        source, label = self.base.source, self.base.source.label
        silent = [key for key in NEEDED if not isinstance(self.base.config.get(key), int)]
        if silent:
            return [f"{label}: config.json must give {', '.join(NEEDED)} as numbers. It lacks {', '.join(silent)}."]
        count = 1 + max((layer for name in source.specs if (layer := layer_of(name)) is not None), default=-1)
        if count != self.layers:
            return [f"{label}: config.json says {self.layers} layers, the weights have {count}. Is it that of these weights?"]
        problems = [
            f"{label}: lacks {len(lacking)} tensors that the mixture takes from it: {_some(lacking)}."
            for lacking in [self._lacking(source)]
            if lacking
        ]
        alien = [name for name in source.specs if not self._held(name) and not self._dense(name) and OLD_BUFFER not in name]
        if alien:
            problems.append(
                f"{label}: has {len(alien)} tensors that a {self.target.name} has no place for: {_some(alien)}. "
                "Models with biases or parts of their own cannot be its base."
            )
        whole = [name for name, spec in source.specs.items() if not spec.dtype.is_floating_point and OLD_BUFFER not in name]
        if whole:
            problems.append(
                f"{label}: {_some(whole)} are not floating-point. Quantised weights cannot be used: give the float checkpoint."
            )
        heads = int(self.base.config.get("num_attention_heads") or 1)
        width = self._width // heads
        if self.target.name == "DeepSeek MoE" and self.base.config.get("head_dim") not in (None, width):
            problems.append(
                f"{label}: has heads of size {self.base.config['head_dim']}; DeepSeek's code takes hidden_size / num_attention_heads = {width}."
            )
        return problems

    def _of_expert(self, place: str, expert: Expert) -> list[str]:
        model = self.models[expert.source_model]
        if model is self.base:
            return []
        ours, theirs = self.base.config, model.config
        differing = [key for key in COMPARED if theirs and ours.get(key) != theirs.get(key) and key in {*ours, *theirs}]
        if differing:
            said = "; ".join(f"{key} {theirs.get(key)!r}, the base's {ours.get(key)!r}" for key in differing)
            return [
                f"{place}: {expert.source_model} is of another architecture than the base {self.recipe.base_model}: {said}. "
                "All models of a mixture must share one."
            ]
        lacking = [name for name in self._dense_names() if name not in model.source.specs]
        if lacking:
            return [f"{place}: {expert.source_model} lacks {len(lacking)} tensors of its MLPs: {_some(lacking)}."]
        alone = [name for name in model.source.specs if ".mlp." in name and not self._dense(name)]
        if alone:
            return [f"{place}: {expert.source_model} has {len(alone)} tensors in its MLPs that no expert has: {_some(alone)}."]
        coded = [name for name in self._dense_names() if not model.source.specs[name].dtype.is_floating_point]
        if coded:
            return [f"{place}: {expert.source_model} is quantised ({_some(coded[:1])}). Give the float checkpoint."]
        base = self.base.source.specs
        bent = [name for name in self._dense_names() if name in base and model.source.specs[name].shape != base[name].shape]
        return [
            f"{place}: {expert.source_model} has {name!r} of shape {list(model.source.specs[name].shape)}; the base has {list(base[name].shape)}."
            for name in bent[:1]
        ]

    def _lacking(self, source: Source) -> list[str]:
        wanted = [*self._dense_names(), "model.embed_tokens.weight", "model.norm.weight"]
        wanted += [
            f"model.layers.{layer}.{part}.weight"
            for layer in range(self.layers)
            for part in (
                "input_layernorm",
                "post_attention_layernorm",
                *(f"self_attn.{one}_proj" for one in "qkvo"),
            )
        ]
        tied = self.target.config(self.base.config, 1, 1, 0).get("tie_word_embeddings")
        return [name for name in (*wanted, *(() if tied else ("lm_head.weight",))) if name not in source.specs]

    def _dense_names(self) -> list[str]:
        return [DENSE.format(layer=layer, part=part) for layer in range(self.layers) for part in PARTS]

    def _held(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.holds)

    def _dense(self, name: str) -> bool:
        return any(fnmatchcase(name, DENSE.format(layer="*", part=part)) for part in PARTS)

    @property
    def _width(self) -> int:
        return int(self.base.config["hidden_size"])

    # What comes from where.

    def patchwork(self, engine: Engine) -> Patchwork:
        """The mixture."""
        stored, altered, drawn = self._pieces()
        gates, shared = self._gate_names()
        router = self._router(gates, shared, engine)
        zeros = self._zeros()
        label = f"{self.target.name} of {len(self.recipe.experts)} experts"
        patches = [_patch(((1.0, Arranged(stored, label=label)),), stored)]
        for (scale, sigma), pieces in altered.items():
            terms: list[tuple[float, Source]] = [(scale, Arranged(pieces, label=label))]
            if sigma:
                terms.append((sigma, Drawn({name: drawn[name] for name in pieces}, seed=self.recipe.seed, what="noise")))
            patches.append(_patch(tuple(terms), pieces))
        patches += [_patch(((weight, source),), source.specs) for weight, source in router]
        if zeros is not None:
            patches.append(_patch(((1.0, zeros),), zeros.specs))
        specs = self._specs(patches)
        everyone = {str(reference): model.source for reference, model in self.models.items()}
        return Patchwork(
            patches,
            specs,
            label=label,
            folder=self.base.source.folder,
            files={"config.json": self._config(specs)},
            models=everyone,
            base=self.base.source,
            notes=self._notes(specs, patches, zeros),
            made=self.recipe.plain() | {"architecture": self.target.spellings[0]},
        )

    def _pieces(self) -> tuple[dict[str, Piece], dict[tuple[float, float], dict[str, Piece]], dict[str, tuple[int, ...]]]:
        """Stored tensors by their new names; those that are scaled or noised, by (scale, σ); shapes of all that are noised."""
        base = self.base.source
        stored = {name: Piece(base, name) for name in base.specs if self._held(name)}
        altered: dict[tuple[float, float], dict[str, Piece]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for index, (_, expert) in enumerate(self.recipe.everyone):
            source = self.models[expert.source_model].source
            for layer in range(self.layers):
                for part in PARTS:
                    theirs, ours = DENSE.format(layer=layer, part=part), self._name(index, layer, part)
                    scale = expert.scale if part == PARTS[-1] else 1.0
                    how = (scale, scale * expert.noise)
                    into = stored if how == (1.0, 0.0) else altered.setdefault(how, {})
                    into[ours] = Piece(source, theirs)
                    shapes[ours] = source.specs[theirs].shape
        return stored, altered, shapes

    def _name(self, index: int, layer: int, part: str) -> str:
        if index < len(self.recipe.experts):
            return self.target.expert(layer, index, part)
        return self.target.shared.format(layer=layer, part=part)

    def _gate_names(self) -> tuple[list[str], list[str]]:
        layers = range(self.layers)
        shared = [self.target.shared_gate.format(layer=layer) for layer in layers] if self.recipe.shared_experts else []
        return [self.target.gate.format(layer=layer) for layer in layers], [name for name in shared if name]

    def _router(self, names: Sequence[str], shared: Sequence[str], engine: Engine) -> list[tuple[float, Source]]:
        recipe, count = self.recipe, len(self.recipe.experts)
        if recipe.gate_mode in DRAWN:
            shapes = dict.fromkeys(names, (count, self._width)) | dict.fromkeys(shared, (1, self._width))
            uniform = recipe.gate_mode == "uniform_random"
            weight = self._width**-0.5 if uniform else 1.0
            return [(weight, Drawn(shapes, seed=recipe.seed, what="gate", uniform=uniform))]
        gates = Gates(
            self.base.source,
            recipe.gate_mode,
            [expert.prompts for expert in recipe.experts],
            names,
            self._width,
            shared=[expert.prompts for expert in recipe.shared_experts] if shared else (),
            shared_names=shared,
        )
        for walk in gates.passes():
            engine.allow(max(step.memory for step in walk.steps), "Running the base over the prompts, one layer at a time,")
        return [(1.0, gates)]

    def _zeros(self) -> MemorySource | None:
        """Biases that the mixture must have and the base has not."""
        source, found = self.base.source, {}
        for layer in range(self.layers):
            for part in self.target.zeros:
                stem = f"model.layers.{layer}.self_attn.{part}"
                if f"{stem}.bias" not in source.specs:
                    spec = source.specs[f"{stem}.weight"]
                    found[f"{stem}.bias"] = torch.zeros(spec.shape[0], dtype=spec.dtype.torch)
        return MemorySource(found, label="biases of zeros", key=f"zeros:{sorted(found)}") if found else None

    # What is written.

    @property
    def _dtype(self) -> Dtype | None:
        """The recipe's, or the one that the base's config names; None where neither does."""
        said = self.recipe.dtype or self.base.config.get("dtype") or self.base.config.get("torch_dtype")
        return FLOATS.get(str(said).removeprefix("torch."))

    def _specs(self, patches: Sequence[Patch]) -> dict[str, Spec]:
        """The output's tensors, block by block as the base's lie."""
        known = {
            name: source.specs[name] for patch in patches for _, source in patch.combination.terms[:1] for name in patch.names
        }
        stored = self.base.source.specs[DENSE.format(layer=0, part=PARTS[0])].dtype
        order = {name: index for index, name in enumerate(self.base.source.specs)}
        first = {layer: min(order[DENSE.format(layer=layer, part=part)] for part in PARTS) for layer in range(self.layers)}

        def place(name: str) -> int:
            layer = layer_of(name)
            return order[name] if name in order else first[layer if layer is not None else 0]

        specs = {}
        for name in sorted(known, key=place):
            spec = known[name]
            own = spec.dtype if name in self.base.source.specs else stored
            specs[name] = Spec(name=name, shape=spec.shape, dtype=self._dtype or own, file=spec.file)
        return specs

    def _config(self, specs: Mapping[str, Spec]) -> Config:
        recipe = self.recipe
        config = self.target.config(self.base.config, len(recipe.experts), recipe.experts_per_token, len(recipe.shared_experts))
        dtypes = Counter(spec.dtype for spec in specs.values())
        name = dtype_name(dtypes.most_common(1)[0][0])
        return {**config, "torch_dtype": name, "dtype": name}

    def _notes(self, specs: Mapping[str, Spec], patches: Sequence[Patch], zeros: MemorySource | None) -> list[str]:
        recipe, base, target = self.recipe, self.base, self.target
        notes = [
            f"{target.name}: {len(recipe.experts)} experts, {recipe.experts_per_token} a token"
            f"{f', {len(recipe.shared_experts)} shared' if recipe.shared_experts else ''}; "
            f"attention, embeddings, norms, config and tokenizer are those of {recipe.base_model}."
        ]
        if recipe.architecture is None:
            others = [one.name for one in TARGETS if one is not target and not _refusal(one, recipe, base.family)]
            if others:
                notes.append(f"{' and '.join(others)} could be made of these models too: name one with `architecture`.")
        if recipe.gate_mode == "cheap_embed":
            notes.append("Gates by cheap_embed are the same in every layer.")
        first = recipe.experts[0]
        alike = {(one.source_model, one.noise, one.scale) for one in recipe.experts} == {(first.source_model, 0.0, first.scale)}
        if len(recipe.experts) > 1 and alike:
            notes.append("All experts are the same: the mixture gives what one of them would until it is trained on.")
        window = base.config.get("sliding_window") if base.family == "mistral" or base.config.get("use_sliding_window") else None
        if window and target.name in ("Mixtral", "Qwen MoE", "DeepSeek MoE"):
            notes.append(f"The base attends to a window of {window} tokens; the mixture to all, as mergekit makes it.")
        if window and target.name == "Qwen3 MoE" and "full_attention" in (base.config.get("layer_types") or []):
            notes.append(f"The base attends to a window of {window} tokens in some layers; a Qwen3 MoE does in all.")
        if zeros is not None:
            notes.append(f"{len(zeros.specs)} biases that a {target.name} has and the base has not are zeros.")
        old = [name for name in base.source.specs if OLD_BUFFER in name]
        if old:
            notes.append(f"{len(old)} buffers of rotary frequencies are left out; a {target.name} computes them.")
        rounded = [
            name
            for patch in patches
            for name in patch.names
            if isinstance(source := patch.combination.terms[0][1], Arranged)
            and source.specs[name].dtype.itemsize > specs[name].dtype.itemsize
        ]
        if rounded:
            notes.append(
                f"{len(rounded)} stored tensors are rounded to {dtype_name(specs[rounded[0]].dtype)}, the output's dtype."
            )
        return notes


def _patch(terms: tuple[tuple[float, Source], ...], names: Mapping[str, Any]) -> Patch:
    return Patch(Combination(terms), tuple(names))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
