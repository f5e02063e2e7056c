"""A session: a base that runs, tasks to measure on it, and the fine-tuned models whose vectors are measured.

    session = Session.open(["models/sst2", "models/mnli"], reading=Reading(max_length=32, cache=Path("cache")))
    session.space.accuracy({"sst2": 0.3, "mnli": 0.3}, "sst2", "test")

What can be made once is: heads, encoded inputs, the models' vectors, the space in which they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

from torch import Tensor

from thetau.bases import Bank
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.merging import held
from thetau.evaluate.options import BASE, Reading
from thetau.evaluate.spaces import Space, TangentSpace, WeightSpace
from thetau.evaluate.tuned import Tuned, make_space, one_space, open_tuned, read_vectors
from thetau.facade import Expression, as_vector, open_base
from thetau.facade import open as open_weights
from thetau.finetune.output import trained_heads
from thetau.models import Encoder, load_encoder
from thetau.models.causal import check_tokenizer
from thetau.models.loading import kind_named
from thetau.tasks import Task, load_task
from thetau.tasks.head import AnyHead


@final
class Session:
    """A live base, its tasks with their heads, and the models that were fine-tuned from it.

    - `encoder`: the base, which runs. `evaluator`: it with the tasks, their heads and inputs.
    - `models`: the fine-tuned models, each of one task. `tangent`: whether their vectors belong to the tangent space.
    - `limits`: split → largest number of examples of a task. `reading`: how data are read, and where evaluations are kept.

    Make it with `open`, or `of_bank`.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Iterable[Task],
        *,
        base: str,
        models: Sequence[Tuned] = (),
        heads: Mapping[str, AnyHead] | None = None,
        limits: Mapping[str, int | None] | None = None,
        reading: Reading | None = None,
        exact: bool = False,
    ) -> None:
        self.encoder, self.base, self.models = encoder, base, tuple(models)
        self.reading, self.limits = reading or Reading(), dict(limits or {})
        self.tangent = one_space(models, encoder) if models else False
        self.evaluator = Evaluator(
            encoder,
            tasks,
            limits=self.limits,
            max_length=self.reading.max_length,
            image_size=self.reading.image_size,
            heads=heads,
            cache=self.reading.cache,
        )
        self.weights: dict[str, Tensor] = encoder.weights(exact=exact)

    @classmethod
    def open(
        cls,
        models: Sequence[str | Path] = (),
        *,
        base: str | Path = BASE,
        tasks: Iterable[str | Path] | None = None,
        limits: Mapping[str, int | None] | None = None,
        reading: Reading | None = None,
        heads: Mapping[str, AnyHead] | None = None,
        exact: bool = False,
    ) -> Session:
        """Open fine-tuned models over their base.

        Args:
            models: folders or files of fine-tuned models, whose records name their tasks, or `TASK=MODEL`.
            base: the model that they were fine-tuned from: a folder, a packaged model or a hub id.
            tasks: names or folders of the tasks to measure; by default those of the models.
            limits: split → largest number of examples of a task; all of them by default.
            heads: task → head that is used in place of the base's, over those that were trained with the models.
            exact: take vectors in float32 from what the base runs with, where its checkpoint is of a smaller dtype.

        Raises:
            DataError: a model without a record, of another base, of a second paradigm or of a task that is there twice; a task that is not
                found.
        """
        given = reading or Reading()
        tuned = [open_tuned(model) for model in models]
        encoder = load_encoder(str(base), kind_named(given.kind), raw=given.features == "raw")
        wanted = [
            load_task(name, given.data) for name in dict.fromkeys([model.task for model in tuned] if tasks is None else tasks)
        ]
        if encoder.kind == "causal":
            for model in tuned:
                check_tokenizer(encoder, model.path)
        own = {name: head for model in tuned for name, head in model.heads().items()} | dict(heads or {})
        return cls(encoder, wanted, base=str(base), models=tuned, heads=own, limits=limits, reading=given, exact=exact)

    @classmethod
    def of_bank(
        cls,
        bank: Bank,
        tasks: Sequence[str | Path] = (),
        *,
        base: str | Path | None = None,
        models: Mapping[str, Path] | None = None,
        limits: Mapping[str, int | None] | None = None,
        reading: Reading | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Session:
        """Open the base of a bank of bases, with tasks to measure its bases on.

        Args:
            tasks: names or folders; by default all the tasks of the bank.
            base: where the bank's base lies now, if it was moved.
            models: task, as in `tasks`, → folder of its model, where that is not the one that the bank recorded: its head is used if it was trained.
            say: is told of each model that is gone, whose head, had it been trained, is missed.
        """
        given = reading or Reading()
        found = {str(name): load_task(name, given.data) for name in tasks or bank.members}
        listed = list({task.name: task for task in found.values()}.values())
        folders = {task.name: Path(bank.members[task.name].source) for task in listed if task.name in bank.members}
        folders |= {found[name].name: path for name, path in (models or {}).items() if name in found}
        label = str(base or bank.base_label)
        encoder = load_encoder(label, kind_named(given.kind), raw=given.features == "raw")
        return cls(encoder, listed, base=label, heads=_heads(folders, say), limits=limits, reading=given)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.evaluator.tasks)

    @property
    def cache(self) -> Path | None:
        """The folder in which evaluations are kept."""
        return self.reading.cache

    @cached_property
    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """Task → its model's vector in float32, under the checkpoint's names."""
        return read_vectors(self.models, self.encoder, self.weights)

    @cached_property
    def held(self) -> dict[str, Expression]:
        """Task → its model's vector as what is merged, in memory: however many merges read it, its files are read once."""
        start = open_base(self.base)
        return {task: held(vector, start, task) for task, vector in self.vectors.items()}

    @cached_property
    def space(self) -> Space:
        """The models' vectors where they belong: in the model, or in its linear form."""
        return self.linear if self.tangent else self.plain

    @cached_property
    def plain(self) -> WeightSpace:
        """The models' vectors in the model itself."""
        return WeightSpace(self.evaluator, self.weights, self.vectors)

    @cached_property
    def linear(self) -> TangentSpace:
        """The models' vectors in the linear form of the model."""
        space = self.space_of(self.vectors, tangent=True)
        assert isinstance(space, TangentSpace)
        return space

    def space_of(self, vectors: Mapping[str, Mapping[str, Tensor]], *, tangent: bool | None = None) -> Space:
        """Other vectors over the same base; `tangent` as the models' by default."""
        linear = self.tangent if tangent is None else tangent
        return make_space(self.evaluator, self.weights, vectors, tangent=linear, cache=self.cache)

    def expressions(self) -> dict[str, Expression]:
        """Task → its model's vector, lazily, for merges and saves."""
        start = open_base(self.base)
        return {model.task: as_vector(open_weights(model.path, base=start), start).named(model.task) for model in self.models}


def _heads(folders: Mapping[str, Path], say: Callable[[str], None]) -> dict[str, AnyHead]:
    """The heads that were trained with the tasks' models. Raises `DataError` for a damaged one."""
    found: dict[str, AnyHead] = {}
    for name, folder in folders.items():
        if folder.is_dir():
            found |= {task: head for task, head in trained_heads(folder).items() if task == name}
        elif not folder.exists():
            say(f"{name}: its model is not at {folder}; a head that was trained with it would be missed, the base's is used.")
    return found
