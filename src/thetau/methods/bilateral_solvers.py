"""The bilateral loss, fed task by task: of each task its leading singular vectors are kept, and the sum of all.

Truncation simplifies the loss and no vector: Σ τ_i is exact, and the directions left out get the weight that their share of ‖τ_i‖² implies
if it is spread evenly (`tail="flat"`), or none, so that what no kept direction sees stays the sum (`"drop"`). With p = 0
or q = 0 one side is the identity, everything is summed up as WUDI does, and memory does not grow with the number of tasks; otherwise it
grows by rank · (d_out + d_in) a task, which `rank` bounds. With `sides="by_role"` every matrix has the one side that its role in the block
says. Whole powers 1 and 2 of one side are products of matrices, and nothing is decomposed. A loss whose factors come from elsewhere is
`with_factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod, sqrt
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from thetau._lazy import torch
from thetau.linalg.descent import descend
from thetau.linalg.kronecker import Kronecker, OneSided, Term
from thetau.linalg.rounding import Spectrum
from thetau.linalg.sketch import gaussian
from thetau.linalg.svd import sketched, truncated_svd
from thetau.methods.quadratic import Quadratic, row_squares
from thetau.methods.sketched import Count, sketched_cost, taken, whole
from thetau.parts import Cost, Site, StreamReduction
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Side: TypeAlias = "tuple[Tensor, Tensor, float]"  # basis, values above the rest, the rest

Kept = int | float | Literal["auto", "full"] | None
TAIL = 1e-5  # a smaller share of ‖τ‖² outside the kept directions is rounding
EXACT = 1e-5  # tolerances below this, but 0, are worked in float64
DAMPING = 1e-2
SPREAD = 10.0  # of the bound over the first Rayleigh quotient, for the cost of a flow: 3 to 9 on a sentence encoder


@dataclass(kw_only=True)
class Total:
    """What is kept: Σ τ_i, and each task's term or, where one side is the identity, the sums A and B (float64)."""

    total: Float[Tensor, "d_out d_in"]
    tasks: int = 0
    size: float = 0.0  # Σ w_i ‖H_i τ_i G_i‖, against which a residual is nothing but rounding
    squares: list[float] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sums: OneSided | None = None
    pull: Tensor | None = None
    expected: int = 1  # tasks that will come
    sketched: Quadratic | None = None  # of τ, or of τᵀ where the left side counts


@dataclass(frozen=True, kw_only=True)
class TwoSided(StreamReduction):
    """The reduction of `Bilateral`; its fields are explained there. An all-zero task vector's term is dropped."""

    p: float = 0.5
    q: float = 1.0
    sides: Literal["by_role", "both"] = "both"
    solver: Literal["cg", "flow"] = "cg"
    iterations: int = 60
    tolerance: float = 0.01
    time: float = 1.0
    rank: Kept = None
    tail: Literal["flat", "drop"] = "flat"
    balance: Literal["norm", "loss", "trace", "none"] = "norm"
    start: Literal["sum", "mean"] = "sum"
    precondition: bool = False
    reference: Literal["own", "random", "random_left", "random_right"] = "own"

    @property
    def rows_as_inputs(self) -> bool:
        """Where the right side counts."""
        return self.q > 0 and self.reference in ("own", "random_left")

    def init(self, d_out: int, d_in: int, tasks: int) -> Total:
        """Nothing yet."""
        return Total(total=torch.zeros(d_out, d_in), expected=tasks)

    def add(self, state: Total, vector: Float[Tensor, "d_out d_in"], site: Site) -> Total:
        """Take in one task."""
        if self.sides == "by_role":
            left = site.weighed_left((vector.shape[0], vector.shape[1]))
            return self._facing(left).add(state, vector, site)
        if self._sketches((vector.shape[0], vector.shape[1]), state.expected):
            self._take(state, vector, site)
            return state
        square = float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2
        if square == 0:
            return state
        if self._one_sided and state.sums is None:
            side = vector.shape[0 if self._left_only else 1]
            gram, target = (torch.zeros(shape, dtype=torch.float64) for shape in ((side, side), vector.shape))
            state.sums = OneSided(gram=gram, target=target, left=self._left_only)
        state.total += vector
        state.tasks += 1
        state.squares.append(square)
        norm = square**0.5
        if state.sums is not None and self._by_products:
            state.size += self._multiply(state.sums, vector, norm, square)
            return state
        given = vector.to(self._dtype)
        u, s, v = truncated_svd(given / norm, self._rank(*vector.shape), stream("bilateral", *site.tasks, site.name))
        seen = int(
            (s > s[0] * max(vector.shape) * torch.finfo(s.dtype).eps).sum()
        )  # what rounding adds to a low rank is no direction
        u, s, v = u[:, :seen], s[:seen].double(), v[:, :seen]
        h, g = s ** (2 * self.p), s ** (2 * self.q)
        h_rest, g_rest = self._rest(s, *vector.shape)
        weight = self._weight(s, h_rest, g_rest, vector.shape, square)
        state.size += weight * float((h * s * g).norm()) * norm
        h, g = h - h_rest, g - g_rest
        if self.reference in ("random", "random_left"):
            u = self._random(u, "left", site)
        if self.reference in ("random", "random_right"):
            v = self._random(v, "right", site)
        if state.sums is not None:
            self._sum(state.sums, vector.double(), (u.double(), h, h_rest), (v.double(), g, g_rest), weight)
            return state
        facts: dict[str, Any] = {"target": (s * norm).to(given)}
        if self.reference != "own":
            rows, columns = u.T @ given, given @ v
            facts = {"target": rows @ v, **({"rows": rows, "columns": columns} if h_rest or g_rest else {})}
        term = Term(left=u, h=h.to(given), right=v, g=g.to(given), h_rest=h_rest, g_rest=g_rest, weight=weight, **facts)
        state.terms.append(term)
        if term.rest:
            pull = weight * h_rest * g_rest
            state.pull = given * pull if state.pull is None else state.pull.add_(given, alpha=pull)
        return state

    def result(self, state: Total, site: Site) -> Float[Tensor, "d_out d_in"]:
        """τ_m; the start where nothing is to be minimised."""
        if state.sketched is not None:
            if self.sides == "by_role":
                left = site.weighed_left((state.total.shape[0], state.total.shape[1]))
                return self._facing(left).result(state, site)
            return self._relaxed(state.sketched)
        start = state.total / state.tasks if self.start == "mean" and state.tasks else state.total
        if state.tasks < 2:
            return start
        if state.sums is not None:
            unit = float(state.sums.gram.diagonal().max())
            if unit == 0:
                return start
            operator: OneSided | Kronecker = state.sums
        else:
            unit = max(term.weight for term in state.terms)
            shape = (state.total.shape[0], state.total.shape[1])
            pull = None if state.pull is None else state.pull / unit
            operator = Kronecker(terms=[term.scaled(1 / unit) for term in state.terms], shape=shape, pull=pull)
        floor = 4 * torch.finfo(self._dtype).eps * state.size / unit
        change = self._change(operator, start, floor, unit if state.sums is not None else 1.0)
        return start + change.to(start.dtype)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix, for as many iterations as there may be."""
        d_out, d_in = shape
        if self.sides == "by_role":  # which of the two it is, a shape cannot tell
            both = [self._facing(left).cost(shape, tasks) for left in (False, True)]
            return Cost(flops=max(one.flops for one in both), memory=max(one.memory for one in both))
        if self._sketches((d_out, d_in), tasks):
            return sketched_cost(self._oriented((d_out, d_in)), tasks, self._count(d_out, d_in))
        entries, small = d_out * d_in, min(d_out, d_in)
        r = self._rank(d_out, d_in)
        sketch = sketched(d_out, d_in, r)
        decompose = 20.0 * r * entries if sketch else 6.0 * entries * small + 20.0 * small**3
        width = 2 if self._dtype == torch.float64 else 1
        if self._one_sided:
            side = d_out if self._left_only else d_in
            step, kept = 2.0 * side * entries, 2 * (side**2 + entries)
            build = tasks * (decompose + 2.0 * r * (side**2 + entries))
            if self._by_products:
                squared = 2.0 * side**3 if (self.p if self._left_only else self.q) == 2 else 0.0
                build = tasks * (4.0 * side * entries + squared)
        else:
            a, b = min(d_out, tasks * r), min(d_in, tasks * r)
            flat = self.tail == "flat" and r < small
            if flat:
                a, b = d_out, d_in
            step, kept = (
                tasks * 4.0 * r * ((2 if flat else 1) * a * b + r * min(a, b)),
                tasks * r * (d_out + d_in) + (entries if flat else 0),
            )
            build = tasks * (decompose + 4.0 * r * entries)
            if a < d_out or b < d_in:
                build += 4.0 * tasks * r * tasks * r * (d_out + d_in)
                kept += a * d_out + b * d_in + tasks * r * (a + b)
        if self.precondition:
            build += 9.0 * (d_out**3 + d_in**3)
            step += 2.0 * entries * (d_out + d_in)
            kept += d_out**2 + d_in**2
        adding = (4 if sketch else 6) * entries + 4 * small**2
        solving = 6 * entries
        if self._one_sided:  # a task's factor in both precisions; the sum once more, its decomposition, and the workspace of that
            adding += 2 * entries + (4 if self._by_products else 3) * side**2
            solving += 2 * entries + (4 if self.solver == "cg" else 5) * side**2
        if self.solver == "cg":
            solve = self.iterations * step
        elif self._one_sided:
            solve = 9.0 * side**3 + 2 * step
        else:
            solve = (4 * sqrt(SPREAD * self.time + 4) + 16) * step
        return Cost(flops=build + solve, memory=4 * width * (kept + max(adding, solving)) + 4 * entries)

    def alternatives(self) -> dict[str, TwoSided]:
        """Smaller ranks of the same loss, by what a recipe would say: for the plan. Products need none."""
        if self.rank == "auto":
            return {"rank=full": replace(self, rank=None)}
        if self.sides == "by_role" and self._facing(True)._by_products:
            return {}
        shares = [share for share in (0.25, 0.0625) if self._all or (isinstance(self.rank, float) and share < self.rank)]
        return {f"rank={share:g}": replace(self, rank=share) for share in shares}

    @property
    def _one_sided(self) -> bool:
        return self.p == 0 or self.q == 0

    @property
    def _by_products(self) -> bool:
        """Whether the one factor is a product of matrices: a small whole power of the whole vector."""
        whole = (self.p if self._left_only else self.q) in (1, 2)
        return self._one_sided and whole and self._all and self.reference == "own" and self.balance in ("norm", "none")

    @property
    def _all(self) -> bool:
        """Whether every singular vector is kept, but where `auto` sketches."""
        return self.rank in (None, "full", "auto")

    @property
    def _left_only(self) -> bool:
        return self.q == 0 and self.p > 0

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.solver == "cg" and 0 < self.tolerance < EXACT else torch.float32

    def _rank(self, d_out: int, d_in: int) -> int:
        small = min(d_out, d_in)
        if self._all or isinstance(self.rank, str) or self.rank is None:
            return small
        return min(small, self.rank if isinstance(self.rank, int) else max(1, ceil(self.rank * small)))

    def _count(self, d_out: int, d_in: int) -> Count:
        return "auto" if self.rank == "auto" else self._rank(d_out, d_in)

    def _oriented(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape with the side that counts last."""
        return (shape[1], shape[0]) if self._left_only else shape

    def _sketches(self, shape: tuple[int, int], tasks: int) -> bool:
        """Whether factors may be sketches: the one side is τᵀτ or ττᵀ itself, and the flow ends at a function of the sum."""
        if self.sides == "by_role" or not self._one_sided or self.p == self.q == 0 or self.solver != "flow" or tasks < 2:
            return False
        plain = (
            max(self.p, self.q) == 1 and self.reference == "own" and self.balance in ("norm", "none") and not self.precondition
        )
        if not plain or self.rank in (None, "full"):
            return False
        count = self._count(*shape)
        worth = count == "auto" or sketched(*shape, int(count))
        return worth and not whole(count, self._oriented(shape), tasks)

    def _take(self, state: Total, vector: Tensor, site: Site) -> None:
        """One task more, as a sketch of its one factor where that is cheaper."""
        faced = vector.T.contiguous() if self._left_only else vector
        squares = row_squares(faced)
        square = float(squares.sum())
        if square == 0:
            return
        if state.sketched is None:
            state.sketched = Quadratic.empty(len(faced), faced.shape[1], 0, torch.float32, sketches=state.expected)
        weight = 1 / square if self.balance == "norm" else 1.0
        bits = stream("bilateral-sketch", *site.tasks, site.name)
        count = self._count(*vector.shape)
        if not taken(state.sketched, faced, count, self.tail, weight, bits, squares):
            state.sketched.take(faced, faced, weight)

    def _relaxed(self, total: Quadratic) -> Tensor:
        """Where the flow of the one-sided sum ends; its unit of time is the mean of the eigenvalues that are not 0."""
        start = total.start(self.start)
        if total.tasks > 1 and total.trace() > 0:
            mean = total.trace() / start.shape[1]

            def gains(spectrum: Spectrum) -> Tensor:
                unit = mean if total.rest > 0 else float(spectrum.values[spectrum.seen].mean())
                return spectrum.flow(self.time / unit)

            start = total.relaxed(start, gains)
        return start.T.contiguous() if self._left_only else start

    def _rest(self, s: Tensor, d_out: int, d_in: int) -> tuple[float, float]:
        """What the directions that `rank` leaves out weigh in H and in G, for s of unit norm.

        Their singular values are taken to be equal, with the square sum that is missing to 1; their trace is spread over all dimensions
        outside the kept ones.
        """
        left, energy = min(d_out, d_in) - len(s), 1 - float(s.square().sum())
        if self.tail == "drop" or left == 0 or energy < TAIL:
            return 0.0, 0.0
        value = (energy / left) ** 0.5
        h, g = (left / (d - len(s)) * value ** (2 * power) for d, power in ((d_out, self.p), (d_in, self.q)))
        return (0.0 if self.p == 0 else h), (0.0 if self.q == 0 else g)

    def _weight(self, s: Tensor, h_rest: float, g_rest: float, shape: tuple[int, ...], square: float) -> float:
        """W_i, for s of unit norm."""
        match self.balance:
            case "loss":
                energy = max(0.0, 1 - float(s.square().sum()))
                return 1 / (float((s ** (2 + 2 * self.p + 2 * self.q)).sum()) + self._tail_loss(h_rest, g_rest) * energy)
            case "trace":
                sides = [
                    float((s ** (2 * power) - rest).sum()) + rest * d
                    for power, rest, d in zip((self.p, self.q), (h_rest, g_rest), shape, strict=True)
                    if power > 0
                ]
                return 1 / prod(sides)
            case "none":
                return float(square ** (self.p + self.q))
        return 1.0

    def _tail_loss(self, h_rest: float, g_rest: float) -> float:
        """What a unit of the tail costs: the product of its weights, a side that is the identity counting 1."""
        return (h_rest if self.p > 0 else 1.0) * (g_rest if self.q > 0 else 1.0)

    def _random(self, basis: Tensor, side: str, site: Site) -> Tensor:
        """Random orthonormal columns in the place of a task's own."""
        bits = stream(site.seed, f"bilateral-{side}", *site.tasks, site.name)
        q: Tensor = torch.linalg.qr(gaussian(basis.shape[0], basis.shape[1], bits).to(basis)).Q
        return q

    def _facing(self, left: bool) -> TwoSided:
        """With the one side that a matrix of `sides="by_role"` has."""
        return replace(self, sides="both", p=self.p if left else 0.0, q=0.0 if left else self.q)

    def _multiply(self, sums: OneSided, vector: Tensor, norm: float, square: float) -> float:
        """Add w τ G and w G, or w H τ and w H, of a whole power, from the vector itself; returns ‖w H τ‖."""
        power = self.p if sums.left else self.q
        unit = vector.to(self._dtype) / norm
        rows = unit.T if sums.left else unit  # M with the factor (MᵀM)^power
        gram = rows.T @ rows
        if power == 2:
            gram = gram @ gram
        factor = gram.double().mul_(self._weight(unit.new_empty(0), 0.0, 0.0, vector.shape, square))
        pull = factor @ vector.double() if sums.left else vector.double() @ factor
        sums.gram.add_(factor)
        sums.target.add_(pull)
        return float(pull.norm())

    def _sum(self, sums: OneSided, vector: Tensor, left: Side, right: Side, weight: float) -> None:
        """Add w τ G and w G, or w H τ and w H; with p = q = 0, w τ and w I."""
        if self.p == self.q == 0:
            sums.gram.diagonal().add_(weight)
            sums.target.add_(vector, alpha=weight)
            return
        basis, values, rest = left if sums.left else right
        weighted = basis * (weight * values)
        sums.gram.addmm_(weighted, basis.T)
        sums.gram.diagonal().add_(weight * rest)
        sums.target.add_(vector, alpha=weight * rest)
        if sums.left:
            sums.target.addmm_(weighted, basis.T @ vector)
        else:
            sums.target.addmm_(vector @ weighted, basis.T)

    def _change(self, operator: OneSided | Kronecker, start: Tensor, floor: float, unit: float = 1.0) -> Tensor:
        """From the start to where it stops; `unit` is what sums are still to be divided by."""
        small, left, right = operator.compressed()
        residual = operator.residual(start.to(torch.float64 if isinstance(operator, OneSided) else self._dtype)).div_(unit)
        residual = residual if left is None else left.T @ residual
        residual = (residual if right is None else residual @ right).to(self._dtype)
        if isinstance(small, OneSided):
            small = small.to(self._dtype, unit)
        if self.solver == "flow":
            change = small.flow(residual, time=self.time, floor=floor)
        else:
            change = descend(
                small.apply,
                residual,
                iterations=self.iterations,
                tolerance=self.tolerance,
                floor=floor,
                precondition=small.preconditioner(DAMPING) if self.precondition else None,
            )
        change = change if left is None else left @ change
        return change if right is None else change @ right.T


def with_factors(
    vectors: Sequence[Float[Tensor, "d_out d_in"]],
    factors: Sequence[tuple[Tensor | None, Tensor | None]],
    part: TwoSided,
) -> Float[Tensor, "d_out d_in"]:
    """The same minimisation with factors (H_i, G_i) that are given, such as covariances measured on data; None is the identity.

    Each is scaled to unit trace, so that every task counts the same; `part` says how far to go. Its p, q, rank, balance and reference do
    not count.
    """
    terms = []
    given = [vector.to(part._dtype) for vector in vectors]
    total = torch.zeros_like(given[0])
    size = 0.0
    for vector, (left, right) in zip(given, factors, strict=True):
        if not bool(vector.any()):
            continue
        total += vector
        (u, h), (v, g) = (_spectrum(side, part._dtype) for side in (left, right))
        term = Term(left=u, h=h, right=v, g=g, target=vector)
        term = replace(term, target=term.inside(vector))
        terms.append(term)
        size += float(term.apply(vector).norm())
    start = total / len(terms) if part.start == "mean" and terms else total
    if len(terms) < 2:
        return start
    shape = (total.shape[0], total.shape[1])
    return start + part._change(Kronecker(terms=terms, shape=shape), start, floor=4 * torch.finfo(part._dtype).eps * size)


def _spectrum(side: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    if side is None:
        return None, torch.ones(1, dtype=dtype)
    values, vectors = torch.linalg.eigh(side.double())
    values = values.clamp(min=0)
    return vectors.to(dtype), (values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)).to(dtype)
