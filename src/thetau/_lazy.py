"""Packages whose names are loaded at first use, so that help and options need neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names live in the modules that `homes` says: name → module."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return load, lambda: sorted(homes)


class _Torch:
    """Stands for `torch`, which is imported when something of it is first asked for: that takes a second, and headers need none of it."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Torch()
