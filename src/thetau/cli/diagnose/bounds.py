"""`thetau diagnose bounds`: measured loss gaps beside the bounds of the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import typer

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Models, session_of, show_rows, told, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import LossBounds

if TYPE_CHECKING:
    from thetau.diagnostics.bounds import Bounds
    from thetau.diagnostics.gaps import Comparison


@with_options
def bounds(models: Models = None, *, out: Charts, json: Json, backbone: Backbone, options: LossBounds, reading: Reading) -> None:
    """Loss gaps of addition, negation and out-of-distribution use, beside the bounds of theory and their conditions.

    thetau diagnose bounds models/* -o diagnostics
    """
    from thetau.plots.bounds import bounds_chart
    from thetau.studies import measures

    json.check()
    result = measures.bounds(session_of(models, backbone, options.by_split(), reading), options)
    write(result, bounds_chart, out, "bounds")
    json.save(result)
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
    show_rows(said, constants, "task", "‖τ‖", "‖τ‖/‖θ₀‖", "‖∇‖", "L (iterations)", "loss at θ₀", "at θ_t", "n")
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
    show_rows(told(result.correlations), found, *first, "inside")
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


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.4g}" if known else "–"


def _count(values: Sequence[bool | None]) -> str:
    return f"{sum(map(bool, values))}" if any(value is not None for value in values) else "–"
