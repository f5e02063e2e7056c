r"""AdaMerging: learn how much of each task vector to add at each tensor, from unlabelled examples alone.

Yang et al., ICLR 2024, <https://arxiv.org/abs/2310.02575>; code: EnnengYang/AdaMerging cea1165. With θ(λ) = θ₀ + Σ_t λ_{t,l} τ_{t,l} at each parameter
tensor l, Adam minimises Σ_t E_x H(p_t(·|x; θ(λ))), H the entropy of the merged model's prediction on task t's examples. As in the code λ
starts at 0.3, lies in [0, 1] in the forward pass, and is moved by Adam at 1e-3 for 500 steps with 32 examples a task (its loop stops after the second
batch of 16). FusionBench's port has no clamp: `clamp: false`. The code adapts to the test images; here that is a choice.

The gradient of λ_{t,l} is ⟨∂L/∂θ_l, τ_{t,l}⟩. So a step is one mixture, one forward and one backward pass of the *one* merged model over all tasks'
batches, and one inner product a task and tensor, each tensor of a vector being read when its turn is: memory is that of the base, the
merged model and its gradient, whatever the number of tasks. The vectors lie on disk, after the transforms of the method that they are to be merged over.

Where the predictions for a task fall on one class (`entropy`) the run stops, and the coefficients from before that are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from thetau.checkpoint import Roles
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, CheckpointError, DataError, OutputError
from thetau.evidence.collecting import file_of, key_of, stored_names
from thetau.evidence.config import CoefficientConfig
from thetau.evidence.entropy import Entropies, lessons_of
from thetau.evidence.files import read_facts, save_evidence
from thetau.facade import Expression, transform
from thetau.finetune.lesson import Lesson
from thetau.finetune.state import StateFolder
from thetau.methods import AdaMerging, plain
from thetau.methods.adamerging import KIND
from thetau.models import Encoder, weights_hash
from thetau.parts import Method
from thetau.tasks import Task
from thetau.tasks.head import AnyHead
from thetau.vectors.combination import require_vector

Vector = Mapping[str, Tensor]
_LOOP = 1  # part of every key; raised when what is computed changes


@final
@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What `learn_coefficients` wrote into `folder`: a file a task, `TASK.safetensors`.

    - `mean`: each task's mean coefficient over the tensors. `entropy`: each task's entropy in nats, over the first and the last window.
    - `steps`: how many were made. `stopped`: why there were no more; None where all were made.
    - `seconds`: of a step, of which `mixing` went into mixtures and inner products; of this run alone.
    - `demand`: bytes that it takes, as `demand` tells them.
    """

    folder: Path
    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    tensors: int
    granularity: str
    steps: int
    mean: Mapping[str, float]
    entropy: Mapping[str, tuple[float, float]]
    seconds: float
    mixing: float
    demand: Mapping[str, int]
    stopped: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    @property
    def files(self) -> dict[str, Path]:
        """Task → its file, as a recipe's `evidence: {coefficients: …}` takes them."""
        return {task: self.folder / f"{task}.safetensors" for task in self.tasks}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def learn_coefficients(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    vectors: Mapping[str, Expression],
    folder: str | Path,
    config: CoefficientConfig | None = None,
    *,
    method: AdaMerging | None = None,
    heads: Mapping[str, AnyHead] | None = None,
    origins: Mapping[str, str] | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> Coefficients:
    """Learn AdaMerging's coefficients for task vectors over one base, and write a file of evidence for each task.

    A run that was cut off goes on where its last state was, to the same bits. Meanwhile the transformed vectors lie beside `folder`.

    Args:
        encoder: holds the base's weights, before and after.
        tasks: the task of each vector, by the names of `vectors`.
        folder: new, or holding these very coefficients.
        method: how they are to be merged; its `then` says over which transforms.
        heads: of tasks whose frozen head, made from the base, is not the one to use.
        origins: what files and messages call each model; a path where there is one.
        seed: of the method, where its transforms are random.
        tick: told of each step and its summed entropy.

    Raises:
        DataError: a task without examples or without classes, an encoder that does not hold its base, entropy or coefficients that diverge.
        AlignmentError: a vector of another base or of the tangent space, or no tensor to merge.
        OutputError: the folder cannot be written, or holds something else.
    """
    config, method, folder = config or CoefficientConfig(), method or AdaMerging(), Path(folder)
    names = tuple(sorted(vectors))
    _check(encoder, tasks, vectors)
    lessons = _lessons(encoder, tasks, names, config, heads or {})
    over = json.dumps(plain(method.then), sort_keys=True)
    facts = {
        "base": encoder.base_hash,
        "tasks": list(names),
        "vectors": {name: [(weight, source.fingerprint()) for weight, source in vectors[name].terms] for name in names},
        "data": {lesson.name: lesson.inputs.unlabelled for lesson in lessons},
        "heads": {lesson.name: lesson.head.hash() for lesson in lessons},
        "over": over,
        "seed": seed,
    }
    chosen = {name: value for name, value in asdict(config).items() if name != "save_every"}
    key = key_of(_LOOP, facts, chosen)
    kept = _existing(folder, names, key)
    if kept is not None:
        return kept
    state = StateFolder.beside(folder, key)
    stored = _selected(encoder, vectors[names[0]], method)
    files = _materialised(vectors, method, state.folder / "vectors", seed, engine)
    live = {name: FileVector(path, stored) for name, path in files.items()}
    before = encoder.weights(exact=True)
    begun = time.perf_counter()
    try:
        learner = Learner(encoder.module, lessons, live, config, groups=_groups(encoder, stored, config))
        stopped = learner.finish(state, tick)
    finally:
        encoder.load(before, "the base")
    made = max(1, learner.step - learner.begun)
    values = learner.full()
    result = Coefficients(
        folder=folder,
        tasks=names,
        examples={lesson.name: len(lesson.inputs) for lesson in lessons},
        tensors=len(learner.names),
        granularity=config.granularity,
        steps=learner.step,
        mean={name: float(row.mean()) for name, row in zip(names, values, strict=True)},
        entropy=learner.entropies.ends(),
        seconds=(time.perf_counter() - begun) / made,
        mixing=learner.mixing / made,
        demand=demand([parameter.numel() for parameter in learner.own.values()], len(names)),
        stopped=stopped,
        notes=tuple(_notes(learner, config, stopped)),
    )
    named = {known: row for place, live in enumerate(learner.names) for known in stored[live] for row in [values[:, place]]}
    told = {name: named.get(name, torch.zeros(len(names))) for name in _acted_on(vectors[names[0]], stored, method)}
    _write(result, told, encoder, {"key": key, "over": over, "base": encoder.base_hash}, origins or {})
    state.remove()
    return result


def _lessons(
    encoder: Encoder, tasks: Mapping[str, Task], names: Sequence[str], config: CoefficientConfig, heads: Mapping[str, AnyHead]
) -> list[Lesson]:
    """The unlabelled examples of each task, and its head."""
    return lessons_of(
        encoder,
        tasks,
        names,
        heads,
        split=config.split,
        examples=config.examples,
        max_length=config.max_length,
        image_size=config.image_size,
        what="coefficients",
    )


def step_seconds(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    config: CoefficientConfig | None = None,
    *,
    heads: Mapping[str, AnyHead] | None = None,
) -> float:
    """Seconds that a step takes here, tried: the second of two over the tasks' examples, with vectors as large as the base's in memory.

    Reading the vectors from a disk comes on top where the system does not hold them.

    Raises:
        DataError: as learning would.
    """
    config = replace(config or CoefficientConfig(), steps=2)
    before = encoder.weights(exact=True)
    vector = {name: parameter.detach() * 1e-3 for name, parameter in encoder.module.named_parameters()}
    lessons = _lessons(encoder, tasks, sorted(tasks), config, heads or {})
    times = [time.perf_counter()]
    try:
        learner = Learner(encoder.module, lessons, dict.fromkeys(tasks, vector), config)
        learner.finish(tick=lambda step, entropy: times.append(time.perf_counter()))
    finally:
        encoder.load(before, "the base")
    return times[-1] - times[-2]


def demand(elements: Sequence[int], tasks: int) -> dict[str, int]:
    """Bytes that learning takes beside the activations of a batch, from the sizes of the tensors: memory, what a step reads, and disk.

    Memory holds the base's tensors, the merged ones, their gradient and one tensor of one vector; the vectors are read from disk twice a step.
    """
    whole = sum(elements)
    return {"memory": 4 * (3 * whole + max(elements, default=0)), "read": 8 * tasks * whole, "disk": 4 * tasks * whole}


@final
class FileVector(Mapping[str, Tensor]):
    """A task vector in a safetensors file, by the live model's names: each tensor is mapped from the file when it is asked for."""

    def __init__(self, path: Path, stored: Mapping[str, tuple[str, ...]]) -> None:
        self._file: Any = safe_open(path, framework="pt")
        held: set[str] = set(self._file.keys())  # type: ignore[no-untyped-call]
        self._names = {live: next(name for name in names if name in held) for live, names in stored.items() if held & set(names)}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@final
class Learner:
    """Adam on the coefficients of task vectors over the weights that a module holds, step by step.

    - `vectors`: by task, in the order of `lessons`, by the names of the module's parameters; a name that is not there is zero.
    - `groups`: for each name the number of its group, which has one coefficient a task; by default each is its own.

    Meanwhile the module's parameters are overwritten; `finish` leaves them so.
    """

    def __init__(
        self,
        module: nn.Module,
        lessons: Sequence[Lesson],
        vectors: Mapping[str, Vector],
        config: CoefficientConfig,
        *,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.module, self.lessons, self.config = module, tuple(lessons), config
        self.vectors = [vectors[lesson.name] for lesson in lessons]
        known = dict(module.named_parameters())
        self.names = [name for name in known if any(name in vector and bool(vector[name].any()) for vector in self.vectors)]
        if not self.names:
            raise AlignmentError("no parameter of the model is changed by any of the task vectors: there is nothing to learn.")
        self.own = {name: known[name] for name in self.names}
        self.base = {name: parameter.detach().clone() for name, parameter in self.own.items()}
        numbers = [(groups or {}).get(name, index) for index, name in enumerate(self.names)]
        order = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
        self.group = torch.tensor([order[number] for number in numbers])
        self.values = torch.full((len(self.lessons), len(order)), float(config.start), requires_grad=True)
        self.adam = torch.optim.Adam([self.values], lr=config.lr, betas=(0.9, 0.999))
        self.healthy = self.values.detach().clone()
        self.entropies = Entropies(module, lessons, batch=config.batch, seed=config.seed, window=config.window)
        self.step = self.begun = 0
        self.mixing = 0.0

    def coefficients(self) -> Float[Tensor, "task group"]:
        """Those of the forward pass."""
        values = self.values.detach()
        return values.clamp(0, 1) if self.config.clamp else values.clone()

    def full(self) -> Float[Tensor, "task tensor"]:
        """The coefficients of the forward pass at each tensor."""
        return self.coefficients()[:, self.group]

    def mix(self) -> None:
        """Put θ₀ + Σ λ τ into the module."""
        full = self.full().tolist()
        with torch.no_grad():
            for place, (name, parameter) in enumerate(self.own.items()):
                parameter.copy_(self.base[name])
                for row, vector in zip(full, self.vectors, strict=True):
                    if name in vector and row[place] != 0:
                        parameter.add_(vector[name].to(parameter), alpha=row[place])

    def slopes(self) -> Float[Tensor, "task group"]:
        """⟨∂L/∂θ, τ⟩ of each task and group, from the gradients that the parameters hold; 0 where a clamp holds a coefficient."""
        found = torch.zeros(len(self.lessons), len(self.names))
        for place, (name, parameter) in enumerate(self.own.items()):
            if parameter.grad is None:
                continue
            for row, vector in zip(found, self.vectors, strict=True):
                if name in vector:
                    row[place] = torch.dot(parameter.grad.reshape(-1), vector[name].to(parameter).reshape(-1))
        total = torch.zeros_like(self.values).index_add_(1, self.group, found)
        inside = (self.values >= 0) & (self.values <= 1)
        return torch.where(inside, total, 0) if self.config.clamp else total

    def advance(self) -> float:
        """One step; the summed entropy before it.

        Raises:
            DataError: an entropy is not finite, or a coefficient diverges.
        """
        begun = time.perf_counter()
        self.mix()
        mixed = time.perf_counter()
        for parameter in self.own.values():
            parameter.grad = None
        total = self.entropies.descend(self.step + 1, "look at the weights, or begin with smaller coefficients (`start`).")
        back = time.perf_counter()
        self.values.grad = self.slopes()
        self.adam.step()
        self.mixing += mixed - begun + time.perf_counter() - back
        self.step += 1
        self._check()
        return total

    def finish(self, state: StateFolder | None = None, tick: Callable[[int, float], None] | None = None) -> str | None:
        """All steps, from those that `state` holds; why it stopped before, or None."""
        asked = {name: parameter.requires_grad for name, parameter in self.module.named_parameters()}
        training = self.module.training
        self.module.eval()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.own)
        try:
            if state is not None:
                self._resume(state)
            while self.step < self.config.steps:
                total = self.advance()
                if tick is not None:
                    tick(self.step, total)
                collapsed = self._collapsed()
                if collapsed is not None:
                    with torch.no_grad():
                        self.values.copy_(self.healthy)
                    return collapsed
                if state is not None and self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self._save(state)
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(asked[name])
                parameter.grad = None
            self.module.train(training)
        return None

    def _check(self) -> None:
        values = self.values.detach()
        worst = values.abs().max()
        if bool(torch.isfinite(values).all()) and (self.config.clamp or float(worst) <= self.config.most):
            return
        task, group = divmod(
            int((~torch.isfinite(values)).int().argmax() if not bool(torch.isfinite(worst)) else values.abs().argmax()),
            values.shape[1],
        )
        name = self.names[int((self.group == group).nonzero()[0])]
        raise DataError(
            f"step {self.step}: the coefficient of {self.lessons[task].name} at {name!r} is {float(values[task, group]):g}, beyond ± {self.config.most:g}: it "
            "diverges. Take a smaller `lr`, or `clamp`."
        )

    def _collapsed(self) -> str | None:
        """At the end of a window: why it is to stop, or None."""
        if self.step % self.config.window:
            return None
        said = self.entropies.collapsed(self.step)
        if said is not None:
            return f"{said} Kept are the coefficients of step {self.step - self.config.window}."
        self.healthy = self.values.detach().clone()
        return None

    def _save(self, state: StateFolder) -> None:
        moments = self.adam.state[self.values]
        tensors = {
            "values": self.values.detach(),
            "healthy": self.healthy,
            **{f"moment/{name}": moments[name] for name in ("exp_avg", "exp_avg_sq", "step")},
            **self.entropies.tensors(),
        }
        state.save(self.step, tensors, [], [])

    def _resume(self, state: StateFolder) -> None:
        saved = state.load()
        if saved is None:
            return
        told = saved.tensors
        with torch.no_grad():
            self.values.copy_(told["values"])
        self.healthy = told["healthy"]
        self.adam.state[self.values] = {name: told[f"moment/{name}"] for name in ("exp_avg", "exp_avg_sq", "step")}
        self.step = self.begun = saved.step
        self.entropies.resume(told, saved.step)


def _check(encoder: Encoder, tasks: Mapping[str, Task], vectors: Mapping[str, Expression]) -> None:
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "coefficients are learned over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    if not vectors:
        raise DataError("coefficients need at least one task vector. Got none.")
    for name, vector in vectors.items():
        require_vector(vector, "AdaMerging")
        if name not in tasks:
            raise DataError(
                f"{name}: no task is given for this vector, so it has no unlabelled examples. Give its task, or leave it out."
            )
        if tasks[name].regression:
            raise DataError(
                f"task {name!r}: is a regression; its predictions have no entropy. Leave it out, and give it a coefficient by hand."
            )
        if any(source.metadata.get("thetau.space") == "tangent" for source in vector.sources()):
            raise DataError(
                f"{vector.label}: belongs to the tangent space; coefficients are learned for vectors of the model's own space."
            )


def _selected(encoder: Encoder, vector: Expression, method: Method) -> dict[str, tuple[str, ...]]:
    """Parameters of the live model on which the method acts, and their names in the checkpoint."""
    selection = method.chain().selection
    stored = stored_names(encoder)
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.module.named_parameters()}
    roles = Roles.of(vector.reference) if vector.reference is not None else Roles()
    found = {
        live: names
        for live, names in stored.items()
        if selection.takes(names[0], shapes[live], roles.kind(names[0], shapes[live])) and 0 not in shapes[live]
    }
    if not found:
        raise AlignmentError(f"{encoder.folder}: no parameter of the live model fits {selection}.")
    return found


def _acted_on(vector: Expression, stored: Mapping[str, tuple[str, ...]], method: Method) -> list[str]:
    """The checkpoint's names of all tensors on which the method acts, those that do not run among them.

    All of them, so that what ranks whole vectors ranks the same entries in the merge as it did for the learning.
    """
    live = {known for names in stored.values() for known in names}
    if vector.reference is None:
        return sorted(live)
    selection, roles = method.chain().selection, Roles.of(vector.reference)
    return sorted(
        name
        for name, spec in vector.reference.specs.items()
        if spec.dtype.is_floating_point and (name in live or selection.takes(name, spec.shape, roles.kind(name, spec.shape)))
    )


def _groups(encoder: Encoder, stored: Mapping[str, tuple[str, ...]], config: CoefficientConfig) -> dict[str, int]:
    """The number of each live parameter's group: the block's, outside the blocks the tensor's own; 0 for all of a task."""
    if config.granularity == "task":
        return dict.fromkeys(stored, 0)
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.module.named_parameters()}
    roles = Roles()
    found: dict[str, int] = {}
    for number, (live, names) in enumerate(stored.items()):
        layer = roles.layer(names[0], shapes[live]) if config.granularity == "layer" else None
        found[live] = number if layer is None else -1 - layer
    return found


def _materialised(
    vectors: Mapping[str, Expression], method: AdaMerging, folder: Path, seed: int, engine: Engine | None
) -> dict[str, Path]:
    """The vectors after the method's transforms, as files; those that an earlier run wrote are taken."""
    names = sorted(vectors)
    made = transform([vectors[name] for name in names], method.then, names=names, seed=seed, engine=engine)
    files = {name: folder / f"{number:04d}.safetensors" for number, name in enumerate(names)}
    for name, vector in zip(names, made, strict=True):
        if not files[name].exists():
            folder.mkdir(parents=True, exist_ok=True)
            vector.save(files[name], dtype="float32", engine=engine)
    return files


def _notes(learner: Learner, config: CoefficientConfig, stopped: str | None) -> list[str]:
    notes = [] if stopped is None else [stopped]
    held = (learner.values.detach() < 0) | (learner.values.detach() > 1)
    if config.clamp and bool(held.any()):
        notes.append(f"{int(held.sum())} of {held.numel()} coefficients are at an end of [0, 1], where the clamp holds them.")
    if config.split == "test":
        notes.append(
            "the coefficients were learned on the test examples themselves, without their labels: a test on them is no held-out one."
        )
    return notes


def _write(
    result: Coefficients, told: Mapping[str, Tensor], encoder: Encoder, facts: Mapping[str, str], origins: Mapping[str, str]
) -> None:
    """A file a task; `told` holds the coefficients of all tasks by the checkpoint's names."""
    about = json.dumps({name: value for name, value in result.to_json().items() if name not in ("folder", "cached")})
    for place, task in enumerate(result.tasks):
        origin = origins.get(task, task)
        more = {"task": task, "model": origin, "examples": str(result.examples[task]), "result": about}
        tensors = {name: values[place].clone() for name, values in told.items()}
        save_evidence(result.files[task], KIND, tensors, {**facts, **more, **file_of(origin, encoder)})


def _existing(folder: Path, names: Sequence[str], key: str) -> Coefficients | None:
    """The result that a folder holds already; None where there is no folder, or some files are missing."""
    if not folder.exists():
        return None
    wanted = {folder / f"{name}.safetensors" for name in names}
    there = set(folder.iterdir()) if folder.is_dir() else {folder}
    told: dict[str, Any] = {}
    try:
        facts = [read_facts(path, KIND) for path in there & wanted]
    except CheckpointError as error:
        raise OutputError(
            f"{folder}: must be new, or hold these very coefficients. It holds something else. Choose another name."
        ) from error
    if there - wanted or any(one.get("key") != key for one in facts):
        raise OutputError(
            f"{folder}: must be new, or hold these very coefficients. It holds something else, or those of other settings, data or weights. Choose "
            "another name or remove it."
        )
    if there != wanted:
        return None
    told = json.loads(facts[0]["result"])
    return Coefficients(
        **{
            **told,
            "folder": folder,
            "tasks": tuple(told["tasks"]),
            "entropy": {task: tuple(ends) for task, ends in told["entropy"].items()},
            "notes": tuple(told["notes"]),
            "cached": True,
        }
    )
