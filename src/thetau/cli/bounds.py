"""`thetau diagnose bounds`: measured loss gaps beside the bounds of the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.diagnose import (
    Base,
    Cached,
    Data,
    ImageSize,
    MaxLength,
    Models,
    Out,
    Split,
    _models,
    _open,
    _table,
    _write,
)

if TYPE_CHECKING:
    from thetau.diagnostics.bounds import Bounds
    from thetau.diagnostics.gaps import Comparison


def bounds(
    models: Models = None,
    *,
    out: Out,
    base: Base = "all-MiniLM-L6-v2",
    data: Data = None,
    split: Split = "test",
    examples: Annotated[
        int, typer.Option(help="Examples a task, always the same ones, for losses, gradients and Hessians.", min=1)
    ] = 64,
    scale: Annotated[
        float | None, typer.Option(help="Add the vectors with this λ too, besides their mean; the theorem needs λ = 1/T.")
    ] = None,
    no_smoothness: Annotated[
        bool, typer.Option("--no-smoothness", help="Leave the Hessians out: gaps, cosines and norms only, no bounds.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Of the power iteration: relative change, twice in a row.")] = 1e-3,
    max_iterations: Annotated[
        int, typer.Option(help="Of the power iteration; a norm that has not converged by then is marked.", min=1)
    ] = 100,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    cache: Cached = None,
) -> None:
    """Loss gaps of addition, negation and out-of-distribution use, beside the bounds of theory and their conditions.

    thetau diagnose bounds models/* -o diagnostics
    """
    from thetau.diagnostics.bounds import bounds as measure
    from thetau.errors import RecipeError
    from thetau.evaluate.spaces import WeightSpace
    from thetau.plots.bounds import bounds_chart

    if not 0 < tolerance < 1:
        raise RecipeError([f"`--tolerance` must be between 0 and 1. Got {tolerance:g}."], "options")
    opened = _open(_models(models), base, data, split, examples, max_length, image_size, cache)
    if not isinstance(opened.space, WeightSpace):
        raise RecipeError(
            [
                "the bounds are about the model itself, whose Hessian at θ_i they take; these vectors belong to the tangent space. "
                "Give models of paradigm standard or attention."
            ],
            "models",
        )
    result = measure(
        opened.space,
        opened.evaluator,
        opened.vectors,
        split=split,
        scale=scale,
        smoothness=not no_smoothness,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    _write(result, bounds_chart, out, "bounds")
    _show(result)


def _show(result: Bounds) -> None:
    constants = [
        [
            one.task,
            f"{one.norm:.3g}",
            f"{one.ratio:.4f}",
            f"{one.gradient:.3g}",
            "–"
            if one.smoothness is None
            else f"{'' if one.smoothness.converged else '≥ '}{one.smoothness.value:.4g} ({one.smoothness.iterations})",
            f"{one.base:.3f}",
            f"{one.own:.3f}",
            str(one.n),
        ]
        for one in result.constants
    ]
    said = f"C = {result.size:.4g}, ε = {result.epsilon:.3g}, over {result.parameters:,} parameters; {result.split} examples"
    _table(said, constants, "task", "‖τ‖", "‖τ‖/‖θ₀‖", "‖∇‖", "L (iterations)", "loss at θ₀", "at θ_t", "n")
    groups: dict[str, list[Comparison]] = {}
    for row in result.comparisons:
        groups.setdefault(_kind(row), []).append(row)
    found = [
        [
            kind,
            str(len(rows)),
            f"{median(row.gap for row in rows):.3g}",
            f"{max(row.gap for row in rows):.3g}",
            *(_median([getattr(row, name) for row in rows]) for name in ("second_order", "bound")),
            *(_count([getattr(row, name) for row in rows]) for name in ("holds_second_order", "holds")),
            str(sum(row.inside for row in rows)),
        ]
        for kind, rows in groups.items()
    ]
    first = ("", "rows", "gap, median", "largest", "L/2·d², median", "bound, median", "gap ≤ L/2·d²", "gap ≤ bound")
    _table(_correlations(result), found, *first, "inside")
    for sentence in _unmet(groups):
        typer.echo(sentence)
    if result.unconverged:
        typer.echo(f"L has not converged and is only a lower estimate: {', '.join(result.unconverged)}. Raise --max-iterations.")


def _kind(row: Comparison) -> str:
    if row.theorem != "addition":
        return row.theorem
    return f"addition, α = {next(iter(row.coefficients.values())):.3g}"


def _unmet(groups: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """A sentence for each rule that some row of a kind breaks."""
    said = []
    for kind, rows in groups.items():
        broken: dict[str, list[str]] = {}
        for row in rows:
            for condition in row.conditions:
                if not condition.met:
                    broken.setdefault(condition.rule, []).append(f"{row.task}, {condition.got}")
        said += [
            f"{kind}: {len(found)} of {len(rows)} outside the condition {rule} (first: {found[0]})."
            for rule, found in broken.items()
        ]
    return said


def _correlations(result: Bounds) -> str:
    return "; ".join(
        f"{one.x} and {one.y}: Spearman {'–' if one.spearman is None else format(one.spearman, '+.2f')}"
        for one in result.correlations
    )


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.4g}" if known else "–"


def _count(values: Sequence[bool | None]) -> str:
    return f"{sum(map(bool, values))}" if any(value is not None for value in values) else "–"
