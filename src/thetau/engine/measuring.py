"""A statistic of some task vectors, by itself: the passes of a merge without its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thetau.engine.executor import Engine
from thetau.engine.merge import Merge
from thetau.parts import BlockReduction, Chain, Op, Site, Statistic, Transform
from thetau.vectors import Combination

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ask(Transform):
    """Changes nothing and asks for a statistic."""

    statistic: Statistic

    def requires(self) -> Statistic:
        """What is asked for."""
        return self.statistic

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> Any:
        """The result as it is."""
        return result

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: Any, site: Site, element: int) -> list[Op]:
        """No operation."""
        return []

    def apply(self, stack: Float[Tensor, "task *block"], state: Any, site: Site) -> Float[Tensor, "task *block"]:
        """The stack as it is."""
        return stack


@dataclass(frozen=True, kw_only=True)
class First(BlockReduction):
    """The first task's entries: the end of a chain whose merged vector nobody reads."""

    def reduce(self, stack: Float[Tensor, "task *block"], state: Any, site: Site) -> Float[Tensor, "*block"]:
        """The first row of the stack."""
        return stack[0]


def measured(
    vectors: Mapping[str, Combination],
    statistic: Statistic,
    *,
    label: str,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> tuple[Any, Merge]:
    """The statistic's result, and the merge that made it (for its tensors and tasks, which are sorted by name).

    Raises:
        AlignmentError: the vectors do not fit each other.
    """
    merge = Merge(
        vectors, Chain(transforms=(Ask(statistic=statistic),), reduction=First()), label=label, exclude=exclude, engine=engine
    )
    merge.prepare()
    assert merge.states is not None
    return merge.states[0], merge
