"""The table of a suite, for a terminal and for a page."""

from __future__ import annotations

from typing import Any

from thetau.evaluate.results import Row, SuiteResults

_ROLES = {"pretrained": "pre-trained", "individual": "individual"}


def header(results: SuiteResults) -> list[str]:
    """The names of the columns."""
    return ["method", "λ", *(task.name for task in results.tasks), "average", "normalised"]


def cells(row: Row, results: SuiteResults) -> list[str]:
    """One row: accuracies in percent with one decimal."""
    scale = f"{row.scale:g}" if row.trials else ""
    accuracies = [f"{100 * row.accuracy[task.name].value:.1f}" for task in results.tasks]
    return [_ROLES.get(row.role, row.name), scale, *accuracies, f"{100 * row.absolute:.1f}", f"{100 * row.normalised:.1f}"]


def caption(results: SuiteResults) -> str:
    """What the numbers are, in a sentence or two."""
    sizes = sorted({task.test for task in results.tasks})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    widest = max(accuracy.high - accuracy.low for row in results.rows for accuracy in row.accuracy.values())
    quick = " A quick run: smaller than the suite asks for." if results.quick else ""
    return (
        f"Suite {results.suite} on {results.backbone}: test accuracy in percent, n = {n} a task, 95 % intervals at most "
        f"±{50 * widest:.1f} points. λ is chosen on at most {results.limits['validation']} validation examples a task by average "
        f"normalised accuracy.{quick}"
    )


def markdown_table(results: SuiteResults) -> str:
    """The table in Markdown, the best merge of each column in bold, the caption below."""
    lines = ["| " + " | ".join(header(results)) + " |", "|---|" + "---:|" * (len(header(results)) - 1)]
    best = _best(results)
    for row in results.rows:
        texts = cells(row, results)
        if row.role == "merged":
            texts = [f"**{text}**" if column in best and text == best[column] else text for column, text in enumerate(texts)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", caption(results)]) + "\n"


def rich_table(results: SuiteResults) -> Any:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption(results), caption_justify="left")
    for number, name in enumerate(header(results)):
        # Narrow headings, and numbers that never wrap: what is short of room is the method's name, which stays readable on two lines.
        heading = name.replace("_", "\n").replace("normalised", "norm-\nalised")
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number > 0, vertical="middle")
    best = _best(results)
    for number, row in enumerate(results.rows):
        texts = cells(row, results)
        if row.role == "merged":
            texts = [
                f"[bold]{text}[/bold]" if column in best and text == best[column] else text for column, text in enumerate(texts)
            ]
        last_reference = row.role != "merged" and number + 1 < len(results.rows) and results.rows[number + 1].role == "merged"
        table.add_row(*texts, end_section=last_reference)
    return table


def _best(results: SuiteResults) -> dict[int, str]:
    """Column → text of the best merge in it."""
    merged = [cells(row, results) for row in results.rows if row.role == "merged"]
    return (
        {column: max((texts[column] for texts in merged), key=float) for column in range(2, len(header(results)))}
        if merged
        else {}
    )
