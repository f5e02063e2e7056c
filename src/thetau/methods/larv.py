r"""LARV: after a merge, scale each block of layers by how much its update stands out from the base's weights and how little it turns them.

Layer-wise Adaptive Rescaling Veneer, Wang et al. 2026, <https://arxiv.org/abs/2602.09413>, over any method (`then`). Block ℓ of L gets the score
g = e^η (ℓ/L)^ρ / (1 + softplus(ĉ)): e is the effective rank of θ₀ over that of Δ, c the norm of the commutators of θ₀ and Δ (Eq. 8; both in
`thetau.methods.larv_contrast`), ĉ is c standardised over the blocks. A gate makes a scale of the score: fixed `tiers` by its quantiles, the paper's
preferred form, or the continuous 1 + ½ tanh(γ(g − 1)).

The paper was not readable to us as a whole, and no code of its authors is known: the formulas stand on its abstract and a third-party port.
Our choices where they are silent: Δ is the merged vector (not each task's), and the scale multiplies it; a block's e and c are the means over its weight
matrices, and all tensors of the block get its scale, while tensors outside the blocks stay; ℓ/L is counted in each tower (T5's encoder and decoder,
CLIP's text and image part), all else over all blocks; tiers are of equal size, and equal scores share the middle one of theirs. The paper's tier
values are unknown to us: the default is the two ends and the middle of the continuous gate (the port: 0.5, 0.75, 1). Blocks whose Δ or θ₀ is zero stay.

Use it over any method of task vectors where shallow layers suffer from merging; tune `tiers` if you can. It needs the base, one more
walk in which `then` is computed a first time, and three products of the smaller side of each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log1p, tanh
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps
from thetau.methods.fields import NotNegative, Numbers, Positive
from thetau.methods.larv_contrast import Contrast, Difference, block_of
from thetau.methods.over import base_of, followed
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Chain, Cost, Method, Op, PostStage, Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Block = tuple[str, int]


@register("larv", paper="Wang et al. 2026, https://arxiv.org/abs/2602.09413")
@dataclass(frozen=True, kw_only=True)
class Larv(Method):
    r"""$\tau_\ell = s(g_\ell)\,\Delta_\ell$ with Δ what `then` gives and $g_\ell = e_\ell^{\eta}\,(\ell/L)^{\rho} / (1 + \mathrm{softplus}(\hat c_\ell))$.

    - `then`: the method whose result is rescaled.
    - `gate`: how a score becomes a scale: by `tiers` of equally many blocks, or by `tanh`.
    - `tiers`: the scales of the tiers, from the lowest scores to the highest.
    - `gamma`: γ, the steepness of `tanh`.
    - `eta`: η, the power of the contrast of effective ranks.
    - `rho`: ρ, the power of the depth.
    """

    then: Method = field(default_factory=TaskArithmetic)
    gate: Literal["tiers", "tanh"] = "tiers"
    tiers: Annotated[tuple[float, ...], Numbers()] = (0.5, 1.0, 1.5)
    gamma: Positive = 3.0
    eta: NotNegative = 1.0
    rho: NotNegative = 0.5

    def chain(self) -> Chain:
        """The other method's chain, and the scales after it."""
        inner = self.then.chain()
        stage = Rescale(gate=self.gate, tiers=self.tiers, gamma=self.gamma, eta=self.eta, rho=self.rho, models=inner.models)
        return followed(inner, stage)


@dataclass(frozen=True, kw_only=True)
class Rescale(PostStage):
    """A scale for each block of layers; its state is the scales by block. `models`: the chain works on models."""

    gate: Literal["tiers", "tanh"] = "tiers"
    tiers: tuple[float, ...] = (0.5, 1.0, 1.5)
    gamma: float = 3.0
    eta: float = 1.0
    rho: float = 0.5
    models: bool = False
    everywhere: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def requires(self) -> Contrast:
        """How the merged matrices differ from the base's."""
        return Contrast(models=self.models)

    def prepare(self, result: Mapping[str, Difference | None], tasks: tuple[str, ...]) -> dict[Block, float]:
        """The scales."""
        scores = self.scores([one for one in result.values() if one is not None])
        if self.gate == "tanh":
            return {block: 1 + 0.5 * tanh(self.gamma * (score - 1)) for block, score in scores.items()}
        return {block: self.tiers[tier] for block, tier in tiered(scores, len(self.tiers)).items()}

    def scores(self, found: Sequence[Difference]) -> dict[Block, float]:
        """The score of each block: Eq. 8, from the means over its matrices."""
        blocks = sorted({one.block for one in found})
        if not blocks:
            return {}
        mine = {block: [one for one in found if one.block == block] for block in blocks}
        contrast = {block: sum(one.contrast for one in of) / len(of) for block, of in mine.items()}
        conflict = {block: sum(one.conflict for one in of) / len(of) for block, of in mine.items()}
        depth: dict[str, int] = {}
        for tower, number in blocks:
            depth[tower] = max(depth.get(tower, 0), number + 1)
        centre = sum(conflict.values()) / len(blocks)
        spread = (sum((value - centre) ** 2 for value in conflict.values()) / len(blocks)) ** 0.5
        scores = {}
        for block in blocks:
            tower, number = block
            standard = (conflict[block] - centre) / spread if spread > MARGIN * eps(torch.float32) else 0.0
            prior = ((number + 1) / depth[tower]) ** self.rho
            scores[block] = contrast[block] ** self.eta * prior / (1 + softplus(standard))
        return scores

    def solving(self, tasks: int, elements: Sequence[int]) -> Cost:
        """Three products and two spectra of the smaller side of each matrix, as if all were square; float64 takes twice as long."""
        return Cost(flops=2 * sum((3 * 2.0 + 2 * 10.0) * count**1.5 for count in elements))

    def compiles(self, site: Site) -> bool:
        """Where a task vector comes out."""
        return not self.models

    def program(self, state: Mapping[Block, float], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        scale = self._scale(state, site)
        return [] if scale == 1 else [Op("scale", value=scale)]

    def adjust(
        self,
        merged: Float[Tensor, "*block"],
        stack: Float[Tensor, "task *block"] | None,
        state: Mapping[Block, float],
        site: Site,
    ) -> Float[Tensor, "*block"]:
        """A block of rows, scaled."""
        scale, base = self._scale(state, site), base_of(site, self.models)
        if scale == 1:
            return merged
        return merged * scale if base is None else base + (merged - base) * scale

    def notes(self, state: Mapping[Block, float]) -> list[str]:
        """The scales' range, for the summary."""
        if not state:
            return ["larv: no weight matrix of a block was measured, so nothing is rescaled."]
        low, high = min(state, key=lambda block: state[block]), max(state, key=lambda block: state[block])
        ends = [f"{state[tower, number]:.3f} ({tower}.{number})" for tower, number in (low, high)]
        return [f"larv: scales of {len(state)} blocks from {ends[0]} to {ends[1]}."]

    def _scale(self, state: Mapping[Block, float], site: Site) -> float:
        block = block_of(site)
        return 1.0 if block is None else state.get(block, 1.0)


def softplus(value: float) -> float:
    """log(1 + e^x)."""
    return max(value, 0.0) + log1p(exp(-abs(value)))


def tiered(scores: Mapping[Block, float], tiers: int) -> dict[Block, int]:
    """The tier of each block, counted from the lowest: as many blocks in each as can be; equal scores share their middle place."""
    values = sorted(scores.values())
    found = {}
    for block, score in scores.items():
        below = sum(value < score for value in values)
        alike = sum(value == score for value in values)
        found[block] = int(tiers * (below + alike / 2) / len(values))
    return found
