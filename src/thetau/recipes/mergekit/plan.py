"""From a recipe in mergekit's format to a model that is put together when it is read.

Every output tensor gets its inputs (a tensor of each model that takes part), the base's tensor and a method with the values that hold
there. Tensors that share models, base and method form one merge. Only headers and configs are read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from thetau.checkpoint import Source, Spec, check_patterns, matches, open_source
from thetau.checkpoint.arranged import Piece
from thetau.checkpoint.config import config_for, differences
from thetau.engine.executor import Engine
from thetau.engine.patchwork import Patchwork
from thetau.errors import AlignmentError, CheckpointError, RecipeError, nearest
from thetau.parts import Method
from thetau.recipes.mergekit import methods, modules
from thetau.recipes.mergekit.checks import check_gradients, check_parameters, compare_configs
from thetau.recipes.mergekit.findings import Findings, some
from thetau.recipes.mergekit.layout import Layout, is_head, renamed
from thetau.recipes.mergekit.members import Model, Slot, apart, find, identities_of, labels_of
from thetau.recipes.mergekit.patches import patches
from thetau.recipes.mergekit.reference import Reference, parse
from thetau.recipes.mergekit.schema import Input, Module, Script, Slice, Where
from thetau.recipes.mergekit.settings import Resolver
from thetau.recipes.mergekit.sidefiles import side_files
from thetau.recipes.mergekit.tokens import (
    Speaker,
    TokenizerSettings,
    Vocabulary,
    differing,
    templated,
    unequal,
    vocabulary,
)
from thetau.vectors import Combination


def assemble(
    scripts: Sequence[Script],
    where: str,
    *,
    folder: Path | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Patchwork:
    """The model that the last of some documents describes; the earlier ones are its inputs, computed when they are read.

    Raises:
        RecipeError: everything that headers and configs can tell is wrong, with line and column.
    """
    made: dict[str, Source] = {}
    result: Patchwork | None = None
    for script in scripts:
        result = Assembly(
            script, where, made, folder, seed, exclude if script is scripts[-1] else (), engine or Engine()
        ).patchwork()
        if script.name is not None:
            made[script.name] = result
    if result is None:
        raise RecipeError(["the file holds no recipe."], where)
    return result


class Assembly:
    """One document on its way to a model.

    `fixed` is a method of ours for every tensor, where the recipe is one of ours; `opened` are models that are open already, and `labels`
    what the recipe calls them. `beside` is the model whose config, tokenizer and template the output takes; None for the first one.
    """

    def __init__(
        self,
        script: Script,
        where: str,
        made: Mapping[str, Source],
        folder: Path | None,
        seed: int,
        exclude: Sequence[str],
        engine: Engine,
        *,
        fixed: Method | None = None,
        opened: Mapping[Reference, Source] = MappingProxyType({}),
        labels: Mapping[Reference, str] = MappingProxyType({}),
        beside: Reference | None = None,
    ) -> None:
        self.script, self.where, self.made = script, where, made
        self.seed, self.exclude, self.engine = seed, tuple(exclude), engine
        self.folder, self.template = folder, dict[str, Any]()
        self.found = Findings()
        self.fixed, self.opened, self.labels = fixed, opened, labels
        spec = methods.SPECS.get(script.method) if fixed is None else methods.ours(fixed)
        if spec is None:
            known = ", ".join(sorted(methods.SPECS))
            raise RecipeError(
                [
                    f"{self._at(('merge_method',))}: unknown method {script.method!r}.{nearest(script.method, methods.SPECS)} Known: {known}."
                ],
                where,
            )
        self.spec = spec
        self.models = self._opened()
        self.donor = next(iter(self.models.values()))
        self.base = self.models[script.base] if script.base is not None else None
        self.beside = self.models[beside] if beside is not None else self.donor

    def _at(self, where: Where) -> str:
        return self.script.document.at(where)

    def _opened(self) -> dict[Reference, Model]:
        references = self.script.references()
        sources: dict[Reference, Source] = {}
        problems = []
        for reference in references:
            try:
                sources[reference] = self._source(reference)
            except (CheckpointError, AlignmentError) as error:
                problems.append(f"{self._at(self.script.place(reference))}: {error}")
        if problems:
            raise RecipeError(problems, self.where)
        labels = {**labels_of(references), **self.labels}
        found: dict[Reference, Model] = {}
        donor: Layout | None = None
        for reference, source in sources.items():
            config = config_for(source)
            layout = Layout.of(source, config)
            donor = donor or layout
            names = {said: own for own, said in renamed(donor, layout).items()}
            found[reference] = Model(labels[reference], source, layout, names, config)
        return found

    def _source(self, reference: Reference) -> Source:
        if reference in self.opened:
            return self.opened[reference]
        named = self.made.get(reference.model.path)
        if named is None:
            return Patchwork.of(reference.open(), label=str(reference))
        if reference.lora is None:
            return named
        adapter = open_source(str(reference.lora), base=named)
        return Patchwork.of(Combination(((1.0, named), (1.0, adapter)), reference=named), label=str(reference))

    # The whole.

    def settled(self) -> tuple[list[modules.Cut], list[Slot]]:
        """The towers as they are cut, and every output tensor with its inputs and its method.

        Raises:
            RecipeError: with all that is wrong.
        """
        check_parameters(self.script, self.spec, self.found)
        self.vocabulary = self._vocabulary()
        cuts = self._cuts()
        check_gradients(self.script, cuts, self.found)
        slots = self._slots(cuts) if not self.found.problems else []
        self._check_idle()
        compare_configs(self.donor, list(self.models.values()), self.found)
        for container in {cut.tower.container for cut in cuts if cut.tower.container is not None}:
            depth, ours = self.beside.depth(container), self.donor.depth(container)
            if depth != ours:
                self.found.wrong(
                    f"config: {self.beside.label} has {depth} layers in {container!r} and {self.donor.label}, whose layers' names the output has, {ours}: "
                    "take the config of a model of the same depth."
                )
        if self.found.problems:
            raise RecipeError(self.found.problems, self.where)
        return cuts, slots

    def patchwork(self) -> Patchwork:
        """The model.

        Raises:
            RecipeError: with all that is wrong.
        """
        cuts, slots = self.settled()
        specs = {slot.name: self._spec(slot) for slot in slots}
        architecture = next((reference.architecture for reference in self.models if reference.architecture), None)
        changed = side_files(self.donor, self.beside, cuts, slots, self.vocabulary, architecture, self.found)
        files = {**self.beside.source.files, **self.template, **changed}
        models = {model.label: model.source for model in self.models.values()}
        return Patchwork(
            patches(slots, self._piece, label=self.script.method or "merge", seed=self.seed, engine=self.engine),
            specs,
            label=self.script.name or self.where,
            folder=self.beside.source.folder,
            files=files,
            models=models,
            base=self.donor.source,
            notes=self.found.notes,
            alarms=self.found.warnings,
        )

    def _piece(self, slot: Slot, model: Model, own: str) -> Piece:
        if self.vocabulary is None or not self._by_token(slot.name):
            return Piece(model.source, own)

        def tensor_of(label: str) -> tuple[Source, str] | None:
            other = next(one for one in (*self.models.values(), *self.lenders.values()) if one.label == label)
            found = find(other, slot.name)
            return (other.source, found) if found is not None else None

        among = [
            label
            for label in self.vocabulary.merged
            if label in {one.label for _, one, _ in slot.inputs} or (slot.base and slot.base[0].label == label)
        ]
        return self.vocabulary.piece(model.label, own, tensor_of, among)

    # What goes where.

    def _cuts(self) -> list[modules.Cut]:
        """Each tower's slices; whole models are one slice of all their layers."""
        found = []
        towers = modules.towers(self.donor.layout, self.donor.source, list(self.script.modules))
        for name, module in self.script.modules.items():
            chosen, problem = modules.chosen(name, towers, cut=bool(module.slices))
            if problem:
                self.found.wrong(f"{self._at(module.where)}: {problem}")
                continue
            if name is None:
                chosen = self._moved(chosen, module)
            found += [modules.Cut(tower, module, self._slices(module, tower)) for tower in chosen]
        taken = {tensor for cut in found for tensor in cut.tower.tensors}
        left = [tensor for tensor in self.donor.source.specs if tensor not in taken]
        if left and not self.found.problems:
            self.found.notes.append(
                f"{len(left)} tensors of towers that the recipe does not name are taken from {self.donor.label}: {some(left)}"
            )
        return found

    def _moved(self, towers: Sequence[modules.Tower], module: Module) -> list[modules.Tower]:
        """The towers that all models have; one for images or sound that some model lacks stays as it is."""
        stays: dict[str, list[str]] = {}
        found = []
        for tower in towers:
            lacking = [self.models[one.model].label for one in module.models if not self.models[one.model].holds(tower)]
            if lacking and tower.role != "text_decoder":
                stays.setdefault(", ".join(lacking), []).append(repr(tower.name))
            else:
                found.append(tower)
        for labels, names in stays.items():
            self.found.warnings.append(f"{labels} has no {', '.join(names)}: they stay as in {self.donor.label}.")
        return found

    def _slices(self, module: Module, tower: modules.Tower) -> tuple[Slice, ...]:
        if module.slices:
            for piece in module.slices:
                for one in piece.sources:
                    self._check_range(one, tower)
            return module.slices
        inputs = list(module.models)
        seen: set[Reference] = set()
        for one in inputs:
            if one.model in seen:
                self.found.warnings.append(f"{self._at(one.where)}: {one.model} stands twice; it counts twice.")
            seen.add(one.model)
        if self.script.base is not None and self.script.base not in seen:
            inputs.append(Input(self.script.base, ("base_model",)))
        container = tower.container
        depths = {one.model: self.models[one.model].depth(container) for one in inputs} if container is not None else {}
        if 0 in depths.values() and any(depths.values()):
            lacking = next(self.models[model] for model, count in depths.items() if count == 0)
            having = next(self.models[model] for model, count in depths.items() if count)
            self.found.wrong(
                f"{self._at(module.where)}: {lacking.label} has no layers {container!r}, {having.label} has.{apart([having, lacking])}"
            )
        elif len(set(depths.values())) > 1:
            said = ", ".join(f"{self.models[model].label} {count}" for model, count in depths.items())
            self.found.wrong(
                f"{self._at(module.where)}: the models have different numbers of layers in {container!r}: {said}. Use `slices`."
            )
        whole = next(iter(depths.values()), 0)
        sources = tuple(Input(one.model, one.where, (0, whole), one.parameters) for one in inputs)
        return (Slice(sources, module.where),)

    def _check_range(self, one: Input, tower: modules.Tower) -> None:
        model = self.models[one.model]
        if tower.container is None or one.layers is None:
            return
        depth = model.depth(tower.container)
        if one.layers[1] > depth:
            self.found.wrong(
                f"{self._at((*one.where, 'layer_range'))}: {model.label} has {depth} layers, 0 to {depth - 1}. Got the range {list(one.layers)}."
            )

    def _slots(self, cuts: Sequence[modules.Cut]) -> list[Slot]:
        before, layers, after = [], [], []
        self.lacking: dict[str, dict[str, str]] = {}  # by model, then tensor: who has it
        self.resolver = Resolver(self._names(cuts))
        for cut in cuts:
            before += [self._slot(name, cut, cut.slices[0], 0.0, None) for name in cut.tower.before]
            for layer in cut.layers():
                rests = self._rests(cut, layer)
                layers += [self._slot(f"{layer.prefix}{rest}", cut, layer.slice, layer.t, layer, rest) for rest in rests]
            after += [self._slot(name, cut, cut.slices[-1], 0.0, None) for name in cut.tower.after]
        taken = {slot.name for slot in (*before, *layers, *after) if slot is not None}
        towers = {tensor for cut in cuts for tensor in cut.tower.tensors}
        rest = [
            Slot(name, ((self.donor.label, self.donor, name),), None, None)
            for name in self.donor.source.specs
            if name not in taken and name not in towers
        ]
        heads = self._heads(cuts, taken)
        self._tell_lacking()
        everything = {*taken, *(name for model in self.models.values() for name in (*model.names, *model.source.specs))}
        for problem in check_patterns(self.exclude, everything, "exclude"):
            self.found.wrong(problem)
        return [slot for slot in (*before, *layers, *after, *heads, *rest) if slot is not None]

    def _names(self, cuts: Sequence[modules.Cut]) -> list[str]:
        """Every name that a filter can be asked about."""
        found: dict[str, None] = {}
        for cut in cuts:
            found.update(dict.fromkeys(cut.placed(name) for name in (*cut.tower.before, *cut.tower.after)))
            for layer in cut.layers():
                found.update(dict.fromkeys(f"{layer.prefix}{rest}" for rest in self._rests(cut, layer)))
        return list(found)

    def _rests(self, cut: modules.Cut, layer: modules.Layer) -> list[str]:
        """The tensors of an output layer, of any of its inputs."""
        container = cut.tower.container
        assert container is not None
        known: dict[str, None] = {}
        for one, index in zip(layer.slice.sources, layer.indices, strict=True):
            known.update(dict.fromkeys(self.models[one.model].layers.get(container, {}).get(index, ())))
        return list(known)

    def _lacks(self, label: str, name: str, holder: str) -> None:
        """Note a tensor that a model has not and another has; all are told together."""
        if not matches(name, self.exclude):
            self.lacking.setdefault(label, {})[name] = holder

    def _tell_lacking(self) -> None:
        """A problem for each model that lacks tensors."""
        for label, names in self.lacking.items():
            shown = some(list(names))
            fused = any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in names)
            why = (
                "One keeps its experts in one tensor, the other each by itself: save one of them anew with the other's version of transformers."
                if fused
                else f"Leave them out with `--exclude PATTERN`: they stay as in {self.donor.label} where it has them. Or take models of one architecture."
            )
            holder = next(iter(names.values()))
            pair = [model for name in (holder, label) for model in self.models.values() if model.label == name]
            lines = differences(pair[0].config, pair[-1].config)
            differ = f" Their configs differ in {some(lines, '; ')}." if lines else ""
            self.found.wrong(f"{label} lacks {len(names)} tensors that {holder} has: {shown}.{differ} {why}")

    def _heads(self, cuts: Sequence[modules.Cut], taken: set[str]) -> list[Slot | None]:
        """Loose tensors that some model has and the donor has not: an output head of its own, beside a donor that ties it."""
        found: list[Slot | None] = []
        for model in self.models.values():
            for said, own in model.names.items():
                if said in taken or said in self.donor.names or model.layout.places[own].container is not None:
                    continue
                taken.add(said)
                if matches(said, self.exclude) or model.layout.further(own):
                    self.found.notes.append(f"{model.label}: {said!r}, which {self.donor.label} has not, is left out.")
                elif is_head(said) and find(self.donor, said) is not None:
                    found.append(self._slot(said, cuts[0], cuts[0].slices[-1], 0.0, None))
                    self.found.notes.append(
                        f"{model.label} has {said!r} of its own; where the others tie it to the embedding, that counts."
                    )
                else:
                    self._lacks(self.donor.label, said, model.label)
            for container, inside in model.layers.items():
                if container not in self.donor.layout.depth:
                    for index, rests in inside.items():
                        for rest in rests:
                            self._lacks(self.donor.label, f"{container}.{index}.{rest}", model.label)
        return found

    def _slot(
        self, name: str, cut: modules.Cut, piece: Slice, t: float, layer: modules.Layer | None, rest: str = ""
    ) -> Slot | None:
        spec = self.spec
        base_reference = piece.base or self.script.base
        inputs: list[tuple[Input, Model, str]] = []
        lacking: list[Model] = []
        called = []  # each input's name of the tensor, with its own layer's number: what filters under a model are asked about
        for position, one in enumerate(piece.sources):
            model = self.models[one.model]
            said = f"{cut.tower.container}.{layer.indices[position]}.{rest}" if layer is not None else name
            own = find(model, said)
            if own is None:
                lacking.append(model)
            else:
                called.append(said)
                inputs.append((one, model, own))
        name = name if layer is not None else cut.placed(name)
        if not self._floating(inputs) or matches(name, self.exclude) or (lacking and self._optional(inputs)):
            return self._kept(name, inputs, base_reference, lacking)
        if lacking:
            for model in lacking:
                self._lacks(model.label, name, inputs[0][1].label if inputs else self.donor.label)
            return None
        ids = identities_of([model.label for _, model, _ in inputs])
        over = [index for index, (one, _, _) in enumerate(inputs) if one.model == base_reference] if spec.base else []
        base = (inputs[over[0]][1], inputs[over[0]][2]) if over else None
        if spec.base == "required" and base is None:
            what = "`base_model` is missing" if base_reference is None else f"{base_reference} must be one of the slice's sources"
            self.found.wrong(f"{self._at(piece.where)}: `{self.script.method}` needs a base: {what}.")
            return None
        tasks = [index for index in range(len(inputs)) if index not in over]
        self._check_shapes(name, inputs)
        levels = [piece.parameters, cut.module.parameters, self.script.parameters]
        shared = {key: self.resolver.value(key, levels, name, t) for key in spec.shared}
        each = [
            {key: self.resolver.value(key, [inputs[index][0].parameters, *levels], called[index], t) for key in spec.per_input}
            for index in tasks
        ]
        try:
            method = spec.method(shared, each, [ids[index] for index in tasks], based=base is not None)
        except RecipeError as error:
            for problem in error.problems:
                self.found.wrong(f"{self._at(piece.where)}: {{}}: {problem}", name)
            return None
        for remark in spec.remarks(shared, each):
            self.found.note(f"{self._at(piece.where)}: {remark}")
        if method is None:  # nothing besides the base: it stays
            assert base is not None
            return Slot(name, ((base[0].label, *base),), None, None)
        return Slot(name, tuple((ids[index], inputs[index][1], inputs[index][2]) for index in tasks), base, method)

    def _optional(self, inputs: Iterable[tuple[Input, Model, str]]) -> bool:
        """Whether a tensor is one that a model can do without."""
        return all(model.layout.further(own) for _, model, own in inputs)

    def _kept(
        self, name: str, inputs: Sequence[tuple[Input, Model, str]], base: Reference | None, lacking: Sequence[Model]
    ) -> Slot | None:
        """A tensor that is not merged: as in the base, or the first model; left out where that has none."""
        if any(model is self.donor for model in lacking) or not inputs:
            self.found.notes.append(f"{name!r}, which {self.donor.label} has not, is left out.")
            return None
        if lacking:
            self.found.notes.append(
                f"{', '.join(model.label for model in lacking)} has no {name!r}; it stays as in {inputs[0][1].label}."
            )
        _, model, own = next((entry for entry in inputs if entry[0].model == base), inputs[0])
        return Slot(name, ((model.label, model, own),), None, None)

    def _floating(self, inputs: Iterable[tuple[Input, Model, str]]) -> bool:
        return all(model.source.specs[own].dtype.is_floating_point for _, model, own in inputs)

    def _spec(self, slot: Slot) -> Spec:
        model, own = slot.base or slot.inputs[0][1:]
        spec = model.source.specs[own]
        shape = spec.shape
        if self.vocabulary is not None and self._by_token(slot.name):
            shape = (self.vocabulary.rows, *shape[1:])
        return Spec(name=slot.name, shape=shape, dtype=spec.dtype, file=spec.file)

    # Tokens.

    def _vocabulary(self) -> Vocabulary | None:
        self.lenders: dict[Reference, Model] = {}
        where: Where = ("tokenizer",) if ("tokenizer",) in self.script.document.marks else ("tokenizer_source",)
        try:
            settings = (
                TokenizerSettings.read(self.script.tokenizer, chat_template=self.script.chat_template, label=self._lender)
                if self.script.tokenizer is not None
                else None
            )
            members = [self._speaker(model, merged=True) for model in self.models.values()]
            members += [self._speaker(model, merged=False) for model in self.lenders.values()]
            if settings is None:
                self.found.warnings += differing(members)
                if self.script.chat_template is not None:
                    self.template = templated(members, self.donor.label, self.script.chat_template)
                return None
            made = vocabulary(members, self.base.label if self.base is not None else None, settings)
        except (RecipeError, CheckpointError, AlignmentError) as error:
            for problem in error.problems if isinstance(error, RecipeError) else [str(error)]:
                self.found.wrong(f"{self._at(where)}: {problem}")
            return None
        self.found.notes += made.notes
        return made

    def _lender(self, said: Any) -> str:
        """The label of a model that the tokenizer's settings name; one that is not merged is opened too."""
        reference = parse(said, "tokenizer", self.folder)
        known = self.models.get(reference) or self.lenders.get(reference)
        if known is None:
            source = self._source(reference)
            config = config_for(source)
            layout = Layout.of(source, config)
            names = {name: own for own, name in renamed(self.donor.layout, layout).items()}
            known = self.lenders[reference] = Model(str(reference), source, layout, names, config)
        return known.label

    def _speaker(self, model: Model, *, merged: bool) -> Speaker:
        return Speaker(label=model.label, folder=model.source.folder, source=model.source, config=model.config, merged=merged)

    def _by_token(self, name: str) -> bool:
        for model in self.models.values():
            own = find(model, name)
            if own is not None:
                return model.by_token(own)
        return False

    # Checks.

    def _check_idle(self) -> None:
        if self.found.problems:
            return
        for key, given in methods.patterns(self.fixed) if self.fixed is not None else ():
            for problem in check_patterns(given, self.resolver.names, f"method.{key}"):
                self.found.wrong(problem)
        for place, problem in self.resolver.idle():
            self.found.wrong(f"{self._at(place)}: {problem}")

    def _check_shapes(self, name: str, inputs: Sequence[tuple[Input, Model, str]]) -> None:
        shapes = [model.source.specs[own].shape for _, model, own in inputs]
        if len(set(shapes)) == 1:
            return
        said = ", ".join(f"{model.label} {list(shape)}" for (_, model, _), shape in zip(inputs, shapes, strict=True))
        if self._by_token(name) and len({shape[1:] for shape in shapes}) == 1:
            if self.vocabulary is None:
                rows = {model.label: shape[0] for (_, model, _), shape in zip(inputs, shapes, strict=True)}
                self.found.wrong(unequal(name, rows))
            return
        differ = apart([model for _, model, _ in inputs])
        self.found.wrong(f"{{}}: the models have other shapes.{differ}", f"{name} ({said})")
