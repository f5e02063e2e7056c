"""The page of `thetau compare`: two models, or a model and its recipe, tensor by tensor."""

from __future__ import annotations

from typing import Literal

from thetau.diagnostics.comparison import Comparison, Part, TensorPair
from thetau.report.blocks import Bars, Block, Code, Column, Facts, Notes, Page, Section, Table
from thetau.report.text import Value


def comparison_page(found: Comparison) -> Page:
    """The page."""
    what = "a recipe" if found.recipe else "two models"
    sections = [_overview(found), _parts(found), _tensors(found), _rows(found), _misfits(found), _beside(found)]
    return Page(
        title=f"{found.a} and {found.b}",
        about=f"comparison of {what}",
        lead=next(iter(found.verdict()), ""),
        sections=tuple(section for section in sections if section is not None),
    )


def _overview(found: Comparison) -> Section:
    base: Value = found.base
    facts = Facts(
        pairs=(
            ("A", found.a),
            ("B", found.b),
            ("Base", base or "none: cosines are of the weights"),
            ("‖A‖", found.norm_a),
            ("‖B‖", found.norm_b),
            ("‖A − B‖", found.distance),
            ("‖A − B‖/‖A‖", found.relative),
            ("Cosine" if found.base is None else "Cosine of the changes", found.cosine),
        )
    )
    blocks: list[Block] = [facts, Notes(texts=tuple(found.verdict()), tone=_tone(found))]
    if found.notes:
        blocks.append(Notes(texts=found.notes))
    return Section(slug="overview", title="Overview", blocks=tuple(blocks))


def _tone(found: Comparison) -> Literal["warning", "good", "plain"]:
    if found.same or (found.recipe and found.agrees):
        return "good"
    return "warning" if found.recipe or not found.complete else "plain"


def _parts(found: Comparison) -> Section | None:
    if not found.parts:
        return None
    blocks: list[Block] = []
    for by, word in (("layer", "block"), ("kind", "kind")):
        parts = [part for part in found.parts if part.by == by]
        if not parts:
            continue
        blocks.append(
            Bars(
                title=f"‖A − B‖/‖A‖ by {word}",
                x="share of the length of A",
                rows={part.name: _share(part) for part in parts},
                spec=".3g",
            )
        )
        blocks.append(
            Table(
                title=f"By {word}",
                columns=(
                    Column(name=word, number=False),
                    Column(name="tensors"),
                    Column(name="parameters"),
                    Column(name="‖A‖"),
                    Column(name="‖A − B‖"),
                    Column(name="‖A − B‖/‖A‖", spec=".3g"),
                    Column(name="cosine", spec="+.3f"),
                    Column(name="entries that differ"),
                ),
                rows=tuple(
                    (
                        part.name,
                        part.tensors,
                        part.parameters,
                        part.norm_a,
                        part.distance,
                        _share(part),
                        part.cosine,
                        part.changed,
                    )
                    for part in parts
                ),
            )
        )
    return Section(slug="parts", title="Where they differ", blocks=tuple(blocks))


def _share(part: Part) -> float | None:
    return part.distance / part.norm_a if part.norm_a else None


def _tensors(found: Comparison) -> Section | None:
    if not found.tensors:
        return None
    table = Table(
        title="Tensors",
        columns=(
            Column(name="tensor", number=False),
            Column(name="kind", number=False),
            Column(name="block"),
            Column(name="shape", number=False),
            Column(name="dtypes", number=False),
            Column(name="‖A‖"),
            Column(name="‖A − B‖"),
            Column(name="‖A − B‖/‖A‖", spec=".3g"),
            Column(name="cosine", spec="+.3f"),
            Column(name="largest", spec=".3g"),
            Column(name="at", number=False),
            Column(name="entries that differ"),
            Column(name="beyond rounding"),
            Column(name="effective rank of B − A", spec=".1f"),
            Column(name="NaN or infinite"),
        ),
        rows=tuple(map(_tensor, sorted(found.tensors, key=lambda one: -(one.relative or 0.0)))),
        caption="Those that differ most come first.",
    )
    return Section(slug="tensors", title="Tensors", blocks=(table,))


def _tensor(one: TensorPair) -> tuple[Value, ...]:
    counted = one.directions.get("difference")
    return (
        one.name if one.other is None else f"{one.name} ({one.other})",
        one.kind,
        one.layer,
        "×".join(map(str, one.shape)) or "1",
        one.dtype_a if one.dtype_a == one.dtype_b else f"{one.dtype_a}, {one.dtype_b}",
        one.norm_a,
        one.distance,
        one.relative,
        one.cosine,
        one.largest,
        ", ".join(map(str, one.at)),
        one.changed,
        one.beyond,
        None if counted is None else counted.effective_rank,
        one.not_finite,
    )


def _rows(found: Comparison) -> Section | None:
    rows = tuple(
        (one.name, row.row, "–" if row.token is None else row.token, row.distance, row.relative)
        for one in found.tensors
        for row in one.rows
    )
    if not rows:
        return None
    table = Table(
        title="Rows of the vocabulary that moved most",
        columns=(
            Column(name="tensor", number=False),
            Column(name="row"),
            Column(name="token", number=False),
            Column(name="‖a − b‖"),
            Column(name="‖a − b‖/‖a‖", spec=".3g"),
        ),
        rows=rows,
    )
    return Section(slug="rows", title="Tokens", blocks=(table,))


def _misfits(found: Comparison) -> Section | None:
    rows = [
        *((name, f"only in {found.a}") for name in found.only_a),
        *((name, f"only in {found.b}") for name in found.only_b),
        *((one.name, f"shapes {list(one.shape_a)} and {list(one.shape_b)}") for one in found.misfits),
        *((name, "is no float, and differs") for name in found.buffers),
    ]
    if not rows:
        return None
    columns = (Column(name="tensor", number=False), Column(name="what", number=False))
    table = Table(title="Tensors that were not compared, or are no floats", columns=columns, rows=tuple(rows))
    return Section(slug="misfits", title="What does not fit", blocks=(table,))


def _beside(found: Comparison) -> Section | None:
    beside = found.beside
    if beside is None:
        return None
    blocks: list[Block] = [Notes(texts=beside.problems, tone="warning")] if beside.problems else []
    if beside.config:
        columns = tuple(Column(name=name, number=False) for name in ("entry", "A", "B"))
        rows = tuple((one.key, one.a or "absent", one.b or "absent") for one in beside.config)
        blocks.append(Table(title="Entries of the configs that differ", columns=columns, rows=rows))
    tokens = beside.tokenizer
    if tokens is not None:
        pairs: list[tuple[str, Value]] = [("Tokens of A", tokens.size_a), ("Tokens of B", tokens.size_b)]
        pairs += [
            (name, f"{one.count}: {', '.join(one.first)}")
            for name, one in (("Only in A", tokens.only_a), ("Only in B", tokens.only_b), ("With another id", tokens.moved))
            if one.count
        ]
        blocks.append(Facts(pairs=tuple(pairs)))
    if beside.same_template is not None:
        blocks.append(
            Notes(texts=("Their chat templates are the same." if beside.same_template else "Their chat templates differ.",))
        )
    if not blocks:
        blocks.append(Notes(texts=("Their configs are the same, and neither has a tokenizer or a chat template.",), tone="good"))
    again = f"thetau compare {found.a} {found.b}" + (f" --base {found.base}" if found.base else "")
    blocks.append(Code(text=again, label="To compare them again"))
    return Section(slug="beside", title="Beside the weights", blocks=tuple(blocks))
