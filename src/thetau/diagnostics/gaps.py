r"""Measured loss gaps of sums, negations and borrowed vectors, each beside its bound.

Zeng et al., 2025, <https://arxiv.org/abs/2502.01015>: the left-hand sides of Theorems 4.5, 4.6 and 4.8, and Fig. 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from thetau.diagnostics.hessian import Smoothness
from thetau.diagnostics.theorems import (
    Condition,
    Geometry,
    addition_bound,
    addition_condition,
    away,
    gradient_condition,
    negation_bound,
    negation_condition,
    ood_bound,
    ood_condition,
)
from thetau.evaluate.spaces import WeightSpace

Theorem = Literal["addition", "negation", "out of distribution"]
ROUNDING = 1e-6  # losses are means in float32


@final
@dataclass(frozen=True, kw_only=True)
class TaskConstants:
    """One task. `norm`: ‖τ‖, `ratio`: ‖τ‖/‖θ₀‖ (Table 9), both over the parameters that some vector moves.

    - `gradient`: ‖∇L_i(θ_i)‖. `smoothness`: L_i at θ_i, None where it was not asked for.
    - `base`, `own`: the mean loss over `n` examples at θ₀ and at θ_i.
    """

    task: str
    n: int
    norm: float
    ratio: float
    gradient: float
    smoothness: Smoothness | None
    base: float
    own: float


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    r"""A measured loss gap of `task` beside its bound.

    - `gap`: L(θ*) − L(θ_task) for θ* = θ₀ + Σ `coefficients` · τ; for negation L(θ*) − L(θ₀).
    - `distance`: ‖θ* − θ_task‖. `second_order`: L/2 · `distance`², for negation + L/2 ‖τ_task‖²: the bound before C and ε, β are put in.
    - `slope`: ⟨θ* − θ_task, ∇⟩, for negation + |⟨τ_task, ∇⟩|: the term that Assumption 4.1 drops; `second_order` + `slope` is what
      Assumption 4.2 says of this very step.
    - `bound`: the theorem's. `holds`, `holds_second_order`: whether the gap is not above it, None without L.
    - `inside`: all `conditions` are met; else the theorem says nothing here, though the formula is shown.
    """

    theorem: Theorem
    task: str
    coefficients: dict[str, float]
    gap: float
    distance: float
    slope: float
    second_order: float | None
    bound: float | None
    holds: bool | None
    holds_second_order: bool | None
    conditions: tuple[Condition, ...]
    inside: bool


@final
@dataclass(frozen=True, kw_only=True)
class HalfSum:
    """θ₀ + ½τ_task + ½τ_other: the loss gap of `task` (Figs. 3, 6), the cosine of the two, L/2 ‖θ* − θ_task‖² where L is known."""

    task: str
    other: str
    cosine: float
    gap: float
    smoothness: float | None
    second_order: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Runs the models. `constants`: by task; `slopes[i][j]` is ⟨τ_j, ∇L_i(θ_i)⟩."""

    space: WeightSpace
    split: str
    geometry: Geometry
    constants: Mapping[str, TaskConstants]
    slopes: Mapping[str, Mapping[str, float]]

    def addition(self, scale: float | None) -> list[Comparison]:
        """Of the mean of the vectors, and of their sum times `scale`."""
        names = self.geometry.names
        rows = []
        for alpha in (1 / len(names), *([] if scale is None else [scale])):
            summed = dict.fromkeys(names, alpha)
            losses = self.space.losses(summed, names, self.split)
            for task in names:
                known = self.constants[task]
                bound = None if known.smoothness is None else addition_bound(known.smoothness.value, *self._size)
                condition = addition_condition(list(summed.values()))
                rows.append(self._compare("addition", task, summed, losses[task].value - known.own, bound, condition))
        return rows

    def negation(self) -> list[Comparison]:
        """Each vector subtracted at α = 1, on every other task."""
        rows = []
        for gone in self.geometry.names:
            others = [name for name in self.geometry.names if name != gone]
            losses = self.space.losses({gone: -1.0}, others, self.split)
            for task in others:
                known = self.constants[task]
                bound = None if known.smoothness is None else negation_bound(known.smoothness.value, *self._size)
                gap = losses[task].value - known.base
                rows.append(self._compare("negation", task, {gone: -1.0}, gap, bound, negation_condition(1.0)))
        return rows

    def out_of_distribution(self) -> list[Comparison]:
        """The most similar other vector at α = 1 in place of each task's own."""
        rows = []
        for task, known in self.constants.items():
            source, beta = self.geometry.nearest(task)
            gap = self.space.losses({source: 1.0}, [task], self.split)[task].value - known.own
            bound = None if known.smoothness is None else ood_bound(known.smoothness.value, self.geometry.size, beta)
            rows.append(self._compare("out of distribution", task, {source: 1.0}, gap, bound, ood_condition(beta)))
        return rows

    def halves(self) -> tuple[HalfSum, ...]:
        """Half of each of two, every ordered pair."""
        names, cosine = self.geometry.names, self.geometry.cosine
        found: dict[tuple[str, str], HalfSum] = {}
        for i, a in enumerate(names):
            for j in range(i):
                both = (a, names[j])
                summed = dict.fromkeys(both, 0.5)
                losses = self.space.losses(summed, both, self.split)
                for task, other in (both, both[::-1]):
                    known = self.constants[task]
                    steep = None if known.smoothness is None else known.smoothness.value
                    found[task, other] = HalfSum(
                        task=task,
                        other=other,
                        cosine=cosine[i][j],
                        gap=losses[task].value - known.own,
                        smoothness=steep,
                        second_order=None if steep is None else steep / 2 * self.geometry.squared(away(summed, task)),
                    )
        return tuple(found[a, b] for a in names for b in names if a != b)

    @property
    def _size(self) -> tuple[float, float]:
        return self.geometry.size, self.geometry.epsilon

    def _compare(
        self, theorem: Theorem, task: str, coefficients: dict[str, float], gap: float, bound: float | None, own: Condition
    ) -> Comparison:
        known, slopes = self.constants[task], self.slopes[task]
        step = away(coefficients, task)
        slope = math.fsum(value * slopes[name] for name, value in step.items())
        distances = [math.sqrt(self.geometry.squared(step))]
        if theorem == "negation":  # the way back from θ_task to θ₀
            slope += abs(slopes[task])
            distances.append(known.norm)
        conditions, second_order = [own], None
        if known.smoothness is not None:
            second_order = known.smoothness.value / 2 * math.fsum(distance**2 for distance in distances)
            conditions.append(gradient_condition(known.gradient, distances, second_order))
            conditions.append(
                Condition(
                    rule="L has converged",
                    met=known.smoothness.converged,
                    got=f"{known.smoothness.iterations} iterations, tolerance {known.smoothness.tolerance:g}",
                )
            )
        return Comparison(
            theorem=theorem,
            task=task,
            coefficients=coefficients,
            gap=gap,
            distance=distances[0],
            slope=slope,
            second_order=second_order,
            bound=bound,
            holds=None if bound is None else gap <= bound + ROUNDING,
            holds_second_order=None if second_order is None else gap <= second_order + ROUNDING,
            conditions=tuple(conditions),
            inside=all(condition.met for condition in conditions),
        )
