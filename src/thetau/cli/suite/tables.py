"""What `thetau suite run` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau.evaluate.means import average, worthless
from thetau.studies.tables import best_cells, caption, cells, header

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.studies.arithmetic import Addition
    from thetau.studies.paradigms import ParadigmResults
    from thetau.studies.suite_results import SuiteResults


def rich_table(results: SuiteResults) -> Table:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption(results), caption_justify="left")
    for number, name in enumerate(header(results)):
        # Narrow headings, and numbers that never wrap: what is short of room is the method's name, which stays readable on two lines.
        heading = name.replace("_", "\n").replace("normalised", "norm-\nalised")
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number > 0, vertical="middle")
    best = best_cells(results)
    for number, row in enumerate(results.rows):
        texts = [
            Text(text, style="bold" if row.role == "merged" and best.get(column) == text else "")
            for column, text in enumerate(cells(row, results))
        ]
        last_reference = row.role != "merged" and number + 1 < len(results.rows) and results.rows[number + 1].role == "merged"
        table.add_row(*texts, end_section=last_reference)
    return table


def paradigm_table(results: ParadigmResults) -> Table:
    """A comparison of paradigms for a terminal: means over tasks and seeds, in percent."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_about(results), caption_justify="left")
    columns = ("paradigm", "individual", "α = 1", "norm.", "tuned", "norm.", "α", "negated", "control")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for name in results.names():
        rows = results.of(name)
        if rows[0].joint is not None:
            table.add_row(name, _percent([average(row.joint) for row in rows if row.joint]))
            continue
        individual = _percent([average(row.individual) for row in rows if row.individual])
        negated = [outcome.tuned for row in rows for outcome in row.negation]
        removal = [_percent([one.target.value for one in negated]), _percent([one.control.value for one in negated])]
        table.add_row(name, individual, *_added([row.addition for row in rows if row.addition]), *(removal if negated else []))
        for method in rows[0].merged:
            table.add_row(f"  + {method}", "", *_added([row.merged[method] for row in rows if method in row.merged]))
    return table


def _added(found: list[Addition]) -> list[str]:
    one, tuned = [each.one_shot for each in found], [each.tuned for each in found]
    return [
        _percent([each.absolute for each in one]),
        _percent([each.normalised for each in one]),
        _percent([each.absolute for each in tuned]),
        _percent([each.normalised for each in tuned]),
        ", ".join(f"{each.alpha:g}" for each in tuned),
    ]


def _percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def _about(results: ParadigmResults) -> str:
    sizes = sorted({size["test"] for size in results.sizes.values()})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    control = "" if results.control is None else f", control task {results.control}"
    quick = " A quick run: smaller than the suite asks for." if results.quick else ""
    nothing = sorted({task for row in results.rows if row.individual for task in worthless(row.individual)})
    lost = (
        f" Some of their own models score 0 or less, and the normalised mean leaves them out: {', '.join(nothing)}."
        if nothing
        else ""
    )
    return (
        f"Suite {results.suite} on {results.backbone}: {len(results.tasks)} tasks{control}; test, in percent, n = {n} a task, "
        f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}. α is chosen on validation.{lost}{quick}"
    )
