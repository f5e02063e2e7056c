"""What a task is: where its data lie, what its classes are called, how it is measured, whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from thetau.errors import DataError
from thetau.tasks.prompts import Prompts
from thetau.tasks.rows import SPLITS, Kind
from thetau.tasks.source import AnySplit, FileSource, HubSource

Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson"]
HeadKind = Literal["prompts", "means", "probe"]


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification or regression task; its splits are read when they are asked for.

    - `kind`: `text`, `text_pair` for two texts that the tokenizer joins, or `image`.
    - `labels`: the class names, in the order of the label numbers; none for a regression.
    - `folder`: where its description lies, with `prompts.yaml`, `mask.yaml`, `text_to_text.yaml` if it has its own.
    - `metric`: pearson makes it a regression. `head`: how its head is made, None for what suits the encoder.
    - `crop`: of images, as in `Pixels`.
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

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.metric == "pearson"

    def split(self, name: str, limit: int | None = None) -> AnySplit:
        """The examples of `train`, `validation` or `test`, at most `limit` of them. Raises `DataError` on any bad row."""
        if name not in SPLITS:
            raise DataError(f"task {self.name!r}: split must be one of {', '.join(SPLITS)}. Got {name!r}.")
        return self.examples.read(name, self.kind, None if self.regression else self.labels).limited(limit)
