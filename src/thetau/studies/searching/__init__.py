"""A search for the best values of a recipe's fields, on validation, with Optuna.

found = search(recipe, Search(space=("scale=0.1..2",), trials=30))
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from thetau._lazy import lazy

if TYPE_CHECKING:
    from thetau.studies.searching.results import Searched as Searched
    from thetau.studies.searching.results import SearchTrial as SearchTrial
    from thetau.studies.searching.run import best_recipe as best_recipe
    from thetau.studies.searching.run import search as search
    from thetau.studies.searching.run import write_best as write_best

_HOMES = {
    "SearchTrial": "thetau.studies.searching.results",
    "Searched": "thetau.studies.searching.results",
    "best_recipe": "thetau.studies.searching.run",
    "search": "thetau.studies.searching.run",
    "write_best": "thetau.studies.searching.run",
}
__all__ = ["SearchTrial", "Searched", "best_recipe", "search", "write_best"]

_load, __dir__ = lazy(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    """A public name, at its first use. Raises `DataError`: Optuna or cmaes is not installed."""
    if name in _HOMES and (lacking := [one for one in ("optuna", "cmaes") if find_spec(one) is None]):
        from thetau.errors import DataError

        raise DataError(f"a search needs {' and '.join(lacking)}. Install what is missing: pip install 'thetau[search]'")
    return _load(name)
