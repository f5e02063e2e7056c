"""Draw docs/data.md and its chart from experiments/data_methods/results.json, and from speed.json and results-SUITE-SEED.json where they are.

python -m experiments.data_methods.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from experiments import leads
from experiments.common import DOCS, IMAGES, table
from experiments.data_methods.run import OUT, ROWS
from experiments.leads import led
from thetau.studies.verdicts import judge

SPEED = OUT.with_name("speed.json")
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
    lines = measured(results)
    more = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.parent.glob("results-*.json"))]
    if more:
        lines += others([results, *more])
    if SPEED.is_file():
        lines += cost(json.loads(SPEED.read_text(encoding="utf-8")))
    return INTRO.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(lines)


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


def best_of(rows: Rows, kind: str) -> str:
    """The best row that looks at this kind of data."""
    return max((name for name in rows if rows[name]["data"] == kind), key=lambda name: float(rows[name]["average"]))


def difference(results: Mapping[str, Any], row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Of two averages, and half of its 95 % interval."""
    return row["average"] - other["average"], 1.96 * sqrt(margin(results, row) ** 2 + margin(results, other) ** 2)


def verdict(results: Mapping[str, Any]) -> str:
    """What the rule makes of the best row with unlabelled data beside the best without."""
    rows: Rows = results["rows"]
    lacking = len(ROWS) - len(rows)
    if lacking:
        return (
            f"{lacking} of {len(ROWS)} rows are not measured yet, so the rule says nothing yet. `make data` goes on where it was."
        )
    free, using = best_of(rows, "none"), best_of(rows, "unlabelled")
    gap, wide = difference(results, rows[using], rows[free])
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


def others(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the best row with unlabelled examples leads the best without on each suite, over its tasks and seeds."""
    whole = [results for results in runs if len(results["rows"]) == len(ROWS)]
    cells = []
    for suite in dict.fromkeys(results["suite"] for results in whole):
        seeds = [results for results in whole if results["suite"] == suite]
        together = {
            name: {"data": row["data"], "average": mean(each["rows"][name]["average"] for each in seeds)}
            for name, row in seeds[0]["rows"].items()
        }
        free, using = best_of(together, "none"), best_of(together, "unlabelled")
        leads_by_task = {
            task: [100 * (each["rows"][using]["tasks"][task] - each["rows"][free]["tasks"][task]) for each in seeds]
            for task in seeds[0]["test"]
        }
        told = [f"{name} ({percent(together[name]['average'])})" for name in (free, using)]
        cells.append((suite, ", ".join(str(each.get("seed", 0)) for each in seeds), *told, str(judge(leads_by_task))))
    lines = [
        "## Other seeds and suites",
        "",
        "Here the rule is that of [verdicts](verdicts.md): tasks and seeds are what varies, and *holds* says that the interval of the lead excludes 0. "
        "The best rows are those of all seeds together.",
        "",
        *table(("suite", "seeds", "best without data", "best with unlabelled examples", "the lead of these"), cells, words=5),
    ]
    unfinished = [
        f"{results['suite']}, seed {results['seed']} ({len(results['rows'])} of {len(ROWS)} rows)"
        for results in runs
        if results not in whole
    ]
    return [*lines, *([f"Not finished yet: {'; '.join(unfinished)}.", ""] if unfinished else [])]


def cost(speed: Mapping[str, Any]) -> list[str]:
    """What looking costs, beside a plain pass."""
    names = {
        "gram": "`evidence gram`",
        "gradients": "`evidence gradients`, a label an example",
        "fisher": "`evidence fisher`, the data's labels",
        "adamerging": "`evidence adamerging`, a step",
    }
    cells = [
        (
            names[name],
            row["beside"],
            f"{row['ratio']:.2f}",
            f"{row['most']:g}",
            "holds" if row["ratio"] <= row["most"] else "missed",
        )
        for name, row in speed["rows"].items()
    ]
    few, many = speed["memory"].items()
    return [
        "## What looking costs",
        "",
        f"`{speed['command']}` compares the processor's seconds, the least of {speed['times']} runs on one thread, on {speed['task']} with "
        f"{speed['backbone']}. The most that each may take is the aim that was set for it.",
        "",
        *table(("", "beside", "times as long", "at most", ""), cells, words=2),
        "A Gram matrix of d inputs takes d²/2 products a row, a layer of d to d' features d d' of them. With the MLPs of this encoder that is nearly one "
        "more forward pass, however it is computed. The Fisher of all labels (`--labels true`, the default) takes a backward pass for each class.",
        "",
        f"AdaMerging held {few[1]:.0f} MB with {few[0]} tasks and {many[1]:.0f} MB with {many[0]}, in a process of its own, without what the system maps "
        "from files.",
        "",
    ]


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
