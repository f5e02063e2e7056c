"""The table of a suite as text: what a page and a terminal show of it."""

from __future__ import annotations

from thetau.evaluate.means import worthless
from thetau.studies.suite_results import Row, SuiteResults

_ROLES = {"pretrained": "pre-trained", "individual": "individual"}


def header(results: SuiteResults) -> list[str]:
    """The names of the columns; seconds and peak memory where they were measured."""
    return ["method", "λ", *(task.name for task in results.tasks), "average", "normalised", *_extras(results)]


def _extras(results: SuiteResults) -> list[str]:
    return [
        *(["loss"] if any(row.loss for row in results.rows) else []),
        *(["seconds", "peak GB"] if any(row.peak_gigabytes is not None for row in results.rows) else []),
    ]


def _extra(row: Row, name: str) -> str:
    """A cell of a column that not every row has."""
    match name:
        case "loss":
            return f"{sum(one.value for one in row.loss.values()) / len(row.loss):.3f}" if row.loss else ""
        case "seconds":
            return "" if row.peak_gigabytes is None or row.merge_seconds is None else f"{row.merge_seconds:.1f}"
    return "" if row.peak_gigabytes is None else f"{row.peak_gigabytes:.2f}"


def cells(row: Row, results: SuiteResults) -> list[str]:
    """One row: accuracies in percent with one decimal."""
    scale = f"{row.scale:g}{'!' * row.at_end}" if row.trials else ""
    accuracies = [f"{100 * row.accuracy[task.name].value:.1f}" for task in results.tasks]
    return [
        _ROLES.get(row.role, row.name),
        scale,
        *accuracies,
        f"{100 * row.absolute:.1f}",
        f"{100 * row.normalised:.1f}",
        *(_extra(row, name) for name in _extras(results)),
    ]


def caption(results: SuiteResults) -> str:
    """What the numbers are, in a sentence or two."""
    sizes = sorted({task.test for task in results.tasks})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    widest = max(accuracy.high - accuracy.low for row in results.rows for accuracy in row.accuracy.values())
    quick = " A quick run: smaller than the suite asks for." if results.quick else ""
    ends = " !: at the end of what was tried, so another λ may be better." if any(row.at_end for row in results.rows) else ""
    own = next((row.accuracy for row in results.rows if row.role == "individual"), {})
    nothing = worthless(own)
    lost = f" Their own models score 0 or less, so the normalised mean leaves out: {', '.join(nothing)}." if nothing else ""
    return (
        f"Suite {results.suite} on {results.backbone}: test accuracy in percent, n = {n} a task, 95 % intervals at most "
        f"±{50 * widest:.1f} points. λ is chosen on at most {results.limits['validation']} validation examples a task by average "
        f"normalised accuracy.{ends}{lost}{quick}"
    )


def markdown_table(results: SuiteResults) -> str:
    """The table in Markdown, the best merge of each column in bold, the caption below."""
    lines = ["| " + " | ".join(header(results)) + " |", "|---|" + "---:|" * (len(header(results)) - 1)]
    best = best_cells(results)
    for row in results.rows:
        texts = cells(row, results)
        if row.role == "merged":
            texts = [f"**{text}**" if column in best and text == best[column] else text for column, text in enumerate(texts)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", caption(results)]) + "\n"


def best_cells(results: SuiteResults) -> dict[int, str]:
    """Column → text of the best merge in it."""
    merged = [cells(row, results) for row in results.rows if row.role == "merged"]
    return (
        {column: max((texts[column] for texts in merged), key=float) for column in range(2, 4 + len(results.tasks))}
        if merged
        else {}
    )
