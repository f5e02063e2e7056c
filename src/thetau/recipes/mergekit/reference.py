"""How mergekit names a model: a path or hub id, perhaps with a revision, perhaps with an adapter: `org/model@revision+org/adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from thetau.checkpoint import open_source
from thetau.checkpoint.remote import is_url
from thetau.checkpoint.safetensors import exists
from thetau.errors import RecipeError, nearest
from thetau.vectors import Combination

_KEYS = ("model", "lora", "override_architecture")
_PLACE_KEYS = ("path", "revision")


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder, file, URL or hub id, and the revision of a hub id."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def plain(self) -> dict[str, str]:
        """As a mapping."""
        return {"path": self.path} | ({"revision": self.revision} if self.revision is not None else {})

    def at(self, folder: Path | None) -> Place:
        """The same, a relative path that exists in `folder` taken from there."""
        if folder is None or is_url(self.path) or Path(self.path).is_absolute() or not exists(folder / self.path):
            return self
        return Place(path=str(folder / self.path), revision=self.revision)


@final
@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model and perhaps the adapter over it. Equal references are the same model.

    `architecture` is what a recipe says of the model instead of its config; here tensors are found by name, so that only the output's
    config can need it.
    """

    model: Place
    lora: Place | None = None
    architecture: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora is not None else str(self.model)

    def plain(self) -> str | dict[str, Any]:
        """What `parse` makes this of again: its text, or a mapping where the text would say something else."""
        places = [self.model] if self.lora is None else [self.model, self.lora]
        if self.architecture is None and not any(sign in place.path for place in places for sign in "+@"):
            return str(self)
        said = {"model": self.model.plain(), "lora": self.lora and self.lora.plain(), "override_architecture": self.architecture}
        return {key: value for key, value in said.items() if value is not None}

    def open(self) -> Combination:
        """The weights, lazily: the model, or the model and what its adapter adds.

        Raises:
            CheckpointError: nothing readable is there.
            AlignmentError: the adapter does not fit the model.
        """
        model = open_source(str(self.model))
        terms = [(1.0, model)]
        if self.lora is not None:
            terms.append((1.0, open_source(str(self.lora), base=model)))
        return Combination(tuple(terms), reference=model, name=str(self))


def parse(value: Any, where: str = "model", folder: Path | None = None) -> Reference:
    """A model as a recipe names it: a text, or a mapping `{model: text or {path, revision}, lora: the same}`.

    Args:
        value: what stands in the recipe.
        where: the key's place in the recipe, for messages.
        folder: where relative paths start that exist there: the recipe's own folder.

    Raises:
        RecipeError: it is neither, or says something that is not known; all problems together.

    Examples:
        >>> parse("org/model@v2+org/adapter")
        Reference(model=Place(path='org/model', revision='v2'), lora=Place(path='org/adapter', revision=None), architecture=None)
        >>> str(parse({"model": {"path": "org/model", "revision": "v2"}}))
        'org/model@v2'
    """
    problems: list[str] = []
    found = _reference(value, where, folder, problems)
    if found is None or problems:
        raise RecipeError(problems, where)
    return found


def _reference(value: Any, where: str, folder: Path | None, problems: list[str]) -> Reference | None:
    if isinstance(value, str):
        if not is_url(value) and _there(value, folder):  # a folder whose own name holds a `+`
            return Reference(model=Place(path=value).at(folder))
        parts = value.split("+")
        if len(parts) > 2:
            problems.append(
                f"{where}: a model takes one adapter, `model+adapter`. Got {value!r}. Merge the others into it first."
            )
            return None
        places = [place for part in parts if (place := _place(part, where, folder, problems)) is not None]
        return Reference(model=places[0], lora=places[1] if parts[1:] else None) if len(places) == len(parts) else None
    if not isinstance(value, Mapping):
        problems.append(f"{where}: must be a path, a hub id or `{{model, lora}}`. Got {value!r}.")
        return None
    _unknown(value, _KEYS, where, problems)
    inner = value.get("model")
    if isinstance(inner, str) and "+" in inner and value.get("lora") is None:
        found = _reference(inner, f"{where}.model", folder, problems)
        model, lora = (found.model, found.lora) if found is not None else (None, None)
    else:
        model = _place(inner, f"{where}.model", folder, problems)
        given = value.get("lora")
        lora = _place(given, f"{where}.lora", folder, problems) if given is not None else None
    architecture = value.get("override_architecture")
    if architecture is not None and not isinstance(architecture, str):
        problems.append(f"{where}.override_architecture: must be a text. Got {architecture!r}.")
        return None
    return Reference(model=model, lora=lora, architecture=architecture) if model is not None else None


def _place(value: Any, where: str, folder: Path | None, problems: list[str]) -> Place | None:
    if isinstance(value, Mapping):
        _unknown(value, _PLACE_KEYS, where, problems)
        path, revision = value.get("path"), value.get("revision")
    elif isinstance(value, str):
        whole = is_url(value) or _there(value, folder)
        path, _, after = (value, "", "") if whole else value.partition("@")
        revision = after or None
        if revision is not None and "@" in revision:
            problems.append(f"{where}: a model has one revision, `path@revision`. Got {value!r}.")
            return None
    else:
        problems.append(f"{where}: must be a path or a hub id. Got {value!r}.")
        return None
    if not isinstance(path, str) or not path:
        problems.append(f"{where}: must name a path or a hub id. Got {value!r}.")
        return None
    if revision is not None and not isinstance(revision, str):
        problems.append(f"{where}.revision: must be a text. Got {revision!r}: put it in quotes.")
        return None
    return Place(path=path, revision=revision).at(folder)


def _there(path: str, folder: Path | None) -> bool:
    return bool(path) and (exists(Path(path)) or (folder is not None and exists(folder / path)))


def _unknown(value: Mapping[Any, Any], known: tuple[str, ...], where: str, problems: list[str]) -> None:
    problems += [
        f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}." for key in value if key not in known
    ]
