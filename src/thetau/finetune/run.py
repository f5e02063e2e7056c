"""From a model and a task to a fine-tuned checkpoint, once for each content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from thetau._version import __version__
from thetau.checkpoint.disk import write_tensors
from thetau.errors import DataError, OutputError
from thetau.finetune.config import FinetuneConfig
from thetau.finetune.lesson import Lesson
from thetau.finetune.loop import Trained, train
from thetau.finetune.output import read_record, write_checkpoint, write_folder
from thetau.finetune.processes import Processes
from thetau.finetune.state import StateFolder
from thetau.models import Encoder, read_weights, weights_hash
from thetau.tasks import Task, encode, make_head
from thetau.tasks.head import AnyHead

# Part of every key; raised when the loop changes what it computes.
_LOOP = 1


@final
@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run made. `cached` says that `out` held this very result already; then `seconds` and losses are those of the first
    run.
    """

    task: str
    out: Path
    key: str
    weights_hash: str
    first_loss: float
    last_loss: float
    seconds: float
    examples: int
    truncated: int
    cached: bool
    tangent: bool = False


def finetune_key(encoder: Encoder, lessons: Sequence[Lesson], config: FinetuneConfig, **more: Any) -> str:
    """The content that a run depends on: config, the inputs and labels, the heads, the base's weights, and `more`."""
    tasks = [(lesson.inputs.hash, lesson.head.hash()) for lesson in lessons]
    data, head = tasks[0] if len(tasks) == 1 else (tasks, None)
    parts = {"loop": _LOOP, "config": config.content(), "data": data, "head": head, "base": encoder.base_hash}
    parts |= {name: value for name, value in more.items() if value}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def finetune(
    encoder: Encoder,
    task: Task | Sequence[Task],
    out: Path,
    config: FinetuneConfig,
    *,
    base: str,
    against: Sequence[Task] = (),
    start: Path | None = None,
    snapshots: Sequence[int] = (),
    heads: Mapping[str, AnyHead] | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> FinetuneResult:
    """Fine-tune the encoder on a task's training split (or jointly on several) and write the checkpoint to `out`.

    `encoder` must hold the base's weights; it does so again afterwards. `base` is what the record calls it. When `out` holds the
    result of the same config, data and base, nothing is done; an unfinished run goes on where it was. Raises `OutputError` when `out`
    holds anything else, `DataError` for bad data or a diverging loss.

    - `against`: the tasks of the τJp penalty, a control task among them; only the inputs of their training splits are read. With
      `penalty="incremental"`, those before the trained task in `against` (all of them, when it is not named there).
    - `start`: a checkpoint of the tangent space over the same base; its τ is trained further.
    - `heads`: task → its frozen head, where it was made before; with `config.train_head`, where its training begins.
    - `snapshots`: steps after which the weights are kept, as `out/snapshots/<step>.safetensors`.

    Under `accelerate launch` (`pip install 'thetau[train]'`) every process calls this and takes a share of each batch; `tick` is called
    in all of them, the first one writes: `accelerate launch --num_processes 4 -m thetau finetune …`, or a script of one's own. Without a
    GPU, add `--cpu`.
    """
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "fine-tuning starts from the base, but the encoder runs with other weights. Load the base's into it first."
        )
    tasks = [task] if isinstance(task, Task) else list(task)
    others = _others(tasks, against, config)
    lessons = [make_lesson(encoder, one, config, heads or {}) for one in tasks]
    # Of the other tasks only the inputs are read; a head of theirs is made when the penalty is on logits.
    given = heads or {} if config.penalty_of == "logits" else {one.name: lessons[0].head for one in others}
    penalised = [make_lesson(encoder, one, config, given) for one in others]
    begun = None if start is None else _tangent(encoder, start, config)
    key = finetune_key(
        encoder,
        lessons,
        config,
        against=[(one.name, _unlabelled(one), one.head.hash() if config.penalty_of == "logits" else "") for one in penalised],
        start=None if start is None else weights_hash(read_weights(start, base=encoder.folder)),
        snapshots=sorted(snapshots),
    )
    processes = Processes(config.device)
    if out.exists():
        return _existing(out, key, tasks[0].name)
    state = StateFolder.beside(out, key) if config.save_every or snapshots else None
    before = encoder.weights(exact=True)
    began = time.perf_counter()
    kept = _Snapshots(encoder, sorted(snapshots), state, config)
    record = {
        "thetau": __version__,
        "key": key,
        "task": "+".join(one.name for one in tasks),
        "tasks": [one.name for one in tasks],
        "base": base,
        "base_hash": encoder.base_hash,
        "space": "tangent" if config.how.linear else "weights",
        **({"features": "raw"} if encoder.raw else {}),
        "config": asdict(config),
        "data_hash": lessons[0].inputs.hash,
        "head_hash": lessons[0].head.hash(),
        "against": [one.name for one in penalised],
        "start": None if start is None else str(start),
        "examples": sum(len(lesson.inputs) for lesson in lessons),
        "truncated": sum(lesson.inputs.truncated for lesson in lessons),
        "licence": "; ".join(dict.fromkeys(one.licence for one in tasks)),
    }

    learnt: dict[str, AnyHead] = {}

    def measured(trained: Trained) -> dict[str, Any]:
        losses = {"losses": trained.losses, **({"penalties": trained.penalties} if config.how.penalty else {})}
        learnt.update(trained.heads)
        return {"trained": list(trained.names), "seconds": round(time.perf_counter() - began, 3), **losses}

    options: dict[str, Any] = {"state": state, "processes": processes, "tick": tick}
    if config.how.lora:
        from thetau.finetune.adapters import adapted, save_adapter

        with adapted(encoder, config) as model:
            record |= measured(train(encoder.module, lessons, config, **options))
            adapter = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
            record["weights_hash"] = weights_hash(adapter)
            processes.once(write_folder, out, lambda folder: save_adapter(model, folder, base), record, learnt)
    else:
        try:
            record |= measured(
                train(
                    encoder.module,
                    lessons,
                    config,
                    against=penalised,
                    start=begun,
                    frozen=encoder.frozen,
                    snapshot=kept if snapshots else None,
                    **options,
                )
            )
            weights = encoder.weights(exact=config.how.linear)
        finally:
            encoder.load(before, base)
        record["weights_hash"] = weights_hash(weights)
        processes.once(write_checkpoint, out, weights, encoder.folder, record, kept.folder, learnt)
    if state is not None and processes.first:
        state.remove()
    return _result(record, out, cached=False)


def make_lesson(encoder: Encoder, task: Task, config: FinetuneConfig, heads: Mapping[str, AnyHead]) -> Lesson:
    """A task's training split as the encoder reads it, with its head: one of `heads`, or made here. Raises `DataError`."""
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    head = heads[task.name] if task.name in heads else make_head(encoder, task, **sizes)
    return Lesson(name=task.name, inputs=encode(encoder, task, "train", **sizes), head=head)


def _others(tasks: Sequence[Task], against: Sequence[Task], config: FinetuneConfig) -> list[Task]:
    """The tasks that the penalty is on."""
    own = {one.name for one in tasks}
    if not config.how.penalty:
        if against:
            raise DataError(f"other tasks (--against) are for paradigm taujp. Got paradigm {config.paradigm!r}.")
        return []
    if config.penalty == "incremental":
        names = [one.name for one in against]
        places = [names.index(name) for name in own if name in names]
        against = against[: min(places)] if places else against
        if not against:
            raise DataError(
                f"penalty incremental: no task was learnt before {tasks[0].name!r} in the order given; train the first one with paradigm linear."
            )
    return [one for one in against if one.name not in own]


def _unlabelled(lesson: Lesson) -> str:
    """A digest of the inputs alone, since no label is read."""
    unlabelled: str = lesson.inputs.unlabelled
    return unlabelled


def _tangent(encoder: Encoder, start: Path, config: FinetuneConfig) -> dict[str, Tensor]:
    """The τ of a checkpoint of the tangent space. Raises `DataError`: another base, another space."""
    record = read_record(start)
    if not config.how.linear:
        raise DataError(
            f"{start}: training goes on from a task vector in linear paradigms only. Got paradigm {config.paradigm!r}."
        )
    if record is None or record.get("space") != "tangent":
        raise DataError(
            f"{start}: must be a checkpoint that thetau fine-tuned with paradigm linear or taujp. It says nothing of the tangent space."
        )
    if record.get("base_hash") != encoder.base_hash:
        raise DataError(f"{start}: was fine-tuned from another base ({record.get('base')}), so its τ means nothing here.")
    given, own = encoder.parameters(read_weights(start, base=encoder.folder)), dict(encoder.module.named_parameters())
    return {name: tensor.float() - own[name].detach() for name, tensor in given.items()}


@final
class _Snapshots:
    """Writes what is trained after some of the steps, beside the state of the run."""

    def __init__(self, encoder: Encoder, steps: Sequence[int], state: StateFolder | None, config: FinetuneConfig) -> None:
        bad = [step for step in steps if not 0 <= step <= config.steps]
        if bad:
            raise DataError(f"snapshots must be after steps 0..{config.steps}. Got {bad}.")
        self._encoder, self._steps, self._linear = encoder, set(steps), config.how.linear
        self.folder = None if state is None or not steps else state.folder / "snapshots"

    def __call__(self, step: int, trained: Mapping[str, Tensor]) -> None:
        if step not in self._steps or self.folder is None:
            return
        own = dict(self._encoder.module.named_parameters())
        stored = {f"backbone.{name}": known for name, known in self._encoder.names.items()}
        content = {
            stored[name]: (own[name].detach().cpu() + tensor.detach().cpu() if self._linear else tensor.detach().cpu().clone())
            for name, tensor in trained.items()
            if name in stored
        }
        write_tensors(self.folder / f"{step:06d}.safetensors", content)


def _existing(out: Path, key: str, task: str) -> FinetuneResult:
    record = read_record(out)
    if record is None or record.get("key") != key:
        got = "something else" if record is None else f"a run on {record.get('task')!r} with other settings, data or base"
        raise OutputError(
            f"{out}: the output folder must be new, or hold this very run on {task!r}. It holds {got}. "
            "Choose another one or remove it."
        )
    adapter = out / "adapter_model.safetensors"
    if not adapter.is_file() and weights_hash(read_weights(out)) != record["weights_hash"]:
        raise OutputError(f"{out}: its weights are no longer those that were written there. Remove the folder and run again.")
    return _result(record, out, cached=True)


def _result(record: dict[str, Any], out: Path, *, cached: bool) -> FinetuneResult:
    losses = record["losses"]
    window = max(1, min(20, len(losses) // 2))
    return FinetuneResult(
        task=record["task"],
        out=out,
        key=record["key"],
        weights_hash=record["weights_hash"],
        first_loss=sum(losses[:window]) / window,
        last_loss=sum(losses[-window:]) / window,
        seconds=record["seconds"],
        examples=record["examples"],
        truncated=record["truncated"],
        cached=cached,
        tangent=record.get("space") == "tangent",
    )
