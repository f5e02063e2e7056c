r"""SVC: after a merge, shrink the singular values of directions in which the tasks were counted several times.

Singular Value Calibration, Li et al., ICML 2026, <https://arxiv.org/abs/2602.05536>, over any method (`then`). With the merged M = Σ_r σ_r u_r v_rᵀ,
the rows a_r = u_rᵀ M and a_r^i = u_rᵀ τ_i, and s_r^i = ⟨a_r, a_r^i⟩ / ‖a_r^i‖², how far the merged row goes along task i's own:
σ_r becomes σ_r K / Σ_i max(α, s_r^i), and the directions stay. As in the authors' code (lyymuwu/SVC) and FusionBench it acts on matrices, and M is
what the method gives, its λ included. While no s falls under α, that λ changes nothing: do not tune both.

Variants and departures. α is 1/K as in the authors' script, which takes 1 over TSV-M (FusionBench: 0.1; 0.2 over Iso-CTS; 1 over TSV-M and WUDI).
The authors leave embeddings and `text_projection` out, FusionBench no matrix; here it is every matrix that `then` acts on, or those of the
blocks alone. A row a_r^i that is below the rounding of τ_i says nothing, and counts as α; the authors divide by at least 1e-12, which follows no
scale. Directions of M that are below the rounding of its largest become 0. τ_i are the vectors as they were, whatever `then` (`ties`, `dare_ties`,
`awd`) trims, thins or takes off. The singular values of `iso_c` are all equal, so that its directions are whatever rounding makes of them: there
is nothing to calibrate.

Use it over `task_arithmetic`, `tsv_m` or `wudi` when the tasks are alike and share directions. It costs one
eigendecomposition of the smaller side in float64 and K products a matrix, and needs all tasks' vectors of a matrix in memory at once, whatever `then` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps
from thetau.linalg.svd import decomposed, polar_flops
from thetau.methods.fields import Within
from thetau.methods.over import base_of, followed, without_base
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Access, Chain, Cost, Method, PostStage, Selection, Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("svc", paper="Li et al., ICML 2026, https://arxiv.org/abs/2602.05536")
@dataclass(frozen=True, kw_only=True)
class Svc(Method):
    r"""$\tau = \sum_r \gamma_r \sigma_r u_r v_r^\top$ with $\sum_r \sigma_r u_r v_r^\top$ what `then` gives and $\gamma_r = K / \sum_i \max(\alpha, s_r^i)$.

    - `then`: the method whose result is calibrated.
    - `alpha`: α, the least that a task counts; 1/α bounds how far a direction is amplified.
    - `matrices`: `all` matrices that `then` acts on, or those of the blocks (`linear`).
    """

    then: Method = field(default_factory=TaskArithmetic)
    alpha: Annotated[float | None, Within("(0, 1]", none="for 1/K")] = None
    matrices: Literal["all", "linear"] = "all"

    def chain(self) -> Chain:
        """The other method's chain, and the calibration after it."""
        inner = self.then.chain()
        kind = CalibrateModels if inner.models else Calibrate
        return followed(inner, kind(alpha=self.alpha, matrices=self.matrices, models=inner.models))


@dataclass(frozen=True, kw_only=True)
class Calibrate(PostStage):
    """The calibration of one merged tensor.

    - `models`: the chain works on models.
    """

    alpha: float | None = None
    matrices: Literal["all", "linear"] = "all"
    models: bool = False
    access: ClassVar[Access] = "whole"
    reads_stack: ClassVar[bool] = True
    reads_vectors: ClassVar[bool] = True

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One decomposition, and each task's vector on its directions."""
        if len(shape) != 2:
            return Cost()
        entries, small = shape[0] * shape[1], min(shape)
        flops = polar_flops(*shape) + 4.0 * (tasks + 1) * small * entries  # float64 takes twice as long
        return Cost(flops=flops, memory=4 * (tasks + 2) * entries + 8 * (6 * entries + 4 * small**2))

    def adjust(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"] | None, state: object, site: Site
    ) -> Float[Tensor, "*block"]:
        """The calibrated tensor; one that is no such matrix as it is."""
        selection = Selection(tensors="matrices" if self.matrices == "all" else "linear")
        if not selection.takes(site.name, site.shape, site.kind) or 0 in site.shape:
            return merged
        assert stack is not None
        base = base_of(site, self.models)
        delta = merged if base is None else merged - base
        vectors = without_base(stack, site, base)
        alpha = 1 / len(vectors) if self.alpha is None else self.alpha
        out = calibrated(delta, vectors, alpha)
        return out if base is None else out + base


@dataclass(frozen=True, kw_only=True)
class CalibrateModels(Calibrate):
    """The same in a chain over models, from which the base is taken first."""

    needs: ClassVar[tuple[str, ...]] = ("base",)


def calibrated(
    merged: Float[Tensor, "d_out d_in"], vectors: Float[Tensor, "task d_out d_in"], alpha: float
) -> Float[Tensor, "d_out d_in"]:
    """M with its singular values calibrated against the tasks' vectors, in float64: singular values lie close together."""
    if not bool(merged.any()):
        return merged
    u, s, v = decomposed(merged)
    total = torch.zeros_like(s)
    for vector in vectors:
        rows = u.T @ vector.double()  # a_r^i
        squares = rows.square().sum(1)
        floor = (MARGIN * eps(torch.float32)) ** 2 * max(vector.shape) * float(vector.norm()) ** 2
        along = s * (rows * v.T).sum(1)  # ⟨a_r, a_r^i⟩, since a_r = σ_r v_rᵀ
        total += torch.where(squares > floor, along / squares.clamp(min=torch.finfo(s.dtype).tiny), 0).clamp(min=alpha)
    out: Tensor = ((u * (s * len(vectors) / total)) @ v.T).to(merged.dtype)
    return out
