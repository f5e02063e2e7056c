"""What an installed library of models says of a checkpoint's names; who builds live models brings it, so that this room needs none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Library:
    """A model of a config, as the library builds it.

    - `names`: its tensors' names there.
    - `tied`: a name there → the name whose values it takes, as the model's class and config tie them.
    - `live`: a checkpoint's name → the name there, by the library's own renames; it leaves what it does not know as it is.
    """

    names: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    live: Callable[[str], str] = str


class _Builder:
    """Who reads a config: named as `module:function` and loaded at the first doubt."""

    def __init__(self) -> None:
        self._where: str | None = None

    def bring(self, where: str) -> None:
        self._where = where

    def read(self, folder: Path) -> Library | None:
        if self._where is None:
            return None
        module, _, function = self._where.partition(":")
        build: Callable[[Path], Library | None] = import_module(module).__dict__[function]
        return build(folder)


_LIBRARY = _Builder()


def bring_library(where: str) -> None:
    """Say who knows: `module:function` of a model's folder → `Library`, or None where it does not know the config; it never raises."""
    _LIBRARY.bring(where)


def library_of(folder: Path | None) -> Library | None:
    """What the library says of the config in a folder; None where there is no config, or nobody who reads it."""
    return _LIBRARY.read(folder) if folder is not None and (folder / "config.json").is_file() else None
