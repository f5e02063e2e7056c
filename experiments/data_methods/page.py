"""Draw docs/data.md and its chart from experiments/data_methods/results.json.

python -m experiments.data_methods.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from experiments import leads
from experiments.common import DOCS, IMAGES, table
from experiments.data_methods.run import OUT, ROWS
from experiments.leads import led

PAGE, CHART, INTRO = DOCS / "data.md", IMAGES / "data.png", Path(__file__).parent / "intro.md"
KINDS = {"none": "no data", "unlabelled": "unlabelled examples", "labelled": "labelled examples"}
Rows = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Write page and chart."""
    results = json.loads(OUT.read_text(encoding="utf-8"))
    PAGE.write_text(led(page(results), leads.data(results, verdict(results))), encoding="utf-8")
    chart(results, CHART)
    sys.stdout.write("docs/data.md\n")


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    return INTRO.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(measured(results))


def front(rows: Rows, by: str) -> set[str]:
    """The rows that no other row beats in accuracy without more of something (seconds, examples)."""
    return {
        name
        for name, row in rows.items()
        if not any(
            other["average"] >= row["average"]
            and other[by] <= row[by]
            and (other["average"], -other[by]) != (row["average"], -row[by])
            for other in rows.values()
        )
    }


def margin(results: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The standard error of a row's average over tasks, from the binomial of each."""
    n = results["test"]
    return sqrt(sum(value * (1 - value) / n[task] for task, value in row["tasks"].items())) / len(row["tasks"])


def verdict(results: Mapping[str, Any]) -> str:
    """What the rule makes of the best row with unlabelled data beside the best without."""
    rows: Rows = results["rows"]
    lacking = len(ROWS) - len(rows)
    if lacking:
        return (
            f"{lacking} of {len(ROWS)} rows are not measured yet, so the rule says nothing yet. `make data` goes on where it was."
        )
    best = {
        kind: max((name for name in rows if rows[name]["data"] == kind), key=lambda name: rows[name]["average"], default=None)
        for kind in ("none", "unlabelled")
    }
    free, using = best["none"], best["unlabelled"]
    assert free is not None and using is not None
    gap = rows[using]["average"] - rows[free]["average"]
    wide = 1.96 * sqrt(margin(results, rows[free]) ** 2 + margin(results, rows[using]) ** 2)
    said = "is worth it" if gap > wide else "costs accuracy" if gap < -wide else "cannot be told from none"
    return (
        f"The best row without data is *{free}* ({percent(rows[free]['average'])}); the best with unlabelled examples is *{using}* "
        f"({percent(rows[using]['average'])}, {rows[using]['examples']} examples a task, {rows[using]['seconds']:.0f} s). The difference is "
        f"{100 * gap:+.1f} ± {100 * wide:.1f} points: data **{said}** here, by the rule above."
    )


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def measured(results: Mapping[str, Any]) -> list[str]:
    """Rule, verdict, table, chart."""
    rows: Rows = results["rows"]
    references, ada, mix = results["references"], results["adamerging"], results["wemoe"]
    quick, few = front(rows, "seconds"), front(rows, "examples")
    cells = [
        (
            name,
            KINDS[row["data"]],
            str(row["examples"] or "—"),
            percent(row["average"]),
            percent(row["normalised"]),
            f"{row['seconds']:.1f}",
            f"{row['peak_megabytes']:.0f}",
            "".join(mark for mark, those in (("t", quick), ("e", few)) if name in those) or "",
        )
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["average"])
    ]
    cells.insert(0, ("each task's own model", "", "", percent(references["individual"]["average"]), "100.0", "", "", ""))
    cells.append(
        (
            "the base",
            "",
            "",
            percent(references["pre-trained"]["average"]),
            percent(references["pre-trained"]["normalised"]),
            "",
            "",
            "",
        )
    )
    lacking = [name for name in ROWS if name not in rows]
    lines = [
        "## How much data is worth it",
        "",
        f"`{results['command']}` merges the demo's {len(results['test'])} models of {results['backbone']} and measures each result on "
        f"{sum(results['test'].values())} test examples. Evidence comes from the training or the validation split. AdaMerging makes {ada['steps']} steps of "
        f"{ada['lr']:g} with {ada['batch']} examples a task, where its authors make 500 of 0.001 with 32. WEMoE makes {mix['steps']} of {mix['lr']:g} with "
        f"{mix['batch']}, where its authors make 1000 of 0.0001 with 8 or 16.",
        "",
        "The rule, written down before the figures: data is worth it where the best row with unlabelled examples beats the best row without by more than "
        "the 95 % interval of their difference, from the binomial of the test examples. Choosing the best of several rows favours both sides; the "
        "side with more rows is favoured more.",
        "",
        verdict(results),
        "",
        "What this cannot say: one seed of fine-tuning, small encoders, six tasks. `t` marks the rows that no other row beats with less time, `e` those that "
        "none beats with fewer examples. Seconds are those of the processor, for collecting and merging together; megabytes the peak of a process of its own.",
        "",
        *table(("row", "looks at", "examples a task", "average", "normalised", "seconds", "MB", "front"), cells, words=2),
    ]
    if lacking:
        lines += [f"Not measured yet: {'; '.join(lacking)}.", ""]
    return lines


def chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy over seconds, the front as a line."""
    from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save

    rows: Rows = results["rows"]
    made = figure(9, 5)
    axes = made.add_subplot()
    for kind, colour in zip(KINDS, PALETTE, strict=False):
        mine = {name: row for name, row in rows.items() if row["data"] == kind}
        axes.plot(
            [max(row["seconds"], 0.1) for row in mine.values()],
            [100 * row["average"] for row in mine.values()],
            "o",
            color=colour,
            label=KINDS[kind],
        )
        for name, row in mine.items():
            axes.annotate(
                name,
                (max(row["seconds"], 0.1), 100 * row["average"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=INK,
            )
    best = sorted((max(rows[name]["seconds"], 0.1), 100 * rows[name]["average"]) for name in front(rows, "seconds"))
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the processor, collecting and merging", color=MUTED)
    axes.set_title("average test accuracy, %", loc="left", color=INK)
    axes.legend(frameon=False)
    plain(axes, "both")
    save(made, path)


if __name__ == "__main__":
    main()
