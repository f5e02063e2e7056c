"""The task vectors of a merge, aligned: which tensors a chain acts on, and the stack, the base and the evidence at any block of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint import Kind, Roles, Source, Spec, align, check_patterns, kind_of, named
from thetau.checkpoint.config import has_config, read_config
from thetau.checkpoint.layouts import Layouts, Reader
from thetau.checkpoint.pieces import apart
from thetau.checkpoint.window import Window
from thetau.engine.check import check_fields
from thetau.engine.guard import strangers
from thetau.engine.window import Reading
from thetau.errors import AlignmentError, RecipeError, nearest
from thetau.parts import BASE, SELECTIONS, Chain, Emit, Site, evidence_shape
from thetau.vectors import Combination
from thetau.vectors.combination import refuse_evidence

if TYPE_CHECKING:
    from torch import Tensor

Evidence = Mapping[str, Mapping[str, Combination]]


class Aligned:
    """K task vectors under a chain, or K models. Tasks are sorted by identity, so that their order changes nothing, not even a rounding."""

    def __init__(
        self,
        tasks: Mapping[str, Combination],
        chain: Chain,
        *,
        label: str,
        seed: int = 0,
        exclude: Sequence[str] = (),
        evidence: Evidence | None = None,
    ) -> None:
        given = [tasks[name] for name in sorted(tasks)]
        for vector in given:
            refuse_evidence(vector)
        self.chain, self.seed, self.label = chain, seed, label
        self.reference = next((vector.reference for vector in given if vector.reference is not None), None)
        if (chain.models or chain.needs_base) and self.reference is None:
            raise AlignmentError(
                f"{label}: needs the base's own weights, and these task vectors were saved without it. Subtract an opened base."
            )
        members = _models(tasks, self.reference, with_base=chain.with_base) if chain.models and self.reference else tasks
        self.tasks = tuple(sorted(members))
        self.vectors = [members[name] for name in self.tasks]
        sources = {source.key: source for vector in self.vectors for source in vector.sources()}
        reference = self.reference.specs if self.reference is not None else _union(self.vectors)
        label_of = self.reference.label if self.reference is not None else "the union of the task vectors"
        if self.reference is not None:
            sources = {self.reference.key: self.reference, **sources}
        self.sources = list(sources.values())
        self.stored = align(reference, label_of, self.sources, exclude)
        self.layouts = self._layouts()
        self.alignment = apart(self.stored, self.layouts.fused, self.sources)
        self.holders = {piece: fused for fused in self.layouts.fused.values() for piece in fused.pieces}
        self.roles = Roles.of(self.reference) if self.reference is not None else Roles()
        self.reading = Reading(self.alignment, self.vectors)
        self.evidence = _evidence(evidence or {}, chain.needs, self.tasks, label)
        found = {source.key: source for given in self.evidence.values() for one in given for source in one.sources()}
        self.testimony = list(found.values())
        self.evidence_reading = Reading(
            apart(align(reference, label_of, self.testimony, exclude, shapes=False), self.layouts.fused, self.testimony),
            [one for given in self.evidence.values() for one in given],
        )
        check_fields(chain, self._known, [self.site(name) for name in self.specs])
        self._check_evidence()

    def _layouts(self) -> Layouts:
        """What stored tensors hold, where the chain reads more than blocks of rows; of other chains, where it selects matrices by what they are."""
        chain = self.chain
        if chain.access == "block" and chain.selection.tensors not in ("linear", "matrices"):
            return Layouts()
        found = self._reader().layouts(self.stored.names, split=chain.split_fused)
        if chain.access == "block":
            return Layouts(fused={name: one for name, one in found.fused.items() if one.experts})
        return found

    def _reader(self) -> Reader:
        base = self.reference
        config = base.files.get("config.json") if base is not None else None
        if config is None and base is not None and base.folder is not None and has_config(base.folder):
            config = read_config(base.folder)
        return Reader(self.stored.specs, config or {})

    @property
    def _known(self) -> list[str]:
        """The names that a pattern may mean: of matrices, and of the tensors that hold several."""
        return [*self.alignment.names, *self.layouts.fused]

    @property
    def yardstick(self) -> Source | None:
        """What the vectors' lengths are compared with: the base; nothing, where models are merged."""
        return None if self.chain.models else self.reference

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """The tensors where the merged vector is not zero by definition; all, where models are merged."""
        everywhere = self.chain.models or self.chain.selection.elsewhere != "base"
        return {name: self.alignment.specs[name] for name in self.alignment.names if name in self.chosen or everywhere}

    @cached_property
    def selected(self) -> tuple[str, ...]:
        """The tensors that the chain acts on, sorted by name.

        Raises:
            AlignmentError: there is none.
        """
        specs, selection = self.alignment.specs, self.chain.selection
        found = [
            name
            for name in self.alignment.names
            if specs[name].elements and selection.takes(name, specs[name].shape, self._kind(name), self._holder(name))
        ]
        if self.chain.reduction.access == "stream":
            found = [name for name in found if len(specs[name].shape) >= 2]
        if not found:
            raise AlignmentError(
                f"{self.label}: no tensor fits {selection}.{self._near()} `thetau inspect --tensors` lists the names."
            )
        told = [name for name in found if not self.evidence or self._told(name)]
        if not told:
            kinds = ", ".join(self.evidence)
            raise AlignmentError(
                f"{self.label}: the evidence ({kinds}) holds none of the {len(found)} tensors. Collect it from these models."
            )
        return tuple(sorted(told))

    def _near(self) -> str:
        tensors = self.chain.selection.tensors
        patterns = [] if tensors in SELECTIONS else [tensors] if isinstance(tensors, str) else tensors
        return "".join(f" {problem}" for problem in check_patterns(patterns, self._known, "tensors"))

    @cached_property
    def chosen(self) -> frozenset[str]:
        """The same as a set."""
        return frozenset(self.selected)

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """The stored tensors that the chain does not act on, not even on a piece of them."""
        acted = {self._holder(name) for name in self.chosen}
        return tuple(name for name in self.stored.names if name not in acted)

    def notes(self) -> list[str]:
        """What becomes of the tensors outside, of those that hold several matrices, and of routers."""
        what = {"base": "stay the base's", "mean": "are averaged", "sum": "are summed"}[self.chain.selection.elsewhere]
        matrices = "matrices of " if self.chain.reduction.access == "stream" else ""
        silent = [name for name in self.outside if self.evidence and not self._speaks(name)]
        others = [name for name in self.outside if name not in silent]
        return [
            *named(f"{len(others)} tensors that are no {matrices}{self.chain.selection} {what}", others),
            *named(f"{len(silent)} tensors of which the evidence says nothing {what}", silent),
            *self._held(),
            *self._routed(what),
        ]

    def _held(self) -> list[str]:
        """Which tensors are merged as the matrices that they hold, and which cannot be."""
        acted = {self._holder(name) for name in self.chosen}
        fused = [one for name, one in self.layouts.fused.items() if name in acted and len(one.shape) - one.stacked == 2]
        experts = [one.name for one in fused if one.experts]
        others = [one.name for one in fused if not one.experts and len(one.parts) > 1]
        count = sum(len(one.pieces) for one in fused if one.experts)
        unknown = [name for name in self.layouts.unknown if name in acted]
        return [
            *named(f"{len(experts)} tensors of stacked experts are merged expert by expert, as {count} matrices", experts),
            *named(f"{len(others)} fused tensors are merged as the matrices that they hold", others),
            *named(
                f"{len(unknown)} fused tensors stay one matrix each, since neither their shape nor a config says how q, k and v lie in them",
                unknown,
            ),
        ]

    def _routed(self, what: str) -> list[str]:
        """What becomes of what chooses among experts."""
        routers = self._reader().routers
        out, outside = [name for name in routers if name in self.stored.kept], set(self.outside)
        left = [name for name in routers if name in outside]
        merged = [name for name in routers if name not in outside and name not in out]
        return [
            *named(f"{len(merged)} tensors of routers are merged like the others", merged),
            *named(f"{len(left)} tensors of routers {what}", left),
            *named(f"{len(out)} tensors of routers stay the base's, as what is left out by name", out),
        ]

    def by_blocks(self, emit: Emit) -> bool:
        """Whether an output can be made from blocks of rows: it needs no merged tensor, and no transform needs a whole one."""
        return self.chain.access == "block" or not (
            emit.reads_merged or any(part.access == "whole" for part in (*self.chain.transforms, emit))
        )

    def _holder(self, name: str) -> str:
        """The stored tensor that holds a matrix: itself, where it is alone."""
        return self.holders[name].name if name in self.holders else name

    def _kind(self, name: str) -> Kind:
        spec, fused = self.alignment.specs[name], self.holders.get(name)
        return (
            kind_of(name, spec.shape) if fused is not None and fused.experts else self.roles.kind(self._holder(name), spec.shape)
        )

    # At one place.

    def site(self, name: str, start: int = 0, tasks: tuple[str, ...] | None = None) -> Site:
        """Where the parts act, without what must be read."""
        spec = self.alignment.specs[name]
        return Site(
            name=name,
            stored=self._holder(name),
            shape=spec.shape,
            kind=self._kind(name),
            layer=self.roles.layer(self._holder(name), spec.shape),
            tasks=self.tasks if tasks is None else tasks,
            seed=self.seed,
            start=start,
            row_elements=spec.row_elements,
        )

    def site_at(self, window: Window, start: int, stop: int, tasks: tuple[str, ...] | None = None) -> Site:
        """The same with the base's rows and the evidence, where the chain needs them."""
        site = self.site(window.name, start, tasks)
        if not self.chain.needs_base and not self.evidence:
            return site
        base = self.base(window, start, stop) if self.chain.needs_base else None
        return Site(**{**site.__dict__, "base": base, "evidence": self._evidence_at(window, start, stop, site.tasks)})

    def base(self, window: Window, start: int, stop: int) -> Tensor:
        """The base's rows, in the dtype of the arithmetic."""
        assert self.reference is not None
        name = self.alignment.maps[self.reference.key][window.name]
        return self.reading.rows(self.alignment.seen(self.reference), name, window, start, stop).to(self.reading.dtype)

    def _evidence_at(self, window: Window, start: int, stop: int, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        spec, found = self.alignment.specs[window.name], {}
        for kind, given in self.evidence.items():
            mine = [one for task, one in zip(self.tasks, given, strict=True) if task in tasks]
            if self.chain.forms[kind] == "entries":
                out = torch.empty((len(mine), stop - start, *spec.shape[1:]), dtype=self.evidence_reading.dtype)
                for row, one in zip(out, mine, strict=True):
                    self.evidence_reading.evaluate(one, window, start, stop, row)
                found[kind] = out
            else:  # a matrix of its inputs or outputs: as a whole
                terms = [self.evidence_reading.terms(one, window.name)[0] for one in mine]
                found[kind] = torch.stack([weight * source.read(theirs).float() for weight, source, theirs in terms])
        return found

    def _told(self, name: str) -> bool:
        """Whether every kind of evidence has this tensor, of every task."""
        return all(self.evidence_reading.terms(one, name) for given in self.evidence.values() for one in given)

    def _speaks(self, stored: str) -> bool:
        """The same of a stored tensor, of any matrix in it."""
        fused = self.layouts.fused.get(stored)
        return any(self._told(name) for name in (fused.pieces if fused is not None else (stored,)))

    def _shape(self, one: Combination, name: str) -> tuple[int, ...]:
        _, source, theirs = self.evidence_reading.terms(one, name)[0]
        return source.specs[theirs].shape

    def _check_evidence(self) -> None:
        """Evidence must have the shape that its form gives it at each tensor.

        Raises:
            AlignmentError: it has not.
        """
        for kind, given in self.evidence.items():
            form = self.chain.forms[kind]
            for name in self.selected:
                want = evidence_shape(form, self.alignment.specs[name].shape)
                for task, one in zip(self.tasks, given, strict=True):
                    got = self._shape(one, name)
                    if got != want:
                        _, source, theirs = self.evidence_reading.terms(one, name)[0]
                        due = f"{list(want)} is needed" if want is not None else "a tensor of one dimension has no such evidence"
                        raise AlignmentError(
                            f"{source.specs[theirs].file}: the evidence `{kind}` of {task} has shape {list(got)} at {name!r}, where "
                            f"{due}. It was collected from another model: collect it again."
                        )

    def matrices_of_evidence(self, name: str) -> int:
        """Elements of one task's evidence at a tensor that is not read by rows, over all kinds."""
        shapes = [
            evidence_shape(form, self.alignment.specs[name].shape)
            for kind, form in self.chain.forms.items()
            if kind in self.evidence and form != "entries"
        ]
        return sum(prod(shape) for shape in shapes if shape is not None)

    def matrix(self, name: str) -> tuple[int, int]:
        """`[d_out, d_in]` of a logical matrix; more than two dimensions are flattened."""
        spec = self.alignment.specs[name]
        return spec.rows, spec.row_elements

    # What it takes.

    def readers(self, name: str) -> list[tuple[Source, str]]:
        """The sources of which this tensor is read, and its name in each; evidence comes last."""
        held = [(source, self.alignment.maps[source.key].get(name)) for source in self._read(name)]
        if name in self.chosen:
            maps = self.evidence_reading.alignment.maps
            held += [(source, maps[source.key].get(name)) for source in self.testimony]
        return [(self.alignment.seen(source), theirs) for source, theirs in held if theirs is not None]

    def _read(self, name: str) -> list[Source]:
        """All sources; without the base where models are merged and nothing asks for it."""
        if not self.chain.models or self.chain.needs_base or name not in self.chosen:
            return self.sources
        used = {source.key for vector in self.vectors for source in vector.sources()}
        return [source for source in self.sources if source.key in used]

    def other_bases(self, base: Source | None) -> list[str]:
        """A sentence for each task vector that is a difference from another model than this base."""
        if base is None:
            return []
        theirs = [(task, v.reference) for task, v in zip(self.tasks, self.vectors, strict=True) if v.reference is not None]
        return [
            f"{task}: this task vector was taken from another base, {other.label}, than {base.label} (their fingerprints differ)."
            for task, other in theirs
            if other.key != base.key and other.fingerprint() != base.fingerprint()
        ]

    def strangers(self) -> list[str]:
        """A sentence for each model that is no relative of the base, or of the first of them."""
        models = {task: one.terms[0][1] for task, one in zip(self.tasks, self.vectors, strict=True) if len(one.terms) == 1}
        assert self.reference is not None
        others = {task: model for task, model in models.items() if task != BASE}
        return strangers(others, self.reference, self.reference.label, self.stored.maps)

    def foreign_evidence(self) -> list[str]:
        """A sentence for each piece of evidence that was collected from another model than the one that is merged."""
        said = []
        for kind, given in self.evidence.items():
            for task, vector, one in zip(self.tasks, self.vectors, given, strict=True):
                known = {source.fingerprint() for weight, source in vector.terms if weight > 0}
                for source in one.sources():
                    collected = source.metadata.get("thetau.weights")
                    if collected and collected not in known:
                        said.append(
                            f"{source.label}: the evidence `{kind}` of {task} was collected from another model than the one that is merged "
                            "(their fingerprints differ)."
                        )
        return said


def _evidence(evidence: Evidence, needs: Sequence[str], tasks: Sequence[str], label: str) -> dict[str, list[Combination]]:
    """By kind, in the order of the tasks.

    Raises:
        RecipeError: all that is missing, or not asked for.
    """
    problems = [
        f"{label} needs the evidence `{kind}`, a file for each task. `thetau evidence {kind}` collects it."
        for kind in needs
        if kind not in evidence
    ]
    problems += [
        f"no part needs the evidence `{kind}`.{nearest(kind, needs)} Leave it out." for kind in evidence if kind not in needs
    ]
    for kind in needs:
        given = evidence.get(kind, {})
        if kind in evidence:
            problems += [f"{kind}: none for the task {task!r}." for task in tasks if task not in given]
            problems += [
                f"{kind}: {name!r} is not a task.{nearest(name, tasks)} Tasks: {', '.join(tasks)}."
                for name in given
                if name not in tasks
            ]
    problems += [
        f"{kind}: the file of {task}, {source.label}, holds evidence of the kind `{held}`. Give the one that `thetau evidence {kind}` collects."
        for kind in needs
        for task, one in evidence.get(kind, {}).items()
        for source in one.sources()
        if (held := source.metadata.get("thetau.evidence", kind)) != kind
    ]
    if problems:
        raise RecipeError(problems, "evidence")
    return {kind: [evidence[kind][task] for task in tasks] for kind in needs}


def _models(tasks: Mapping[str, Combination], reference: Source, *, with_base: bool) -> dict[str, Combination]:
    """The models that task vectors belong to; what is a model already stays as it is."""
    base = Combination(((1.0, reference),), reference=reference)
    found = {name: one if one.is_model else one + base for name, one in tasks.items()}
    return {BASE: base, **found} if with_base else found


def _union(vectors: Sequence[Combination]) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for vector in vectors:
        for name, spec in vector.specs().items():
            found.setdefault(name, spec)
    return found
