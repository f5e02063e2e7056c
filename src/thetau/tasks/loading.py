"""Finding tasks: in the user's data folder first, then among those shipped with thetau."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from thetau.errors import DataError, nearest
from thetau.tasks.prompts import load_prompts
from thetau.tasks.task import Task

_META = "meta.json"


def shipped_data() -> Path:
    """The folder of the small tasks that come with thetau."""
    return Path(str(files("thetau.tasks").joinpath("data")))


def available_tasks(data: Path | None = None) -> dict[str, Path]:
    """Name → folder of every task that can be loaded. A task in `data` hides the shipped one of the same name.

    `data` holds task folders, or is one. Raises `DataError` when it holds none.
    """
    found = _folders(shipped_data())
    if data is not None:
        own = {data.resolve().name: data} if (data / _META).is_file() else _folders(data)
        if not own:
            deeper = [str(path.parent.parent) for path in sorted(data.glob(f"*/*/{_META}"))] if data.is_dir() else []
            hint = f" Did you mean {deeper[0]}?" if deeper else ""
            raise DataError(f"{data}: a data folder must hold folders with {_META}, one a task. Got none.{hint}")
        found |= own
    return dict(sorted(found.items()))


def _folders(root: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{_META}"))} if root.is_dir() else {}


def load_task(name: str | Path, data: Path | None = None) -> Task:
    """A task by its name (from `data`, else shipped) or by the path of its folder. Raises `DataError`."""
    folder = Path(name)
    if not (folder / _META).is_file():
        known = available_tasks(data)
        if str(name) not in known:
            hint = "" if data is not None else " Other tasks are read from a folder given by --data."
            raise DataError(f"no task {str(name)!r}. Known: {', '.join(known)}.{nearest(str(name), known)}{hint}")
        folder = known[str(name)]
    return _read(folder)


def _read(folder: Path) -> Task:
    path = folder / _META
    try:
        meta: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: must be a JSON object. Got {type(meta).__name__}.")
    problems = []
    kind, labels = meta.get("kind"), meta.get("labels")
    if kind not in ("text", "text_pair"):
        problems.append(f"`kind` must be text or text_pair. Got {kind!r}.")
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        problems.append(f"`labels` must be a list of class names. Got {labels!r}.")
    elif len(labels) < 2 or len(set(labels)) != len(labels):
        problems.append(f"`labels` must be at least two different class names. Got {labels!r}.")
    if problems or kind not in ("text", "text_pair"):
        raise DataError(f"{path}: " + " ".join(problems))
    name = str(meta.get("task") or folder.resolve().name)
    names = tuple(labels or ())
    return Task(
        name=name,
        kind=kind,
        labels=names,
        prompts=load_prompts(name, names, folder),
        folder=folder,
        licence=str(meta.get("licence", "not stated")),
        source=str(meta.get("source", "not stated")),
    )
