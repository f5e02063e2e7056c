"""Cosine similarity of task vectors, group by group: Figs. 7, 9 and 10 of the attention-only paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, final

from thetau.diagnostics.interference import cosine_matrix
from thetau.diagnostics.results import Matrix, Result
from thetau.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class CosineGroup:
    """The vectors of one paradigm. `mean_absolute`: over pairs, None for a single vector."""

    name: str
    tasks: tuple[str, ...]
    cosine: Matrix
    mean_absolute: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Cosines(Result):
    """Cosine similarity of task vectors, group by group."""

    groups: tuple[CosineGroup, ...]


def cosines(groups: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> Cosines:
    """Of group → task → τ. Raises `DataError` when there is no group, or an empty one."""
    if not groups or not all(groups.values()):
        raise DataError("cosines need at least one group of task vectors, and none of them empty.")
    found = []
    for name, vectors in groups.items():
        matrix = cosine_matrix(list(vectors.values()))
        off = [abs(matrix[i][j]) for i in range(len(matrix)) for j in range(i)]
        found.append(CosineGroup(name=name, tasks=tuple(vectors), cosine=matrix, mean_absolute=mean(off) if off else None))
    return Cosines(groups=tuple(found))
