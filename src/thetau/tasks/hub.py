"""Texts and images of a task from Hugging Face `datasets` (a hub name, a local folder, a jsonl file) or from a parquet file.

No code of a data set is ever run: `trust_remote_code` is not passed, and data sets that need it are refused by `datasets`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from thetau.errors import DataError, nearest
from thetau.tasks.images import ImageSplit, images_of
from thetau.tasks.rows import Split

_SHOWN = 5
_ROLES = ("text", "text2", "label")


def read_dataset(
    name: str | Path,
    config: str | None,
    split: str,
    columns: Mapping[str, str],
    limit: int | None = None,
    *,
    labels: tuple[str, ...] | None,
    same_names: bool = True,
) -> Split:
    """One split of a data set of the hub, of a local folder that `datasets` can read, or of a `.jsonl` or `.parquet` file.

    - `config`: the data set's configuration, such as `sst2` of `glue`; None for none. A file has none, and its split is `train`.
    - `columns`: `text`, perhaps `text2`, and `label` → the data set's column.
    - `labels`: the class names in the order of the label numbers, which must be the data set's own when it names them; rows may
      give names instead of numbers. None: a regression.

    Raises `DataError`: not found, no such split or column, rows that break a rule.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".parquet":
        return read_parquet(path, columns, labels).limited(limit)
    where = _where(name, config, split)
    table = _table(name, config, split, where)
    _check_columns(columns, table.column_names, where)
    _check_names(table, columns["label"], labels, where, same=same_names)
    return _rows(lambda column: list(table[column]), columns, labels, where).limited(limit)


def read_records(name: str | Path, config: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All the rows of one split of a data set, or of a parquet file, with all their columns. Raises `DataError`."""
    where = _where(name, config, split)
    if (path := Path(name)).is_file() and path.suffix == ".parquet":
        return [dict(row) for row in _parquet(path, None).to_pylist()]
    return [dict(row) for row in _table(name, config, split, where)]


def read_image_dataset(
    name: str | Path,
    config: str | None,
    split: str,
    columns: Mapping[str, str],
    *,
    labels: tuple[str, ...],
    same_names: bool = True,
) -> ImageSplit:
    """As `read_dataset`, of images; `columns`: `image` and `label` → the data set's column. Files are decoded when needed."""
    where = _where(name, config, split)
    table = _table(name, config, split, where)
    missing = [column for column in (columns.get("image"), columns.get("label")) if column not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: no column {missing[0]!r}. Known: {', '.join(table.column_names)}.{nearest(str(missing[0]), table.column_names)}"
        )
    _check_names(table, columns["label"], labels, where, same=same_names)
    undecoded = table.cast_column(columns["image"], import_module("datasets").Image(decode=False))
    return images_of(list(undecoded[columns["image"]]), list(table[columns["label"]]), labels, where)


def _where(name: str | Path, config: str | None, split: str) -> str:
    return f"{name}{'' if config is None else f' ({config})'}, split {split!r}"


def _table(name: str | Path, config: str | None, split: str, where: str) -> Any:
    path = Path(name)
    try:
        api: Any = import_module("datasets")
    except ImportError as error:
        raise DataError(f"{where}: reading it needs datasets. Install it: pip install 'thetau[data]'") from error
    with _quiet(api):
        try:
            args, files = (("json",), {"data_files": str(path)}) if path.is_file() else ((str(name), config), {})
            return api.load_dataset(*args, split=split, **files)
        except (OSError, ValueError, RuntimeError, api.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{where}: cannot be read ({reason}). Check the name, the configuration and the split.") from error


def _check_names(table: Any, column: str, labels: tuple[str, ...] | None, where: str, *, same: bool) -> None:
    """The classes that a data set names must be the task's, in their order; spelling may differ in case and punctuation.

    Where they need not be the same, they must be as many.
    """
    own = getattr(table.features[column], "names", None)
    if labels is None or own is None:
        return
    if len(own) != len(labels):
        raise DataError(f"{where}: the data set has {len(own)} classes and the task {len(labels)}. Correct `labels`.")
    if same and [_plain(label) for label in labels] != [_plain(str(name)) for name in own]:
        raise DataError(f"{where}: `labels` must be the data set's own names in its order, {own}. Got {list(labels)}.")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def read_parquet(path: str | Path, columns: Mapping[str, str], labels: tuple[str, ...] | None) -> Split:
    """The rows of one parquet file through pyarrow; `columns` and `labels` as in `read_dataset`.

    Raises `DataError`: not readable, no such column, rows that break a rule.
    """
    table = _parquet(Path(path), columns)
    return _rows(lambda column: table.column(column).to_pylist(), columns, labels, str(path))


def _parquet(path: Path, columns: Mapping[str, str] | None) -> Any:
    """A parquet file's table, of some columns or of all."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow. Install it: pip install 'thetau[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            if columns is not None:
                _check_columns(columns, file.schema_arrow.names, str(path))
            return file.read(columns=None if columns is None else list(columns.values()))
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise DataError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())}).") from error


def _check_columns(columns: Mapping[str, str], known: Sequence[str], where: str) -> None:
    unknown = [role for role in columns if role not in _ROLES]
    if unknown or "text" not in columns or "label" not in columns:
        raise DataError(f"{where}: `columns` must map text, label and perhaps text2 to columns. Got {dict(columns)!r}.")
    missing = [column for column in columns.values() if column not in known]
    if missing:
        raise DataError(f"{where}: no column {missing[0]!r}. Known: {', '.join(known)}.{nearest(missing[0], known)}")


def _rows(read: Callable[[str], list[Any]], columns: Mapping[str, str], labels: tuple[str, ...] | None, where: str) -> Split:
    given = {role: read(column) for role, column in columns.items()}
    numbers: dict[str, int] = {label: number for number, label in enumerate(labels or ())}
    given["label"] = [numbers.get(value, value) if isinstance(value, str) else value for value in given["label"]]
    texts, texts2, targets = given["text"], given.get("text2"), given["label"]
    found = ((row, _problem(texts[row], texts2[row] if texts2 else "", value, labels)) for row, value in enumerate(targets))
    problems = [f"row {row}: {problem}" for row, problem in found if problem is not None]
    if problems:
        count = len(problems)
        more = f"\n  … and {count - _SHOWN} more" if count > _SHOWN else ""
        head = f"{where}: {count} row{'s' if count > 1 else ''} cannot be used."
        raise DataError(head + "\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    if not targets:
        raise DataError(f"{where}: a split must hold at least one example. Got none; choose another split.")
    pair = None if texts2 is None else tuple(texts2)
    return Split(texts=tuple(texts), texts2=pair, labels=tuple(map(float, targets)) if labels is None else tuple(targets))


def _problem(text: Any, text2: Any, label: Any, labels: tuple[str, ...] | None) -> str | None:
    """The rule that a row breaks. One text of a pair may be blank, as a few of QQP are."""
    if not isinstance(text, str) or not isinstance(text2, str) or not (text + text2).strip():
        return f"texts must be given and not be blank. Got {text!r}{f' and {text2!r}' if text2 != '' else ''}; drop the row."
    if labels is None:
        if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
            return f"the label of a regression must be a finite number. Got {label!r}; correct the row."
        return None
    if isinstance(label, str):
        return f"the label must be one of {', '.join(labels)}. Got {label!r}.{nearest(label, labels)}"
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(labels):
        hint = "; this split has no labels, choose another one" if label == -1 else "; correct the row or `labels`"
        return f"the label must be an integer in 0..{len(labels) - 1}. Got {label!r}{hint}."
    return None


@contextmanager
def _quiet(api: Any) -> Iterator[None]:
    """No progress bars; the caller's setting comes back."""
    before = api.are_progress_bars_disabled()
    api.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            api.enable_progress_bars()
