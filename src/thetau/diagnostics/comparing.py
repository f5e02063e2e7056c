"""Two models, tensor by tensor: how far apart, in which direction, where most; and whether a model is what a recipe gives.

Nothing needs to fit: tensors that only one of them has, or that have other shapes, are listed, and the others are compared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint import Roles, Spec, dtype_name
from thetau.checkpoint.window import Window
from thetau.diagnostics.beside import Beside, compare_beside
from thetau.diagnostics.comparison import Comparison, Misfit, Part, TensorPair, TokenRow, some
from thetau.diagnostics.fitting import Shared, root_of, share, stored_as, unlike
from thetau.diagnostics.spectra import directions, fits, working
from thetau.engine.executor import Engine
from thetau.engine.save import Output
from thetau.engine.window import Reading, blocks, windows
from thetau.engine.work import Call
from thetau.errors import AlignmentError
from thetau.facade import Expression
from thetau.plan import Step
from thetau.random import stream
from thetau.recipes.mergekit.tokens import embedding_rows, is_vocabulary
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10  # rows of a vocabulary that are kept
WIDE = 64  # bytes an entry of a window: the sides, their differences, and sums in float64


def compare(
    a: Expression,
    b: Expression,
    *,
    base: Expression | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Comparison:
    """One streaming pass over two models, or two task vectors, and the base that cosines are taken from.

    Raises:
        AlignmentError: they have no tensor in common, or one is a model and the other a task vector.

    Examples:
        >>> import thetau
        >>> found = compare(thetau.open("a"), thetau.open("b"), base=thetau.open("base"))
        >>> found.tensors[0].name, abs(found.cosine) < 0.1
        ('embeddings.word_embeddings.weight', True)
    """
    if a.is_model != b.is_model:
        raise AlignmentError(
            f"{a.label} is a {'model' if a.is_model else 'task vector'} and {b.label} is not: give two models, or two task vectors."
        )
    engine = engine or Engine()
    specs = a.specs()
    shared = share(specs, root_of(a), [*a.sources(), *b.sources()], base, exclude)
    only_b = unlike(b, shared, exclude)
    side = _Read(Reading(shared.alignment, [a, b]), b, engine)
    beside, common = compare_beside(root_of(a), root_of(b))
    return _compared(a, side, base, shared, only_b, engine, beside=beside, common=common, label=b.label)


def compare_with(
    a: Expression,
    expression: Expression,
    *,
    label: str,
    base: Expression | None = None,
    engine: Engine | None = None,
) -> Comparison:
    """A model beside what an expression gives, computed and rounded as `save` would: whether a merged model is what a recipe says.

    Raises:
        AlignmentError: the expression's parts do not fit each other.
        CheckpointError: an input is damaged.
    """
    engine = engine or Engine()
    output = Output.plan(expression)
    output.fetch(engine)
    reference = expression.reference or expression.sources()[0]
    shared = share(output.specs, reference, a.sources(), base, ())
    shared.misfits = [Misfit(name=one.name, shape_a=one.shape_b, shape_b=one.shape_a) for one in shared.misfits]
    stored = {name: stored_as(a, shared, name) for name in shared.alignment.names}
    output = output.typed({name: spec.dtype for name, spec in stored.items() if spec is not None})
    output.prepare()
    missing, shared.missing = shared.missing, unlike(a, shared, ())
    return _compared(a, _Made(output, engine), base, shared, missing, engine, beside=None, common={}, label=label)


class _Side(ABC):
    """What a model is compared with: its tensors' rows, window by window. `recipe`: whether they are computed from one."""

    recipe = False
    combinations: tuple[Combination, ...] = ()  # those that are read beside the model

    @abstractmethod
    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """`(first row, rows)` of a tensor; a 0-d tensor has shape `[1]`."""

    @abstractmethod
    def cost(self, name: str) -> tuple[int, int]:
        """Bytes read, and memory."""

    @abstractmethod
    def spec(self, shared: Shared, name: str) -> Spec:
        """The tensor as it is there."""

    @abstractmethod
    def integers(self, shared: Shared, name: str) -> Tensor:
        """A tensor that is no float."""


class _Read(_Side):
    def __init__(self, reading: Reading, combination: Combination, engine: Engine) -> None:
        self.reading, self.combination, self.engine = reading, combination, engine
        self.combinations = (combination,)

    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        spec = self.reading.alignment.specs[name]
        for low, high in windows(spec, self.engine.reach(4)):
            yield low, evaluated(self.reading, self.combination, name, low, high)

    def cost(self, name: str) -> tuple[int, int]:
        spec = self.reading.alignment.specs[name]
        return sum(source.specs[theirs].nbytes for _, source, theirs in self.reading.terms(self.combination, name)), spec.nbytes

    def spec(self, shared: Shared, name: str) -> Spec:
        return stored_as(self.combination, shared, name) or shared.alignment.specs[name]

    def integers(self, shared: Shared, name: str) -> Tensor:
        return _integers(self.combination, shared, name)


class _Made(_Side):
    recipe = True

    def __init__(self, output: Output, engine: Engine) -> None:
        self.output, self.engine = output, engine
        self.steps = {step.name: step for step in output.walk(engine).steps}

    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        yield from self.output.rows(name, self.engine)

    def cost(self, name: str) -> tuple[int, int]:
        return self.steps[name].read, self.steps[name].memory

    def spec(self, shared: Shared, name: str) -> Spec:
        return self.output.specs[name]

    def integers(self, shared: Shared, name: str) -> Tensor:
        return torch.cat([rows for _, rows in self.rows(name)])


def evaluated(reading: Reading, combination: Combination, name: str, low: int, high: int) -> Tensor:
    """Rows of a combination, in the dtype of the arithmetic; a 0-d tensor has shape `[1]`."""
    spec = reading.alignment.specs[name]
    window = Window(name, low, high)
    rows = torch.empty((high - low, *spec.shape[1:]), dtype=reading.dtype)
    for start, stop in blocks(spec, low, high):
        reading.evaluate(combination, window, start, stop, rows[start - low : stop - low])
    return rows


@dataclass
class _Sums:
    """What is added up over the windows of a tensor, in float64."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    square: float = 0.0
    pp: float = 0.0
    qq: float = 0.0
    pq: float = 0.0
    changed: int = 0
    beyond: int = 0
    broken: int = 0
    largest: float = 0.0
    place: int = 0
    distances: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)

    def take(self, a: Tensor, b: Tensor, first: int, step: float, by_row: bool) -> Tensor:
        """Add a window; its difference b − a is given back."""
        x, y = a.double(), b.double()
        unlike = (x != y) & ~(x.isnan() & y.isnan())
        self.changed += int(unlike.sum())
        broken = int((~(x.isfinite() & y.isfinite())).sum())
        self.broken += broken
        gap = y - x
        size = gap.abs().nan_to_num(nan=0.0, posinf=0.0)
        if size.numel():
            top, place = size.reshape(-1).max(0)
            if float(top) > self.largest:
                self.largest, self.place = float(top), first + int(place)
        self.beyond += int((size > step * torch.maximum(x.abs(), y.abs())).sum())
        if not broken:
            self.aa += float(x.square().sum())
            self.bb += float(y.square().sum())
            self.ab += float((x * y).sum())
            self.square += float(gap.square().sum())
        if by_row:
            self.distances.append(gap.square().sum(1).sqrt())
            self.lengths.append(x.square().sum(1).sqrt())
        return gap

    def based(self, a: Tensor, b: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Add the same window's differences to the base."""
        p, q = a.double() - base.double(), b.double() - base.double()
        if not self.broken:
            self.pp += float(p.square().sum())
            self.qq += float(q.square().sum())
            self.pq += float((p * q).sum())
        return p, q


def _cosine(ab: float, aa: float, bb: float) -> float | None:
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else None


def _compared(
    a: Expression,
    side: _Side,
    base: Expression | None,
    shared: Shared,
    only_b: Sequence[str],
    engine: Engine,
    *,
    beside: Beside | None,
    common: Mapping[str, tuple[int, int]],
    label: str,
) -> Comparison:
    alignment = shared.alignment
    given = [a] if base is None else [a, base]
    reading = Reading(alignment, [*given, *side.combinations])
    roles = Roles.of(root_of(a))
    tokens = {here: token for token, (here, _) in common.items()}
    vocabulary = embedding_rows(root_of(a), {}) or 0
    notes = list(shared.notes)
    steps, shortened = [], []
    for name in alignment.names:
        spec = alignment.specs[name]
        read, memory = side.cost(name)
        window = min(spec.elements, engine.reach(4)) * WIDE
        read += sum(source.specs[one].nbytes for part in given for _, source, one in reading.terms(part, name))
        whole = (4 * spec.elements * (3 if base is not None else 1) + working(spec.shape)) if fits(spec.shape) else 0
        if memory + window + whole > engine.max_memory:
            shortened.append(name)
            whole = 0
        steps.append(Step(name, read, memory + window + whole))
    short = frozenset(shortened)
    if short:
        notes.append(
            f"{len(short)} matrices are larger than the memory budget allows to decompose; their directions are not counted: {some(shortened)}."
        )

    def has_base(name: str) -> bool:
        return base is not None and all(name in alignment.maps[source.key] for source in base.sources())

    def look(step: Step) -> TensorPair:
        name = step.name
        spec = alignment.specs[name]
        rows_of = len(spec.shape) == 2 and vocabulary > 0 and is_vocabulary(name, spec.shape, vocabulary)
        mine, other = stored_as(a, shared, name) or spec, side.spec(shared, name)
        precision = max(torch.finfo(one.torch).eps for one in (mine.dtype, other.dtype) if one.is_floating_point)
        based = has_base(name)
        sums = _Sums()
        kept: dict[str, Tensor] = {}
        for low, b_rows in side.rows(name):
            high = low + (len(b_rows) if spec.shape else 1)
            a_rows = evaluated(reading, a, name, low, high)
            gap = sums.take(a_rows, b_rows, low * spec.row_elements, precision, rows_of)
            parts = {"difference": gap}
            if based and base is not None:
                parts["a"], parts["b"] = sums.based(a_rows, b_rows, evaluated(reading, base, name, low, high))
            if fits(spec.shape) and name not in short:
                for word, rows in parts.items():
                    kept.setdefault(word, torch.empty(spec.shape))[low:high] = rows
        good = sums.broken == 0
        based = based and math.isfinite(sums.pp) and math.isfinite(sums.qq)
        usable = ("difference", "a", "b") if based else ("difference",)
        counted = {word: directions(kept[word], stream("directions", name)) for word in usable if word in kept} if good else {}
        cosine = None
        if based:
            cosine = _cosine(sums.pq, sums.pp, sums.qq)
        elif base is None:
            cosine = _cosine(sums.ab, sums.aa, sums.bb)
        called = other.name if other.name != name else None
        distance = math.sqrt(sums.square) if good else None
        return TensorPair(
            name=name,
            other=called,
            kind=roles.kind(name, spec.shape).value,
            layer=roles.layer(name, spec.shape),
            shape=spec.shape,
            dtype_a=dtype_name(mine.dtype),
            dtype_b=dtype_name(other.dtype),
            norm_a=math.sqrt(sums.aa) if good else None,
            norm_b=math.sqrt(sums.bb) if good else None,
            distance=distance,
            relative=distance / math.sqrt(sums.aa) if distance is not None and sums.aa else None,
            cosine=cosine if good else None,
            shift_a=math.sqrt(sums.pp) if good and based else None,
            shift_b=math.sqrt(sums.qq) if good and based else None,
            changed=sums.changed,
            beyond=sums.beyond,
            largest=sums.largest,
            at=_place(sums.place, spec.shape) if sums.changed else (),
            directions=counted,
            rows=_moved(sums, tokens) if rows_of and good else (),
            not_finite=sums.broken,
        )

    found = tuple(row for _, row in engine.run(steps, Call(look), "Comparing"))
    lost = [one.name for one in found if one.shift_a is None and not one.not_finite and has_base(one.name)]
    if lost:
        notes.append(f"The base holds NaN or infinite values in {len(lost)} tensors, whose changes are not told: {some(lost)}.")
    everything = _sum(found, "whole", "", base is not None)
    norm_b = math.sqrt(math.fsum((one.norm_b or 0.0) ** 2 for one in found))
    return Comparison(
        a=a.label,
        b=label,
        base=base.label if base is not None else None,
        recipe=side.recipe,
        tensors=found,
        parts=(
            *_grouped(found, "kind", lambda one: one.kind, base is not None),
            *_grouped(found, "layer", _layer, base is not None),
        ),
        norm_a=everything.norm_a,
        norm_b=norm_b,
        distance=everything.distance,
        relative=everything.distance / everything.norm_a if everything.norm_a else None,
        cosine=everything.cosine,
        only_a=tuple(shared.missing),
        only_b=tuple(only_b),
        misfits=tuple(shared.misfits),
        buffers=tuple(_buffers(a, side, shared)),
        beside=beside,
        notes=tuple(dict.fromkeys(notes)),
    )


def _buffers(a: Expression, side: _Side, shared: Shared) -> list[str]:
    """The integer tensors that differ."""
    mine = ((name, _integers(a, shared, name)) for name in shared.buffers)
    return [name for name, value in mine if not torch.equal(value.reshape(-1), side.integers(shared, name).reshape(-1))]


def _integers(one: Combination, shared: Shared, name: str) -> Tensor:
    """A tensor that is no float, as the model itself has it."""
    source = root_of(one)
    return shared.alignment.seen(source).read(shared.alignment.maps[source.key][name])


def _place(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for side in reversed(shape):
        flat, rest = divmod(flat, side)
        place.append(rest)
    return tuple(reversed(place))


def _moved(sums: _Sums, tokens: Mapping[int, str]) -> tuple[TokenRow, ...]:
    distance, length = torch.cat(sums.distances), torch.cat(sums.lengths)
    top = distance.topk(min(SHOWN, len(distance)))
    return tuple(
        TokenRow(
            row=row,
            token=tokens.get(row),
            distance=far,
            relative=far / float(length[row]) if float(length[row]) else None,
        )
        for far, row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if far > 0
    )


def _layer(one: TensorPair) -> str:
    return "outside" if one.layer is None else str(one.layer)


def _grouped(found: Sequence[TensorPair], by: str, key: Callable[[TensorPair], str], based: bool) -> list[Part]:
    groups: dict[str, list[TensorPair]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return [_sum(members, by, name, based) for name, members in groups.items()]


def _sum(members: Sequence[TensorPair], by: str, name: str, based: bool) -> Part:
    """Squares add up; a cosine's product is what a tensor's cosine and its two lengths say."""
    good = [one for one in members if one.norm_a is not None]
    lengths = [(one.shift_a or 0.0, one.shift_b or 0.0) if based else (one.norm_a or 0.0, one.norm_b or 0.0) for one in good]
    product = math.fsum((one.cosine or 0.0) * x * y for one, (x, y) in zip(good, lengths, strict=True))
    xx, yy = (math.fsum(pair[i] ** 2 for pair in lengths) for i in (0, 1))
    return Part(
        by=by,
        name=name,
        tensors=len(members),
        parameters=sum(one.elements for one in members),
        norm_a=math.sqrt(math.fsum((one.norm_a or 0.0) ** 2 for one in good)),
        distance=math.sqrt(math.fsum((one.distance or 0.0) ** 2 for one in good)),
        cosine=_cosine(product, xx, yy),
        changed=sum(one.changed for one in members),
    )
