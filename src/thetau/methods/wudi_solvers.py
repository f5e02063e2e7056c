"""WUDI's minimisation, fed task by task (`thetau.methods.quadratic`): its weights, its reference rows and its solvers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from thetau._lazy import torch
from thetau.linalg.sketch import gaussian
from thetau.methods.fields import part_of
from thetau.methods.quadratic import Quadratic, Sizes, Start, row_squares
from thetau.methods.sketched import Count, Tail, sketched_cost, taken, whole
from thetau.methods.spectral_filter import Filter, Rule, SpectralFilter
from thetau.parts import Cost, Site, StreamReduction
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Solver = Literal["adam", "closed_form", "gradient_flow"]
SOLVERS: tuple[Solver, ...] = ("adam", "closed_form", "gradient_flow")


@dataclass(frozen=True, kw_only=True)
class Interference(StreamReduction):
    """The reduction of `Wudi`; its fields are explained there. An all-zero task vector's term is dropped."""

    solver: Solver = "adam"
    steps: int = 300
    lr: float = 1e-5
    lr_absolute: bool = False
    ridge: float = 1e-3
    omega: float | None = None
    time: float = 1.0
    exp_time: float | None = None
    filter: Filter = "flow"
    alpha: float = 1e-2
    rank: Rule = "share"
    keep: float = 1.0
    start: Start = "sum"
    balance: bool = True
    rows: float = 1.0
    reference: Literal["own", "random"] = "own"
    directions: Count = "full"
    tail: Tail = "flat"

    @property
    def rows_as_inputs(self) -> bool:
        """Unless random rows stand in."""
        return self.reference == "own"

    def init(self, d_out: int, d_in: int, tasks: int) -> Quadratic:
        """Nothing yet; whether A is kept as a factor is settled here, by shape and number of tasks."""
        exact = torch.float64 if self._inverts else torch.float32
        sketches = tasks if self._sketches(d_out, d_in, tasks) else 0
        return Quadratic.empty(d_out, d_in, tasks * ceil(self.rows * d_out), exact, anchored=self._ridged, sketches=sketches)

    def add(self, total: Quadratic, vector: Float[Tensor, "d_out d_in"], site: Site) -> Quadratic:
        """Take in one task."""
        squares = row_squares(vector)
        square = float(squares.sum())
        if square > 0:
            weight = 1 / square if self.balance else 1.0
            bits = stream("wudi-sketch", *site.tasks, site.name)
            if not total.sketches or not taken(total, vector, self.directions, self.tail, weight, bits, squares):
                total.take(vector, self._reference(vector, site), weight)
        return total

    def result(self, total: Quadratic, site: Site) -> Float[Tensor, "d_out d_in"]:
        """τ_m; the start where it is the minimiser already, or nothing is to be minimised."""
        start = total.start(self.start)
        if total.trace() == 0 or (total.tasks < 2 and self.start != "zero"):
            return start
        if self.solver == "adam":
            return total.by_adam(start, self.steps, self.lr, absolute=self.lr_absolute, balanced=self.balance)
        if self.solver == "closed_form":
            return self._closed_form(total).to(start.dtype)
        return self._filtered(total, start)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        if self._sketches(d_out, d_in, tasks):
            return sketched_cost((d_out, d_in), tasks, self.directions)
        sizes = Sizes(d_out, d_in, tasks, ceil(self.rows * d_out), doubled=self._inverts)
        if self.solver == "adam":
            return sizes.steps(self.steps)
        return sizes.inverse(regular=self._ridged) if self.solver == "closed_form" else sizes.spectrum()

    @property
    def _inverts(self) -> bool:
        """Whether something is divided by eigenvalues however small, which enlarges what they round: then all is in float64."""
        return self.solver == "closed_form" or (self.solver == "gradient_flow" and self.filter == "cut")

    def _sketches(self, d_out: int, d_in: int, tasks: int) -> bool:
        """Whether references may be sketches: the tasks' own vectors, in solvers that end at a function of A."""
        plain = self.reference == "own" and self.rows == 1
        smooth = self.solver == "closed_form" or (
            self.solver == "gradient_flow" and self.filter == "flow" and self.rank == "share" and self.keep == 1
        )
        return tasks > 1 and plain and smooth and not whole(self.directions, (d_out, d_in), tasks)

    @property
    def _ridged(self) -> bool:
        return self.solver == "closed_form" and (self.omega is not None or self.ridge > 0)

    def alternatives(self) -> dict[str, Interference]:
        """The other solvers of the same objective, by what a recipe would say: for the plan."""
        others = {f"solver={name}": replace(self, solver=name) for name in SOLVERS if name != self.solver}
        if self.solver != "adam" and self.directions != "full":
            others["directions=full"] = replace(self, directions="full")
        return others

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

    def _closed_form(self, total: Quadratic) -> Tensor:
        """(B + ω Σ w_i τ_i)(A + ω Σ w_i I)⁻¹ as a move from the mean Σ w_i τ_i / Σ w_i, in float64; ω Σ w_i is `ridge` mean eigenvalues of A.

        Without ω a singular A has many minimisers; this is the one nearest to the start, τ₀ + (B − τ₀A) A⁺. Where the tasks' own rows
        are the reference they span A's range, and from Σ τ_i it is also the one of least norm, B A⁺.
        """
        start, shift = total.start(self.start).double(), 0.0
        if total.anchor is not None:
            start = total.anchor.double() / total.weight
            shift = self.ridge * total.trace() / start.shape[1] if self.omega is None else self.omega * total.weight
        if total.pull is not None:
            return total.relaxed(start, lambda spectrum: spectrum.inverse(shift))
        return total.moved(start, total.inverted(total.residual(start), shift))

    def _filtered(self, total: Quadratic, start: Tensor) -> Tensor:
        """Where the gradient flow, or another filter, ends."""
        return SpectralFilter(**part_of(SpectralFilter, self)).moved(total, start)
