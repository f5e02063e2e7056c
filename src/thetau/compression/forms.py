"""The forms in which a task vector can be kept: its hyper-parameters, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, final

from thetau.checkpoint import FLOATS, Dtype, matches
from thetau.errors import RecipeError
from thetau.fields import AtLeast, PerPattern, Within, check

Values = Literal["float32", "bfloat16", "float16"]
DTYPES = ("float32", "bfloat16", "float16")


@final
@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A bit an entry, and values where the bit is set.

    - `density`: share of the entries that is kept, in (0, 1], the largest by magnitude; None keeps every entry that is not zero.
    - `scope`: what is ranked: the whole `vector`, or each `tensor`.
    - `dtype`: of the values: float32, bfloat16 or float16.
    """

    density: Annotated[float, Within("(0, 1]", none="for all that is not zero")] | None = 0.05
    scope: Literal["vector", "tensor"] = "vector"
    dtype: Values = "float32"

    def __post_init__(self) -> None:
        check(self)

    @property
    def values(self) -> Dtype:
        """The dtype itself."""
        return FLOATS[self.dtype]


@final
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """U·V for each matrix, its truncated singular value decomposition; a tensor of more axes counts as rows × the rest.

    Vectors, and matrices of which the product would take no less room, are kept dense.

    - `rank`: a whole number from 1, or one a pattern of tensor names.
    - `dtype`: of all that is stored: float32, bfloat16 or float16.
    """

    rank: int | PerPattern = 16
    dtype: Values = "float32"

    def __post_init__(self) -> None:
        for rank in self.rank.values.values() if isinstance(self.rank, PerPattern) else [self.rank]:
            AtLeast(1).check("LowRank", "rank", int(rank) if isinstance(rank, float) and rank.is_integer() else rank)
        check(self)

    @property
    def values(self) -> Dtype:
        """The dtype itself."""
        return FLOATS[self.dtype]

    def rank_of(self, name: str) -> int:
        """The rank of a tensor.

        Raises:
            RecipeError: no pattern fits it.
        """
        if not isinstance(self.rank, PerPattern):
            return self.rank
        for pattern, rank in self.rank.values.items():
            if matches(name, [pattern]):
                return int(rank)
        raise RecipeError([f'no pattern fits {name!r}; end with `"*": rank`. Got {", ".join(self.rank.values)}.'], "rank")


@final
@dataclass(frozen=True, kw_only=True)
class Precision:
    """Every entry, in fewer bits: bfloat16, float16, or int8 with a scale a row (its largest magnitude is 127).

    - `dtype`: bfloat16, float16 or int8.
    """

    dtype: Literal["bfloat16", "float16", "int8"] = "bfloat16"

    def __post_init__(self) -> None:
        check(self)

    @property
    def values(self) -> Dtype:
        """The dtype itself."""
        return FLOATS.get(self.dtype, Dtype.I8)


Form = Sparse | LowRank | Precision
