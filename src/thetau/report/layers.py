"""The page of `thetau diagnose layers`: what fine-tuning and merges do at every layer, task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from thetau.diagnostics.layers import FEATURES, LayerRow, Layers
from thetau.errors import DataError
from thetau.report.blocks import Block, Column, Facts, Heatmap, Page, Section, Table
from thetau.report.text import Value


def layers_page(found: Layers) -> Page:
    """The page. Raises `DataError`: rows without the figures that they should have, as where a file was changed by hand."""
    wrong = [
        row.layer
        for row in found.rows
        if set(row.error) != set(found.merged)
        or set(row.drift) != set(found.merged)
        or len(row.missed) not in (0, len(found.shares))
        or row.task not in found.tasks
    ]
    if wrong or not found.rows:
        raise DataError(
            f"the layers have not one figure a merge and share each ({wrong[0] if wrong else 'there is no row'}). The file was changed; run "
            "`thetau diagnose layers` again."
        )
    sections = [_overview(found), _inputs(found), _outputs(found), _rows(found)]
    merges = f"{len(found.merged)} merge{'s' if len(found.merged) != 1 else ''}" if found.merged else "no merge"
    return Page(
        title=f"Layers of {', '.join(found.tasks)}",
        about="layers",
        lead=f"What fine-tuning and {merges} do to {len(_places(found))} blocks, on the tasks' own examples.",
        sections=tuple(section for section in sections if section is not None),
    )


def _place(row: LayerRow) -> str:
    return FEATURES if row.kind == FEATURES else "outside" if row.block is None else str(row.block)


def _places(found: Layers) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_place, found.rows)))


def _overview(found: Layers) -> Section:
    facts = Facts(
        pairs=(
            ("Tasks", ", ".join(found.tasks)),
            ("Merges", ", ".join(found.merged) or "none"),
            ("Examples", ", ".join(f"{task} {n}" for task, n in found.n.items()) + f" ({found.split})"),
            ("Layers", len({row.layer for row in found.rows if row.kind != FEATURES})),
            ("Positions of each layer", max(row.rows for row in found.rows)),
        )
    )
    return Section(slug="overview", title="Overview", blocks=(facts,))


def _mean(rows: Sequence[LayerRow], value: Callable[[LayerRow], float | None]) -> float | None:
    known = [one for row in rows if (one := value(row)) is not None]
    return sum(known) / len(known) if known else None


def _map(
    found: Layers,
    title: str,
    rows: Sequence[tuple[str, Callable[[LayerRow], float | None]]],
    caption: str,
    *,
    signed: bool = False,
) -> Heatmap:
    """A row a figure and task, or a figure; a column a block: means over the layers of the block."""
    places = _places(found)
    members = {place: [row for row in found.rows if _place(row) == place] for place in places}
    return Heatmap(
        title=title,
        rows=tuple(name for name, _ in rows),
        columns=places,
        values=tuple(tuple(_mean(members[place], value) for place in places) for _, value in rows),
        caption=caption,
        signed=signed,
        spec=".3g",
    )


def _of(task: str, value: Callable[[LayerRow], float | None]) -> Callable[[LayerRow], float | None]:
    return lambda row: value(row) if row.task == task else None


def _inputs(found: Layers) -> Section:
    names = found.tasks
    blocks: list[Block] = [
        _map(
            found,
            "How far inputs turn: 1 − cos x",
            [(task, _of(task, lambda row: row.direction)) for task in names],
            "Of each task's own model against the base (WUDI's Eq. 7); WUDI takes it to be little.",
        ),
        _map(
            found,
            "How far inputs stretch: Δ‖x‖/‖x‖",
            [(task, _of(task, lambda row: row.magnitude)) for task in names],
            "The same of their length (Eq. 8).",
            signed=True,
        ),
    ]
    if any(row.missed for row in found.rows):
        shares = range(len(found.shares))
        rows = [(f"own, {found.shares[k]:.3g} of all directions", _missed(k)) for k in shares]
        rows += [(f"others', {found.shares[k]:.3g}", _missed_by_others(k)) for k in shares]
        blocks.append(
            _map(
                found,
                "What a vector's leading directions leave out of the inputs",
                [one for one in rows if any(one[1](row) is not None for row in found.rows)],
                "The share of ‖x‖² (ε of Eq. 13), mean over tasks. Directions drawn by chance would leave out all but their share.",
            )
        )
    return Section(slug="inputs", title="What goes in", blocks=tuple(blocks))


def _missed(k: int) -> Callable[[LayerRow], float | None]:
    return lambda row: row.missed[k] if row.missed else None


def _missed_by_others(k: int) -> Callable[[LayerRow], float | None]:
    return lambda row: row.missed_by_others[k] if row.missed_by_others and k < len(row.missed_by_others) else None


def _error(name: str) -> Callable[[LayerRow], float | None]:
    return lambda row: row.error[name]


def _drift(name: str) -> Callable[[LayerRow], float | None]:
    return lambda row: row.drift[name]


def _outputs(found: Layers) -> Section:
    blocks: list[Block] = []
    if found.merged:
        blocks.append(
            _map(
                found,
                "Relative error of a merge's outputs",
                [(name, _error(name)) for name in found.merged],
                "‖y_m − y_i‖/‖y_i‖ against the task's own model, with everything below merged too (Eq. 83), mean over tasks. `features` is what the head "
                "reads.",
            )
        )
    blocks.append(
        _map(
            found,
            "How far outputs move from the base",
            [("own model", lambda row: row.moved), *((name, _drift(name)) for name in found.merged)],
            "‖y − y₀‖/‖y₀‖, mean over tasks.",
        )
    )
    blocks += [
        _map(
            found,
            f"Relative error of {name} by task",
            [(task, _of(task, _error(name))) for task in found.tasks],
            "Eq. 83, as above.",
        )
        for name in found.merged
    ]
    return Section(slug="outputs", title="What comes out", blocks=tuple(blocks))


def _rows(found: Layers) -> Section:
    columns = (
        Column(name="task", number=False),
        Column(name="layer", number=False),
        Column(name="kind", number=False),
        Column(name="block"),
        Column(name="positions"),
        Column(name="1 − cos x", spec=".4f"),
        Column(name="Δ‖x‖/‖x‖", spec="+.4f"),
        Column(name="Δy/y, own", spec=".4f"),
        *(Column(name=f"missed at {share:.3g}", spec=".4f") for share in found.shares),
        *(Column(name=f"error, {name}", spec=".4f") for name in found.merged),
    )
    rows: tuple[tuple[Value, ...], ...] = tuple(
        tuple(
            chain(
                (row.task, row.layer, row.kind, row.block, row.rows, row.direction, row.magnitude, row.moved),
                row.missed or (None,) * len(found.shares),
                (row.error[name] for name in found.merged),
            )
        )
        for row in found.rows
    )
    return Section(slug="layers", title="Every layer", blocks=(Table(title="Layers", columns=columns, rows=rows),))
