r"""Share: localised task vectors, weighted so that their sum is the stitched vector; masks shared within clusters of tasks.

Localize-and-Stitch, He et al. 2024, <https://arxiv.org/abs/2408.13656>: task i keeps a mask $\gamma_i$, and where masks overlap its
entry counts $\gamma_i / \sum_j \gamma_j$. Mask Sharing and Stitch Twice are of "Task vector bases" (Zeng et al. 2025,
<https://arxiv.org/abs/2502.01015>, Section 6.4):

- `mask`: the N tasks of a cluster share $\bar\gamma_c = \mathrm{round}(\sum_i \gamma_i / N)$, and their values come from the whole
  vectors. With one mask, stitching within the cluster is the mean, so the cluster is *one* sparse model $\bar\gamma_c \odot
  \mathrm{mean}_i\, \tau_i$ (the paper: "only m < T copies of sparse models"; Table 8 counts 4 masks). The outer stitch is over these m
  models, as every outer merge of the paper is over bases: an entry is divided by the number of *clusters* that keep it.
- `twice`: $\gamma_i \leftarrow \mathrm{round}(\gamma_i / \sum_{j \in c} \gamma_j)$, then $\gamma_i / \sum_{j \le T} \gamma_j$.

`rounding` is what ½ becomes. Up, a mask shared by two tasks is their union, and Stitch Twice drops what three or more of a cluster
share; to even (torch's and NumPy's `round`), two tasks share only what both keep, and Stitch Twice drops all that any two share. Only
half up agrees with the densities of Table 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from thetau._lazy import torch
from thetau.parts import BlockReduction, PerTask, Site, Transform
from thetau.statistics import MagnitudeQuantile
from thetau.sums import sum_in_order
from thetau.transforms.trim import Trim

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Sharing = Literal["none", "mask", "twice"]
Rounding = Literal["half_up", "half_even"]


@dataclass(frozen=True, kw_only=True)
class Share(Transform):
    """Multiplies each task's entries by their weight. With `stitch=False` by what is kept alone: what is then stored, whose sum over
    the tasks of a cluster is the cluster's model under `mask`.
    """

    density: float
    scope: Literal["vector", "tensor"] = "vector"
    sharing: Sharing
    clusters: PerTask
    rounding: Rounding = "half_up"
    stitch: bool = True
    per_task: ClassVar[bool] = False

    def requires(self) -> MagnitudeQuantile | None:
        """The exact cuts; none where every entry that is not zero is kept."""
        return self._trim.requires()

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """Cuts by task."""
        return self._trim.prepare(result, tasks)

    def apply(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "task *block"]:
        """A block, weighted."""
        clusters = [int(number) for number in site.per_task(self.clusters)]
        masks = shared(self._trim.apply(stack, state, site) != 0, clusters, self.sharing, self.rounding)
        return stack * (weights if self.stitch else inner)(masks, clusters, self.sharing)

    @property
    def _trim(self) -> Trim:
        return Trim(density=self.density, scope=self.scope)


def shared(
    kept: Bool[Tensor, "task *block"], clusters: Sequence[int], sharing: Sharing, rounding: Rounding
) -> Bool[Tensor, "task *block"]:
    """Each task's mask after sharing; `clusters` are the tasks' numbers, in the order of the stack."""
    if sharing == "none":
        return kept
    out = torch.empty_like(kept)
    up = rounding == "half_up"
    for number in set(clusters):
        rows = [row for row, one in enumerate(clusters) if one == number]
        counts = kept[rows].sum(0)
        if sharing == "mask":
            out[rows] = (2 * counts >= len(rows)) if up else (2 * counts > len(rows))  # a half is not rounded up to 1, but to 0
        else:
            out[rows] = kept[rows] & (counts <= (2 if up else 1))  # round(1/counts) is 1 for 1, for 2 where up, never beyond
    return out


def weights(masks: Bool[Tensor, "task *block"], clusters: Sequence[int], sharing: Sharing) -> Float[Tensor, "task *block"]:
    """What each task's entries are multiplied by, so that their sum is the stitched vector."""
    own = inner(masks, clusters, sharing)
    if sharing == "mask":
        first = [clusters.index(number) for number in sorted(set(clusters))]
        return own / masks[first].sum(0).clamp(min=1)
    return own / masks.sum(0).clamp(min=1)


def inner(masks: Bool[Tensor, "task *block"], clusters: Sequence[int], sharing: Sharing) -> Float[Tensor, "task *block"]:
    """The weights within what is stored: the mean over a cluster under `mask`, the masks themselves elsewhere."""
    own = masks.to(torch.float32)
    if sharing == "mask":
        for row, number in enumerate(clusters):
            own[row] /= clusters.count(number)
    return own


@dataclass(frozen=True, kw_only=True)
class StitchPairs(BlockReduction):
    """The end of a chain over a doubled stack: the whole vectors, and beside each the localised one whose nonzero entries are its mask.

    `pairs` names both, with the number of the task's cluster.
    """

    pairs: tuple[tuple[str, str, int], ...]
    sharing: Sharing
    rounding: Rounding = "half_up"

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """A block, stitched."""
        place = {task: row for row, task in enumerate(site.tasks)}
        whole = stack[[place[one] for one, _, _ in self.pairs]]
        clusters = [number for _, _, number in self.pairs]
        masks = shared(stack[[place[mask] for _, mask, _ in self.pairs]] != 0, clusters, self.sharing, self.rounding)
        return sum_in_order(whole * weights(masks, clusters, self.sharing))
