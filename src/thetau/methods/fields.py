"""The fields that many methods share, each with its range and its meaning, and the rules for a method's own.

A method that gives one of them a narrower sense says so in the list of its docstring, which counts first.
"""

from __future__ import annotations

from typing import Annotated, Literal

from thetau.fields import AtLeast as AtLeast
from thetau.fields import Numbers as Numbers
from thetau.fields import OneOf as OneOf
from thetau.fields import Patterns as Patterns
from thetau.fields import Rank as Rank
from thetau.fields import Rule as Rule
from thetau.fields import Varies as Varies
from thetau.fields import Within as Within
from thetau.fields import part_of as part_of
from thetau.parts import Varying

Coefficient = Annotated[Varying, Varies(pattern=True), "λ; a number, or one a pattern of tensor names (`per_pattern`)."]
Coefficients = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    "λ; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`), or both.",
]
Portion = Annotated[float, Within("(0, 1]")]
Density = Annotated[Portion, "share of each task vector's entries that is kept."]
DropRate = Annotated[float, Within("[0, 1)"), "p, the probability with which an entry is dropped."]
NotNegative = Annotated[float, Within("[0, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
Ranked = Annotated[Literal["vector", "tensor"], "what is ranked: the whole `vector`, or each `tensor`."]
Cancelled = Annotated[
    Literal["zero", "majority"], "entries whose kept deltas cancel exactly: `zero`, or the `majority` sign of all entries."
]
Tensors = Annotated[
    str | tuple[str, ...],
    Patterns(),
    "what it acts on: `linear` (weight matrices of the blocks), `matrices` (whatever has two dimensions), `all`, or patterns of names.",
]
Elsewhere = Annotated[
    Literal["base", "mean", "sum"], "what other tensors get: `base` (no task vector), `mean` or `sum` of the task vectors."
]
SplitFused = Annotated[bool, "merge fused q/k/v as the three matrices that they are."]
