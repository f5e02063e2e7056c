"""The page of a suite's run: every value with what it is known of, what methods cost, and which of them can be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, final

from thetau.evaluate.accuracy import Accuracy
from thetau.report.blocks import Block, Code, Column, Facts, Heatmap, Notes, Page, Point, Scatter, Section, Spread, Table
from thetau.report.text import Span, number
from thetau.studies.suite_results import Row, SuiteResults
from thetau.studies.verdicts import Lead, few_examples, lead_of

PAIRS = 24  # methods up to which every pair is listed


def suite_page(results: SuiteResults, *, missing: Sequence[str] = ()) -> Page:
    """The page of a finished run; `missing`: what was planned and is not in it."""
    merged = [row for row in results.rows if row.role == "merged"]
    best = max(merged, key=lambda row: _plain(row.normalised), default=None)
    told = f" The best average normalised accuracy is {_percent(best.normalised)} %, by {best.name}." if best is not None else ""
    return Page(
        title=f"Suite {results.suite}",
        about="suite run",
        lead=f"{len(merged)} merges of {len(results.tasks)} tasks on {results.backbone}, measured on test.{told}",
        sections=tuple(
            section
            for section in (
                _overview(results, missing),
                _accuracies(results),
                _costs(merged, results.rows),
                _differences(merged, [task.name for task in results.tasks]),
                _cells(results),
                _coefficients(merged),
                _tasks(results),
                _again(results),
            )
            if section is not None
        ),
    )


def _plain(value: float) -> float:
    return value if value == value else float("-inf")


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, ".1f")


def _overview(results: SuiteResults, missing: Sequence[str]) -> Section:
    warnings = [f"Not there yet: {one}" for one in missing]
    if results.quick:
        warnings.append(
            "A quick run: few steps, few examples, at most two λ. Its figures say that everything works, and no more."
        )
    ends = [row.name for row in results.rows if row.at_end]
    if ends:
        warnings.append(f"λ lies at the end of its grid for {', '.join(ends)}: a larger grid may give better values.")
    few = few_examples(results.limits.get("validation") or 0, min((task.validation for task in results.tasks), default=0))
    few += few_examples(min((task.test for task in results.tasks), default=0), split="test")
    warnings += [f"Values are {one}." for one in few[:1]]
    facts = Facts(
        pairs=(
            ("Backbone", results.backbone),
            ("Tasks", len(results.tasks)),
            ("Merges", sum(row.role == "merged" for row in results.rows)),
            ("Test examples a task", _sizes([task.test for task in results.tasks])),
            ("Seconds in all", number(results.seconds, ".0f")),
            ("Versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
        )
    )
    blocks: list[Block] = [facts]
    if warnings:
        blocks.append(Notes(texts=tuple(warnings), tone="warning"))
    return Section(slug="overview", title="Overview", lead=results.description, blocks=tuple(blocks))


def _sizes(sizes: Sequence[int]) -> str:
    return "–" if not sizes else str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def _accuracies(results: SuiteResults) -> Section:
    tasks = [task.name for task in results.tasks]
    columns = (
        Column(name="model", number=False),
        Column(name="λ", meaning="the coefficient that was chosen on validation"),
        Column(name="average", spec=".1f", meaning="mean test accuracy over the tasks, in percent"),
        Column(name="normalised", spec=".1f", meaning="mean of accuracy over that of the task's own model, in percent"),
        *(Column(name=task, spec=".1f", meaning="test accuracy in percent, with its 95 % interval") for task in tasks),
    )
    rows = tuple(
        (row.name, row.scale, 100 * row.absolute, 100 * row.normalised, *(_span(row, task) for task in tasks))
        for row in results.rows
    )
    table = Table(
        title="Accuracy by model and task",
        columns=columns,
        rows=rows,
        best=tuple(range(2, len(columns))),
        caption="In percent, on test, with 95 % intervals. The largest of each column is bold. Which can be told apart is said below.",
    )
    drawn = [row for row in results.rows if row.role != "individual"]
    spread = Spread(
        title="How tasks are spread around the mean",
        x="test accuracy over that of the task's own model, %",
        rows={row.name: _relative(row, results, tasks) for row in drawn},
        caption="A dot is a task, the line their mean, the outline their density. 100 is the task's own fine-tuned model.",
    )
    cells = [100 * found.value for row in results.rows for found in row.accuracy.values()]
    heat = Heatmap(
        title="Test accuracy, %",
        bottom=min((value for value in cells if value == value), default=0.0),
        rows=tuple(row.name for row in results.rows),
        columns=tuple(tasks),
        values=tuple(tuple(_cell(row, task) for task in tasks) for row in results.rows),
        cluster=len(results.rows) > 40,
        spec=".1f",
        caption="Rows that are alike stand together." if len(results.rows) > 40 else "",
    )
    return Section(slug="accuracy", title="Accuracy", blocks=(table, spread, heat))


def _span(row: Row, task: str) -> Span | None:
    found = row.accuracy.get(task)
    return None if found is None else Span(value=100 * found.value, low=100 * found.low, high=100 * found.high, n=found.n)


def _cell(row: Row, task: str) -> float | None:
    found = row.accuracy.get(task)
    return None if found is None else 100 * found.value


def _relative(row: Row, results: SuiteResults, tasks: Sequence[str]) -> dict[str, float]:
    own: Mapping[str, Any] = next((one.accuracy for one in results.rows if one.role == "individual"), {})
    return {
        task: 100 * row.accuracy[task].value / own[task].value
        for task in tasks
        if task in row.accuracy and task in own and own[task].value
    }


def front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other beats: at least as large everywhere, and larger somewhere.

    Examples:
        >>> front([(0.9, -2.0), (0.8, -1.0), (0.8, -3.0)])
        [True, True, False]
    """
    return [
        not any(
            all(a >= b for a, b in zip(other, one, strict=True)) and any(a > b for a, b in zip(other, one, strict=True))
            for other in points
        )
        for one in points
    ]


def _costs(merged: Sequence[Row], rows: Sequence[Row]) -> Section | None:
    timed = [row for row in merged if row.merge_seconds is not None and row.normalised == row.normalised]
    if not timed:
        return None
    measured = all(row.peak_gigabytes is not None for row in timed)
    values = [
        (row.normalised, -(row.merge_seconds or 0.0), *((-(row.peak_gigabytes or 0.0),) if measured else ())) for row in timed
    ]
    on_front = front(values)
    points = tuple(
        Point(
            name=row.name,
            x=max(row.merge_seconds or 0.0, 0.01),
            y=100 * row.normalised,
            size=row.peak_gigabytes,
            front=kept,
            said=f"{_percent(row.normalised)} % normalised, {number(row.merge_seconds, '.3g')} s"
            + (f", {number(row.peak_gigabytes, '.3g')} GB" if row.peak_gigabytes is not None else ", memory not measured"),
        )
        for row, kept in zip(timed, on_front, strict=True)
    )
    lines = {row.name: 100 * row.normalised for row in rows if row.role in ("pretrained", "joint")}
    size = "the larger a dot, the more memory" if measured else "memory was not measured (`thetau suite run … --memory` does)"
    chart = Scatter(
        title="Accuracy against the seconds of a merge",
        x="seconds of one merge",
        y="normalised accuracy, %",
        points=points,
        log_x=True,
        lines=lines,
        caption=f"The coloured ones are those that no other beats in everything, and the line joins those that none beats in accuracy and seconds; {size}.",
    )
    order = sorted(range(len(timed)), key=lambda place: -_plain(timed[place].normalised))
    table = Table(
        title="What a merge costs",
        columns=(
            Column(name="method", number=False),
            Column(name="normalised, %", spec=".1f"),
            Column(name="seconds", spec=".3g"),
            Column(name="peak memory, GB", spec=".3g"),
            Column(name="beaten by none", number=False),
        ),
        rows=tuple(
            (
                timed[i].name,
                100 * timed[i].normalised,
                timed[i].merge_seconds,
                timed[i].peak_gigabytes,
                "yes" if on_front[i] else "no",
            )
            for i in order
        ),
    )
    return Section(
        slug="cost",
        title="Accuracy, seconds, memory",
        lead="Seconds are those of one merge on the machine of the run.",
        blocks=(chart, table),
    )


def _lead(a: Row, b: Row, tasks: Sequence[str]) -> Lead | None:
    both = {
        task: [100 * (a.accuracy[task].value - b.accuracy[task].value)]
        for task in tasks
        if task in a.accuracy and task in b.accuracy
    }
    both = {task: values for task, values in both.items() if values[0] == values[0]}
    return lead_of(both) if both else None


def _differences(merged: Sequence[Row], tasks: Sequence[str]) -> Section | None:
    if len(merged) < 2:
        return None
    ranked = sorted(merged, key=lambda row: -_plain(row.absolute))
    every = len(ranked) <= PAIRS
    pairs = list(combinations(ranked, 2)) if every else [(ranked[0], row) for row in ranked[1:]]
    rows: list[tuple[Any, ...]] = []
    for a, b in pairs:
        lead = _lead(a, b, tasks)
        if lead is None:
            rows.append((a.name, b.name, None, 0, "no task in common"))
            continue
        finite = lead.tasks > 1
        span = Span(value=lead.value, low=lead.low if finite else None, high=lead.high if finite else None)
        word = (
            "one task: not told"
            if not finite
            else "not told apart"
            if lead.low <= 0 <= lead.high
            else "first is better"
            if lead.value > 0
            else "second is better"
        )
        rows.append((a.name, b.name, span, lead.tasks, word))
    table = Table(
        title="Paired differences" if every else f"Paired differences with {ranked[0].name}, the best by average",
        columns=(
            Column(name="first", number=False),
            Column(name="second", number=False),
            Column(
                name="first − second, points",
                spec="+.1f",
                meaning="mean over tasks of the difference in test accuracy, with its 95 % interval",
            ),
            Column(name="tasks"),
            Column(name="verdict", number=False),
        ),
        rows=tuple(rows),
        caption="The unit is the task: Student's interval of the mean difference over tasks. "
        f"Of {len(rows)} pairs that do not differ at all, about {max(1, round(len(rows) / 20))} would seem to, at 95 %.",
    )
    names = tuple(row.name for row in ranked)
    known = [[None if a is b else _lead(a, b, tasks) for b in ranked] for a in ranked] if every else []
    heat = Heatmap(
        title="Row minus column, mean over tasks, points",
        rows=names,
        columns=names,
        values=tuple(tuple(0.0 if a is b else _mean_lead(a, b, tasks) for b in ranked) for a in ranked)
        if not every
        else tuple(
            tuple(0.0 if i == j else None if one is None else one.value for j, one in enumerate(row))
            for i, row in enumerate(known)
        ),
        signed=True,
        spec="+.1f",
    )
    return Section(
        slug="differences",
        title="Which can be told apart",
        lead="Methods are compared on the same tasks, so what counts is the difference on each task and how it varies.",
        blocks=(table, heat),
    )


def _mean_lead(a: Row, b: Row, tasks: Sequence[str]) -> float | None:
    both = [
        100 * (a.accuracy[task].value - b.accuracy[task].value) for task in tasks if task in a.accuracy and task in b.accuracy
    ]
    return sum(both) / len(both) if both else None


def _cells(results: SuiteResults) -> Section:
    rows = tuple(
        (
            row.name,
            row.role,
            task,
            found.n,
            found.correct if isinstance(found, Accuracy) else None,
            100 * found.value,
            100 * found.low,
            100 * found.high,
        )
        for row in results.rows
        for task, found in row.accuracy.items()
    )
    table = Table(
        title="Every cell",
        columns=(
            Column(name="model", number=False),
            Column(name="role", number=False),
            Column(name="task", number=False),
            Column(name="n"),
            Column(name="correct"),
            Column(name="accuracy, %", spec=".1f"),
            Column(name="low", spec=".1f", meaning="lower end of the 95 % interval"),
            Column(name="high", spec=".1f", meaning="upper end of the 95 % interval"),
        ),
        rows=rows,
        caption="95 % intervals (Wilson) of single accuracies.",
    )
    return Section(slug="cells", title="Every cell, with n", blocks=(table,))


def _coefficients(merged: Sequence[Row]) -> Section | None:
    tried = [(row, trial) for row in merged for trial in row.trials]
    if not tried:
        return None
    table = Table(
        title="λ by validation",
        columns=(
            Column(name="method", number=False),
            Column(name="λ"),
            Column(name="normalised on validation, %", spec=".1f"),
            Column(name="chosen", number=False),
        ),
        rows=tuple(
            (row.name, trial.scale, 100 * trial.normalised, "yes" if trial.scale == row.scale else "") for row, trial in tried
        ),
    )
    return Section(slug="coefficients", title="How λ was chosen", blocks=(table,))


def _tasks(results: SuiteResults) -> Section:
    table = Table(
        title="Tasks",
        columns=(
            Column(name="task", number=False),
            Column(name="kind", number=False),
            Column(name="classes"),
            Column(name="train"),
            Column(name="validation"),
            Column(name="test"),
            Column(name="steps"),
            Column(name="first loss", spec=".3g"),
            Column(name="last loss", spec=".3g"),
            Column(name="licence of the data", number=False),
            Column(name="source", number=False),
        ),
        rows=tuple(
            (
                task.name,
                task.kind,
                len(task.labels),
                task.train,
                task.validation,
                task.test,
                _integer(task.config.get("steps")),
                task.first_loss,
                task.last_loss,
                task.licence,
                task.source,
            )
            for task in results.tasks
        ),
    )
    methods = Table(
        title="Methods with all their fields",
        columns=(Column(name="row", number=False), Column(name="method", number=False)),
        rows=tuple((row.name, row.method) for row in results.rows if row.method),
    )
    return Section(slug="tasks", title="Tasks and methods", blocks=(table, *((methods,) if methods.rows else ())))


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _again(results: SuiteResults) -> Section:
    command = f"thetau suite run {results.suite} --backbone {results.backbone} --out run"
    command += " --quick" if results.quick else ""
    return Section(
        slug="again",
        title="How to make it again",
        blocks=(Code(text=command, label="A folder that holds the run already goes on where it was"),),
    )


# Runs that are not finished.


@final
@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What a run's folder holds before there are results: its plan, where it wrote one, the tasks that are fine-tuned, and the rows."""

    folder: Path
    suite: str | None
    tasks: tuple[str, ...] | None
    methods: tuple[str, ...] | None
    tuned: tuple[str, ...]
    rows: tuple[Row, ...]

    def missing(self) -> list[str]:
        """What the plan has and the folder does not."""
        if self.tasks is None or self.methods is None:
            return ["the results. The run left no plan, so what else is missing cannot be told."]
        done = {row.name for row in self.rows}
        tasks = [task for task in self.tasks if task not in self.tuned]
        methods = [name for name in self.methods if name not in done]
        said = []
        if tasks:
            said.append(f"the fine-tuning on {', '.join(tasks)} ({len(tasks)} of {len(self.tasks)} tasks)")
        if methods:
            said.append(f"the merges by {', '.join(methods)} ({len(methods)} of {len(self.methods)})")
        return [*said, "the values of the base and of the tasks' own models, and the final table"]


def unfinished_page(run: Unfinished) -> Page:
    """The page of a run that is still going on, or that ended early: what is there, and what is not."""
    tasks = list(dict.fromkeys([*(run.tasks or run.tuned), *(task for row in run.rows for task in row.accuracy)]))
    blocks: list[Block] = [
        Facts(
            pairs=(
                ("Fine-tuned", f"{len(run.tuned)} of {len(run.tasks) if run.tasks is not None else '?'}"),
                ("Merged and measured", f"{len(run.rows)} of {len(run.methods) if run.methods is not None else '?'}"),
            )
        ),
        Notes(texts=tuple(f"Missing: {one}" for one in run.missing()), tone="warning"),
    ]
    sections = [
        Section(
            slug="missing",
            title="What is missing",
            lead="This run is not finished. The same command goes on with it.",
            blocks=tuple(blocks),
        )
    ]
    if run.rows:
        table = Table(
            title="Merges that are done",
            columns=(
                Column(name="model", number=False),
                Column(name="λ"),
                Column(name="average", spec=".1f"),
                Column(name="normalised", spec=".1f"),
                *(Column(name=task, spec=".1f") for task in tasks),
            ),
            rows=tuple(
                (row.name, row.scale, 100 * row.absolute, 100 * row.normalised, *(_span(row, task) for task in tasks))
                for row in run.rows
            ),
            caption="In percent, on test, with 95 % intervals.",
        )
        sections.append(Section(slug="accuracy", title="Accuracy so far", blocks=(table,)))
        costs = _costs(list(run.rows), run.rows)
        differences = _differences(list(run.rows), tasks)
        sections += [section for section in (costs, differences) if section is not None]
    return Page(
        title=f"Suite {run.suite or run.folder.name}",
        about="unfinished suite run",
        lead=f"{len(run.rows)} merges are done. What is missing is listed below; these figures are not the whole picture.",
        sections=tuple(sections),
    )
