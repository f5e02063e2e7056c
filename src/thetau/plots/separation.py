"""The chart of disentangling: cosines before and after."""

from __future__ import annotations

from pathlib import Path

from thetau.diagnostics.cosines import CosineGroup, Cosines
from thetau.diagnostics.separation import Separation
from thetau.plots.diagnose import cosines_chart


def separation_chart(result: Separation, path: Path) -> None:
    """Two heatmaps with one scale. Raises `OutputError`."""
    groups = (("before", result.before, result.mean_before), ("after", result.after, result.mean_after))
    cosines_chart(
        Cosines(
            groups=tuple(
                CosineGroup(name=name, tasks=result.tasks, cosine=matrix, mean_absolute=mean) for name, matrix, mean in groups
            )
        ),
        path,
    )
