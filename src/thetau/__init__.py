"""thetau: task arithmetic on real checkpoints.

The names below are loaded at first use, so that `import thetau` and `thetau --help` need neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thetau._version import __version__ as __version__

if TYPE_CHECKING:
    from thetau import adapters as adapters
    from thetau import bases as bases
    from thetau import evaluate as evaluate
    from thetau import methods as methods
    from thetau import studies as studies
    from thetau.compression import LowRank as LowRank
    from thetau.compression import Precision as Precision
    from thetau.compression import Sparse as Sparse
    from thetau.compression import compress as compress
    from thetau.compression import compress_tasks as compress_tasks
    from thetau.compression import open_task as open_task
    from thetau.compression import stitch as stitch
    from thetau.compression import storage as storage
    from thetau.compression import stored as stored
    from thetau.compression import switch as switch
    from thetau.engine.executor import Engine as Engine
    from thetau.facade import Expression as Expression
    from thetau.facade import ThetauWarning as ThetauWarning
    from thetau.facade import gram as gram
    from thetau.facade import merge as merge
    from thetau.facade import open as open
    from thetau.facade import outputs as outputs
    from thetau.facade import transform as transform
    from thetau.facade import verify as verify
    from thetau.parts import PerPattern as PerPattern
    from thetau.parts import PerTask as PerTask

_HOMES = {
    "Engine": "thetau.engine.executor",
    "Expression": "thetau.facade",
    "LowRank": "thetau.compression",
    "PerPattern": "thetau.parts",
    "PerTask": "thetau.parts",
    "Precision": "thetau.compression",
    "Sparse": "thetau.compression",
    "ThetauWarning": "thetau.facade",
    "adapters": "thetau.adapters",
    "bases": "thetau.bases",
    "compress": "thetau.compression",
    "compress_tasks": "thetau.compression",
    "evaluate": "thetau.evaluate",
    "gram": "thetau.facade",
    "merge": "thetau.facade",
    "methods": "thetau.methods",
    "open": "thetau.facade",
    "open_task": "thetau.compression",
    "outputs": "thetau.facade",
    "stitch": "thetau.compression",
    "storage": "thetau.compression",
    "stored": "thetau.compression",
    "studies": "thetau.studies",
    "switch": "thetau.compression",
    "transform": "thetau.facade",
    "verify": "thetau.facade",
}
__all__ = [
    "Engine",
    "Expression",
    "LowRank",
    "PerPattern",
    "PerTask",
    "Precision",
    "Sparse",
    "ThetauWarning",
    "__version__",
    "adapters",
    "bases",
    "compress",
    "compress_tasks",
    "evaluate",
    "gram",
    "merge",
    "methods",
    "open",
    "open_task",
    "outputs",
    "stitch",
    "storage",
    "stored",
    "studies",
    "switch",
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
