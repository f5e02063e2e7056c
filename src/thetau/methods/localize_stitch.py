r"""Localize-and-Stitch without data: keep the largest entries of each task vector, and divide where they overlap.

He et al. 2024, <https://arxiv.org/abs/2408.13656>; Mask Sharing and Stitch Twice from "Task vector bases",
<https://arxiv.org/abs/2502.01015>, Section 6.4 (see `thetau.transforms.share` for what the two store and divide by). The authors' code
keeps what is *above* the k-th largest magnitude, so one entry less than said; ours keeps ⌈density · n⌉. Masks that were learned on data
(`thetau vector localize`) are stitched by the same method at `density: 1`, or with `thetau.stitch`, which Mask Sharing then needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.errors import RecipeError
from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, PerTask, Varying
from thetau.transforms import Share, Trim


@register("localize_stitch", paper="He et al. 2024, https://arxiv.org/abs/2408.13656")
@dataclass(frozen=True, kw_only=True)
class LocalizeStitch(Method):
    r"""$\tau = \lambda \sum_t \frac{\gamma_t}{\sum_s \gamma_s} \odot \tau_t$ entrywise, $\gamma_t$ keeping the largest entries of task $t$.

    - `density`: share of each task vector's entries that is kept, in (0, 1]; 1 keeps all that is not zero.
    - `trim`: what is ranked: the whole `vector`, or each `tensor`.
    - `sharing`: of masks within clusters of tasks: `none`; `mask` (Mask Sharing: one mask and one model a cluster); `twice` (Stitch Twice).
    - `clusters`: the number of each task's cluster, `per_task`; for `mask` and `twice`.
    - `rounding`: what ½ becomes in a shared mask: `half_up` to 1, `half_even` (torch's `round`) to 0.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    density: float = 0.05
    trim: Literal["vector", "tensor"] = "vector"
    sharing: Literal["none", "mask", "twice"] = "none"
    clusters: PerTask | tuple[float, ...] | None = None
    rounding: Literal["half_up", "half_even"] = "half_up"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        number("LocalizeStitch", "density", self.density, "in (0, 1]", low=0, high=1, open_low=True)
        choice("LocalizeStitch", "trim", self.trim, ("vector", "tensor"))
        choice("LocalizeStitch", "sharing", self.sharing, ("none", "mask", "twice"))
        choice("LocalizeStitch", "rounding", self.rounding, ("half_up", "half_even"))
        check_clusters("LocalizeStitch", self.clusters)
        varying("LocalizeStitch", "scale", self.scale, tasks=False)

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


def check_clusters(owner: str, clusters: object) -> None:
    """Whole numbers by task, or a tuple of them in the order in which tasks are given, or None.

    Raises:
        ValueError: they are not.
    """
    ones: object = clusters.values.values() if isinstance(clusters, PerTask) else clusters
    rule = "a whole number for each task (`PerTask`, or a tuple), or None"
    if not isinstance(clusters, PerTask | tuple | None) or clusters == ():
        raise ValueError(f"`{owner}(clusters=...)` must be {rule}. Got {clusters!r}.")
    for one in ones or ():  # type: ignore[attr-defined]
        if isinstance(one, bool) or not isinstance(one, int | float) or one != one // 1:
            raise ValueError(f"`{owner}(clusters=...)` must be {rule}. Got {one!r}.")
