r"""Second moments of every linear layer, from data: of its inputs (`gram`), or of the gradients of its outputs (`gradients`).

The first is RegMean's Gram matrix (Jin et al., ICLR 2023, <https://arxiv.org/abs/2212.09849>): XᵀX divided by the number of rows, a row being
what the layer reads at one position (token or patch) of one example, not centred. The second is the other factor of K-FAC (Martens and Grosse,
ICML 2015, <https://arxiv.org/abs/1503.05671>): E Σ g gᵀ, g the gradient of log p(y|x) in the layer's output at one position, summed over
positions and labels as `evidence fisher` does it, averaged over examples. Layers are all that `evidence.layers` knows; padding counts nowhere.

Layers that read the very same tensor (q, k and v) share one sum while it grows. The sums are float64; where they are more than `memory` allows
the examples run several times, for some of the layers each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors import safe_open
from torch import Tensor

from thetau.checkpoint.disk import write_tensors
from thetau.errors import DataError
from thetau.evidence.collecting import check_head, check_start, existing, file_of, key_of, labels_drawn, labels_of
from thetau.evidence.config import Labels, MomentConfig
from thetau.evidence.files import save_evidence
from thetau.evidence.jobs import ALL, Jobs, Opened, Share, Tick, added, run_shares, running
from thetau.evidence.layers import Layer, batched, groups, measurable, sharing, watched
from thetau.finetune.lesson import to_device
from thetau.finetune.state import StateFolder
from thetau.linalg.gram import add_upper, mirrored
from thetau.models import Encoder, weights_hash
from thetau.tasks import Task, encode, make_head
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs

Moment = Literal["gram", "gradients"]
ROWS = "rows"  # under this prefix the state holds how many rows each sum has
_SUMS, _ROWS = "sums-{:04d}.safetensors", "thetau.rows"  # of a share, by the run over the examples; each layer's rows
_LOOP = 1  # part of every key; raised when what is computed changes


@final
@dataclass(frozen=True, kw_only=True)
class SecondMoments:
    """What `collect_second_moments` wrote to `path`.

    `rows`: layer → rows that its sum has (positions of all examples). `idle`: layers that did not run. `cached`: the file held this
    very result already.
    """

    path: Path
    kind: Moment
    task: str
    examples: int
    labels: str
    tensors: int
    rows: Mapping[str, int]
    runs: int
    idle: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path)}


def collect_second_moments(
    encoder: Encoder,
    task: Task,
    weights: Mapping[str, Tensor],
    path: str | Path,
    kind: Moment = "gram",
    config: MomentConfig | None = None,
    *,
    head: AnyHead | None = None,
    origin: str = "the model",
    tick: Tick | None = None,
    jobs: Jobs | None = None,
    device: str | None = None,
) -> SecondMoments:
    """Collect the second moments of a fine-tuned model on a task, and write them as safetensors by the names of the layers' weights.

    A run that was cut off goes on where its last state was, to the same bits.

    Args:
        encoder: holds the base's weights, before and after.
        weights: of the fine-tuned model, by the base's names; `origin` is what messages and the file call them.
        path: of the file, new or this very result, ending in `.safetensors`.
        kind: of the layers' inputs (`gram`), or of their output's gradients.
        head: by default the task's frozen head, made from the base; `gram` looks at none.
        tick: told of the number of examples that were done since it was called last, in every run over them.
        jobs: processes that share the examples, and the memory; their sums lie beside the file meanwhile.
        device: where the model runs; by default where it is.

    Raises:
        DataError: the encoder does not hold its base, no example or label, no layer, a head of another model, NaN.
        AlignmentError: the weights are not the encoder's.
        OutputError: the file cannot be written, or holds something else.
    """
    config, path = config or MomentConfig(), Path(path)
    check_start(path, encoder)
    opened = Opened(encoder=encoder, task=task, weights=weights, head=head)
    head, inputs = _examples(opened, kind, config)
    if not len(inputs):
        raise DataError(f"task {task.name!r}: second moments need at least one example. Got none.")
    facts = {
        "task": task.name,
        "data": inputs.hash if kind == "gradients" and config.labels == "empirical" else inputs.unlabelled,
        "head": "" if head is None else head.hash(),
        "base": encoder.base_hash,
        "fingerprint": weights_hash(weights),
    }
    chosen = {name: value for name, value in asdict(config).items() if name not in ("save_every", "memory")}
    key = key_of(_LOOP, kind, facts, chosen)
    kept = existing(path, kind, key, f"evidence of {kind}")
    if kept is not None:
        return SecondMoments(path=path, cached=True, **{**kept, "idle": tuple(kept["idle"]), "notes": tuple(kept["notes"])})
    state = StateFolder.beside(path, key)
    work = _Sums(kind=kind, config=config, origin=origin, device=device)
    shared = None if jobs is None or jobs.count == 1 else run_shares(jobs, work, opened, state, tick)
    with work.run(opened, head, inputs, ALL if jobs is None else Share(count=jobs.count)) as run:
        sums, rows = run.finish(state, tick) if shared is None else run.gathered(shared, state)
    idle = tuple(name for name in run.layers if name not in run.leaders)
    notes = _notes(run, rows, idle, config)
    result = SecondMoments(
        path=path,
        kind=kind,
        task=task.name,
        examples=len(inputs),
        labels=run.labels if kind == "gradients" else "none",
        tensors=len(run.leaders),
        rows={name: rows[leader] for name, leader in run.leaders.items()},
        runs=len(run.groups),
        idle=idle,
        notes=tuple(notes),
    )
    told = {name: value for name, value in result.to_json().items() if name not in ("path", "cached")}
    more = {
        "model": origin,
        **file_of(origin, encoder),
        "examples": str(len(inputs)),
        "labels": result.labels,
        "config": json.dumps(asdict(config)),
        "key": key,
        "result": json.dumps(told),
    }
    save_evidence(path, kind, {name: sums[leader] for name, leader in run.leaders.items()}, facts | more)
    state.remove()
    return result


def _examples(opened: Opened, kind: Moment, config: MomentConfig) -> tuple[AnyHead | None, Inputs]:
    """The head, where gradients ask for one, and the examples; the encoder holds the base."""
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    head = None if kind == "gram" else opened.head or make_head(opened.encoder, opened.task, **sizes)
    return head, encode(opened.encoder, opened.task, config.split, limit=config.examples, **sizes)


@final
@dataclass(frozen=True, kw_only=True)
class _Sums:
    """The sums of a share of the examples."""

    kind: Moment
    config: MomentConfig
    origin: str
    device: str | None

    @contextmanager
    def run(self, opened: Opened, head: AnyHead | None, inputs: Inputs, share: Share) -> Iterator[Run]:
        """A collection of the share, while the encoder runs with the fine-tuned weights."""
        with running(opened, self.origin, share.device(self.device)):
            if head is not None:
                check_head(opened.encoder, head, inputs, opened.task)
            yield Run(opened.encoder, inputs, self.config, head=head, share=share)

    def summed(self, opened: Opened, share: Share, state: StateFolder, tick: Tick | None) -> None:
        """Leave them in a file for each run over the examples, unless they are there."""
        with self.run(opened, *_examples(opened, self.kind, self.config), share) as run:
            run.leave(state, tick)


def _notes(run: Run, rows: Mapping[str, int], idle: tuple[str, ...], config: MomentConfig) -> list[str]:
    notes = []
    if run.head is None:
        few = [name for name, leader in run.leaders.items() if rows[leader] < run.layers[name].d_in]
        if few:
            notes.append(
                f"{len(few)} of {len(run.leaders)} layers saw fewer rows than they have inputs ({', '.join(few[:3])}{', …' if len(few) > 3 else ''}): their "
                "matrices are singular, and a merge learns nothing of the other directions. More examples help."
            )
    elif run.labels != config.labels:
        notes.append(
            f"the task has more than {config.most_classes} classes: {config.draws} label(s) an example were drawn from the model."
        )
    if idle:
        notes.append(f"{len(idle)} layers do not act on the task ({', '.join(idle[:3])}{', …' if len(idle) > 3 else ''}).")
    if len(run.groups) > 1:
        notes.append(
            f"the examples ran {len(run.groups)} times, since all sums together take more than {config.memory / 1e9:g} GB."
        )
    return notes


@final
class Run:
    """One collection: its layers, which of them share a sum, and the runs over the examples that memory asks for.

    With a `head` it is the output gradients that are summed up, else the inputs. The encoder holds the model's weights. Of a `share` it sums its
    batches alone, in its part of the memory.
    """

    def __init__(
        self, encoder: Encoder, inputs: Inputs, config: MomentConfig, *, head: AnyHead | None = None, share: Share = ALL
    ) -> None:
        self.encoder, self.inputs, self.config = encoder, inputs, config
        self.device = next(encoder.module.parameters()).device
        self.head = None if head is None else head.to(self.device)
        self.layers: dict[str, Layer] = measurable(encoder)
        encoder.module.eval()
        first = to_device(inputs.batch([0]), self.device)
        shared = sharing(encoder, self.layers, first)
        if not shared:
            raise DataError(f"{encoder.folder}: has no linear layer that runs and whose weight is in its checkpoint.")
        self.leaders = shared if head is None else {name: name for name in shared}
        sizes = {name: 8 * self.side(name) ** 2 for name in dict.fromkeys(self.leaders.values())}
        self.groups = groups(sizes, config.memory // share.count)
        self.batches = share.of(batched(inputs.lengths, config.batch))
        self.labels: Labels = config.labels
        if self.head is not None:
            with torch.no_grad():
                outcomes = self.head.outcomes(encoder.module(**first))[0].shape[-1]
            self.labels = labels_of(config.labels, outcomes, config.most_classes)

    def side(self, name: str) -> int:
        """Of a layer's matrix."""
        return self.layers[name].d_in if self.head is None else self.layers[name].d_out

    def finish(self, state: StateFolder | None, tick: Tick | None) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The moments of the layers that lead, float32, and how many rows each has."""
        means: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for number, names in enumerate(self.groups):
            part = None if state is None or len(self.groups) == 1 else state.folder / f"group-{number:04d}.safetensors"
            if part is not None and _holds(part, names):
                counts |= _rows_in(part)
                means |= _mapped(part)
                if tick is not None:
                    tick(len(self.inputs))
                continue
            sums, rows = self._group(number, names, state, tick)
            means |= self._kept(part, {name: self._mean(name, sums.pop(name), rows[name]) for name in names}, rows)
            counts |= rows
        return means, counts

    def leave(self, state: StateFolder, tick: Tick | None) -> None:
        """A share's sums in files, one for each run over its examples, for `gathered`."""
        for number, names in enumerate(self.groups):
            part = state.folder / _SUMS.format(number)
            if not _holds(part, names):
                sums, rows = self._group(number, names, state, tick)
                write_tensors(part, sums, {_ROWS: json.dumps(rows)})

    def gathered(self, shares: Sequence[Path], state: StateFolder) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As `finish`, of what the shares of all processes left in their folders."""
        means: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for number, names in enumerate(self.groups):
            files = [folder / _SUMS.format(number) for folder in shares]
            told = [_rows_in(file) for file in files]
            rows = {name: sum(each[name] for each in told) for name in names}
            part = None if len(self.groups) == 1 else state.folder / f"group-{number:04d}.safetensors"
            means |= self._kept(part, {name: self._mean(name, total, rows[name]) for name, total in added(files)}, rows)
            counts |= rows
        return means, counts

    def _kept(self, part: Path | None, found: Mapping[str, Tensor], rows: Mapping[str, int]) -> Mapping[str, Tensor]:
        """The moments of some layers, mapped from a file where one is named, so that they are not held."""
        if part is None:
            return found
        write_tensors(part, found, {_ROWS: json.dumps(rows)})
        return _mapped(part)

    def _mean(self, name: str, total: Tensor, rows: int) -> Tensor:
        if not torch.isfinite(total.sum()):
            what = "inputs" if self.head is None else "gradients"
            raise DataError(f"the {what} of {name!r} must be finite; they hold NaN or Inf. Look at the weights below it.")
        count = max(rows, 1) if self.head is None else len(self.inputs)
        return mirrored((total / count).float().cpu())

    def _group(
        self, number: int, names: list[str], state: StateFolder | None, tick: Tick | None
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """One run over the examples of the share."""
        total = sum(map(len, self.batches))
        sums = {name: torch.zeros(self.side(name), self.side(name), dtype=torch.float64, device=self.device) for name in names}
        rows = dict.fromkeys(names, 0)
        saved = None if state is None else state.load()
        done = kept = 0
        if saved is not None and saved.step // total == number and all(name in saved.tensors for name in names):
            done = kept = saved.step % total
            for name in names:
                sums[name] = saved.tensors[name].to(self.device)
                rows[name] = int(saved.tensors[f"{ROWS}/{name}"])
            if tick is not None:
                tick(done)
        layers = {name: self.layers[name] for name in names}
        begun, place = done, 0
        for batch in self.batches:
            place += len(batch)
            if place <= begun:
                continue
            columns = to_device(self.inputs.batch(batch), self.device)
            if self.head is None:
                self._inputs(layers, columns, sums, rows)
            else:
                self._gradients(layers, columns, batch, sums, rows)
            done = place
            if tick is not None:
                tick(len(batch))
            if state is not None and done - kept >= self.config.save_every and done < total:
                told = {f"{ROWS}/{name}": torch.tensor(count) for name, count in rows.items()}
                state.save(number * total + done, sums | told, [], [])
                kept = done
        return sums, rows

    def _inputs(
        self, layers: Mapping[str, Layer], columns: Mapping[str, Tensor], sums: Mapping[str, Tensor], rows: dict[str, int]
    ) -> None:
        def seen(name: str, x: Tensor) -> None:
            given = place.rows(x.detach())
            add_upper(sums[name], given)
            rows[name] += len(given)

        with torch.no_grad(), watched(self.encoder, layers, seen=seen) as place:
            place.columns = columns
            self.encoder.module(**dict(columns))

    def _gradients(
        self,
        layers: Mapping[str, Layer],
        columns: Mapping[str, Tensor],
        batch: list[int],
        sums: Mapping[str, Tensor],
        rows: dict[str, int],
    ) -> None:
        assert self.head is not None
        outputs: list[tuple[str, Tensor]] = []
        asked = {name: parameter.requires_grad for name, parameter in self.encoder.module.named_parameters()}
        try:
            for parameter in self.encoder.module.parameters():
                parameter.requires_grad_(True)
            with torch.enable_grad(), watched(self.encoder, layers, made=lambda name, y: outputs.append((name, y))):
                features = self.encoder.module(**dict(columns))
                labels, shares = labels_drawn(self.head, features, self.inputs, batch, self.labels, self.config)
                told = [
                    (self.head.log_likelihood(features, label) * share.sqrt()).sum()
                    for label, share in zip(labels.T, shares.T, strict=True)
                ]  # no row of one example meets one of another, so that √p before the square is p after it
        finally:
            for name, parameter in self.encoder.module.named_parameters():
                parameter.requires_grad_(asked[name])
        live = [(name, y) for name, y in outputs if y.requires_grad]
        if not live or not told[0].requires_grad:
            raise DataError("the head does not depend on the layers of the model. Is it the head of this model?")
        for number, value in enumerate(told):
            slopes = torch.autograd.grad(value, [y for _, y in live], retain_graph=number + 1 < len(told), allow_unused=True)
            for (name, _), slope in zip(live, slopes, strict=True):
                if slope is not None:
                    given = slope.reshape(-1, slope.shape[-1])  # at padding it is zero
                    add_upper(sums[name], given)
                    rows[name] += len(given) if number == 0 else 0


def _mapped(path: Path) -> dict[str, Tensor]:
    """A file's tensors, not held."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping


def _holds(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is there with these layers; one of a run in another memory may hold others."""
    return path.is_file() and set(_rows_in(path)) == set(names)


def _rows_in(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt") as file:
        told: dict[str, int] = json.loads(file.metadata()[_ROWS])
    return told
