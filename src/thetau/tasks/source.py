"""Where the examples of a task come from: files in its folder, or a data set of the hub."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from thetau.errors import DataError
from thetau.tasks.causal.form import CAUSAL
from thetau.tasks.causal.rows import Rows
from thetau.tasks.hub import read_dataset, read_image_dataset, read_parquet, read_records
from thetau.tasks.images import ImageSplit, read_image_folder, read_image_parquet, read_npz
from thetau.tasks.rows import SPLITS, Kind, Split, read_lines, read_split, split_file

AnySplit = Split | ImageSplit | Rows
HELD_OUT, MOST_HELD_OUT = 0.1, 5000


@final
@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set that Hugging Face `datasets` reads: a hub name, or a local folder of the same layout.

    - `splits`: split → the data set's own. Without `validation`, a tenth of `train` (at most 5,000 examples) is held out for it, the
      same one always, as the task-arithmetic papers do (Ilharco et al., ICLR 2023).
    - `columns`: text, text2, image, label → the data set's column.
    - `class_names`: `same`, the data set's names must be the task's labels; `by_number`, the labels are other words for its classes,
      in the same order, such as CLIP's.
    """

    name: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    columns: Mapping[str, str] = field(default_factory=dict)
    class_names: Literal["same", "by_number"] = "same"

    def read(self, split: str, kind: Kind, labels: tuple[str, ...] | None) -> AnySplit:
        """All the examples of a split. Raises `DataError`."""
        same = self.class_names == "same"
        held_out = "validation" not in self.splits and split in ("train", "validation")
        own = "train" if held_out else split
        if own not in self.splits:
            raise DataError(f"{self.name}: no split {split!r} is named in `hub.splits`. Got {', '.join(self.splits)}.")
        examples: AnySplit
        if kind in CAUSAL:
            examples = _numbered(
                read_records(self.name, self.config, self.splits[own]), f"{self.name}, split {self.splits[own]!r}"
            )
        elif kind == "image":
            columns = {"image": "image", "label": "label", **self.columns}
            examples = read_image_dataset(self.name, self.config, self.splits[own], columns, labels=labels or (), same_names=same)
        else:
            texts = ("text", "text2") if kind == "text_pair" else ("text",)
            columns = {name: self.columns.get(name, name) for name in (*texts, "label")}
            examples = read_dataset(self.name, self.config, self.splits[own], columns, labels=labels, same_names=same)
        return _held_out(examples, split, self.name) if held_out else examples


def _held_out(examples: AnySplit, split: str, name: str) -> AnySplit:
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    count = min(MOST_HELD_OUT, int(len(order) * HELD_OUT))
    if not count:
        raise DataError(f"{name}: {len(order)} examples are too few to hold a tenth out for validation. Name a split for it.")
    return examples.take(sorted(order[:count] if split == "validation" else order[count:]))


@final
@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Files beside the task's description, of one of these layouts, `<split>` being train, validation or test:

    - texts: `<split>.jsonl[.gz]`, or `<split>.parquet`;
    - images: an npz file of arrays, `<split>.parquet`, or folders `<split>/<class>/`.

    `columns` renames the columns of parquet files.
    """

    root: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    def read(self, split: str, kind: Kind, labels: tuple[str, ...] | None) -> AnySplit:
        """All the examples of a split. Raises `DataError`."""
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}. Got {split!r}.")
        parquet = self.root / f"{split}.parquet"
        if kind in CAUSAL:
            return (
                _numbered(read_records(parquet), str(parquet)) if parquet.is_file() else _read_rows(split_file(self.root, split))
            )
        if kind == "image":
            if self.root.is_file():
                return read_npz(self.root, split, labels or ())
            return (
                read_image_parquet(parquet, labels or ())
                if parquet.is_file()
                else read_image_folder(self.root, split, labels or ())
            )
        if parquet.is_file():
            texts = ("text", "text2") if kind == "text_pair" else ("text",)
            return read_parquet(parquet, {name: self.columns.get(name, name) for name in (*texts, "label")}, labels)
        return read_split(split_file(self.root, split), kind, labels)


def _read_rows(path: Path) -> Rows:
    """The rows of a file of JSON lines, whatever their columns."""
    read = list(read_lines(path))
    bad = next((line for line, row in read if not isinstance(row, dict)), None)
    if bad is not None:
        raise DataError(f"{path}: line {bad}: a row must be one JSON object. Write the columns that the task's templates name.")
    return _checked(Rows(rows=tuple(row for _, row in read), lines=tuple(line for line, _ in read), where=str(path)))


def _numbered(records: Sequence[Mapping[str, Any]], where: str) -> Rows:
    return _checked(Rows(rows=tuple(records), lines=tuple(range(1, len(records) + 1)), where=where))


def _checked(rows: Rows) -> Rows:
    if not len(rows):
        raise DataError(f"{rows.where}: a split must hold at least one row. Got none; put rows in it.")
    return rows
