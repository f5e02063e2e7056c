"""Finding tasks: in the user's data folder first, then among those shipped with thetau."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from thetau.errors import DataError, nearest
from thetau.tasks.causal.form import CAUSAL, read_form
from thetau.tasks.images import CROPS
from thetau.tasks.prompts import Prompts, load_prompts
from thetau.tasks.rows import SPLITS, Kind
from thetau.tasks.source import FileSource, HubSource
from thetau.tasks.task import HeadKind, Metric, Task

_META = "meta.json"
_METRICS = tuple(metric for metric in get_args(Metric) if metric not in ("exact_match", "perplexity"))
_COMMON = ("task", "kind", "hub", "licence", "source")
_HUB_KEYS = ("name", "config", "splits", "columns", "class_names")
_ROLES = ("text", "text2", "image", "label")


def shipped_data() -> tuple[Path, ...]:
    """The folders of the tasks that come with thetau: small ones with their data, and others that the hub holds."""
    return tuple(Path(str(files("thetau.tasks").joinpath(name))) for name in ("hub_tasks", "data"))


def available_tasks(data: Path | None = None) -> dict[str, Path]:
    """Name → description of every task that can be loaded. A task in `data` hides the shipped one of the same name.

    `data` holds task folders with `meta.json` and npz files with a `.json` of the same name beside them, or is a task folder. Raises
    `DataError` when it holds none.

    Examples:
        >>> "banking77" in available_tasks()
        True
    """
    found: dict[str, Path] = {}
    for folder in shipped_data():
        found |= _tasks_in(folder)
    if data is not None:
        own = {data.resolve().name: data / _META} if (data / _META).is_file() else _tasks_in(data)
        if not own:
            deeper = [str(path.parent.parent) for path in sorted(data.glob(f"*/*/{_META}"))] if data.is_dir() else []
            hint = f" Did you mean {deeper[0]}?" if deeper else ""
            raise DataError(f"{data}: a data folder must hold folders with {_META}, one a task. Got none.{hint}")
        found |= own
    return dict(sorted(found.items()))


def _tasks_in(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        return {}
    arrays = {path.stem: path.with_suffix(".json") for path in sorted(root.glob("*.npz")) if path.with_suffix(".json").is_file()}
    return arrays | {path.parent.name: path for path in sorted(root.glob(f"*/{_META}"))}


def load_task(name: str | Path, data: Path | None = None) -> Task:
    """A task by its name (from `data`, else shipped) or by the path of its folder, its `meta.json` or its npz file. Raises `DataError`.

    Examples:
        >>> load_task("sms_spam").labels
        ('ham', 'spam')
    """
    path = Path(name)
    if path.suffix == ".npz" and path.is_file():
        path = path.with_suffix(".json")
        if not path.is_file():
            raise DataError(f"{name}: {path.name} must lie beside it, with the task's `kind` and `labels`; there is none.")
    elif path.name == _META and path.is_file():
        pass
    elif (path / _META).is_file():
        path = path / _META
    else:
        known = available_tasks(data)
        if str(name) not in known:
            hint = "" if data is not None else " Other tasks are read from a folder given by --data."
            raise DataError(f"no task {str(name)!r}. Known: {', '.join(known)}.{nearest(str(name), known)}{hint}")
        path = known[str(name)]
    return _read(path, data)


def _read(path: Path, data: Path | None) -> Task:
    try:
        meta: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: must be a JSON object. Got {type(meta).__name__}.")
    if meta.get("kind") in CAUSAL:
        return _causal(path, meta, data)
    problems: list[str] = []
    for key, choices, default in (
        ("kind", get_args(Kind), None),
        ("metric", _METRICS, "accuracy"),
        ("head", (*get_args(HeadKind), None), None),
        ("crop", CROPS, "none"),
    ):
        value = meta.get(key, default)
        if value not in choices:
            problems.append(f"`{key}` must be one of {', '.join(map(str, choices))}. Got {value!r}.")
    labels = _labels(meta, problems)
    hub = _hub(meta.get("hub"), problems)
    columns = meta.get("columns", {})
    if not isinstance(columns, dict) or not set(columns) <= set(_ROLES):
        problems.append(f"`columns` must map {', '.join(_ROLES)} to columns. Got {columns!r}.")
    if problems:
        raise DataError(f"{path}: " + " ".join(problems))
    own = path.parent if path.name == _META else path.with_suffix(".npz")
    name = str(meta.get("task") or own.resolve().stem)
    folder = path.parent
    return Task(
        name=name,
        kind=meta["kind"],
        labels=labels,
        prompts=load_prompts(name, labels, folder if path.name == _META else folder / name, meta["kind"]),
        folder=folder if path.name == _META else folder / name,
        examples=FileSource(root=own, columns=columns) if hub is None else _local(hub, data),
        licence=str(meta.get("licence", "not stated")),
        source=str(meta.get("source", "not stated")),
        metric=meta.get("metric", "accuracy"),
        head=meta.get("head"),
        crop=meta.get("crop", "none"),
    )


def _causal(path: Path, meta: dict[str, Any], data: Path | None) -> Task:
    """A task of a causal language model."""
    problems: list[str] = []
    form = read_form(meta, _COMMON, problems)
    hub = _hub(meta.get("hub"), problems)
    if hub is not None and (hub.columns or hub.class_names != "same"):
        problems.append(
            "`hub` needs no `columns` and `class_names` here: the templates name the data set's own columns. Leave them out."
        )
    if form is None or problems:
        raise DataError(f"{path}: " + " ".join(problems))
    return Task(
        name=str(meta.get("task") or path.parent.resolve().name),
        kind=form.kind,
        labels=(),
        prompts=Prompts(templates=(), phrases=()),
        folder=path.parent,
        examples=FileSource(root=path.parent) if hub is None else _local(hub, data),
        licence=str(meta.get("licence", "not stated")),
        source=str(meta.get("source", "not stated")),
        metric=form.metric,
        form=form,
    )


def _labels(meta: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    labels = meta.get("labels")
    if meta.get("metric") == "pearson":
        if labels:
            problems.append("`labels` are classes, and metric pearson is for numbers: leave one of them out.")
        return ()
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        problems.append(f"`labels` must be a list of class names. Got {labels!r}.")
        return ()
    if len(labels) < 2 or len(set(labels)) != len(labels):
        problems.append(f"`labels` must be at least two different class names. Got {labels!r}.")
    return tuple(labels)


def _hub(given: Any, problems: list[str]) -> HubSource | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        problems.append(f"`hub` must be a mapping with a `name`. Got {given!r}.")
        return None
    problems += [f"unknown key `hub.{key}`.{nearest(str(key), _HUB_KEYS)}" for key in given if key not in _HUB_KEYS]
    splits, columns = given.get("splits", {"train": "train", "test": "test"}), given.get("columns", {})
    if not isinstance(splits, dict) or not {"train", "test"} <= set(splits) <= set(SPLITS):
        problems.append(f"`hub.splits` must map train, test and perhaps validation to the data set's splits. Got {splits!r}.")
    if not isinstance(columns, dict) or not set(columns) <= set(_ROLES):
        problems.append(f"`hub.columns` must map {', '.join(_ROLES)} to columns. Got {columns!r}.")
    class_names = given.get("class_names", "same")
    if class_names not in ("same", "by_number"):
        problems.append(f"`hub.class_names` must be same or by_number. Got {class_names!r}.")
    return HubSource(name=given["name"], config=given.get("config"), splits=splits, columns=columns, class_names=class_names)


def _local(hub: HubSource, data: Path | None) -> HubSource:
    """The copy of a hub data set that lies in the data folder under its name, where there is one."""
    from dataclasses import replace

    local = None if data is None else data / hub.name
    return replace(hub, name=str(local)) if local is not None and local.is_dir() else hub
