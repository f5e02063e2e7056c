"""The words that a class is called by, and the sentences that they are put in; data, not code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from thetau.errors import DataError, nearest

DEFAULT_TEMPLATES = ("This text is about {}.",)
IMAGE_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """`phrases`: for each class, in the order of the labels, one phrase or several; `templates`: sentences with one `{}`."""

    templates: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]

    def sentences(self) -> list[list[str]]:
        """For each class, every phrase in every template."""
        return [[template.format(phrase) for phrase in phrases for template in self.templates] for phrases in self.phrases]


def load_prompts(task: str, labels: tuple[str, ...], folder: Path, kind: str = "text") -> Prompts:
    """The prompts of a task: `prompts.yaml` in its folder, else those shipped under its name, else made from the labels.

    A class that the file leaves out is called by its label with spaces for underscores. Raises `DataError` listing every problem.
    """
    import yaml

    own = folder / "prompts.yaml"
    shipped = files("thetau.tasks").joinpath("prompts", f"{task}.yaml")
    usual = IMAGE_TEMPLATES if kind == "image" else DEFAULT_TEMPLATES
    source: Any = own if own.is_file() else shipped
    if not source.is_file():
        return Prompts(templates=usual, phrases=tuple((_plain(label),) for label in labels))
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{source}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    return _checked(content, labels, str(source), usual)


def _plain(label: str) -> str:
    return label.replace("_", " ")


def _checked(content: Any, labels: tuple[str, ...], where: str, usual: tuple[str, ...]) -> Prompts:
    if not isinstance(content, Mapping):
        raise DataError(f"{where}: must be a mapping with `templates` and `classes`. Got {type(content).__name__}.")
    problems = [
        f"unknown key {key!r}.{nearest(str(key), ('templates', 'classes'))}"
        for key in content
        if key not in ("templates", "classes")
    ]
    templates = content.get("templates", list(usual))
    if not isinstance(templates, list) or not templates or not all(isinstance(t, str) and t.count("{}") == 1 for t in templates):
        problems.append(f"`templates` must be a list of sentences with one {{}} each. Got {templates!r}.")
    classes = content.get("classes", {})
    if not isinstance(classes, Mapping):
        problems.append(f"`classes` must map labels to phrases. Got {type(classes).__name__}.")
        classes = {}
    for label, given in classes.items():
        if label not in labels:
            problems.append(f"`classes` names {label!r}, which is not a label of the task.{nearest(str(label), labels)}")
        if not _phrases(given) or not all(isinstance(phrase, str) and phrase.strip() for phrase in _phrases(given)):
            problems.append(f"`classes.{label}` must be a phrase or a list of phrases. Got {given!r}.")
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems))
    return Prompts(templates=tuple(templates), phrases=tuple(_phrases(classes.get(label, _plain(label))) for label in labels))


def _phrases(given: Any) -> tuple[str, ...]:
    return tuple(given) if isinstance(given, list) else (given,)
