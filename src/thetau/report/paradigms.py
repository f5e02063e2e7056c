"""The page of `thetau suite run --paradigm`: fine-tuning paradigms beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from thetau.errors import DataError
from thetau.evaluate.measures import Measure
from thetau.report.blocks import Block, Column, Facts, Heatmap, Lines, Notes, Page, Section, Spread, Table
from thetau.report.text import Span, Value
from thetau.studies.by_paradigm import alpha_curves, costs, single_tasks
from thetau.studies.paradigms import ParadigmResults, ParadigmRow, spread


def paradigms_page(results: ParadigmResults) -> Page:
    """The page. Raises `DataError`: rows that lack a task of the comparison, as where a file was changed by hand."""
    _check(results)
    sections = (
        _overview(results),
        _table(results),
        _tasks(results),
        _curves(results),
        _negations(results),
        _left_out(results),
        _cost(results),
        _traces(results),
        _every(results),
    )
    return Page(
        title=results.suite,
        about="comparison of paradigms",
        lead=f"{len(results.names())} ways to fine-tune, {len(results.tasks)} tasks, {len(results.seeds)} seed{'s' if len(results.seeds) != 1 else ''}.",
        sections=tuple(section for section in sections if section is not None),
    )


def _check(results: ParadigmResults) -> None:
    wrong = [
        name
        for name in results.tasks
        if not {"validation", "test"} <= set(results.sizes.get(name, {})) or name not in results.pretrained
    ]
    for row in results.rows:
        found = [row.individual, row.joint]
        for added in (row.addition, row.elsewhere, *row.merged.values()):
            found += [] if added is None else [added.individual, added.one_shot.accuracy, added.tuned.accuracy]
        wrong += [row.name for accuracy in found if accuracy is not None and not set(results.tasks) <= set(accuracy)]
    if wrong or not results.rows:
        raise DataError(
            f"the comparison of paradigms has not one figure a task ({wrong[0] if wrong else 'it has no row'}). The file was changed; run "
            "`thetau suite run` again."
        )


def _overview(results: ParadigmResults) -> Section:
    facts = Facts(
        pairs=(
            ("Backbone", results.backbone),
            ("Tasks", ", ".join(results.tasks)),
            ("Control task", results.control or "none"),
            ("Seeds", ", ".join(map(str, results.seeds))),
            ("Test examples", ", ".join(f"{task} {results.sizes[task]['test']}" for task in results.tasks)),
        )
    )
    blocks: list[Block] = [facts]
    if results.quick:
        blocks.append(
            Notes(texts=("A quick run: a few steps and few examples. Its figures say nothing of the paradigms.",), tone="warning")
        )
    missing = [
        f"{name}: seed {seed}"
        for name in results.names()
        for seed in results.seeds
        if seed not in [row.seed for row in results.of(name)]
    ]
    if missing:
        blocks.append(Notes(texts=(f"Not in it, or not yet: {', '.join(missing)}.",)))
    return Section(slug="overview", title="Overview", blocks=tuple(blocks))


def _over_seeds(rows: Sequence[ParadigmRow], value: Callable[[ParadigmRow], float | None]) -> Span | None:
    """The mean over seeds with a standard deviation on either side, where there is more than one."""
    known = [one for row in rows if (one := value(row)) is not None]
    if not known:
        return None
    middle, deviation = spread(known)
    low, high = (middle - deviation, middle + deviation) if len(known) > 1 else (None, None)
    return Span(value=middle, low=low, high=high, n=len(known))


def _average(accuracy: dict[str, Measure] | None, tasks: Sequence[str]) -> float | None:
    return None if accuracy is None else 100 * mean(accuracy[task].value for task in tasks)


def _table(results: ParadigmResults) -> Section:
    tasks = results.tasks

    def row(name: str) -> tuple[Value, ...]:
        rows = results.of(name)
        return (
            name,
            rows[0].space,
            _over_seeds(rows, lambda one: _average(one.individual or one.joint, tasks)),
            _over_seeds(rows, lambda one: None if one.addition is None else one.addition.tuned.alpha),
            _over_seeds(rows, lambda one: None if one.addition is None else 100 * one.addition.tuned.absolute),
            _over_seeds(rows, lambda one: None if one.addition is None else 100 * one.addition.tuned.normalised),
            _over_seeds(rows, lambda one: None if one.addition is None else 100 * one.addition.one_shot.normalised),
            _over_seeds(rows, lambda one: None if one.elsewhere is None else 100 * one.elsewhere.tuned.normalised),
            _over_seeds(rows, lambda one: 100 * mean(cut.tuned.target.value for cut in one.negation) if one.negation else None),
            _over_seeds(rows, lambda one: 100 * mean(cut.tuned.control.value for cut in one.negation) if one.negation else None),
            _over_seeds(rows, lambda one: None if one.others_kept is None else 100 * one.others_kept),
        )

    base = mean(results.pretrained[task].value for task in tasks)
    table = Table(
        title="Paradigms",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="measured in", number=False),
            Column(name="single", spec=".1f", meaning="each task's own model, or a joint one, mean over the tasks, in percent"),
            Column(name="α", spec=".2f", meaning="chosen on validation"),
            Column(name="added", spec=".1f", meaning="θ₀ + α Σ τ, in percent"),
            Column(name="normalised", spec=".1f", meaning="over the task's own model, in percent"),
            Column(name="normalised, α = 1", spec=".1f"),
            Column(name="in the other space", spec=".1f", meaning="the same vectors added in the other space, normalised"),
            Column(name="forgotten", spec=".1f", meaning="target's accuracy after negation, mean over the tasks; less is better"),
            Column(name="control", spec=".1f", meaning="the control task's accuracy after it"),
            Column(name="others kept", spec=".1f", meaning="of the base's accuracy on other tasks, by a single vector at α = 1"),
        ),
        rows=(("pre-trained", "", 100 * base, *(None,) * 8), *map(row, results.names())),
        best=(4, 5),
        caption="Test; means over seeds, a standard deviation on either side in brackets where there is more than one seed.",
    )
    return Section(slug="paradigms", title="Beside each other", blocks=(table,))


def _tasks(results: ParadigmResults) -> Section:
    names = [name for name in results.names() if any(row.addition is not None for row in results.of(name))]
    blocks: list[Block] = []
    if names:
        values = [[_added(results.of(name), task) for task in results.tasks] for name in names]
        cells = [value for row in values for value in row if value is not None and value == value]
        blocks.append(
            Heatmap(
                title="Accuracy of the sum by task, %",
                rows=tuple(names),
                columns=results.tasks,
                values=tuple(map(tuple, values)),
                bottom=min(cells, default=0.0),
                spec=".1f",
                caption="At the α that validation prefers, means over seeds.",
            )
        )
        blocks.append(
            Spread(
                title="How tasks are spread",
                x="accuracy of the sum over that of the task's own model, %",
                rows={name: _relative(results.of(name), results.tasks) for name in names},
            )
        )
    single = single_tasks(results)
    rows: list[tuple[Value, ...]] = [
        ("pre-trained", *(100 * single.pretrained[task] for task in results.tasks), 100 * mean(single.pretrained.values()))
    ]
    rows += [(row.name, *(100 * row.accuracy[task] for task in results.tasks), 100 * row.average) for row in single.rows]
    blocks.append(
        Table(
            title="Single tasks",
            columns=(
                Column(name="paradigm", number=False),
                *(Column(name=task, spec=".1f") for task in (*results.tasks, "average")),
            ),
            rows=tuple(rows),
            best=tuple(range(1, len(results.tasks) + 2)),
            caption="Each task's own model on test, in percent, means over seeds.",
        )
    )
    return Section(slug="tasks", title="Task by task", blocks=tuple(blocks))


def _added(rows: Sequence[ParadigmRow], task: str) -> float | None:
    known = [100 * row.addition.tuned.accuracy[task].value for row in rows if row.addition is not None]
    return mean(known) if known else None


def _relative(rows: Sequence[ParadigmRow], tasks: Sequence[str]) -> dict[str, float]:
    found = {}
    for task in tasks:
        known = [
            100 * row.addition.tuned.accuracy[task].value / own
            for row in rows
            if row.addition is not None and (own := row.addition.individual[task].value) > 0
        ]
        if known:
            found[task] = mean(known)
    return found


def _curves(results: ParadigmResults) -> Section | None:
    try:
        found = alpha_curves(results)
    except DataError:
        return None
    rows = tuple(
        (curve.name, alpha, 100 * whole, 100 * share)
        for curve in found.curves
        for alpha, whole, share in zip(curve.alphas, curve.absolute, curve.normalised, strict=True)
    )
    table = Table(
        title="Accuracy over α",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="α", spec=".3g"),
            Column(name="absolute", spec=".1f"),
            Column(name="normalised", spec=".1f"),
        ),
        rows=rows,
    )
    blocks: list[Block] = [table]
    grids = {curve.alphas for curve in found.curves}
    if len(grids) == 1:
        series: dict[str, tuple[float | None, ...]] = {
            curve.name: tuple(100 * one for one in curve.normalised) for curve in found.curves[:12]
        }
        alphas = found.curves[0].alphas
        blocks.insert(
            0,
            Lines(
                title="Normalised validation accuracy over α",
                x=f"place in the grid: {alphas[0]:g} to {alphas[-1]:g}" if alphas else "",
                y="%",
                series=series,
            ),
        )
    return Section(slug="alpha", title="Over α", lead=f"On validation, at most {found.n} examples a task.", blocks=tuple(blocks))


def _negations(results: ParadigmResults) -> Section | None:
    rows = tuple(
        (
            row.name,
            row.seed,
            one.task,
            one.tuned.alpha,
            _span(one.pretrained_target),
            _span(one.tuned.target),
            _span(one.pretrained_control),
            _span(one.tuned.control),
            "yes" if one.tuned.qualified else "no",
        )
        for row in results.rows
        for one in row.negation
    )
    if not rows:
        return None
    table = Table(
        title="Negation",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="seed"),
            Column(name="task", number=False),
            Column(name="α", spec=".3g"),
            Column(name="target before", spec=".1f"),
            Column(name="target after", spec=".1f"),
            Column(name="control before", spec=".1f"),
            Column(name="control after", spec=".1f"),
            Column(name="control kept", number=False, meaning="at least 95 % on validation"),
        ),
        rows=rows,
        caption="Test accuracy in percent, with 95 % intervals. α = 0: no α above 0 keeps the control task.",
    )
    return Section(slug="negation", title="Forgetting", blocks=(table,))


def _span(found: Measure) -> Span:
    return Span(value=100 * found.value, low=100 * found.low, high=100 * found.high, n=found.n)


def _left_out(results: ParadigmResults) -> Section | None:
    rows = tuple(
        (row.name, row.seed, one.task, one.alpha, _span(one.base), _span(one.merged))
        for row in results.rows
        for one in row.left_out
    )
    if not rows:
        return None
    table = Table(
        title="Tasks left out",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="seed"),
            Column(name="task", number=False),
            Column(name="α", spec=".3g"),
            Column(name="base", spec=".1f"),
            Column(name="sum of the others", spec=".1f"),
        ),
        rows=rows,
    )
    return Section(slug="left-out", title="On tasks that are not in the sum", blocks=(table,))


def _cost(results: ParadigmResults) -> Section | None:
    try:
        found = costs(results)
    except DataError:
        return None
    table = Table(
        title="Cost of fine-tuning",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="parameters"),
            Column(name="trained"),
            Column(name="seconds a step", spec=".3g"),
            Column(name="over the first", spec=".2f"),
            Column(name="peak memory, GB", spec=".2f"),
        ),
        rows=tuple(
            (row.name, row.parameters, row.trained, row.seconds_a_step, row.relative, row.peak_gigabytes) for row in found.rows
        ),
        caption=""
        if all(row.own_process for row in found.rows)
        else "Memory was not always measured in a process of its own, and then only rises.",
    )
    return Section(slug="cost", title="What it costs", blocks=(table,))


def _traces(results: ParadigmResults) -> Section | None:
    rows = tuple(
        (row.name, row.seed, point.step, 100 * point.absolute, 100 * point.normalised, point.tau_jp)
        for row in results.rows
        for point in row.trace
    )
    if not rows:
        return None
    table = Table(
        title="Continued training",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="seed"),
            Column(name="steps"),
            Column(name="absolute", spec=".1f"),
            Column(name="normalised", spec=".1f"),
            Column(name="τJp", spec=".3g"),
        ),
        rows=rows,
        caption="The sum at α = 1 after so many steps more; test.",
    )
    return Section(slug="trace", title="Continued training", blocks=(table,))


def _every(results: ParadigmResults) -> Section:
    table = Table(
        title="Settings",
        columns=(
            Column(name="paradigm", number=False),
            Column(name="seed"),
            Column(name="setting", number=False),
            Column(name="value", number=False),
        ),
        rows=tuple((row.name, row.seed, key, str(value)) for row in results.rows for key, value in row.config.items()),
    )
    return Section(slug="settings", title="Settings", blocks=(table,))
