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


def load_result(kind: type[T], path: Path) -> T:
    """Read what `save` wrote. Raises `DataError`."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: cannot be read as {kind.__name__} ({reason}).") from error


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
