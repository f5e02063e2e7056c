"""One quadratic, fed task by task: what is kept of the tasks is A, B and their sum, whatever their number.

WUDI, SWUDI, OptMerge, ACTMat and ACE all minimise Σ_i w_i ‖(τ − T_i) R_iᵀ‖² in one matrix τ and differ in the weights w_i, in the targets
T_i, in the rows R_i that stand in for a task's inputs, and in how far they go. The gradient is 2(τA − B) with A = Σ w_i R_iᵀR_i and
B = Σ w_i T_iR_iᵀR_i.

All solvers move from a start τ₀ by a change Δ, for which the gradient is 2(ΔA − R) with R = B − τ₀A: what is left of B, where the
tasks' own large terms have cancelled, so that no step loses digits to them. Where all reference rows together are few against d_in
(twice their number ≤ d_in), A is kept as its factor F, A = FᵀF, and R = CF as C; that is then the cheaper side. A task's own Gram matrix is
a product in float32, but in float64 where an inverse would enlarge its rounding; whatever cancels in R is
accumulated in float64, and what of it is rounding alone is zero (`thetau.linalg.rounding`): Adam makes full steps of any residual.

A reference may be a sketch: few rows R_i and a weight c_i of every direction, R_iᵀR_i + c_i in the place of what they stand for. Then
A = FᵀF + c with c = Σ w_i c_i, and what moves outside the rows of F moves with c alone, so that nothing larger than FFᵀ is decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Literal

from thetau._lazy import torch
from thetau.linalg.gram import gram_of
from thetau.linalg.rounding import MARGIN, Spectrum, eps, settled
from thetau.parts import Cost

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Start = Literal["sum", "mean", "zero"]
PAPER_RMS = 2.4e-4  # rms of the entries of WUDI's task vectors (CLIP ViT-B/32, eight tasks)
PAPER_EPS = 1e-8
BETAS = (0.9, 0.999)
SMALL = 1e-12  # the squares of shorter rows come near to the least float32


@dataclass(kw_only=True)
class Quadratic:
    """Σ_i w_i ‖(τ − T_i) R_iᵀ‖²: everything that its gradient 2(τA − B) needs.

    `total` is Σ τ_i and `anchor`, where it is kept, Σ w_i T_i. Either `gram` is A `[d_in, d_in]` and `target` is B `[d_out, d_in]`; or
    `factor` holds the √w_i R_i, the rows of F, and `product` the √w_i T_i R_iᵀ, the columns of M with B = MF. A, B and M are float64.
    `rows` are the squared lengths of the rows of all T_i, and `exact` is the precision of the products A is made of. Beside the factor
    stand `rest`, c = Σ w_i c_i, and `pull`, Σ w_i c_i T_i, where sketches have them.
    """

    total: Float[Tensor, "d_out d_in"]
    rows: Float[Tensor, " d_out"]
    exact: torch.dtype
    anchor: Tensor | None = None
    gram: Tensor | None = None
    target: Tensor | None = None
    factor: list[Tensor] = field(default_factory=list)
    product: list[Tensor] = field(default_factory=list)
    sketches: int = 0  # tasks whose references may be sketches
    rest: float = 0.0
    pull: Tensor | None = None
    weight: float = 0.0
    squares: float = 0.0
    tasks: int = 0

    @staticmethod
    def empty(
        d_out: int, d_in: int, references: int, exact: torch.dtype, *, anchored: bool = False, sketches: int = 0
    ) -> Quadratic:
        """That of no task; `references` is how many reference rows all tasks will bring, which settles how A is kept.

        Where the references of so many tasks may be `sketches`, A is a factor until one comes that is none.
        """
        rows = torch.zeros(d_out, dtype=torch.float64)
        total = Quadratic(total=torch.zeros(d_out, d_in), rows=rows, exact=exact, sketches=sketches)
        if anchored:
            total.anchor = torch.zeros(d_out, d_in)
        if not sketches and not factored(references, d_in):
            total.gram = torch.zeros(d_in, d_in, dtype=torch.float64)
            total.target = torch.zeros(d_out, d_in, dtype=torch.float64)
        return total

    def take(
        self,
        vector: Float[Tensor, "d_out d_in"],
        reference: Float[Tensor, "row d_in"],
        weight: float,
        target: Float[Tensor, "d_out d_in"] | None = None,
    ) -> None:
        """One task more, whose target is the vector itself unless it is given."""
        target = vector if target is None else target
        squares = row_squares(target)
        self._count(vector, target, squares, weight, None if target is vector else float(row_squares(vector).sum()))
        rows = reference.to(self.exact) * sqrt(weight)
        if self.gram is None or self.target is None:
            self.factor.append(rows)
            self.product.append(target.double() @ rows.double().T)
        else:
            gram = gram_of(rows).double()
            self.target.addmm_(target.double(), gram)
            self.gram += gram

    def take_sketch(
        self,
        vector: Float[Tensor, "d_out d_in"],
        rows: Float[Tensor, "row d_in"],
        images: Float[Tensor, "d_out row"],
        rest: float,
        weight: float,
        squares: Float[Tensor, " d_out"],
    ) -> None:
        """One task more that is its own target, of whose reference RᵀR + c the rows R, the product τRᵀ and c are given.

        `squares` are the squared lengths of the vector's rows.
        """
        self._count(vector, vector, squares, weight, None)
        rows, images = (part.to(self.exact) * sqrt(weight) for part in (rows, images))
        if self.gram is not None and self.target is not None:
            exact = rows.double()
            self.gram.addmm_(exact.T, exact).diagonal().add_(weight * rest)
            self.target.addmm_(images.double(), exact).add_(vector, alpha=weight * rest)
            return
        self.factor.append(rows)
        self.product.append(images)
        if rest > 0:
            self.rest += weight * rest
            self.pull = vector * (weight * rest) if self.pull is None else self.pull.add_(vector, alpha=weight * rest)

    def unfold(self) -> None:
        """Keep A and B themselves from now on: a reference comes that is no sketch."""
        if self.gram is not None or not self.sketches:
            return
        d_out, d_in = self.total.shape
        self.gram, self.target = (torch.zeros(rows, d_in, dtype=torch.float64) for rows in (d_in, d_out))
        for rows, product in zip(self.factor, self.product, strict=True):
            self.gram.addmm_(rows.double().T, rows.double())
            self.target.addmm_(product.double(), rows.double())
        self.gram.diagonal().add_(self.rest)
        if self.pull is not None:
            self.target.add_(self.pull)
        self.factor, self.product, self.rest, self.pull = [], [], 0.0, None

    def _count(self, vector: Tensor, target: Tensor, squares: Tensor, weight: float, own: float | None) -> None:
        self.total += vector
        self.rows += squares
        if self.anchor is not None:
            self.anchor.add_(target, alpha=weight)
        self.weight += weight
        self.squares += float(squares.sum()) if own is None else own
        self.tasks += 1

    def start(self, where: Start) -> Float[Tensor, "d_out d_in"]:
        """Σ τ_i, their mean over the tasks that are not zero, or zero; the caller's own copy."""
        if where == "zero":
            return torch.zeros_like(self.total)
        return self.total / max(1, self.tasks) if where == "mean" else self.total.clone()

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
        return float(sum(rows.double().square().sum() for rows in self.factor)) + self.rest * self.total.shape[1]

    def numerator(self) -> Float[Tensor, "d_out d_in"]:
        """B in float64."""
        if self.target is not None:
            return self.target
        return torch.cat(self.product, 1) @ torch.cat(self.factor).double()

    def through(self, left: Float[Tensor, "row d_in"]) -> Float[Tensor, "row side"]:
        """left · A, or what stands left of F in it, in float64."""
        if self.gram is not None:
            return left.double() @ self.gram
        return left.double() @ torch.cat(self.factor).double().T

    def residual(self, start: Tensor) -> Float[Tensor, "d_out side"]:
        """R = B − start · A, or C with R = CF; in float64, and zero where it is rounding."""
        lengths = row_squares(start).sqrt() + self.rows.sqrt()
        if self.sketches and self.factor:
            rows = torch.cat(self.factor)
            sketched = torch.addmm(torch.cat(self.product, 1), start.to(rows.dtype), rows.T, alpha=-1).double()
            columns = rows.norm(dim=1).double()
            return settled(sketched, lengths, columns, float(columns.norm()), inputs=self.exact)
        start = start.double()
        if self.gram is not None and self.target is not None:
            residual = torch.addmm(self.target, start, self.gram, alpha=-1)
            squares = self.gram.diagonal()
            columns = (squares * squares.sum()).sqrt()
            return settled(residual, lengths, columns, float(columns.max()), inputs=self.exact)
        pairs = zip(self.factor, self.product, strict=True)
        residual = torch.cat([product - start @ rows.double().T for rows, product in pairs], 1)
        columns = torch.cat([rows.double().norm(dim=1) for rows in self.factor])
        return settled(residual, lengths, columns, float(columns.norm()), inputs=self.exact)

    def relaxed(self, start: Tensor, gains: Callable[[Spectrum], Tensor]) -> Float[Tensor, "d_out d_in"]:
        """start + R g(A), g being given by what it makes of a spectrum's eigenvalues.

        With A = FᵀF + c, FFᵀ = EΛEᵀ and R = CF + T, T being Σ w_i c_i (T_i − start), R g(A) is
        [C E g(Λ + c) + T Fᵀ E (g(Λ + c) − g(c)) / Λ] EᵀF + g(c) T.
        """
        exact = self.exact
        spectrum = Spectrum.of(self.kernel(exact), margin=MARGIN if exact == torch.float64 else 1.0)
        residual, vectors = self.residual(start).to(exact), spectrum.vectors
        if self.pull is None:
            moves = residual @ vectors * gains(spectrum)
            return self.moved(start.to(exact), moves @ vectors.T)
        tail = self._tail(start).to(exact)
        values = torch.where(spectrum.seen, spectrum.values, 0)
        gain = gains(Spectrum(values + self.rest, vectors, torch.ones_like(spectrum.seen)))
        alone = Spectrum(values.new_tensor([self.rest]), values.new_ones(1, 1), torch.ones_like(spectrum.seen[:1]))
        outside = gains(alone)
        more = torch.where(spectrum.seen, (gain - outside) * spectrum.inverse(), 0)
        moves = residual @ vectors * gain + (tail @ torch.cat(self.factor).to(exact).T) @ vectors * more
        return self.moved(torch.add(start.to(exact), tail, alpha=float(outside)), moves @ vectors.T)

    def _tail(self, start: Tensor) -> Float[Tensor, "d_out d_in"]:
        """Σ w_i c_i (T_i − start), the rows that are rounding being zero."""
        assert self.pull is not None
        tail = torch.sub(self.pull, start, alpha=self.rest)
        rounding = MARGIN * eps(torch.float32) * self.rest * (row_squares(start).sqrt() + self.rows.sqrt())
        nothing = row_squares(tail).sqrt() <= rounding
        return tail.masked_fill_(nothing[:, None], 0) if bool(nothing.any()) else tail

    def moved(self, start: Tensor, change: Float[Tensor, "d_out side"]) -> Float[Tensor, "d_out d_in"]:
        """Start + change, or start + change · F."""
        if self.gram is not None:
            return start + change
        return torch.addmm(start, change, torch.cat(self.factor).to(start.dtype))

    def inverted(self, residual: Float[Tensor, "row side"], shift: float) -> Float[Tensor, "row side"]:
        """residual · (A + shift)⁻¹ in float64, the change that a closed form makes.

        Where the shift is below A's own rounding it makes nothing regular: then a direction is left out where its eigenvalue is
        rounding, of A's float64 sums or of the float32 entries of vectors of low rank.
        """
        kernel = self.kernel(torch.float64)
        if shift > MARGIN * sqrt(len(kernel)) * eps(torch.float64) * self.trace():
            kernel.diagonal().add_(shift)
            return torch.cholesky_solve(residual.T, torch.linalg.cholesky(kernel)).T
        spectrum = Spectrum.of(kernel, margin=MARGIN)
        return (residual @ spectrum.vectors * spectrum.inverse(shift)) @ spectrum.vectors.T

    def stepped(
        self, start: Tensor, steps: int, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], *, loss: float = 1.0
    ) -> Float[Tensor, "d_out d_in"]:
        """Where so many steps of an optimiser lead from a start, the objective being divided by `loss`; one product a step."""
        gram = (self.gram / loss).float() if self.gram is not None else None
        rows = torch.cat(self.factor).float() / sqrt(loss) if self.factor else None
        residual = (self.residual(start) / (loss if rows is None else sqrt(loss))).float()
        change = torch.zeros_like(start, requires_grad=True)
        change.grad = torch.empty_like(start)
        stepping = optimiser([change])
        with torch.no_grad():
            for _ in range(steps):
                if gram is not None:
                    torch.addmm(residual, change, gram, beta=-2, alpha=2, out=change.grad)
                elif rows is not None:
                    torch.mm(torch.addmm(residual, change, rows.T, beta=-2, alpha=2), rows, out=change.grad)
                stepping.step()
        return start + change.detach()

    def by_adam(self, start: Tensor, steps: int, lr: float, *, absolute: bool, balanced: bool) -> Float[Tensor, "d_out d_in"]:
        """WUDI's Adam. Unless `absolute`, lr and ε follow the rms of the tensor's entries, so that the result follows their scale."""
        rms = sqrt(self.squares / (self.tasks * self.total.numel()))
        unit = 1.0 if absolute else rms / PAPER_RMS
        # Adam divides out any factor of the loss; unbalanced losses, of fourth order in τ, are so kept from under- and overflow.
        loss = 1.0 if balanced else self.squares / self.tasks
        floor = PAPER_EPS * unit ** (1 if balanced else 3) / loss  # scaled as the gradient is

        def adam(values: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(values, lr=lr * unit, betas=BETAS, eps=floor, fused=True)

        return self.stepped(start, steps, adam, loss=loss)


def row_squares(matrix: Tensor) -> Float[Tensor, " row"]:
    """The squared lengths of rows, in float64; summed there too where float32 could not hold them."""
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    if not SMALL < float(lengths.max()) < 1 / SMALL:
        lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
    return lengths.double().square()


def factored(references: int, d_in: int) -> bool:
    """Whether A is kept as its factor: where twice as many rows as it is made of are no more than its side."""
    return 2 * references <= d_in


@dataclass(frozen=True)
class Sizes:
    """What a quadratic of one matrix costs, by solver: operations and bytes. `each` is a task's number of reference rows."""

    d_out: int
    d_in: int
    tasks: int
    each: int
    doubled: bool = False  # products in float64

    @property
    def entries(self) -> int:
        """Entries of the matrix."""
        return self.d_out * self.d_in

    @property
    def factored(self) -> bool:
        """Whether A is kept as its factor."""
        return factored(self.each * self.tasks, self.d_in)

    @property
    def side(self) -> int:
        """The side of what is decomposed."""
        return self.each * self.tasks if self.factored else self.d_in

    @property
    def step(self) -> float:
        """Operations of one gradient."""
        return (4.0 * self.side if self.factored else 2.0 * self.d_in) * self.entries

    def cost(self, solve: float, held: int) -> Cost:
        """Feeding all tasks, then so many operations with so many floats beside what is kept."""
        r = self.each * self.tasks
        if self.factored:
            build = 4.0 * r * self.entries
            kept = (2 if self.doubled else 1) * r * self.d_in + 2 * r * self.d_out
        else:
            build = self.tasks * 2.0 * (self.each + self.d_out) * self.d_in**2
            kept = 2 * (self.d_in**2 + self.entries)
        adding = (
            3 * self.side * self.d_in + 5 * self.entries
        )  # a task's Gram matrix in both precisions, its rows and itself in float64
        return Cost(flops=build + solve, memory=4 * (kept + max(held, adding)))

    def steps(self, steps: int) -> Cost:
        """So many steps of an optimiser."""
        return self.cost(steps * (self.step + 20.0 * self.entries), 7 * self.entries + self.side * self.d_in)

    def inverse(self, *, regular: bool) -> Cost:
        """A closed form: by Cholesky where A is made `regular` by a shift, else by an eigendecomposition."""
        return self.cost(
            (self.side**3 / 3 if regular else 9.0 * self.side**3) + 4.0 * self.step, 8 * self.side**2 + 10 * self.entries
        )

    def spectrum(self) -> Cost:
        """A filter of the spectrum: one eigendecomposition."""
        return self.cost(9.0 * self.side**3 + 4.0 * self.step, (10 if self.doubled else 5) * self.side**2 + 10 * self.entries)
