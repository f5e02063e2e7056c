"""Packages whose names are loaded at first use, so that help and options need neither torch nor transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names live in the modules that `homes` says: name → module."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return load, lambda: sorted(homes)


class _Late:
    """Stands for a module that is imported when something of it is first asked for; our modules then hold it in place of this."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        module = import_module(self._name)
        for known, ours in sys.modules.copy().items():
            if known.startswith("thetau.") and isinstance(ours, ModuleType):
                for word in [word for word, value in vars(ours).copy().items() if value is self]:
                    setattr(ours, word, module)
        return getattr(module, name)


# Torch takes a second or two to import, and what is known from headers needs none of it.
if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy, torch = _Late("numpy"), _Late("torch")
