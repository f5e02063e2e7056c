"""What a task is: where its data lie, what its classes are called, how it is measured, whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from thetau.errors import DataError
from thetau.tasks.causal.form import Form
from thetau.tasks.causal.rows import Question, Rows, questions
from thetau.tasks.prompts import Prompts
from thetau.tasks.rows import SPLITS, Kind
from thetau.tasks.source import AnySplit, FileSource, HubSource

Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "exact_match", "perplexity"]
HeadKind = Literal["prompts", "means", "probe"]


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification or regression task, or one of a causal language model; its splits are read when they are asked for.

    - `kind`: `text`, `text_pair` for two texts that the tokenizer joins, or `image`; of causal models `choices`, `generation`, `perplexity`.
    - `labels`: the class names, in the order of the label numbers; none for a regression.
    - `folder`: where its description lies, with `prompts.yaml`, `mask.yaml`, `text_to_text.yaml` if it has its own.
    - `metric`: pearson makes it a regression. `head`: how its head is made, None for what suits the encoder.
    - `crop`: of images, as in `Pixels`. `form`: how a causal model is asked, None for other tasks.
    - `licence`, `source`: what `meta.json` says about the data.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    prompts: Prompts
    folder: Path
    examples: FileSource | HubSource
    licence: str
    source: str
    metric: Metric = "accuracy"
    head: HeadKind | None = None
    crop: str = "none"
    form: Form | None = None

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.metric == "pearson"

    def split(self, name: str, limit: int | None = None) -> AnySplit:
        """The examples of `train`, `validation` or `test`, at most `limit` of them. Raises `DataError` on any bad row."""
        if name not in SPLITS:
            raise DataError(f"task {self.name!r}: split must be one of {', '.join(SPLITS)}. Got {name!r}.")
        return self.examples.read(name, self.kind, None if self.regression else self.labels).limited(limit)

    def asked(self, name: str, limit: int | None = None) -> tuple[list[Question], list[Question]]:
        """What a causal model is asked of a split, and the solved examples that stand before each. Raises `DataError`."""
        form, rows = self.form, self.split(name, limit)
        if form is None or not isinstance(rows, Rows):
            raise DataError(f"task {self.name!r}: is of kind {self.kind}, of which a causal model is not asked.")
        if not form.shots:
            return questions(form, rows), []
        if form.shots_from == name:
            raise DataError(
                f"task {self.name!r}: its solved examples come from {name!r} itself, whose answers would be given away. Set `shots` to 0, "
                "`shots_from` to another split, or read another split."
            )
        source = self.split(form.shots_from)
        if not isinstance(source, Rows) or len(source) < form.shots:
            raise DataError(
                f"task {self.name!r}: split {form.shots_from!r} must hold the {form.shots} solved examples. Got {len(source)}."
            )
        return questions(form, rows), questions(form, source.take(range(form.shots)))
