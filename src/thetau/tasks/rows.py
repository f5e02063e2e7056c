"""Reading the rows of one split, every one of them checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thetau.errors import DataError

Kind = Literal["text", "text_pair", "image", "choices", "generation", "perplexity"]
SPLITS = ("train", "validation", "test")
_SHOWN = 5
_BLANK = 0.01  # share of a split that may be blank: a few are examples as any other, more are a wrong column


@dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of one split, in file order. `texts2` is given for pair tasks only.

    Labels index the task's `labels`; those of a regression are numbers.
    """

    texts: tuple[str, ...]
    texts2: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Split:
        """Some of the examples, in the order given."""
        return Split(
            texts=tuple(self.texts[i] for i in indices),
            texts2=None if self.texts2 is None else tuple(self.texts2[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
        )

    def limited(self, limit: int | None) -> Split:
        """At most `limit` examples, drawn without regard to their order in the file and always the same ones."""
        return self if limit is None or limit >= len(self) else self.take(drawn(len(self), limit))

    def hash(self) -> str:
        """A hexadecimal digest of texts and labels in their order."""
        content = json.dumps([self.texts, self.texts2, self.labels], ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def drawn(count: int, limit: int) -> list[int]:
    """`limit` of `count` places in their order, always the same ones. Raises `DataError` for less than one."""
    if limit < 1:
        raise DataError(f"the number of examples must be at least 1. Got {limit}.")
    return sorted(random.Random(0).sample(range(count), limit))


def split_file(folder: Path, split: str) -> Path:
    """The file of a split: `<split>.jsonl.gz` or `<split>.jsonl`. Raises `DataError` when there is neither, or both."""
    found = [path for suffix in (".jsonl.gz", ".jsonl") if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        got = "both" if found else "neither"
        raise DataError(f"{folder}: split {split!r} must be one file, {split}.jsonl.gz or {split}.jsonl. Got {got}.")
    return found[0]


def read_split(path: Path, kind: Kind, labels: tuple[str, ...] | None) -> Split:
    """All the rows of a file; keys other than `text`, `text2` and `label` are not read. `labels` is None for a regression.

    A blank text is an example like any other (a tweet of nothing but a link, say) where at most 1 % of the rows have one.

    Raises `DataError` with the file, the line, the rule and the remedy of the first few rows that break a rule.
    """
    texts, texts2, numbers = [], [], []
    problems: list[str] = []
    count = 0
    rows = list(read_lines(path))
    blank = {line for line, row in rows if _is_blank(row, kind)}
    for line, row in rows:
        problem = _problem(row, kind, labels, blank_allowed=len(blank) <= _BLANK * len(rows))
        if problem is None:
            texts.append(row["text"])
            texts2.append(row.get("text2", ""))
            numbers.append(row["label"])
        else:
            count += 1
            if count <= _SHOWN:
                problems.append(f"line {line}: {problem}")
    if problems:
        more = f"\n  … and {count - _SHOWN} more" if count > _SHOWN else ""
        raise DataError(f"{path}: {count} row{'s' if count > 1 else ''} cannot be used.\n  " + "\n  ".join(problems) + more)
    if not texts:
        raise DataError(f"{path}: a split must hold at least one example. Got an empty file; put rows in it.")
    return Split(texts=tuple(texts), texts2=tuple(texts2) if kind == "text_pair" else None, labels=tuple(numbers))


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line of a file of JSON lines with its number, blank ones left out. Raises `DataError`."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line, content in enumerate(file, start=1):
                if not content.strip():
                    continue
                try:
                    yield line, json.loads(content)
                except ValueError as error:
                    raise DataError(f"{path}: line {line}: a row must be one JSON object ({error}).") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as {'gzip of ' if path.suffix == '.gz' else ''}UTF-8 text ({error}).") from error


def _texts(kind: Kind) -> tuple[str, ...]:
    return ("text", "text2") if kind == "text_pair" else ("text",)


def _is_blank(row: Any, kind: Kind) -> bool:
    return isinstance(row, dict) and any(isinstance(row.get(key), str) and not row[key].strip() for key in _texts(kind))


def _problem(row: Any, kind: Kind, labels: tuple[str, ...] | None, *, blank_allowed: bool) -> str | None:
    if not isinstance(row, dict):
        return f"a row must be a JSON object. Got {type(row).__name__}."
    for key in _texts(kind):
        value = row.get(key)
        if not isinstance(value, str) or not (value.strip() or blank_allowed):
            return f"`{key}` must be a text that is not blank for a task of kind {kind}. Got {value!r}; add it or drop the row."
    if kind == "text" and "text2" in row:
        return "`text2` is for tasks of kind text_pair, this one is of kind text. Change `kind` in meta.json or drop `text2`."
    label = row.get("label")
    if labels is None:
        if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
            return f"the `label` of a regression must be a finite number. Got {label!r}; correct it or drop the row."
        return None
    if not isinstance(label, int) or isinstance(label, bool):
        return f"`label` must be an integer. Got {label!r}; write the index of the class in meta.json's `labels`."
    if not 0 <= label < len(labels):
        return (
            f"`label` must be in 0..{len(labels) - 1}, the head has {len(labels)} classes. "
            f"Got {label}; correct it or add the class to `labels` in meta.json."
        )
    return None
