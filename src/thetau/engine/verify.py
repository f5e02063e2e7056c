"""Checking a written output, any time later: what its `thetau.json` says against what the files hold."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint import Dtype, Source, dtype_name, open_source
from thetau.checkpoint.naming import is_variance
from thetau.checkpoint.safetensors import read_text
from thetau.engine.executor import Engine
from thetau.engine.save import Output
from thetau.engine.window import windows
from thetau.engine.work import Call
from thetau.errors import CheckpointError
from thetau.plan import Step
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor


# Some bits of a number, and what they are where it is NaN or infinite; the 4-bit floats are always finite.
_NOT_FINITE = {
    Dtype.F64: (0x7FF << 52, 0x7FF << 52),
    Dtype.F32: (0x7F800000, 0x7F800000),
    Dtype.BF16: (0x7F80, 0x7F80),
    Dtype.F16: (0x7C00, 0x7C00),
    Dtype.F8_E5M2: (0x7C, 0x7C),
    Dtype.F8_E4M3: (0x7F, 0x7F),
    Dtype.F8_E5M2FNUZ: (0xFF, 0x80),
    Dtype.F8_E4M3FNUZ: (0xFF, 0x80),
    Dtype.F8_E8M0: (0xFF, 0xFF),
}


@dataclass(frozen=True)
class Verification:
    """How many tensors and bytes were read, and everything that is wrong; `against` names what they were compared with."""

    path: Path
    tensors: int
    nbytes: int
    against: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: Path, *, engine: Engine, again: Combination | None = None, recipe: Mapping[str, Any] | None = None
) -> Verification:
    """Read every tensor of an output: there, of the recorded shape, dtype and checksum, and finite.

    `recipe`, resolved as a run would, must be the recorded one; `again` is what the recipe describes, which is computed once more and
    compared bit for bit.

    Raises:
        CheckpointError: the output cannot be opened at all, or says nothing of how it was made.
    """
    source = open_source(path).as_stored()
    record = read_record(path) if path.is_dir() else {}
    recorded: Mapping[str, Any] = record.get("tensors", {})
    problems: list[str] = []
    against = []
    if recorded:
        against.append("thetau.json")
        problems += _differences(source, recorded)
    if recipe is not None:
        against.append("the recipe")
        problems += _other_recipe(record.get("recipe", {}), recipe)
    steps = [Step(name, spec.nbytes, 3 * min(spec.nbytes, 4 * engine.window), by="copy") for name, spec in source.specs.items()]

    def look(step: Step) -> tuple[int, int, int]:
        spec, crc, lost, below = source.specs[step.name], 0, 0, 0
        for start, stop in windows(spec, engine.window):
            raw = source.raw(step.name, start, stop)
            crc, lost = zlib.crc32(raw, crc), lost + not_finite(raw, spec.dtype)
            if source.degree == 1 and is_variance(step.name):
                below += int((source.read(step.name, start, stop) < 0).sum())
        return crc, lost, below

    sums: dict[str, int] = {}
    for step, (crc, lost, below) in engine.run(steps, Call(look), "Verifying"):
        sums[step.name] = crc
        if lost:
            problems.append(f"{step.name!r}: {lost} values are not finite.")
        if below:
            problems.append(f"{step.name!r}: {below} variances are negative; the model would give NaN.")
        if recorded.get(step.name, {}).get("crc32", crc) != crc:
            problems.append(f"{step.name!r}: its bytes are not those that were written.")
    if again is not None:
        against.append("a new run")
        problems += _run_again(again, record, source, sums, engine)
    nbytes = sum(step.read for step in steps)
    return Verification(path, len(steps), nbytes, tuple(against), tuple(problems))


def read_record(path: Path) -> dict[str, Any]:
    """An output's `thetau.json`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = path / "thetau.json"
    if not file.exists():
        raise CheckpointError(f"{path}: has no thetau.json, so nothing says how it was made. Give an output of `thetau merge`.")
    try:
        record = json.loads(read_text(file))
        tensors = record["tensors"]
        good = isinstance(tensors, dict) and all(
            isinstance(one, dict) and {"dtype", "shape", "crc32"} <= set(one) for one in tensors.values()
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged, or written by a version that kept no checksums ({error}).") from error
    if not good:
        raise CheckpointError(f"{file}: damaged: `tensors` must give a dtype, a shape and a checksum for each tensor.")
    return dict(record)


def _differences(source: Source, recorded: Mapping[str, Any]) -> list[str]:
    problems = [f"{name!r}: is missing." for name in recorded if name not in source.specs]
    problems += [f"{name!r}: was not written by this run." for name in source.specs if name not in recorded]
    for name, spec in source.specs.items():
        want = recorded.get(name)
        got = {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape)}
        if want is not None and any(want[key] != value for key, value in got.items()):
            problems.append(f"{name!r}: is {got['dtype']} {got['shape']}; {want['dtype']} {want['shape']} was written.")
    return problems


def _other_recipe(recorded: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    keys = sorted({*recorded, *recipe})
    return [
        f"recipe: `{key}` is {recipe.get(key)!r} here; the output was made with {recorded.get(key)!r}."
        for key in keys
        if recorded.get(key) != recipe.get(key)
    ]


def _run_again(
    again: Combination, record: Mapping[str, Any], source: Source, sums: Mapping[str, int], engine: Engine
) -> list[str]:
    problems = []
    before = {entry["path"]: entry["fingerprint"] for entry in record.get("inputs", []) if isinstance(entry, dict)}
    output = Output.plan(again, quantise=record.get("recipe", {}).get("quantise"))
    output.fetch(engine)
    problems += [
        f"{leaf.label}: this input has changed since the output was made."
        for leaf in output.leaves()
        if before.get(leaf.label, leaf.fingerprint()) != leaf.fingerprint()
    ]
    output = output.typed({name: spec.dtype for name, spec in source.specs.items() if name not in output.coded})
    output.prepare()

    def compute(step: Step) -> dict[str, int]:
        found = dict.fromkeys(output.stored_as(step.name), 0)
        for part, _, rows in output.pieces(step.name, engine):
            found[part] = _crc(rows, found[part])
        return found

    missing = [name for name in output.stored if name not in sums]
    problems += [f"{name!r}: a new run writes it; the output does not hold it." for name in missing]
    steps = [step for step in output.walk(engine).steps if all(part in sums for part in output.stored_as(step.name))]
    for _, found in engine.run(steps, Call(compute), "Computing again"):
        problems += [f"{part!r}: a new run gives other bits." for part, crc in found.items() if crc != sums[part]]
    return problems


def _crc(rows: Tensor, crc: int) -> int:
    raw = rows.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().data, crc) if raw.numel() else crc


def not_finite(raw: memoryview, dtype: Dtype) -> int:
    """How many numbers of stored bytes are NaN or infinite."""
    if dtype not in _NOT_FINITE:
        return 0
    mask, value = _NOT_FINITE[dtype]
    bits = np.frombuffer(raw, f"<u{dtype.itemsize}")
    return int(np.count_nonzero((bits & bits.dtype.type(mask)) == value))
