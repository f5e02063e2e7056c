r"""RegMean++: Gram matrices of what the merged model itself feeds its layers, block after block.

Nguyen et al. 2025, <https://arxiv.org/abs/2508.03121>; code: nthehai01/RegMean-plusplus 8f4bf1f. RegMean takes each layer's inputs from the task's own
model, but in the merged model the layers below are others. Here block after block is merged in the order in which they run: task i's examples go
through the blocks that are merged already, then through model i's own block, whose layers' inputs give the Gram matrices; RegMean merges the
block, and the next one follows. Inside a block the inputs are the candidate's, as in the code. What is outside the blocks is a block of its own where
it runs; what has no Gram matrix is averaged (the code leaves the last norm at the pre-trained one).

The result are evidence files of kind `gram`, so that `regmean` with the same factor merges with them as with any others. The examples run through the
blocks below once more for every block, of one model at a time; the code keeps activations instead, and all models in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from thetau.checkpoint.naming import kind_of, layer_of, place_of, view_of
from thetau.engine.executor import Engine
from thetau.errors import DataError, OutputError
from thetau.evidence.adamerging import FileVector
from thetau.evidence.collecting import existing, file_of, key_of, stored_names
from thetau.evidence.config import MomentConfig
from thetau.evidence.files import save_evidence
from thetau.evidence.layers import Layer, batched, measurable, sharing, watched
from thetau.facade import Expression
from thetau.finetune.lesson import to_device
from thetau.finetune.state import StateFolder
from thetau.linalg.gram import add_upper, mirrored
from thetau.methods import RegMean, plain
from thetau.methods.regmean import KIND, LeastSquares
from thetau.models import Encoder, weights_hash
from thetau.parts import Site
from thetau.tasks import Task, encode
from thetau.tasks.inputs import Inputs
from thetau.vectors.combination import require_vector

_LOOP = 1


@final
@dataclass(frozen=True, kw_only=True)
class MergedGrams:
    """What `collect_merged_grams` wrote into `folder`: a file a task, `TASK.safetensors`. `blocks`: how many were merged, one after the other."""

    folder: Path
    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    tensors: int
    blocks: int
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    @property
    def files(self) -> dict[str, Path]:
        """Task → its file, as a recipe's `evidence: {gram: …}` takes them."""
        return {task: self.folder / f"{task}.safetensors" for task in self.tasks}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def collect_merged_grams(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    vectors: Mapping[str, Expression],
    folder: str | Path,
    config: MomentConfig | None = None,
    *,
    method: RegMean | None = None,
    origins: Mapping[str, str] | None = None,
    engine: Engine | None = None,
    tick: Callable[[int], None] | None = None,
) -> MergedGrams:
    """Collect Gram matrices of the merged model's own activations, for task vectors over one base.

    Args:
        encoder: holds the base's weights, before and after.
        tasks: the task of each vector, by the names of `vectors`.
        folder: new, or holding these very matrices.
        method: how the blocks are merged; a merge with the files should be the same.
        origins: what files and messages call each model; a path where there is one.
        tick: told of the number of blocks that were merged since it was called last.

    Raises:
        DataError: a task without examples, an encoder that does not hold its base, no layer, NaN.
        AlignmentError: a vector is none.
        OutputError: the folder cannot be written, or holds something else.
    """
    config, method, folder = config or MomentConfig(), method or RegMean(), Path(folder)
    plainly = RegMean(off_diagonal=method.off_diagonal, coefficients=method.coefficients, unseen=method.unseen)
    if method != plainly:
        raise DataError("RegMean++ merges all layers with scale 1; set no field but off_diagonal, coefficients and unseen.")
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "Gram matrices are collected over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    names = tuple(sorted(vectors))
    inputs: dict[str, Inputs] = {}
    for name in names:
        require_vector(vectors[name], "RegMean++")
        if name not in tasks:
            raise DataError(f"{name}: no task is given for this vector, so it has no examples. Give its task, or leave it out.")
        inputs[name] = encode(
            encoder,
            tasks[name],
            config.split,
            limit=config.examples,
            max_length=config.max_length,
            image_size=config.image_size,
        )
        if not len(inputs[name]):
            raise DataError(f"task {name!r}: has no example in its split {config.split}. Leave it out, or name another split.")
    facts = {
        "base": encoder.base_hash,
        "vectors": {name: [(weight, source.fingerprint()) for weight, source in vectors[name].terms] for name in names},
        "data": {name: one.unlabelled for name, one in inputs.items()},
        "method": plain(method),
    }
    chosen = {name: value for name, value in asdict(config).items() if name not in ("save_every", "memory")}
    key = key_of(_LOOP, "merged", facts, chosen)
    kept = [existing(folder / f"{name}.safetensors", KIND, key, "evidence of merged activations") for name in names]
    if folder.is_file():
        raise OutputError(f"{folder}: must be a folder, new or holding these very matrices. It is a file.")
    if all(one is not None for one in kept) and kept[0] is not None:
        told = kept[0]
        return MergedGrams(folder=folder, cached=True, **{**told, "tasks": tuple(told["tasks"]), "notes": tuple(told["notes"])})
    state = StateFolder.beside(folder, key)
    stored = stored_names(encoder)
    files = {}
    for number, name in enumerate(names):
        files[name] = state.folder / f"{number:04d}.safetensors"
        if not files[name].exists():
            files[name].parent.mkdir(parents=True, exist_ok=True)
            vectors[name].save(files[name], dtype="float32", engine=engine)
    before = encoder.weights(exact=True)
    try:
        live = {name: FileVector(path, stored) for name, path in files.items()}
        blocks, grams = merge_blocks(encoder, inputs, live, method, config, stored, tick)
    finally:
        encoder.load(before, "the base")
    result = MergedGrams(
        folder=folder,
        tasks=names,
        examples={name: len(one) for name, one in inputs.items()},
        tensors=len(grams[names[0]]),
        blocks=blocks,
    )
    about = json.dumps({name: value for name, value in result.to_json().items() if name not in ("folder", "cached")})
    for name in names:
        origin = (origins or {}).get(name, name)
        more = {
            "task": name,
            "model": origin,
            "examples": str(len(inputs[name])),
            "activations": "merged",
            "regmean": json.dumps(plain(method)),
            "config": json.dumps(asdict(config)),
            "base": encoder.base_hash,
            "key": key,
            "result": about,
        }
        save_evidence(result.files[name], KIND, grams[name], {**more, **file_of(origin, encoder)})
    state.remove()
    return result


def merge_blocks(
    encoder: Encoder,
    inputs: Mapping[str, Inputs],
    vectors: Mapping[str, Mapping[str, Tensor]],
    method: RegMean,
    config: MomentConfig,
    stored: Mapping[str, tuple[str, ...]],
    tick: Callable[[int], None] | None = None,
) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Merge block after block in the live model, which is left merged; returns how many blocks, and each task's Gram matrices, float32.

    `vectors` are by the live parameters' names, `stored` are those in the checkpoint.
    """
    module = encoder.module.eval()
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in stored}
    layers = measurable(encoder)
    first = next(iter(inputs.values()))
    device = next(module.parameters()).device
    order = list(sharing(encoder, layers, to_device(first.batch([0]), device)))
    if not order:
        raise DataError(f"{encoder.folder}: has no linear layer that runs and whose weight is in its checkpoint.")
    known = {names: live for live, all_names in stored.items() for names in all_names}
    blocks = [list(run) for _, run in groupby(order, key=_block)]
    tasks = tuple(sorted(inputs))
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def mean(live: str) -> Tensor:
        total = start[live].clone()
        site = _site(stored[live][0], tuple(total.shape), tasks)
        for task, weight in zip(tasks, LeastSquares(coefficients=method.coefficients).weights(site), strict=True):
            if live in vectors[task]:
                total += vectors[task][live].to(total) * (weight / len(tasks))
        return total

    inside = {live: number for number, block in enumerate(blocks) for live in _members(block, parameters, known)}
    with torch.no_grad():
        for live, parameter in parameters.items():
            if live not in inside:
                parameter.copy_(mean(live))
        grams: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
        for number, block in enumerate(blocks):
            own = [live for live, place in inside.items() if place == number]
            for task in tasks:
                for live in own:
                    parameters[live].copy_(start[live])
                    if live in vectors[task]:
                        parameters[live].add_(vectors[task][live].to(device))
                grams[task] |= _grams(encoder, {name: layers[name] for name in block}, inputs[task], config, task)
            for live in own:
                names = [name for name in stored[live] if name in grams[tasks[0]]]
                parameters[live].copy_(
                    mean(live)
                    if not names
                    else start[live]
                    + _least_squares(
                        method, names[0], live, vectors, {task: grams[task][names[0]] for task in tasks}, start[live]
                    )
                )
            if tick is not None:
                tick(1)
    return len(blocks), grams


def _block(name: str) -> tuple[str, int | None]:
    """What a layer stands in: the container of its block and the number; outside the blocks itself."""
    place = place_of(name)
    return (name, None) if place is None else (place[0], place[1])


def _members(block: Sequence[str], parameters: Mapping[str, nn.Parameter], known: Mapping[str, str]) -> list[str]:
    """The live parameters of a block: all that its names begin like, and for what is outside the blocks the weight alone."""
    container, number = _block(block[0])
    if number is None:
        return [known[name] for name in block]
    prefix = f"{container}.{number}."
    return [live for name, live in known.items() if name.startswith(prefix) and live in parameters]


def _grams(encoder: Encoder, layers: Mapping[str, Layer], inputs: Inputs, config: MomentConfig, task: str) -> dict[str, Tensor]:
    device = next(encoder.module.parameters()).device
    sums = {name: torch.zeros(layer.d_in, layer.d_in, dtype=torch.float64, device=device) for name, layer in layers.items()}
    rows = dict.fromkeys(layers, 0)

    def seen(name: str, x: Tensor) -> None:
        given = place.rows(x)
        add_upper(sums[name], given)
        rows[name] += len(given)

    with watched(encoder, layers, seen=seen) as place:
        for batch in batched(inputs.lengths, config.batch):
            place.columns = to_device(inputs.batch(batch), device)
            encoder.module(**dict(place.columns))
    for name, total in sums.items():
        if not bool(torch.isfinite(total.sum())):
            raise DataError(f"{task}: the inputs of {name!r} must be finite; they hold NaN or Inf. Look at the weights below it.")
    return {name: mirrored((total / max(rows[name], 1)).float().cpu()) for name, total in sums.items()}


def _least_squares(
    method: RegMean,
    name: str,
    live: str,
    vectors: Mapping[str, Mapping[str, Tensor]],
    grams: Mapping[str, Tensor],
    like: Tensor,
) -> Tensor:
    """RegMean's merged vector of one stored tensor, by the reduction that a merge uses."""
    shape = tuple(like.shape)
    transposed = view_of(name, shape).transposed
    part = LeastSquares(off_diagonal=method.off_diagonal, coefficients=method.coefficients, unseen=method.unseen)

    def logical(tensor: Tensor) -> Tensor:
        return tensor.T if transposed else tensor.flatten(1)

    matrix = logical(like)
    total = part.init(matrix.shape[0], matrix.shape[1], len(grams))
    for task, gram in grams.items():
        vector = logical(vectors[task][live].cpu()) if live in vectors[task] else torch.zeros_like(matrix, device="cpu")
        site = _site(name, shape, (task,), gram)
        total = part.add(total, vector.contiguous(), site)
    made = part.result(total, _site(name, shape, tuple(grams)))
    return (made.T if transposed else made).reshape(shape).to(like)


def _site(name: str, shape: tuple[int, ...], tasks: tuple[str, ...], gram: Tensor | None = None) -> Site:
    return Site(
        name=name,
        shape=shape,
        kind=kind_of(name, shape),
        layer=layer_of(name),
        tasks=tasks,
        evidence={} if gram is None else {KIND: gram[None]},
    )
