"""How the results of diagnostics are kept: frozen, as JSON, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from pydantic import TypeAdapter, ValidationError

from thetau.checkpoint.disk import write_bytes
from thetau.errors import DataError

T = TypeVar("T")
Matrix = tuple[tuple[float, ...], ...]


class Result:
    """A frozen result. Subclasses are dataclasses of plain values."""

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all. Raises `OutputError`."""
        adapter: TypeAdapter[Any] = TypeAdapter(type(self))
        write_bytes(path, adapter.dump_json(self, indent=1) + b"\n")


def load_result(kind: type[T], path: Path, called: str | None = None, remedy: str = "") -> T:
    """Read what `save` wrote. `called`: what an error calls it, `remedy`: what to give instead. Raises `DataError`."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = _reason(error)
        raise DataError(
            f"{path}: cannot be read as {called or kind.__name__} ({reason}).{f' {remedy}' if remedy else ''}"
        ) from error


def _reason(error: OSError | ValidationError) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return f"it is no JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}"
    missing = [str(one["loc"][0]) for one in found if one["type"] == "missing" and len(one["loc"]) == 1]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return f"it lacks {', '.join(missing[:4])}{more}"
    return f"{'.'.join(map(str, found[0]['loc'])) or 'all of it'}: {found[0]['msg']}"


@final
@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Of two lists of `n` numbers; None where it is not defined (fewer than 3, or one of them constant)."""

    x: str
    y: str
    n: int
    pearson: float | None
    spearman: float | None


def correlate(x: Sequence[float], y: Sequence[float], names: tuple[str, str]) -> Correlation:
    """Pearson's and Spearman's correlation.

    Examples:
        >>> told = correlate([1, 2, 3, 4], [1, 4, 9, 16], ("x", "x squared"))
        >>> round(told.pearson, 3), told.spearman
        (0.984, 1.0)
    """
    pearson = spearman = None
    if len(x) >= 3 and len(set(x)) > 1 and len(set(y)) > 1:
        from scipy import stats

        found: tuple[Any, Any] = stats.pearsonr(x, y), stats.spearmanr(x, y)
        pearson, spearman = (float(one.statistic) for one in found)
    return Correlation(x=names[0], y=names[1], n=len(x), pearson=pearson, spearman=spearman)
