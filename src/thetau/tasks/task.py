"""What a task is: where its data lie, what its classes are called, whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thetau.errors import DataError
from thetau.tasks.prompts import Prompts
from thetau.tasks.rows import SPLITS, Kind, Split, read_split, split_file


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task; its splits are read when they are asked for.

    - `kind`: `text`, or `text_pair` for two texts that the tokenizer joins.
    - `labels`: the class names, in the order of the label numbers.
    - `licence`, `source`: what `meta.json` says about the data.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    prompts: Prompts
    folder: Path
    licence: str
    source: str

    def split(self, name: str, limit: int | None = None) -> Split:
        """The examples of `train`, `validation` or `test`, at most `limit` of them. Raises `DataError` on any bad row."""
        if name not in SPLITS:
            raise DataError(f"task {self.name!r}: split must be one of {', '.join(SPLITS)}. Got {name!r}.")
        return read_split(split_file(self.folder, name), self.kind, self.labels).limited(limit)
