"""The fields that many methods share, each with its range and its meaning, and the rules for a method's own.

A method that gives one of them a narrower sense says so in the list of its docstring, which counts first.
"""

from __future__ import annotations

from typing import Annotated, Literal

from thetau.fields import AtLeast as AtLeast
from thetau.fields import Directions as Directions
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
Total = Annotated[
    Varying | None,
    Varies(pattern=True),
    "what the scales are multiplied to add up to at each tensor, so that only their proportions count; None leaves them. "
    "Scales that add up to 0 are multiplied by it.",
]
Weights = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    "w, what each task's kept entries are multiplied by before a sign is elected; a number, one a task, one a pattern of names, or both.",
]
Shares = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    "w; a number, one a model (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`), or both.",
]
Origin = Annotated[
    Literal["models", "vectors"], "what is merged: the `models`, or the task `vectors`, their differences from the base."
]
Normalise = Annotated[
    bool, "divide by the sum of the weights of the tasks that agree; otherwise their weighted entries are added up."
]
Portion = Annotated[float, Within("(0, 1]")]
Density = Annotated[Portion, "share of each task vector's entries that is kept."]
Densities = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    Within("(0, 1]"),
    "share of each task vector's entries that is kept; by task too, and by pattern of names where `trim` is `tensor`.",
]
Counted = Annotated[
    Literal["ceil", "floor"],
    "how the number of entries that are kept is rounded: up (`ceil`), or down (`floor`, as in mergekit).",
]
Rescaled = Annotated[
    Literal["none", "l1"],
    "what stays after the mask is left as it is (`none`), or multiplied until its magnitudes add up to what all did (`l1`).",
]
Expectation = Annotated[
    Literal["probability", "l1", "none"],
    "what stays is divided by the probability of staying, multiplied until its magnitudes add up to what all did in the tensor (`l1`), "
    "or left as it is (`none`).",
]
DropRate = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    Within("[0, 1)"),
    "p, the probability with which an entry is dropped; by task and by pattern of names too.",
]
NotNegative = Annotated[float, Within("[0, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
Ranked = Annotated[Literal["vector", "tensor"], "what is ranked: the whole `vector`, or each `tensor`."]
Cancelled = Annotated[
    Literal["zero", "majority", "positive"],
    "entries whose kept deltas cancel exactly: `zero`, the `majority` sign of all entries, or +, `positive`.",
]
Tensors = Annotated[
    str | tuple[str, ...],
    Patterns(),
    "what it acts on: `linear` (weight matrices of the blocks), `matrices` (whatever has two dimensions), `all`, or patterns of names.",
]
Elsewhere = Annotated[
    Literal["base", "mean", "sum"], "what other tensors get: `base` (no task vector), `mean` or `sum` of the task vectors."
]
SplitFused = Annotated[
    bool,
    "merge fused q/k/v, and gate and up in one tensor, as the matrices that they are. Stacked experts always are.",
]
