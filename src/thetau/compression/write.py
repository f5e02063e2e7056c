"""Writing a task vector in a compressed form: one streaming pass, or as many more as the form's exact cut takes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from thetau.checkpoint import Spec, Writer
from thetau.checkpoint.compressed import FORMAT, part
from thetau.checkpoint.disk import check_json
from thetau.compression.encode import Encoder, Loss, LowRankEncoder, PrecisionEncoder, Room, SparseEncoder, Windows
from thetau.compression.forms import Form, LowRank, Precision, Sparse
from thetau.engine.executor import Engine
from thetau.engine.measuring import measured
from thetau.engine.save import Output, changed_inputs, metadata_of, report_of
from thetau.engine.work import Call
from thetau.errors import CheckpointError, OutputError
from thetau.plan import Step
from thetau.transforms import Trim
from thetau.vectors import Combination
from thetau.vectors.combination import require_vector

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What was written, and what it costs.

    - `nbytes`: of the file, header included. `dense_bytes`: of all entries in float32, as `vector extract` writes them.
    - `elements`: entries of the vector. `kept`: numbers that are stored for them (of a product, those of U and V).
    - `error`: ‖τ − τ̂‖ / ‖τ‖, over all and in the `worst` tensor; of what is read back, so rounding counts. 0 for a zero vector.
    """

    path: Path
    form: str
    tensors: int
    elements: int
    kept: int
    nbytes: int
    dense_bytes: int
    error: float
    worst: str
    worst_error: float
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Numbers stored for each entry."""
        return self.kept / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path), "density": self.density}


def compress(
    vector: Combination,
    path: str | Path,
    form: Form,
    *,
    engine: Engine | None = None,
    exclude: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Compressed:
    """Write a task vector in less room, as one safetensors file that `thetau.open` reads as any other task vector.

    Args:
        vector: `model - base`, an adapter over its base, a saved or merged vector, or a sum of these.
        path: must be new and end in `.safetensors`. The file is whole or not there.
        form: `Sparse`, `LowRank` or `Precision`.
        engine: workers, memory budget, progress; the work is done on this machine.
        exclude: shell-style patterns of tensors that are left out, which then do not change.
        provenance: what the file says of how the vector was made; by default its expression.

    Raises:
        AlignmentError: it is no task vector, or its parts do not fit.
        CheckpointError: an input is damaged, changed meanwhile, or holds NaN or infinite values.
        OutputError: the path is taken or cannot be written, or a value does not fit the dtype.

    Examples:
        >>> import thetau
        >>> base = thetau.open("base")
        >>> told = compress(thetau.open("sst2") - base, "sst2-half.safetensors", thetau.Sparse(density=0.5))
        >>> round(told.density, 2), round(told.kept / told.elements, 2)
        (0.5, 0.5)
        >>> thetau.open("sst2-half.safetensors").norm() < (thetau.open("sst2") - base).norm()
        True
    """
    target = Path(path)
    require_vector(vector, "Compressing")
    check_json(dict(provenance or {}), target, "provenance")
    if target.suffix != ".safetensors":
        raise OutputError(f"{target}: a compressed task vector is one file, whose name ends in .safetensors. Give such a name.")
    engine = replace(engine or Engine(), executor="local")
    output = Output.plan(vector, exclude=exclude)
    output.prepare()
    encoder = _encoder(form, vector, engine, exclude)
    steps = [_step(step, output.specs[step.name], encoder) for step in output.walk(engine).steps]
    engine.check(steps, "Compressing")

    def windows(name: str) -> Windows:
        return output.rows(name, engine)

    def room(step: Step) -> Room:
        return encoder.room(output.specs[step.name], windows(step.name) if encoder.looks else ())

    counted = engine.run(steps, Call(room), "Counting") if encoder.looks else ((step, room(step)) for step in steps)
    rooms = {step.name: found for step, found in counted}
    specs = {
        part(which, name): Spec(name=part(which, name), shape=shape, dtype=dtype, file=str(target))
        for name, one in rooms.items()
        for which, (shape, dtype) in one.parts.items()
    }
    metadata = _metadata(vector, form, rooms, output.specs, provenance)
    with Writer(target, specs, metadata, run=hashlib.sha256(json.dumps(metadata).encode()).hexdigest()) as writer:

        def put(name: str) -> Callable[[str, int, Tensor], None]:
            return lambda which, start, rows: writer.write(part(which, name), start, rows)

        def encode(step: Step) -> Loss:
            return encoder.encode(output.specs[step.name], rooms[step.name], lambda: windows(step.name), put(step.name))

        losses = {step.name: loss for step, loss in engine.run(steps, Call(encode), "Writing")}
        moved = changed_inputs(vector)
        if moved:
            raise CheckpointError(
                f"{moved[0]}: changed while it was read ({len(moved)} files did). Nothing was written: run again when it is at rest."
            )
        writer.commit(copy_from=None, files={})
    said = report_of(output, target, vector.reference)
    errors = {name: _ratio(loss.error, loss.square) for name, loss in losses.items()}
    worst = max(errors, key=lambda name: (errors[name], name), default="")
    elements = sum(output.specs[name].elements for name in rooms)
    return Compressed(
        path=target,
        form=describe(form),
        tensors=len(rooms),
        elements=elements,
        kept=sum(loss.kept for loss in losses.values()),
        nbytes=target.stat().st_size,
        dense_bytes=4 * elements,
        error=_ratio(math.fsum(loss.error for loss in losses.values()), math.fsum(loss.square for loss in losses.values())),
        worst=worst,
        worst_error=errors.get(worst, 0.0),
        notes=said.notes,
        warnings=said.warnings,
    )


def describe(form: Form) -> str:
    """A form in a few words."""
    match form:
        case Sparse(density=None):
            return f"sparse, all that is not zero, {form.dtype}"
        case Sparse():
            return f"sparse, density {form.density:g} of the {form.scope}, {form.dtype}"
        case LowRank():
            return f"low rank, {form.rank if isinstance(form.rank, int) else 'by pattern'}, {form.dtype}"
        case Precision():
            return form.dtype


def _encoder(form: Form, vector: Combination, engine: Engine, exclude: Sequence[str]) -> Encoder:
    match form:
        case LowRank():
            return LowRankEncoder(form)
        case Precision():
            return PrecisionEncoder(form)
        case Sparse():
            if form.density is None or form.density >= 1:
                return SparseEncoder(form.values, lambda name, start, rows: rows)
            trim = Trim(density=form.density, scope=form.scope)
            cuts = trim.requires()
            assert cuts is not None  # the density is below 1
            result, merge = measured({"vector": vector}, cuts, label="compress", exclude=exclude, engine=engine)
            aligned, state = merge.aligned, trim.prepare(result, merge.tasks)

            def kept(name: str, start: int, rows: Tensor) -> Tensor:
                return trim.apply(rows[None], state, aligned.site(name, start))[0] if name in aligned.chosen else rows

            return SparseEncoder(form.values, kept)


def _step(step: Step, spec: Spec, encoder: Encoder) -> Step:
    return replace(step, memory=step.memory + encoder.memory(spec))


def _metadata(
    vector: Combination,
    form: Form,
    rooms: Mapping[str, Room],
    specs: Mapping[str, Spec],
    provenance: Mapping[str, Any] | None,
) -> dict[str, str]:
    name = {Sparse: "sparse", LowRank: "low_rank", Precision: "quantised"}[type(form)]
    table = {tensor: {"kind": room.kind, "shape": list(specs[tensor].shape)} for tensor, room in rooms.items()}
    metadata = metadata_of(vector, dict(provenance or {"expression": vector.label}))
    metadata |= {"thetau.form": name, "thetau.format": str(FORMAT), "thetau.tensors": json.dumps(table, separators=(",", ":"))}
    metadata["thetau.compression"] = json.dumps(asdict(form), separators=(",", ":"))
    if isinstance(form, Sparse):
        elements = sum(specs[tensor].elements for tensor in rooms)
        kept = sum(room.values[0][0] for room in rooms.values())
        metadata["thetau.density"] = repr(kept / elements if elements else 0.0)
    return metadata


def _ratio(error: float, square: float) -> float:
    return math.sqrt(error / square) if square else 0.0
