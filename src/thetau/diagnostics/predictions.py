"""How often the doctor's advice was right where it was tried: what `experiments/doctor` measured, as it ships."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from typing import Any

from thetau.diagnostics.doctor import HitRate

FILE = "predictions.json"
LEVEL = 1.96  # standard deviations of a 95 % interval


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score.

    Examples:
        >>> [round(x, 2) for x in wilson(8, 10)]
        [0.49, 0.94]
    """
    if n < 1:
        return 0.0, 1.0
    share, square = hits / n, LEVEL**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = LEVEL / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@cache
def measured(topic: str) -> HitRate | None:
    """The hit rate of advice on a topic; None where none was measured."""
    found = _read().get(topic)
    if found is None:
        return None
    low, high = wilson(found["hits"], found["n"])
    return HitRate(hits=found["hits"], n=found["n"], low=low, high=high, what=found["what"])


def _read() -> dict[str, Any]:
    file = resources.files("thetau.diagnostics").joinpath(FILE)
    return dict(json.loads(file.read_text(encoding="utf-8"))["hits"]) if file.is_file() else {}
