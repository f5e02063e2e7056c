"""Elementwise chains as programs for the compiled inner loop (`kernels.c`).

A chain runs there when each of its parts says what it is (`compiles`, `program`), every input is a stored safetensors tensor in float32, bfloat16
or float16, and each task vector is a model, or a model minus one base. Everything else takes the torch path, which gives the same bits
and is what runs where no compiler was at hand.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thetau._lazy import numpy as np
from thetau.checkpoint import Alignment, Dtype, Source, Spec, dtype_name
from thetau.engine.guard import refuse_nonfinite
from thetau.errors import CheckpointError, OutputError
from thetau.parts import Op
from thetau.vectors import Combination

DTYPES = {Dtype.F32: 0, Dtype.BF16: 1, Dtype.F16: 2}
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
FORM = 3  # of operations and their arguments, as the loop was built
INDEX_BITS = 31  # a run does not cross a multiple of 2³¹ elements: the index's upper part is in the random keys

CODES = {
    "drop": 1,
    "trim": 2,
    "elect": 3,
    "disentangle": 4,
    "sum": 5,
    "mean": 6,
    "disjoint_mean": 7,
    "scale": 8,
    "band": 9,
    "weigh": 10,
    "rank_drop": 11,
    "clip": 12,
}
STATISTICS = {"none": 0, "upper": 1, "lower": 2, "gram": 3, "inside": 4}


class _Op(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_int32),
        ("value", ctypes.c_float),
        ("by_task", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        ("sources", ctypes.c_int32),
        ("tasks", ctypes.c_int32),
        ("ops", ctypes.c_int32),
        ("statistic", ctypes.c_int32),
        ("fds", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("model", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("program", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("ground", ctypes.c_int32),
        ("out_fd", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("out_offset", ctypes.c_int64),
        ("squares", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("above", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("cuts", ctypes.c_int64),
        ("bins", ctypes.c_int64),
        ("gram", ctypes.c_void_p),
        ("failed", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("overflow", ctypes.c_int64),
    )


def _library() -> Any:
    if os.environ.get("THETAU_KERNELS", "1") == "0":
        return None
    try:
        from thetau.engine import _kernels  # type: ignore[attr-defined]
    except ImportError:
        return None
    library = ctypes.CDLL(_kernels.__file__)
    try:
        form = ctypes.c_int.in_dll(library, "thetau_form").value
    except ValueError:
        form = 1
    if form != FORM:  # built from other sources: its operations would read other arguments
        return None
    library.thetau_run.argtypes = [ctypes.c_void_p]
    library.thetau_run.restype = ctypes.c_int
    return library


_LIBRARY = _library()


def available() -> bool:
    """Whether the compiled loop is there (`THETAU_KERNELS=0` switches it off)."""
    return _LIBRARY is not None


@dataclass(frozen=True)
class Inputs:
    """One tensor's stored inputs: where each source's elements begin, and which of them make up each task vector."""

    spec: Spec
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    model: tuple[int, ...]
    base: tuple[int, ...]
    ground: int

    @property
    def nbytes(self) -> int:
        """Bytes read in one pass."""
        return sum(source.specs[name].nbytes for source, name in zip(self.sources, self.names, strict=True))


def inputs(alignment: Alignment, vectors: Sequence[Combination], name: str, ground: Source | None) -> Inputs | None:
    """The stored inputs of one tensor, or None where they are not of the form that the compiled loop takes."""
    if _LIBRARY is None:
        return None
    found: dict[tuple[str, str], int] = {}
    sources: list[Source] = []
    names: list[str] = []

    def place(source: Source) -> int | None:
        theirs, source = alignment.maps[source.key].get(name), alignment.seen(source)
        if theirs is None or source.specs[theirs].dtype not in DTYPES or not source.has_place(theirs):
            return None
        key = (source.key, theirs)
        if key not in found:
            found[key] = len(sources)
            sources.append(source)
            names.append(theirs)
        return found[key]

    model, base = [], []
    for vector in vectors:
        plus = [source for weight, source in vector.terms if weight == 1]
        minus = [source for weight, source in vector.terms if weight == -1]
        if len(plus) != 1 or len(minus) > 1 or len(vector.terms) != len(plus) + len(minus):
            return None
        at = place(plus[0])
        below = place(minus[0]) if minus else -1
        if at is None or below is None:
            return None
        model.append(at)
        base.append(below)
    floor = place(ground) if ground is not None else -1
    if floor is None:
        return None
    return Inputs(alignment.specs[name], tuple(sources), tuple(names), tuple(model), tuple(base), floor)


@dataclass(frozen=True)
class Inside:
    """The bins of the upper bits inside which the lower ones are counted: so many from the first one on, by task and cut."""

    first: Sequence[Sequence[int]]
    bins: int = 1


@dataclass
class Result:
    """What a run found: sums of squares by task and of the ground, and its statistic."""

    squares: np.ndarray[Any, np.dtype[np.float64]]
    counts: np.ndarray[Any, np.dtype[np.int64]] | None = None
    above: np.ndarray[Any, np.dtype[np.int64]] | None = None
    gram: np.ndarray[Any, np.dtype[np.float64]] | None = None

    @classmethod
    def empty(cls, tasks: int, statistic: str, inside: Inside | None = None) -> Result:
        """Zeros for what a statistic adds up: counts `[task, cut, place]`, those beyond the bins, or the Gram matrix's upper triangle."""
        cuts, places = (1, UPPER_BINS) if inside is None else (len(inside.first[0]), inside.bins * LOWER_BINS)
        return cls(
            np.zeros(tasks + 1),
            np.zeros((tasks, cuts, places), np.int64) if statistic in ("upper", "lower", "inside") else None,
            np.zeros((tasks, cuts), np.int64) if statistic == "inside" else None,
            np.zeros((tasks, tasks)) if statistic == "gram" else None,
        )


@dataclass(frozen=True)
class Sink:
    """Where results go: an open file, the byte of the tensor's first element, and the dtype."""

    fd: int
    offset: int
    dtype: Dtype


def run(
    found: Inputs,
    ops: Sequence[Op],
    first: int,
    count: int,
    *,
    into: Result,
    sink: Sink | None = None,
    statistic: str = "none",
    inside: Inside | None = None,
) -> None:
    """Run a program over `count` elements from `first`, writing to `sink` or adding a statistic to `into`.

    Raises:
        CheckpointError: an input could not be read.
        OSError: the output could not be written.
        OutputError: a value does not fit the output's dtype.
    """
    assert _LIBRARY is not None
    tasks = len(found.model)
    result = into
    held: list[Any] = []

    def array(values: Any, dtype: Any) -> int | None:
        made = np.asarray(values, dtype)
        held.append(made)
        return int(made.ctypes.data) if made.size else None

    program = (_Op * max(1, len(ops)))()
    for index, op in enumerate(ops):
        program[index] = _Op(
            CODES[op.code],
            op.value,
            array(op.by_task, np.float32),
            array(np.asarray(op.keys, np.int64).astype(np.int32), np.int32),  # unsigned ones keep their bits
        )
    places = [place for source, name in zip(found.sources, found.names, strict=True) if (place := source.place(name)) is not None]
    dtypes = [source.specs[name].dtype for source, name in zip(found.sources, found.names, strict=True)]
    starts = [offset + first * dtype.itemsize for (_, offset), dtype in zip(places, dtypes, strict=True)]
    work = _Run(
        sources=len(found.sources),
        tasks=tasks,
        ops=len(ops),
        statistic=STATISTICS[statistic],
        fds=array([fd for fd, _ in places], np.int32),
        dtypes=array([DTYPES[dtype] for dtype in dtypes], np.int32),
        offsets=array(starts, np.int64),
        model=array(found.model, np.int32),
        base=array(found.base, np.int32),
        program=ctypes.addressof(program),
        first=first,
        count=count,
        ground=found.ground,
        out_fd=sink.fd if sink else -1,
        out_dtype=DTYPES[sink.dtype] if sink else 0,
        out_offset=sink.offset + first * sink.dtype.itemsize if sink else 0,
        squares=int(result.squares.ctypes.data),
        counts=int(result.counts.ctypes.data) if result.counts is not None else None,
        above=int(result.above.ctypes.data) if result.above is not None else None,
        upper=array([] if inside is None else np.asarray(inside.first).ravel(), np.int32),
        cuts=0 if inside is None else len(inside.first[0]),
        bins=0 if inside is None else inside.bins,
        gram=int(result.gram.ctypes.data) if result.gram is not None else None,
    )
    status = _LIBRARY.thetau_run(ctypes.byref(work))
    if status:
        if work.failed >= 0:
            source, name = found.sources[work.failed], found.names[work.failed]
            why = os.strerror(work.error) if work.error else "the file ended early; it changed while it was read"
            raise CheckpointError(
                f"{source.specs[name].file}: reading tensor {name!r} failed: {why}. Restore it, then run again."
            )
        if sink is not None:
            raise OSError(work.error, os.strerror(work.error))
        raise MemoryError("the compiled loop could not get its buffers")
    if work.overflow and sink is not None:
        for source, name in zip(found.sources, found.names, strict=True):
            refuse_nonfinite(source, name)
        raise OutputError(
            f"{found.spec.name!r}: {work.overflow} values do not fit {dtype_name(sink.dtype)}. Choose another output dtype "
            "(`--dtype bfloat16` or `float32`). Nothing was written."
        )
