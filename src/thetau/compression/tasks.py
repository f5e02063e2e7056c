"""Several tasks in one file: a merged vector, and for each task the bits and the rescaler that make its own vector of it.

What TALL masks (Wang et al., ICML 2024, <https://arxiv.org/abs/2405.07813>) and EMR-Merging (Huang et al., NeurIPS 2024,
<https://arxiv.org/abs/2405.17461>) keep in place of K models: 32 + K bits an entry where K float32 vectors take 32 K.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from thetau._lazy import torch
from thetau.checkpoint import FLOATS, Dtype, Spec, Writer, dtype_name, open_store
from thetau.checkpoint.compressed import FORMAT, nbytes, part
from thetau.checkpoint.disk import check_json
from thetau.checkpoint.masked import FORM, layout_of
from thetau.checkpoint.window import Window
from thetau.compression.accounting import Storage, StorageRow, dense_row
from thetau.compression.encode import Bits, rounded
from thetau.compression.forms import DTYPES, Values
from thetau.engine.executor import Engine
from thetau.engine.merge import Merge
from thetau.engine.save import Output, changed_inputs, metadata_of, report_of
from thetau.engine.window import blocks, windows
from thetau.engine.work import Call
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError
from thetau.facade import Expression, merge
from thetau.fields import OneOf
from thetau.methods import name_of
from thetau.methods.masks import Masked
from thetau.parts import Method
from thetau.plan import Step
from thetau.sums import masked
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True, kw_only=True)
class TaskStore:
    """What was written, and what it costs.

    - `rescalers`: by task. `density`: share of the entries that a task's mask keeps. `error`: ‖τ_t − τ̂_t‖ / ‖τ_t‖ of what is read back.
    - `storage`: the rows `dense`, K vectors in float32, and the method's: `values` are the bytes of what the tasks share.
    """

    path: Path
    method: str
    tensors: int
    rescalers: Mapping[str, float]
    density: Mapping[str, float]
    error: Mapping[str, float]
    storage: Storage
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the file, header included."""
        return self.storage.row(self.method).on_disk or 0

    @property
    def dense_bytes(self) -> int:
        """Of all tasks' vectors in float32."""
        return self.storage.row("dense").nbytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path), "nbytes": self.nbytes, "dense_bytes": self.dense_bytes}


def compress_tasks(
    vectors: Sequence[Combination],
    path: str | Path,
    method: Method,
    *,
    dtype: Values = "float32",
    names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> TaskStore:
    """Write several task vectors as one that they share and a bit an entry for each, in one pass after those of the method.

    Args:
        vectors: task vectors, `model - base`.
        path: must be new and end in `.safetensors`. The file is whole or not there.
        method: one that keeps a mask for each task: `tall_masks` or `emr`.
        dtype: of the shared values; in float32 what is read back has the bits of the method's outputs (`thetau.outputs`), but for
            vectors of float64 models, which are rounded first.
        names, exclude: as for `thetau.merge`.
        engine: workers, memory budget, progress; the work is done on this machine.
        provenance: what the file says of how it was made; by default the method and the tasks.

    Raises:
        AlignmentError: a vector is a model, or vectors do not fit each other.
        CheckpointError: an input is damaged, changed meanwhile, or holds NaN or infinite values.
        OutputError: the path is taken or cannot be written, or a value does not fit the dtype.
        RecipeError: the method keeps no masks.

    Examples:
        >>> import thetau
        >>> base = thetau.open("base")
        >>> tuned = {name: thetau.open(name) - base for name in ("a", "b")}
        >>> told = compress_tasks(list(tuned.values()), "both.safetensors", thetau.methods.Emr())
        >>> told.storage.row("emr").nbytes < told.dense_bytes
        True
        >>> open_task("both.safetensors", "a").cosine(tuned["a"]) > 0.5
        True
    """
    target = Path(path)
    OneOf(DTYPES).check("compress_tasks", "dtype", dtype)
    check_json(dict(provenance or {}), target, "provenance")
    if target.suffix != ".safetensors":
        raise OutputError(f"{target}: a file of task vectors has a name that ends in .safetensors. Give such a name.")
    if not isinstance(method.chain().emit, Masked):
        raise RecipeError([f"`{name_of(method)}` keeps no mask for each task. Give `tall_masks` or `emr`."], "method")
    engine = replace(engine or Engine(), executor="local")
    merged = merge(vectors, method, names=names, exclude=exclude, engine=engine)
    output = Output.plan(merged)
    walk = output.walk(engine)
    engine.check(walk.steps, "Compressing")
    output.prepare()
    work = _Tasks.of(merged, FLOATS[dtype], engine)
    specs = {
        part(which, name): Spec(name=part(which, name), shape=shape, dtype=kind, file=str(target))
        for name, spec in output.specs.items()
        for which, (shape, kind) in layout_of(spec.shape, work.dtype, len(work.tasks)).items()
    }
    metadata = metadata_of(merged, dict(provenance or {"expression": merged.label, "merges": [work.merge.recipe()]}))
    table = {name: {"kind": FORM, "shape": list(spec.shape)} for name, spec in output.specs.items()}
    metadata |= {"thetau.form": FORM, "thetau.format": str(FORMAT), "thetau.tasks": json.dumps(work.rescalers)}
    metadata["thetau.tensors"] = json.dumps(table, separators=(",", ":"))
    with Writer(target, specs, metadata, run=hashlib.sha256(json.dumps(metadata).encode()).hexdigest()) as writer:
        found = [sums for _, sums in engine.run(walk.steps, Call(lambda step: work.write(step, writer)), "Writing")]
        moved = changed_inputs(merged)
        if moved:
            raise CheckpointError(
                f"{moved[0]}: changed while it was read ({len(moved)} files did). Nothing was written: run again when it is at rest."
            )
        writer.commit(copy_from=None, files={})
    said = report_of(output, target, merged.reference)
    sums = torch.stack(found)
    elements = sum(spec.elements for spec in output.specs.values())
    kept, squares, errors = ([math.fsum(column) for column in sums[:, row].T.tolist()] for row in range(3))
    density = [count / elements if elements else 0.0 for count in kept]
    row = StorageRow(
        name=name_of(method),
        masks=len(work.tasks),
        density=sum(density) / len(density),
        values=elements * work.dtype.itemsize,
        nbytes=sum(nbytes(layout_of(spec.shape, work.dtype, len(work.tasks))) for spec in output.specs.values()),
        on_disk=target.stat().st_size,
    )
    return TaskStore(
        path=target,
        method=name_of(method),
        tensors=len(output.specs),
        rescalers=work.rescalers,
        density=dict(zip(work.tasks, density, strict=True)),
        error={
            task: math.sqrt(error / square) if square else 0.0
            for task, square, error in zip(work.tasks, squares, errors, strict=True)
        },
        storage=Storage(
            rows=(dense_row(len(work.tasks), elements, "float32"), row), elements=elements, itemsize=work.dtype.itemsize
        ),
        notes=said.notes,
        warnings=said.warnings,
    )


@dataclass(frozen=True)
class _Tasks:
    """A merge that keeps masks, at work: its blocks with every task's mask at once, so that the inputs are read once."""

    merge: Merge
    emit: Masked
    dtype: Dtype
    engine: Engine
    rescalers: Mapping[str, float]

    @classmethod
    def of(cls, merged: Expression, dtype: Dtype, engine: Engine) -> _Tasks:
        """The one merge that an expression is; its passes must have been made."""
        ((_, source),) = merged.terms
        assert isinstance(source, Merge) and source.states is not None
        emit, state = source.aligned.chain.emit, source.states[-1]
        assert isinstance(emit, Masked)
        return cls(source, emit, dtype, engine, {task: emit.rescaler(row, state) for row, task in enumerate(source.tasks)})

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of the masks."""
        return tuple(self.rescalers)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """First row, merged rows, and the tasks' vectors and masks there, `[task, rows, *rest]`."""
        spec, count = self.merge.specs[name], len(self.rescalers)
        for low, high in windows(spec, self.engine.reach(len(self.merge.aligned.sources)), self.merge.grain(name)):
            window = Window(name, low, high)
            for start, stop in blocks(spec, low, high):
                made = self.merge.rows(window, start, stop, self._made, lead=1, what="masks")
                yield start, made[0], made[1 : 1 + count], made[1 + count :] != 0

    def _made(self, window: Window, start: int, stop: int) -> Tensor:
        """`[1 + 2 · task, rows, *rest]`: the merged rows, the tasks' vectors, and their masks."""
        aligned, apply = self.merge.aligned, self.merge.apply()
        site = aligned.site_at(window, start, stop)
        stack = apply.transformed(window, start, stop, site)
        rows = apply.merged(stack, site)
        return torch.cat([rows[None], stack, self.emit.masks(rows, stack, site).to(stack.dtype)])

    def write(self, step: Step, writer: Writer) -> Tensor:
        """Write one tensor's parts; entries kept, Σ τ² and Σ (τ − τ̂)² of each task, `[3, task]`, float64."""
        name, spec = step.name, self.merge.specs[step.name]
        sums = torch.zeros(3, len(self.tasks), dtype=torch.float64)
        bits = [
            Bits(lambda first, packed, which=f"mask{task}": writer.write(part(which, name), first, packed))  # type: ignore[misc]
            for task in range(len(self.tasks))
        ]
        for start, rows, stack, masks in self.blocks(name):
            values = rounded(rows, self.dtype, spec)
            if not bool(values.isfinite().all()):
                raise CheckpointError(f"{name!r}: the merged vector is not finite, though its inputs are. Nothing was written.")
            writer.write(part("values", name), start, values if spec.shape else values.reshape(()))
            for task, (rescaler, mask) in enumerate(zip(self.rescalers.values(), masks, strict=True)):
                bits[task].add(mask, last=start + len(rows) == spec.rows)
                error = stack[task] - masked(values.float(), mask, rescaler)
                sums[:, task] += torch.stack(
                    [mask.sum().double(), stack[task].double().square().sum(), error.double().square().sum()]
                )
        return sums


def open_task(store: str | os.PathLike[str], task: str) -> Expression:
    """One task's vector out of a file of several, lazily; `thetau.open("file.safetensors#task")` is the same under the file's name.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has no such task.
    """
    return Expression(((1.0, open_store(store).task(task)),), name=task)


def open_tasks(store: str | os.PathLike[str]) -> dict[str, Expression]:
    """Every task's vector out of a file of several, by name, lazily.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.

    Examples:
        >>> import thetau
        >>> base = thetau.open("base")
        >>> told = compress_tasks([thetau.open(name) - base for name in ("a", "b")], "both.safetensors", thetau.methods.TallMasks())
        >>> sorted(open_tasks("both.safetensors"))
        ['a', 'b']
    """
    opened = open_store(store)
    return {task: Expression(((1.0, opened.task(task)),), name=task) for task in opened.tasks}


def switch(module: nn.Module, model: Combination, *, engine: Engine | None = None) -> list[str]:
    """Give a live module another model's weights in place, `switch(module, base + open_task(store, "sst2"))`, tensor by tensor.

    Every tensor is computed from the base, not from what the module holds, and rounded once to the module's dtype: going from one task to
    another and back gives the same bits. Parameters stay the same objects, on their device, and buffers that are no floats as they are.

    Args:
        module: its `state_dict` must have the model's tensors, by name.
        model: any model, opened lazily; what of it the module lacks is refused.
        engine: memory budget of what is read at once.

    Returns:
        The names of the tensors that were written.

    Raises:
        AlignmentError: it is no model, or the module lacks tensors of it or has them in another shape. Nothing was changed.

    Examples:
        >>> import torch, thetau
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> base = thetau.open({"weight": torch.zeros(1, 2)})
        >>> tau = thetau.open({"weight": torch.ones(1, 2)}) - base
        >>> switch(layer, base + 0.5 * tau)
        ['weight']
        >>> layer.weight.tolist()
        [[0.5, 0.5]]
    """
    if not model.is_model:
        raise AlignmentError(f"`switch` needs a model, such as `base + vector`. Got {model!r}.")
    engine = replace(engine or Engine(), executor="local")
    live = module.state_dict()
    output = Output.plan(model)
    wanted = {name: spec for name, spec in output.specs.items() if spec.dtype.is_floating_point}
    problems = [f"{name!r} is missing" for name in wanted if name not in live]
    problems += [
        f"{name!r} has shape {list(live[name].shape)} instead of {list(spec.shape)}"
        for name, spec in wanted.items()
        if name in live and tuple(live[name].shape) != spec.shape
    ]
    problems += [
        f"{name!r} is {dtype_name(live[name].dtype)}" for name in wanted if name in live and not live[name].is_floating_point()
    ]
    if problems:
        raise AlignmentError(
            f"{type(module).__name__} does not fit {model.label}: {problems[0]}{f' and {len(problems) - 1} more' if problems[1:] else ''}. "
            "Give the module that these weights belong to."
        )
    output = output.typed({name: Dtype.of(live[name].dtype) for name in wanted})
    output.prepare()
    with torch.no_grad():
        for name in wanted:
            for start, rows in output.rows(name, engine):
                place = live[name]
                if place.ndim:
                    place[start : start + len(rows)].copy_(rows)
                else:
                    place.copy_(rows.reshape(()))
    return list(wanted)
