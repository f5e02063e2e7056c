r"""WEMoE: routers that mix the tasks' MLPs for each input, learned from unlabelled examples and kept beside a merged model.

Tang et al., ICML 2024, <https://arxiv.org/abs/2402.00433>; code: tanganke/weight-ensembling_MoE, scripts/clip_dictmoe.py. All but the MLPs is merged (by
task arithmetic at 0.3 there, by any method here); a block's MLP is θ₀ + Σ_t w_t(x) τ_t, w by a router of two layers at 0.3 for every task to begin
with, so that it begins close to task arithmetic. Adam at 1e-4 (the step of the runs that the authors committed; their config file has 1e-3), falling to
0 as a cosine over 1,000 steps, minimises the summed entropy of the predictions on 16 examples of every task; the code learns on test images, here the
split is a choice. Nobody has to know which task an input is of,
save for the head. Departs from the code in leaving padding out of the mean over positions.

The tasks' MLP vectors lie in memory while it learns and runs, and beside the model: as many bytes as K MLPs have. Where the predictions for a task fall
on one class (`entropy`) the run stops, and the routers from before that are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.evidence.collecting import existing, key_of
from thetau.evidence.config import MixtureConfig
from thetau.evidence.entropy import Entropies, lessons_of
from thetau.evidence.files import read_facts, save_evidence
from thetau.facade import Expression
from thetau.finetune.lesson import Lesson
from thetau.finetune.state import StateFolder
from thetau.models import Encoder, weights_hash
from thetau.models.mixture import Mixture, Router, Running, mixed_names, mixing, mlp_blocks
from thetau.tasks import Task
from thetau.tasks.head import AnyHead
from thetau.vectors.combination import require_vector

EVIDENCE = "wemoe"
FOLDER = "wemoe"  # inside a merged model's
FILE = "mixture.safetensors"
_LOOP = 1


@final
@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What `learn_mixture` wrote into one file.

    - `entropy`: each task's entropy in nats, over the first and the last window. `shares`: task → how much of every task's vector its examples got,
      over the last window, mean over the blocks.
    - `steps`: how many were made. `stopped`: why there were no more; None where all were made. `seconds`: of a step.
    - `blocks`: MLPs that are mixed; `numbers`: of the routers; `nbytes`: of the file.
    """

    path: Path
    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    blocks: int
    numbers: int
    steps: int
    entropy: Mapping[str, tuple[float, float]]
    shares: Mapping[str, Mapping[str, float]]
    seconds: float
    stopped: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path)}


def learn_mixture(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    vectors: Mapping[str, Expression],
    merged: Mapping[str, Tensor],
    path: str | Path,
    config: MixtureConfig | None = None,
    *,
    heads: Mapping[str, AnyHead] | None = None,
    origin: str = "the merged model",
    tick: Callable[[int, float], None] | None = None,
) -> Mixed:
    """Learn the routers that mix a merged model's MLPs, and write them with the tasks' MLP vectors.

    A run that was cut off goes on where its last state was, to the same bits.

    Args:
        encoder: holds the base's weights, before and after.
        tasks: the task of each vector, by the names of `vectors`.
        merged: the merged model's weights, by the base's names, for all that is no MLP; `origin` is what messages and the file call it.
        path: of the file, new or holding this very mixture; `MERGED/wemoe/mixture.safetensors` is where `thetau evaluate` looks.
        heads: of tasks whose frozen head, made from the base, is not the one to use.
        tick: told of each step and its summed entropy.

    Raises:
        DataError: a task without examples or without classes, an encoder of another kind or with other weights, entropy or shares that diverge.
        AlignmentError: a vector of another base or of the tangent space, or vectors that change no MLP.
        OutputError: the file cannot be written, or holds something else.
    """
    config, path = config or MixtureConfig(), Path(path)
    names = tuple(sorted(vectors))
    _check(encoder, tasks, vectors)
    lessons = lessons_of(
        encoder,
        tasks,
        names,
        heads or {},
        split=config.split,
        examples=config.examples,
        max_length=config.max_length,
        image_size=config.image_size,
        what="routers",
    )
    blocks = mlp_blocks(encoder, lessons[0].inputs.batch([0]))
    facts = {
        "base": encoder.base_hash,
        "merged": weights_hash(merged),
        "tasks": list(names),
        "vectors": {name: [(weight, source.fingerprint()) for weight, source in vectors[name].terms] for name in names},
        "data": {lesson.name: lesson.inputs.unlabelled for lesson in lessons},
        "heads": {lesson.name: lesson.head.hash() for lesson in lessons},
    }
    chosen = {name: value for name, value in asdict(config).items() if name != "save_every"}
    key = key_of(_LOOP, facts, chosen)
    kept = existing(path, EVIDENCE, key, "mixture")
    if kept is not None:
        return _result(path, kept, cached=True)
    own = encoder.weights(exact=True)
    added = _vectors(vectors, names, mixed_names(encoder, blocks))
    generator = torch.Generator().manual_seed(config.seed)
    routers = {
        block: Router.drawn(config.depth, own[weights[0]].shape[1], len(names), config.start, generator)
        for block, weights in blocks.items()
    }
    mixture = Mixture(tasks=names, blocks=blocks, routers=routers, vectors=added)
    state = StateFolder.beside(path, key)
    begun = time.perf_counter()
    try:
        encoder.load(merged, origin)
        learner = Learner(encoder, mixture, own, lessons, config)
        stopped = learner.finish(state, tick)
    finally:
        encoder.load(own, "the base")
    result = Mixed(
        path=path,
        tasks=names,
        examples={lesson.name: len(lesson.inputs) for lesson in lessons},
        blocks=len(blocks),
        numbers=sum(tensor.numel() for router in routers.values() for tensor in router.tensors.values()),
        steps=learner.step,
        entropy=learner.entropies.ends(),
        shares=learner.shares(),
        seconds=(time.perf_counter() - begun) / max(1, learner.step - learner.begun),
        stopped=stopped,
        notes=tuple(_notes(config, stopped)),
    )
    told = {name: value for name, value in result.to_json().items() if name not in ("path", "cached")}
    about = {
        "model": origin,
        "task": ", ".join(names),
        "tasks": json.dumps(names),
        "base": encoder.base_hash,
        "merged": str(facts["merged"]),
        "blocks": json.dumps(blocks),
        "config": json.dumps(asdict(config)),
        "key": key,
        "result": json.dumps(told),
    }
    save_evidence(path, EVIDENCE, _tensors(learner.mixture), about)
    state.remove()
    return result


@final
class Learner:
    """Adam on the routers of a mixture over the weights that an encoder runs with, step by step.

    `base`: θ₀ by the checkpoint's names. `mixture`: the routers as they are; their tensors are moved in place.
    """

    def __init__(
        self, encoder: Encoder, mixture: Mixture, base: Mapping[str, Tensor], lessons: list[Lesson], config: MixtureConfig
    ) -> None:
        device = next(encoder.module.parameters()).device
        self.encoder, self.base, self.config = encoder, base, config
        routers = {
            block: Router(tensors={name: tensor.to(device).clone().requires_grad_() for name, tensor in router.tensors.items()})
            for block, router in mixture.routers.items()
        }
        self.mixture = Mixture(tasks=mixture.tasks, blocks=mixture.blocks, routers=routers, vectors=mixture.vectors)
        self.parameters = {
            f"{block}/{name}": tensor for block, router in routers.items() for name, tensor in router.tensors.items()
        }
        self.adam = torch.optim.Adam(self.parameters.values(), lr=config.lr)
        self.entropies = Entropies(encoder.module, lessons, batch=config.batch, seed=config.seed, window=config.window)
        self.healthy = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.given: list[list[list[float]]] = []  # by step, task whose examples they are, and task: mean shares
        self.step = self.begun = 0

    def advance(self, running: Running) -> float:
        """One step; the summed entropy before it.

        Raises:
            DataError: an entropy or a share is not finite, or a share diverges.
        """
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * (1 + math.cos(math.pi * self.step / max(1, self.config.steps))) / 2
        self.adam.zero_grad()
        given: list[list[float]] = []
        remedy = "look at the weights, or begin with smaller shares (`start`)."
        total = self.entropies.descend(self.step + 1, remedy, lambda lesson: given.append(self._seen(lesson, running)))
        self.adam.step()
        self.given = [*self.given[1 - self.config.window :], given] if self.config.window > 1 else [given]
        self.step += 1
        return total

    def finish(self, state: StateFolder | None = None, tick: Callable[[int, float], None] | None = None) -> str | None:
        """All steps, from those that `state` holds; why it stopped before, or None."""
        with _frozen(self.encoder), mixing(self.encoder, self.mixture, self.base) as (_, running):
            if state is not None:
                self._resume(state)
            while self.step < self.config.steps:
                total = self.advance(running)
                if tick is not None:
                    tick(self.step, total)
                if self.step % self.config.window == 0:
                    said = self.entropies.collapsed(self.step)
                    if said is not None:
                        self._put(self.healthy)
                        return f"{said} Kept are the routers of step {self.step - self.config.window}."
                    self.healthy = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
                if state is not None and self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self._save(state)
        return None

    def shares(self) -> dict[str, dict[str, float]]:
        """Task → how much of every task's vector its examples got in the last window, mean over the blocks; NaN where no step was made."""
        tasks = self.mixture.tasks
        rows = torch.tensor(self.given).mean(0) if self.given else torch.full((len(tasks), len(tasks)), math.nan)
        return {name: dict(zip(tasks, row, strict=True)) for name, row in zip(tasks, rows.tolist(), strict=True)}

    def _seen(self, lesson: str, running: Running) -> list[float]:
        """The mean shares of the batch that ran."""
        for block, shares in running.shares.items():
            worst = float(shares.detach().abs().max())
            if not worst <= self.config.most:
                raise DataError(
                    f"step {self.step + 1}: a share that block {block} gives an example of {lesson} is {worst:g}, beyond ± {self.config.most:g}: it diverges. "
                    "Take a smaller `lr`."
                )
        found: list[float] = torch.stack([shares.detach().mean(0) for shares in running.shares.values()]).mean(0).tolist()
        return found

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(values[name])

    def _save(self, state: StateFolder) -> None:
        moments = ("exp_avg", "exp_avg_sq", "step")
        tensors = {f"value/{name}": tensor.detach() for name, tensor in self.parameters.items()}
        tensors |= {f"healthy/{name}": tensor for name, tensor in self.healthy.items()}
        tensors |= {
            f"moment/{name}/{moment}": self.adam.state[tensor][moment]
            for name, tensor in self.parameters.items()
            for moment in moments
            if tensor in self.adam.state
        }
        state.save(self.step, tensors | self.entropies.tensors() | {"given": torch.tensor(self.given)}, [], [])

    def _resume(self, state: StateFolder) -> None:
        saved = state.load()
        if saved is None:
            return
        told = saved.tensors
        self._put({name: told[f"value/{name}"] for name in self.parameters})
        self.healthy = {name: told[f"healthy/{name}"] for name in self.parameters}
        for name, tensor in self.parameters.items():
            found = {key.rpartition("/")[2]: value for key, value in told.items() if key.startswith(f"moment/{name}/")}
            if found:
                self.adam.state[tensor] = found
        self.given = told["given"].tolist()
        self.step = self.begun = saved.step
        self.entropies.resume(told, saved.step)


@contextmanager
def _frozen(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode, and no parameter of the encoder asks for a gradient."""
    asked = {name: parameter.requires_grad for name, parameter in encoder.module.named_parameters()}
    training = encoder.module.training
    encoder.module.eval()
    for parameter in encoder.module.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in encoder.module.named_parameters():
            parameter.requires_grad_(asked[name])
        encoder.module.train(training)


def _check(encoder: Encoder, tasks: Mapping[str, Task], vectors: Mapping[str, Expression]) -> None:
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "routers are learned over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    if not vectors:
        raise DataError("a mixture needs at least one task vector. Got none.")
    for name, vector in vectors.items():
        require_vector(vector, "WEMoE")
        if name not in tasks:
            raise DataError(
                f"{name}: no task is given for this vector, so it has no unlabelled examples. Give its task, or leave it out."
            )
        if tasks[name].regression:
            raise DataError(f"task {name!r}: is a regression; its predictions have no entropy to learn routers by. Leave it out.")
        if any(source.metadata.get("thetau.space") == "tangent" for source in vector.sources()):
            raise DataError(f"{vector.label}: belongs to the tangent space; routers mix vectors of the model's own space.")


def _vectors(vectors: Mapping[str, Expression], names: tuple[str, ...], mixed: list[str]) -> dict[str, Tensor]:
    """What each task adds to what is mixed, `[task, *shape]`; one vector is read at a time."""
    found: dict[str, list[Tensor]] = {name: [] for name in mixed}
    for task in names:
        held = vectors[task].state_dict()
        for name in mixed:
            if name not in held:
                raise AlignmentError(
                    f"{task}: its vector has no {name!r}, which the base's MLPs have. Give a model of this base."
                )
            found[name].append(held[name].float())
    made = {name: torch.stack(rows) for name, rows in found.items()}
    if not any(bool(tensor.any()) for tensor in made.values()):
        raise AlignmentError(
            "no MLP is changed by any of the task vectors, so there is nothing to mix. Merge them without a mixture."
        )
    for name, tensor in made.items():
        if not bool(tensor.isfinite().all()):
            raise AlignmentError(f"{name!r}: the task vectors must be finite. Look at the models' weights.")
    return made


def _notes(config: MixtureConfig, stopped: str | None) -> list[str]:
    notes = [] if stopped is None else [stopped]
    if config.split == "test":
        notes.append(
            "the routers were learned on the test examples themselves, without their labels: a test on them is no held-out one."
        )
    return notes


def _tensors(mixture: Mixture) -> dict[str, Tensor]:
    found = {
        f"router/{block}/{name}": tensor.detach().cpu()
        for block, router in mixture.routers.items()
        for name, tensor in router.tensors.items()
    }
    return found | {f"vector/{name}": tensor for name, tensor in mixture.vectors.items()}


def _result(path: Path, told: Mapping[str, Any], *, cached: bool) -> Mixed:
    entropy = {task: tuple(ends) for task, ends in told["entropy"].items()}
    more: dict[str, Any] = {"tasks": tuple(told["tasks"]), "notes": tuple(told["notes"]), "entropy": entropy}
    return Mixed(path=path, cached=cached, **{**told, **more})


def mixture_file(merged: Path) -> Path:
    """Where a merged model's folder holds its mixture."""
    return merged / FOLDER / FILE


def read_mixture(path: Path, merged: Mapping[str, Tensor], base: str) -> Mixture:
    """A mixture that `learn_mixture` wrote for this merged model over the base of this hash.

    Raises:
        CheckpointError: it is none, or damaged.
        DataError: it is another model's, or of another base.
    """
    facts = read_facts(path, EVIDENCE)
    if facts.get("merged") != weights_hash(merged):
        raise DataError(
            f"{path}: was learned for another merged model, {facts.get('model')}, than the one that is measured. Learn it again: thetau evidence wemoe."
        )
    if facts.get("base") != base:
        raise DataError(
            f"{path}: was learned over another base than the one that the tasks are measured with. Name its own with --base."
        )
    try:
        tensors = load_file(path)
        blocks = {block: tuple(names) for block, names in json.loads(facts["blocks"]).items()}
        tasks = tuple(json.loads(facts["tasks"]))
        routers: dict[str, dict[str, Tensor]] = {block: {} for block in blocks}
        for name in (name for name in tensors if name.startswith("router/")):
            block, _, part = name.removeprefix("router/").rpartition("/")
            routers[block][part] = tensors[name]
        if not all("second_bias" in parts for parts in routers.values()):
            raise KeyError("second_bias")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: is damaged, {error} is missing or cannot be read. Learn it again: thetau evidence wemoe."
        ) from error
    vectors = {name.removeprefix("vector/"): tensor for name, tensor in tensors.items() if name.startswith("vector/")}
    return Mixture(
        tasks=tasks, blocks=blocks, routers={block: Router(tensors=parts) for block, parts in routers.items()}, vectors=vectors
    )
