r"""Localize-and-Stitch without data: keep the largest entries of each task vector, and divide where they overlap.

He et al. 2024, <https://arxiv.org/abs/2408.13656>; Mask Sharing and Stitch Twice from "Task vector bases",
<https://arxiv.org/abs/2502.01015>, Section 6.4 (see `thetau.transforms.share` for what the two store and divide by). The authors' code
keeps what is *above* the k-th largest magnitude, so one entry less than said; ours keeps ⌈density · n⌉. Masks that were learned on data
(`thetau vector localize`) are stitched by the same method at `density: 1`, or with `thetau.stitch`, which Mask Sharing then needs.

Use it where each task lives in few entries, so that a small share of them hardly overlaps and can be kept in full, or to store many tasks
sparsely. It costs two passes over the inputs and needs a base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from thetau.errors import RecipeError
from thetau.methods.fields import Coefficient, Density, Ranked, Rule
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, PerTask
from thetau.transforms import Share, Trim


@dataclass(frozen=True)
class Clusters(Rule):
    """A whole number for each task, or None."""

    @property
    def by_task(self) -> bool:
        """A tuple stands in the order of the tasks."""
        return True

    @property
    def text(self) -> str:
        """The rule in words."""
        return "a whole number for each task (`PerTask`, or a tuple), or None"

    def faults(self, value: object) -> Iterator[object]:
        """The numbers that are not whole, or what is no number for each task."""
        if value is None:
            return
        numbers = tuple(value.values.values()) if isinstance(value, PerTask) else value
        if not isinstance(numbers, tuple) or not numbers:
            yield value
            return
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1:
                yield number


@register("localize_stitch", paper="He et al. 2024, https://arxiv.org/abs/2408.13656")
@dataclass(frozen=True, kw_only=True)
class LocalizeStitch(Method):
    r"""$\tau = \lambda \sum_t \frac{\gamma_t}{\sum_s \gamma_s} \odot \tau_t$ entrywise, $\gamma_t$ keeping the largest entries of task $t$.

    - `density`: share of each task vector's entries that is kept; 1 keeps all that is not zero.
    - `sharing`: of masks within clusters of tasks: `none`; `mask` (Mask Sharing: one mask and one model a cluster); `twice` (Stitch Twice).
    - `clusters`: the number of each task's cluster, `per_task`; for `mask` and `twice`.
    - `rounding`: what ½ becomes in a shared mask: `half_up` to 1, `half_even` (torch's `round`) to 0.
    """

    density: Density = 0.05
    trim: Ranked = "vector"
    sharing: Literal["none", "mask", "twice"] = "none"
    clusters: Annotated[PerTask | tuple[float, ...] | None, Clusters()] = None
    rounding: Literal["half_up", "half_even"] = "half_up"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Trim and disjoint mean; with clusters share and sum. Then scale.

        Raises:
            RecipeError: masks are to be shared and no clusters are given.
        """
        post = (Scale(scale=self.scale),)
        if self.sharing == "none":
            return Chain(transforms=(Trim(density=self.density, scope=self.trim),), reduction=DisjointMean(), post=post)
        return Chain(transforms=(self.share(stitch=True),), reduction=Sum(), post=post)

    def share(self, *, stitch: bool) -> Share:
        """The transform of the clusters.

        Raises:
            RecipeError: no clusters are given.
        """
        if not isinstance(self.clusters, PerTask) or self.sharing == "none":
            raise RecipeError(
                [
                    f"`sharing: {self.sharing}` needs `clusters`, a number for each task: `clusters: {{per_task: {{a: 0, b: 0, c: 1}}}}`. "
                    f"Got {self.clusters!r}."
                ],
                "localize_stitch",
            )
        return Share(
            density=self.density,
            scope=self.trim,
            sharing=self.sharing,
            clusters=self.clusters,
            rounding=self.rounding,
            stitch=stitch,
        )
