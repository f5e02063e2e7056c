"""The page of a doctor's result: what the models are, who gets in whose way, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thetau.diagnostics.doctor import Advice, Doctor, Group, HitRate, OnTask, Subject
from thetau.errors import DataError
from thetau.report.blocks import Block, Column, Facts, Heatmap, Lines, Notes, Page, Section, Table
from thetau.report.text import Value, clean, number

PAIRS = 12  # models up to which cosines are drawn for each layer


def doctor_page(found: Doctor) -> Page:
    """The page. Raises `DataError`: its figures are not of as many models as it names, as where a file was changed by hand."""
    _check(found)
    return Page(
        title=f"{len(found.models)} models over {found.base.name}",
        about="before merging",
        lead=_lead(found),
        sections=tuple(
            section
            for section in (
                _advice(found),
                _subjects(found),
                _likeness(found),
                _pairs(found),
                _layers(found),
                _harms(found),
                _tasks(found),
                _spectra(found),
                _notes(found),
            )
            if section is not None
        ),
    )


def _check(found: Doctor) -> None:
    count, staying = len(found.compared), len(found.staying)
    wrong = [
        f"group {group.by} {group.name}"
        for group in found.groups
        if len(group.norms) != count or len(group.cosine) != count or any(len(row) != count for row in group.cosine)
    ]
    wrong += [
        f"interference of {one.method}"
        for one in found.harms
        if len(one.whole) != staying or any(len(values) != staying for values in one.layers.values())
    ]
    wrong += [
        f"task {one.task}"
        for one in found.tasks
        if any(len(row) != count for row in (one.loss, one.score, one.tau_jp, one.direction, one.magnitude, *one.layers.values()))
    ]
    if wrong:
        raise DataError(
            f"the doctor's result does not have one figure a model: {clean(', '.join(wrong[:3]))}. It was changed; run `thetau doctor` again."
        )


def _lead(found: Doctor) -> str:
    lost = len(found.models) - len(found.compared)
    fits = f"{len(found.compared)} of {len(found.models)} models fit the base." if lost else "All models fit the base."
    findings = (
        f" {len(found.findings)} thing{'s' if len(found.findings) != 1 else ''} stand{'s' if len(found.findings) == 1 else ''} out."
        if found.findings
        else " Nothing stands out."
    )
    return fits + findings


def _rate(measured: HitRate | None) -> str:
    if measured is None:
        return "not measured"
    return (
        f"{measured.hits} of {measured.n} times (95 %: {100 * measured.low:.0f} to {100 * measured.high:.0f} %): {measured.what}"
    )


def _advice(found: Doctor) -> Section:
    blocks: list[Block] = []
    if found.findings:
        blocks.append(Notes(texts=tuple(one.sentence for one in found.findings), tone="warning"))
    else:
        blocks.append(Notes(texts=("No duplicate, no continuation, no opposed vector, no wrong base was found.",), tone="good"))
    if found.advice:
        blocks.append(Notes(texts=tuple(map(_advised, found.advice))))
    if found.findings:
        blocks.append(
            Table(
                title="What stands out",
                columns=(
                    Column(name="what", number=False),
                    Column(name="models", number=False),
                    Column(name="said", number=False),
                    Column(name="figures", number=False),
                ),
                rows=tuple(
                    (
                        one.kind,
                        ", ".join(one.models),
                        one.sentence,
                        ", ".join(f"{name} {number(value)}" for name, value in one.figures.items()),
                    )
                    for one in found.findings
                ),
            )
        )
    return Section(slug="advice", title="What to do", blocks=tuple(blocks))


def _advised(one: Advice) -> str:
    parts = {"Why": one.evidence, "But": one.uncertainty, "How often such advice was right": _rate(one.measured)}
    return "\n".join([f"{one.topic.capitalize()}: {one.sentence}", *(f"{name}: {text}" for name, text in parts.items() if text)])


def _subjects(found: Doctor) -> Section:
    facts = Facts(
        pairs=(
            ("Base", found.base.name),
            ("Architecture", found.base.architecture or "not stated"),
            ("Parameters", found.base.parameters),
            ("‖θ₀‖", found.base.norm),
            ("Tied", ", ".join(found.base.tied) or "nothing"),
        )
    )
    table = Table(
        title="Models",
        columns=(
            Column(name="model", number=False),
            Column(name="form", number=False),
            Column(name="architecture", number=False),
            Column(name="dtypes", number=False),
            Column(name="parameters"),
            Column(name="‖τ‖"),
            Column(name="‖τ‖/‖θ₀‖", spec=".3g"),
            Column(name="differs beside the weights", number=False),
            Column(name="problems and notes", number=False),
        ),
        rows=tuple(_subject(one) for one in found.models),
    )
    return Section(slug="models", title="What they are", blocks=(facts, table))


def _subject(one: Subject) -> tuple[Value, ...]:
    dtypes = ", ".join(f"{count} {name}" for name, count in one.dtypes.items()) + (f" ({one.quantised})" if one.quantised else "")
    return (
        one.name,
        one.form,
        one.architecture,
        dtypes,
        one.parameters,
        one.norm,
        one.shift,
        " ".join(one.beside),
        " ".join((*one.problems, *one.notes)),
    )


def _groups(found: Doctor, by: str) -> dict[str, Group]:
    return {group.name: group for group in found.groups if group.by == by}


def _likeness(found: Doctor) -> Section | None:
    whole = next((group for group in found.groups if group.by == "whole"), None)
    if whole is None or len(found.compared) < 2:
        return None
    blocks: list[Block] = [
        Heatmap(
            title="Cosines of the task vectors",
            rows=found.compared,
            columns=found.compared,
            values=whole.cosine,
            signed=True,
            top=1.0,
            cluster=True,
            spec=".2f",
            caption="Over all tensors. Models that are alike stand together.",
        )
    ]
    layers = _groups(found, "layer")
    if len(layers) > 1:
        blocks.append(_pairwise("Mean cosine with the other models, by block", layers, found.compared))
    kinds = _groups(found, "kind")
    if len(kinds) > 1:
        blocks.append(_pairwise("Mean cosine with the other models, by kind", kinds, found.compared))
    return Section(slug="likeness", title="How alike they are", blocks=tuple(blocks))


def _pairwise(title: str, groups: Mapping[str, Group], names: Sequence[str]) -> Heatmap:
    count = len(names)
    return Heatmap(
        title=title,
        rows=tuple(names),
        columns=tuple(groups),
        values=tuple(
            tuple((sum(group.cosine[i]) - group.cosine[i][i]) / (count - 1) for group in groups.values()) for i in range(count)
        ),
        signed=True,
        cluster=count > PAIRS,
        spec=".2f",
    )


def _pairs(found: Doctor) -> Section | None:
    if not found.pairs:
        return None
    table = Table(
        title="Pairs",
        columns=(
            Column(name="first", number=False),
            Column(name="second", number=False),
            Column(name="cosine", spec="+.3f"),
            Column(name="overlap", spec=".3f", meaning="Σ min(|a|, |b|) / Σ max(|a|, |b|) over entries"),
            Column(name="sign conflict", spec=".3f", meaning="share of the overlap on entries of opposed signs; 0.5 by chance"),
            Column(
                name="first in second",
                spec="+.3f",
                meaning="⟨a, b⟩/‖a‖²: near 1 in all tensors where the second was trained from the first",
            ),
            Column(name="second in first", spec="+.3f"),
            Column(name="inputs shared", spec=".3f", meaning="of the leading directions at the layers' inputs"),
            Column(name="by chance", spec=".3f"),
            Column(
                name="first on second",
                spec=".3f",
                meaning="what the first does to the inputs of the second, over what the second does",
            ),
            Column(name="second on first", spec=".3f"),
        ),
        rows=tuple(
            (
                one.a,
                one.b,
                one.cosine,
                one.overlap,
                one.conflict,
                one.projection,
                one.back,
                one.inputs,
                one.inputs_by_chance,
                one.a_on_b,
                one.b_on_a,
            )
            for one in sorted(found.pairs, key=lambda one: -abs(one.cosine))
        ),
        caption="The most alike, or most opposed, come first.",
    )
    place = {name: i for i, name in enumerate(found.compared)}
    known = [one for one in found.pairs if one.a in place and one.b in place]
    blocks: list[Block] = [table]
    if any(one.a_on_b is not None for one in known):
        values: list[list[float | None]] = [[None] * len(place) for _ in place]
        for one in known:
            values[place[one.a]][place[one.b]] = one.a_on_b
            values[place[one.b]][place[one.a]] = one.b_on_a
        blocks.append(
            Heatmap(
                title="What each (row) does to the inputs of each (column)",
                rows=found.compared,
                columns=found.compared,
                values=tuple(map(tuple, values)),
                cluster=len(place) > PAIRS,
                spec=".2f",
                caption="Over what the column's own vector does to them; 0 is out of the way.",
            )
        )
    return Section(slug="pairs", title="Who gets in whose way", blocks=tuple(blocks))


def _layers(found: Doctor) -> Section | None:
    layers, kinds = _groups(found, "layer"), _groups(found, "kind")
    if not found.compared or not (layers or kinds):
        return None
    blocks = [
        Heatmap(
            title=f"‖τ‖/‖θ₀‖ by {by}",
            rows=found.compared,
            columns=tuple(groups),
            values=tuple(
                tuple(group.norms[i] / group.base if group.base else None for group in groups.values())
                for i in range(len(found.compared))
            ),
            cluster=len(found.compared) > PAIRS,
            spec=".2g",
            caption="How far each model's weights moved, in shares of the base's norm.",
        )
        for by, groups in (("block", layers), ("kind", kinds))
        if groups
    ]
    return Section(slug="layers", title="Where they moved", blocks=tuple(blocks))


def _harms(found: Doctor) -> Section | None:
    if not found.harms:
        return None
    names = [one.method if one.scale is None else f"{one.method}, λ = {one.scale:.3g}" for one in found.harms]
    names = [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
    blocks: list[Block] = [
        Heatmap(
            title="Estimated interference by method",
            rows=tuple(names),
            columns=found.staying,
            values=tuple(one.whole for one in found.harms),
            top=1.0,
            spec=".2f",
            caption="0: as the task's own model does to its inputs. 1: no more than the base. The vector's rows stand for the inputs (WUDI, Eq. 21).",
        )
    ]
    layered = {
        name: {layer: sum(values) / len(values) for layer, values in one.layers.items() if values}
        for name, one in zip(names, found.harms, strict=True)
    }
    order = list(dict.fromkeys(layer for values in layered.values() for layer in values))
    if len(order) > 1:
        blocks.append(
            Heatmap(
                title="The same by block, mean over models",
                rows=tuple(names),
                columns=tuple(order),
                values=tuple(tuple(layered[name].get(layer) for layer in order) for name in names),
                spec=".2f",
            )
        )
    lead = "" if found.best_scale is None else f"λ of task arithmetic that makes it least: {found.best_scale:.3g}."
    return Section(slug="interference", title="What a merge would do", lead=lead, blocks=tuple(blocks))


def _tasks(found: Doctor) -> Section | None:
    """What the tasks' examples say."""
    if not found.tasks or not found.compared:
        return None
    names = tuple(one.task for one in found.tasks)
    sizes = ", ".join(f"{one.task} {one.n} ({one.split})" for one in found.tasks)
    place = {name: i for i, name in enumerate(found.compared)}
    many = len(found.compared) > PAIRS
    blocks: list[Block] = [
        Heatmap(
            title="Change of the loss against the base",
            rows=found.compared,
            columns=names,
            values=tuple(tuple(_less(one.loss[i], one.base_loss) for one in found.tasks) for i in range(len(found.compared))),
            signed=True,
            cluster=many,
            spec="+.3f",
            caption="Of each model (row) on each task's examples (column). Below 0 the model is better than the base.",
        )
    ]
    if any(value is not None for one in found.tasks for value in one.tau_jp):
        blocks.append(
            Heatmap(
                title="√τJp of each model (row) on each task (column), over that of the task's own model",
                rows=found.compared,
                columns=names,
                values=tuple(tuple(_over_own(one, i, place) for one in found.tasks) for i in range(len(found.compared))),
                cluster=many,
                spec=".2f",
                caption="How far a vector moves the task's features at the base, to first order; 0 is out of the way. Hatched where no model of the "
                "task is known.",
            )
        )
    owned = [one for one in found.tasks if one.own in place and one.layers]
    layers = tuple(dict.fromkeys(layer for one in owned for layer in one.layers))
    if len(layers) > 1:
        blocks.append(
            Heatmap(
                title="How far inputs turn by block: 1 − cos x (Eq. 7)",
                rows=tuple(one.task for one in owned),
                columns=layers,
                values=tuple(
                    tuple(one.layers[layer][place[one.own]] if layer in one.layers else None for layer in layers) for one in owned
                ),
                spec=".2g",
                caption="Of each task's own model against the base, on the task's examples. WUDI takes it to be little.",
            )
        )
    blocks.append(_by_task(found))
    return Section(slug="tasks", title="What examples say", lead=f"Examples: {sizes}.", blocks=tuple(blocks))


def _by_task(found: Doctor) -> Table:
    rows: list[tuple[Value, ...]] = []
    for one in found.tasks:
        rows.append((one.task, found.base.name, "base", one.base_loss, one.base_score, one.metric, None, one.unit, None, None))
        rows += [
            (
                one.task,
                name,
                "own" if name == one.own else "",
                one.loss[i],
                one.score[i],
                one.metric,
                one.tau_jp[i],
                one.unit,
                one.direction[i],
                one.magnitude[i],
            )
            for i, name in enumerate(found.compared)
        ]
    return Table(
        title="Models on tasks",
        columns=(
            Column(name="task", number=False),
            Column(name="model", number=False),
            Column(name="is", number=False),
            Column(name="loss", spec=".4f"),
            Column(name="score", spec=".4f"),
            Column(name="metric", number=False),
            Column(name="τJp", spec=".3g", meaning="mean of ‖J(x; θ₀) τ‖² over the examples"),
            Column(name="‖f‖²", spec=".3g", meaning="mean of ‖f(x; θ₀)‖², to compare τJp with"),
            Column(
                name="1 − cos x", spec=".4f", meaning="how far the layers' inputs turn against the base, mean over layers (Eq. 7)"
            ),
            Column(name="Δ‖x‖/‖x‖", spec="+.4f", meaning="how far they stretch (Eq. 8)"),
        ),
        rows=tuple(rows),
    )


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _over_own(one: OnTask, i: int, place: Mapping[str, int]) -> float | None:
    own, value = one.tau_jp[place[one.own]] if one.own in place else None, one.tau_jp[i]
    return None if value is None or not own else (value / own) ** 0.5


def _spectra(found: Doctor) -> Section | None:
    if not found.spectra:
        return None
    table = Table(
        title="Ranks of the task vectors' matrices",
        columns=(
            Column(name="model", number=False),
            Column(name="tensor", number=False),
            Column(name="kind", number=False),
            Column(name="block"),
            Column(name="full rank"),
            Column(name="effective rank", spec=".1f"),
            Column(name="stable rank", spec=".1f"),
            Column(name="first direction's share", spec=".3f"),
            Column(name="exact", number=False),
        ),
        rows=tuple(
            (
                one.model,
                one.tensor,
                one.kind,
                one.layer,
                one.full,
                one.effective_rank,
                one.stable_rank,
                one.shares[0] if one.shares else None,
                "yes" if one.exact else "at most",
            )
            for one in found.spectra
        ),
    )
    means: dict[str, list[tuple[float, ...]]] = {}
    for one in found.spectra:
        means.setdefault(one.model, []).append(one.shares)
    series = {model: _mean(rows) for model, rows in list(means.items())[:12]}
    lines = Lines(
        title="Share of ‖τ‖² by singular direction, mean over matrices",
        x="direction",
        y="share",
        series=series,
        caption="The first twelve models." if len(means) > 12 else "",
    )
    return Section(slug="spectra", title="Spectra", blocks=(lines, table))


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    longest = max(map(len, rows), default=0)
    return tuple(sum(row[k] if k < len(row) else 0.0 for row in rows) / len(rows) for k in range(longest))


def _notes(found: Doctor) -> Section | None:
    if not found.notes:
        return None
    return Section(slug="notes", title="How this was found", blocks=(Notes(texts=found.notes),))
