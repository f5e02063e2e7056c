"""WUDI's minimisation, fed task by task: what is kept of the tasks is A, B and their sum, whatever their number.

All solvers move from a start τ₀ by a change Δ, for which the gradient is 2(ΔA − R) with R = B − τ₀A: what is left of B, where the
tasks' own large terms have cancelled, so that no step loses digits to them. Where all reference rows together are few against d_in
(2·K·d_out ≤ d_in), A is kept as its factor F, A = FᵀF, and R = CF as C; that is then the cheaper side. A task's own Gram matrix is
a product in float32, but in float64 for the closed form, whose inverse would enlarge its rounding; whatever cancels in R is
accumulated in float64, and what of it is rounding alone is zero (`thetau.linalg.rounding`): Adam makes full steps of any residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.gram import gram_of
from thetau.linalg.rounding import MARGIN, Spectrum, eps, settled
from thetau.linalg.sketch import gaussian
from thetau.parts import Cost, Site, StreamReduction

PAPER_RMS = 2.4e-4  # rms of the entries of the paper's task vectors (CLIP ViT-B/32, eight tasks)
PAPER_EPS = 1e-8
BETAS = (0.9, 0.999)


@dataclass(kw_only=True)
class Quadratic:
    """Σ_i w_i ‖(τ − τ_i) R_iᵀ‖² with w_i = 1/‖τ_i‖²: everything that its gradient 2(τA − B) needs.

    `total` is Σ τ_i and `mean`, where it is kept, Σ w_i τ_i. Either `gram` is A `[d_in, d_in]` and `target` is B `[d_out, d_in]`; or
    `factor` holds the √w_i R_i, the rows of F, and `product` the √w_i τ_i R_iᵀ, the columns of M with B = MF. A, B and M are float64.
    `rows` are the squared lengths of the rows of all τ_i, and `exact` is the precision of the products A is made of.
    """

    total: Float[Tensor, "d_out d_in"]
    rows: Float[Tensor, " d_out"]
    exact: torch.dtype
    mean: Tensor | None = None
    gram: Tensor | None = None
    target: Tensor | None = None
    factor: list[Tensor] = field(default_factory=list)
    product: list[Tensor] = field(default_factory=list)
    weight: float = 0.0
    squares: float = 0.0
    tasks: int = 0

    def kernel(self, dtype: torch.dtype) -> Float[Tensor, "side side"]:
        """A, or FFᵀ, which has the same eigenvalues but for zeros; the caller's own copy."""
        if self.gram is not None:
            return self.gram.to(dtype, copy=True)
        rows = torch.cat(self.factor).to(dtype)
        return rows @ rows.T

    def trace(self) -> float:
        """tr A."""
        if self.gram is not None:
            return float(self.gram.diagonal().double().sum())
        return float(sum(rows.double().square().sum() for rows in self.factor))

    def residual(self, start: Tensor) -> Float[Tensor, "d_out side"]:
        """R = B − start · A, or C with R = CF; in float64, and zero where it is rounding."""
        start = start.double()
        lengths = start.norm(dim=1) + self.rows.sqrt()
        if self.gram is not None and self.target is not None:
            residual = torch.addmm(self.target, start, self.gram, alpha=-1)
            squares = self.gram.diagonal()
            columns = (squares * squares.sum()).sqrt()
            return settled(residual, lengths, columns, float(columns.max()), inputs=self.exact)
        pairs = zip(self.factor, self.product, strict=True)
        residual = torch.cat([product - start @ rows.double().T for rows, product in pairs], 1)
        columns = torch.cat([rows.double().norm(dim=1) for rows in self.factor])
        return settled(residual, lengths, columns, sqrt(self.trace()), inputs=self.exact)

    def moved(self, start: Tensor, change: Float[Tensor, "d_out side"]) -> Float[Tensor, "d_out d_in"]:
        """Start + change, or start + change · F."""
        if self.gram is not None:
            return start + change
        return torch.addmm(start, change, torch.cat(self.factor).to(start.dtype))


@dataclass(frozen=True, kw_only=True)
class Interference(StreamReduction):
    """The reduction of `Wudi`; its fields are explained there. An all-zero task vector's term is dropped."""

    solver: Literal["adam", "closed_form", "gradient_flow"] = "adam"
    steps: int = 300
    lr: float = 1e-5
    lr_absolute: bool = False
    ridge: float = 1e-3
    omega: float | None = None
    time: float = 1.0
    balance: bool = True
    rows: float = 1.0
    reference: Literal["own", "random"] = "own"

    def init(self, d_out: int, d_in: int, tasks: int) -> Quadratic:
        """Nothing yet; whether A is kept as a factor is settled here, by shape and number of tasks."""
        rows = torch.zeros(d_out, dtype=torch.float64)
        exact = torch.float64 if self.solver == "closed_form" else torch.float32
        total = Quadratic(total=torch.zeros(d_out, d_in), rows=rows, exact=exact)
        if self._ridged:
            total.mean = torch.zeros(d_out, d_in)
        if not self._factored(d_out, d_in, tasks):
            total.gram = torch.zeros(d_in, d_in, dtype=torch.float64)
            total.target = torch.zeros(d_out, d_in, dtype=torch.float64)
        return total

    def add(self, total: Quadratic, vector: Float[Tensor, "d_out d_in"], site: Site) -> Quadratic:
        """Take in one task."""
        squares = vector.double().square().sum(1)
        square = float(squares.sum())
        if square == 0:
            return total
        weight = 1 / square if self.balance else 1.0
        total.total += vector
        total.rows += squares
        if total.mean is not None:
            total.mean.add_(vector, alpha=weight)
        total.weight += weight
        total.squares += square
        total.tasks += 1
        rows = self._reference(vector, site).to(total.exact) * sqrt(weight)
        if total.gram is None or total.target is None:
            total.factor.append(rows)
            total.product.append(vector.double() @ rows.double().T)
        else:
            gram = gram_of(rows).double()
            total.target.addmm_(vector.double(), gram)
            total.gram += gram
        return total

    def result(self, total: Quadratic, site: Site) -> Float[Tensor, "d_out d_in"]:
        """τ_m; Σ τ_i where it is the minimiser already, or nothing is to be minimised."""
        if total.tasks < 2 or total.trace() == 0:
            return total.total
        if self.solver == "adam":
            return self._adam(total)
        if self.solver == "closed_form":
            return self._closed_form(total).to(total.total.dtype)
        return self._gradient_flow(total)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        each = ceil(self.rows * d_out)
        r, entries = each * tasks, d_out * d_in
        if self._factored(d_out, d_in, tasks):
            build, step, side = 4.0 * r * entries, 4.0 * r * entries, r
            kept = (2 if self.solver == "closed_form" else 1) * r * d_in + 2 * r * d_out
        else:
            build, step, side = tasks * 2.0 * (each + d_out) * d_in * d_in, 2.0 * entries * d_in, d_in
            kept = 2 * (d_in * d_in + entries)
        solve, held = {
            "adam": (self.steps * (step + 20.0 * entries), 7 * entries + side * d_in),
            "closed_form": ((side**3 / 3 if self._ridged else 9.0 * side**3) + 4.0 * step, 8 * side**2 + 10 * entries),
            "gradient_flow": (9.0 * side**3 + 4.0 * step, 5 * side**2 + 7 * entries),
        }[self.solver]
        adding = 3 * side * d_in + 5 * entries  # a task's Gram matrix in both precisions, its rows and itself in float64
        return Cost(flops=build + solve, memory=4 * (kept + max(held, adding)))

    @property
    def _ridged(self) -> bool:
        return self.solver == "closed_form" and (self.omega is not None or self.ridge > 0)

    def _factored(self, d_out: int, d_in: int, tasks: int) -> bool:
        return 2 * tasks * ceil(self.rows * d_out) <= d_in

    def alternatives(self) -> dict[str, Interference]:
        """The other solvers of the same objective, by what a recipe would say: for the plan."""
        return {
            f"solver={name}": replace(self, solver=name)
            for name in ("adam", "closed_form", "gradient_flow")
            if name != self.solver
        }

    def _reference(self, vector: Tensor, site: Site) -> Tensor:
        """The rows that stand in for a task's inputs."""
        rows = vector
        if self.reference == "random":  # Box–Muller on the site's own bits: the same whatever the order of tasks
            normal = gaussian(vector.shape[0], vector.shape[1], lambda axis, count: site.bits(0, count, f"wudi-{axis}"))
            rows = (vector.mean() + vector.std(correction=0) * normal).to(vector.dtype)
        if self.rows < 1:
            order = torch.argsort(site.bits(0, len(rows), "wudi-rows"), stable=True)
            rows = rows[order[: ceil(self.rows * len(rows))].sort().values]
        return rows

    def _adam(self, total: Quadratic) -> Tensor:
        rms = sqrt(total.squares / (total.tasks * total.total.numel()))
        unit = 1.0 if self.lr_absolute else rms / PAPER_RMS
        # Adam divides out any factor of the loss; unbalanced losses, of fourth order in τ, are so kept from under- and overflow.
        loss = 1.0 if self.balance else total.squares / total.tasks
        floor = PAPER_EPS * unit ** (1 if self.balance else 3) / loss  # scaled as the gradient is
        gram = (total.gram / loss).float() if total.gram is not None else None
        rows = torch.cat(total.factor) / sqrt(loss) if total.factor else None
        residual = (total.residual(total.total) / (loss if rows is None else sqrt(loss))).float()
        change = torch.zeros_like(total.total, requires_grad=True)
        change.grad = torch.empty_like(total.total)
        optimiser = torch.optim.Adam([change], lr=self.lr * unit, betas=BETAS, eps=floor, fused=True)
        with torch.no_grad():
            for _ in range(self.steps):
                if gram is not None:
                    torch.addmm(residual, change, gram, beta=-2, alpha=2, out=change.grad)
                elif rows is not None:
                    torch.mm(torch.addmm(residual, change, rows.T, beta=-2, alpha=2), rows, out=change.grad)
                optimiser.step()
        return total.total + change.detach()

    def _closed_form(self, total: Quadratic) -> Tensor:
        """(B + ω Σ w_i τ_i)(A + ω Σ w_i I)⁻¹ as a move from the mean Σ w_i τ_i / Σ w_i, in float64; ω Σ w_i is `ridge` mean eigenvalues of A.

        Without ω a singular A has many minimisers; this is the one nearest to Σ τ_i, Σ τ_i + (B − Σ τ_i A) A⁺. Where the tasks' own rows
        are the reference they span A's range, and it is also the one of least norm, B A⁺. A direction is left out where its eigenvalue is
        rounding: of A's float64 sums, or of the float32 entries of vectors of low rank.
        """
        kernel, trace = total.kernel(torch.float64), total.trace()
        shift = 0.0
        start = total.total.double()
        if total.mean is not None:
            start = total.mean.double() / total.weight
            shift = self.ridge * trace / start.shape[1] if self.omega is None else self.omega * total.weight
        residual = total.residual(start)
        if shift > MARGIN * sqrt(len(kernel)) * eps(torch.float64) * trace:
            kernel.diagonal().add_(shift)
            change = torch.cholesky_solve(residual.T, torch.linalg.cholesky(kernel)).T
        else:  # the shift, if any, is below A's own rounding and makes nothing regular
            spectrum = Spectrum.of(kernel, margin=MARGIN)
            change = (residual @ spectrum.vectors * spectrum.inverse(shift)) @ spectrum.vectors.T
        return total.moved(start, change)

    def _gradient_flow(self, total: Quadratic) -> Tensor:
        """τ₀ + R Q φ(Λ) Qᵀ with φ(λ) = (1 − e^{−2sλ})/λ and s = time / mean eigenvalue of A = QΛQᵀ.

        With B = τ₀A + R this is τ₀ Q e^{−2sΛ} Qᵀ + B Q φ(Λ) Qᵀ. In a direction whose λ is no more than A's own rounding R has only rounding
        too, and nothing moves.
        """
        spectrum = Spectrum.of(total.kernel(torch.float32))
        growth = spectrum.flow(self.time * total.total.shape[1] / total.trace())
        moves = total.residual(total.total).float() @ spectrum.vectors
        return total.moved(total.total, moves * growth @ spectrum.vectors.T)
