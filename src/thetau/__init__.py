"""thetau: task arithmetic on real checkpoints.

The names below are loaded at first use, so that `import thetau` and `thetau --help` need neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thetau._version import __version__ as __version__

if TYPE_CHECKING:
    from thetau import methods as methods
    from thetau.engine.executor import Engine as Engine
    from thetau.engine.types import PerPattern as PerPattern
    from thetau.engine.types import PerTask as PerTask
    from thetau.facade import Expression as Expression
    from thetau.facade import ThetauWarning as ThetauWarning
    from thetau.facade import gram as gram
    from thetau.facade import merge as merge
    from thetau.facade import open as open
    from thetau.facade import transform as transform
    from thetau.facade import verify as verify

_HOMES = {
    "Engine": "thetau.engine.executor",
    "Expression": "thetau.facade",
    "PerPattern": "thetau.engine.types",
    "PerTask": "thetau.engine.types",
    "ThetauWarning": "thetau.facade",
    "gram": "thetau.facade",
    "merge": "thetau.facade",
    "methods": "thetau.methods",
    "open": "thetau.facade",
    "transform": "thetau.facade",
    "verify": "thetau.facade",
}
__all__ = [
    "Engine",
    "Expression",
    "PerPattern",
    "PerTask",
    "ThetauWarning",
    "__version__",
    "gram",
    "merge",
    "methods",
    "open",
    "transform",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'thetau' has no attribute {name!r}")
    module = import_module(home)
    return module if home == f"thetau.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
