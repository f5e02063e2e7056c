"""WUDI's minimisation, fed task by task: what is kept of the tasks is A, B and their sum, whatever their number.

Where all reference rows together are few against d_in (2·K·d_out ≤ d_in), A is kept as its factor F, A = FᵀF, which is then the cheaper side.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.engine.types import Cost, Site

PAPER_RMS = 2.4e-4  # rms of the entries of the paper's task vectors (CLIP ViT-B/32, eight tasks)
PAPER_EPS = 1e-8
BETAS = (0.9, 0.999)


@dataclass
class Quadratic:
    """Σ_i w_i ‖(τ − τ_i) R_iᵀ‖² with w_i = 1/‖τ_i‖²: everything that its gradient 2(τA − B) needs.

    `gram` is A `[d_in, d_in]`, or `factor` is F `[r, d_in]`; `target` is B and `total` Σ τ_i, `[d_out, d_in]`; `mean` is Σ w_i τ_i.
    """

    total: Tensor | None = None
    target: Tensor | None = None
    mean: Tensor | None = None
    gram: Tensor | None = None
    factor: list[Tensor] = field(default_factory=list)
    weight: float = 0.0
    squares: float = 0.0
    tasks: int = 0
    factored: bool = False

    def times(self, tau: Tensor) -> Tensor:
        """τA."""
        if self.factored:
            rows = torch.cat(self.factor)
            return (tau @ rows.T) @ rows
        assert self.gram is not None
        return tau @ self.gram

    def trace(self) -> float:
        """tr A."""
        if self.factored:
            return float(sum(rows.double().square().sum() for rows in self.factor))
        assert self.gram is not None
        return float(self.gram.diagonal().double().sum())

    def spectrum(self) -> tuple[Float[Tensor, " r"], Float[Tensor, "d_in r"]]:
        """Eigenvalues and eigenvectors of A; of its range only, where it is kept as a factor. B and Σ τ_i lie in that range."""
        if not self.factored:
            assert self.gram is not None
            values, vectors = torch.linalg.eigh(self.gram)
            return values.clamp(min=0), vectors
        rows = torch.cat(self.factor).double()
        values, left = torch.linalg.eigh(rows @ rows.T)
        keep = values > values.max() * len(values) * torch.finfo(torch.float32).eps
        vectors = (rows.T @ left[:, keep]) / values[keep].sqrt()
        return values[keep].float(), vectors.float()


@dataclass(frozen=True, kw_only=True)
class Interference:
    """The reduction of `Wudi`; its fields are explained there. An all-zero task vector's term is dropped."""

    solver: Literal["adam", "closed_form", "gradient_flow"] = "adam"
    steps: int = 300
    lr: float = 1e-5
    lr_absolute: bool = False
    ridge: float = 1e-3
    time: float = 1.0
    balance: bool = True
    rows: float = 1.0
    reference: Literal["own", "random"] = "own"

    def init(self, d_out: int, d_in: int, tasks: int) -> Quadratic:
        """Nothing yet; whether A is kept as a factor is settled here, by shape and number of tasks."""
        return Quadratic(factored=2 * tasks * ceil(self.rows * d_out) <= d_in)

    def add(self, total: Quadratic, vector: Float[Tensor, "d_out d_in"], site: Site) -> Quadratic:
        """Take in one task."""
        if total.total is None:
            total.total, total.target, total.mean = (torch.zeros_like(vector) for _ in range(3))
            if not total.factored:
                total.gram = vector.new_zeros(vector.shape[1], vector.shape[1])
        assert total.target is not None and total.mean is not None
        square = float(vector.double().square().sum())
        if square == 0:
            return total
        weight = 1 / square if self.balance else 1.0
        rows = self._reference(vector, site)
        total.total += vector
        total.mean.add_(vector, alpha=weight)
        total.weight += weight
        total.squares += square
        total.tasks += 1
        if total.factored:
            total.factor.append(rows * weight**0.5)
            total.target.addmm_(vector @ rows.T, rows, alpha=weight)
        else:
            assert total.gram is not None
            gram = rows.T @ rows
            if 2 * len(rows) < vector.shape[1]:
                total.target.addmm_(vector @ rows.T, rows, alpha=weight)
            else:
                total.target.addmm_(vector, gram, alpha=weight)
            total.gram.add_(gram, alpha=weight)
        return total

    def result(self, total: Quadratic, site: Site) -> Float[Tensor, "d_out d_in"]:
        """τ_m."""
        assert total.total is not None
        if total.tasks == 0:
            return total.total
        if self.solver == "adam":
            return self._adam(total)
        return self._closed_form(total) if self.solver == "closed_form" else self._gradient_flow(total)

    def cost(self, d_out: int, d_in: int, tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        r = ceil(self.rows * d_out) * tasks
        factored = 2 * r <= d_in
        side = r if factored else d_in
        build = 4.0 * r * d_out * d_in if factored else tasks * 2.0 * d_in * d_in * (d_out + ceil(self.rows * d_out))
        step = 4.0 * d_out * r * d_in if factored else 2.0 * d_out * d_in * d_in
        solve = {
            "adam": self.steps * (step + 20.0 * d_out * d_in),
            "closed_form": (9.0 * side**3 if self.ridge == 0 or factored else side**3 / 3) + 2.0 * step,
            "gradient_flow": 9.0 * side**3 + 2.0 * step,
        }[self.solver]
        square = side * d_in if factored else d_in * d_in
        held = {
            "adam": 1.5 * square + 8 * d_out * d_in,
            "closed_form": 5 * square + 7 * d_out * d_in,
            "gradient_flow": 4 * square + 7 * d_out * d_in,
        }
        return Cost(flops=build + solve, memory=int(4 * held[self.solver]))

    def alternatives(self) -> dict[str, Interference]:
        """The other solvers of the same objective, by what a recipe would say: for the plan."""
        return {f"solver={name}": replace(self, solver=name) for name in ("adam", "closed_form", "gradient_flow") if name != self.solver}

    def _reference(self, vector: Tensor, site: Site) -> Tensor:
        """The rows that stand in for a task's inputs."""
        rows = vector
        if self.reference == "random":  # Box–Muller on the site's own bits: the same whatever the order of tasks
            u = [(site.bits(0, vector.numel(), f"wudi-{axis}").double() + 0.5) / (1 << 31) for axis in "uv"]
            normal = (-2 * u[0].log()).sqrt() * (2 * torch.pi * u[1]).cos()
            rows = (vector.mean() + vector.std() * normal.reshape(vector.shape)).to(vector.dtype)
        if self.rows < 1:
            order = torch.argsort(site.bits(0, len(rows), "wudi-rows"), stable=True)
            rows = rows[order[: ceil(self.rows * len(rows))].sort().values]
        return rows

    def _adam(self, total: Quadratic) -> Tensor:
        assert total.total is not None and total.target is not None
        rms = (total.squares / (total.tasks * total.total.numel())) ** 0.5
        unit = 1.0 if self.lr_absolute else rms / PAPER_RMS
        tau = total.total.clone().requires_grad_()
        tau.grad = torch.empty_like(total.target)
        optimiser = torch.optim.Adam([tau], lr=self.lr * unit, betas=BETAS, eps=PAPER_EPS * unit, fused=True)
        rows = torch.cat(total.factor) if total.factored else None
        with torch.no_grad():
            for _ in range(self.steps):
                if rows is not None:
                    torch.addmm(total.target, tau @ rows.T, rows, beta=-2, alpha=2, out=tau.grad)
                else:
                    assert total.gram is not None
                    torch.addmm(total.target, tau, total.gram, beta=-2, alpha=2, out=tau.grad)
                optimiser.step()
        return tau.detach()

    def _closed_form(self, total: Quadratic) -> Tensor:
        """(B + ω Σ w_i τ_i)(A + ω Σ w_i I)⁻¹, with ω Σ w_i = ridge · mean eigenvalue of A.

        At ridge 0 a singular A has many minimisers; this is the one nearest to Σ τ_i, Σ τ_i + (B − Σ τ_i A) A⁺. Where the tasks' own rows
        are the reference they span A's range, and it is also the one of least norm, B A⁺.
        """
        assert total.total is not None and total.target is not None and total.mean is not None
        d_in = total.target.shape[1]
        shift = self.ridge * total.trace() / d_in
        mean = total.mean.double() / total.weight
        numerator = total.target.double() + shift * mean
        if shift > 0 and not total.factored:
            assert total.gram is not None
            factor = torch.linalg.cholesky(total.gram.double() + shift * torch.eye(d_in, dtype=torch.float64))
            return torch.cholesky_solve(numerator.T.contiguous(), factor).T.to(total.target.dtype)
        values, vectors = (part.double() for part in total.spectrum())
        outside = mean if shift > 0 else total.total.double()  # what the directions that A does not see get
        if shift == 0:
            keep = values > values.max() * d_in * torch.finfo(torch.float32).eps
            values, vectors = values[keep], vectors[:, keep]
        inside = (numerator @ vectors) / (values + shift) - outside @ vectors
        return (outside + inside @ vectors.T).to(total.target.dtype)

    def _gradient_flow(self, total: Quadratic) -> Tensor:
        """τ₀ + [τ₀ Q (e^{−2sΛ} − 1) + B Q φ(Λ)] Qᵀ with φ(λ) = (1 − e^{−2sλ})/λ and s = time / mean eigenvalue of A = QΛQᵀ."""
        assert total.total is not None and total.target is not None
        s = self.time * total.total.shape[1] / total.trace()
        values, vectors = total.spectrum()
        fall = torch.expm1(-2 * s * values)
        growth = torch.where(values > 0, -fall / values.clamp(min=torch.finfo(values.dtype).tiny), 2 * s)
        return total.total + (total.total @ vectors * fall + total.target @ vectors * growth) @ vectors.T
