"""`thetau doctor`: look at the models before they are merged, and say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json, LeftOut, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import Few, Reading
from thetau.pace import silence

if TYPE_CHECKING:
    from rich.console import Console

    from thetau.diagnostics.doctor import Advice, Doctor

PAIRS = 15  # pairs that are printed
WIDEST = 12  # models up to which tables with a column a model are printed


@with_options
def doctor(
    base: Annotated[str, typer.Argument(help="The base: folder, file or hub id.")],
    models: Annotated[
        list[str], typer.Argument(help="Fine-tuned models, LoRA adapters or saved task vectors, each PATH or NAME=PATH.")
    ],
    candidate: Annotated[
        list[str] | None,
        typer.Option("--candidate", "-c", help="Another model that may be the true base; may be repeated. BASE is one of them."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", "-t", help="Look at the models on this task too, TASK or MODEL=TASK (whose it is); may be repeated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page of it here: NAME.html.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="List every pair, not only those that stand out.")] = False,
    *,
    few: Few,
    reading: Reading,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Look at models before they are merged: what they are, how they hang together, what to leave out, which method to begin with.

    thetau doctor base sst2 mnli qa=models/squad -o doctor.html --json doctor.json

    From the weights alone, in streaming passes within --max-memory. With --task the models are run on a few examples too.
    """
    from thetau.diagnostics.examine import examine
    from thetau.facade import open as open_weights
    from thetau.facade import open_base

    if machine.quiet:
        silence()
    json.check()
    if not task and (few != Few() or reading != Reading()):
        raise RecipeError(["how examples are read was given, and no task: say which with --task."], "options")
    if out is not None:
        from thetau.checkpoint.disk import check_file
        from thetau.report import check

        check()
        check_file(out)
    opened = open_base(base)
    given = [open_weights(path, base=opened, name=name) for name, path in map(named, models)]
    others = [open_base(other) for other in candidate or []]
    examples = None
    if task:
        from thetau.diagnostics.examples import open_examples

        examples = open_examples(base, given, task, few=few, reading=reading)
    engine = machine.engine()  # after the model that runs, which takes its part of the memory
    result = examine(opened, given, candidates=others, exclude=left_out.exclude, engine=engine)
    if examples is not None:
        from thetau.diagnostics.examples import with_examples

        result = with_examples(result, examples, opened, given, engine=engine)
    json.save(result)
    if out is not None:
        from thetau.report import doctor_page, write

        write(doctor_page(result), out)
    show(result, pairs=pairs)


def named(text: str) -> tuple[str | None, str]:
    """`NAME=PATH` as its two parts; a path that has an equals sign in it is a path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and not Path(text).exists() else (None, text)


def show(result: Doctor, *, pairs: bool = False) -> None:
    """Print what was seen, what stands out, and the advice."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    _models(result, console)
    _groups(result)
    _pairs(result, every=pairs)
    _harms(result)
    _tasks(result)
    for note in result.notes:
        console.print(f"· {note}")
    console.print("\nwhat stands out")
    for one in result.findings:
        console.print(f"  {one.kind}: {one.sentence}")
    if not result.findings:
        console.print("  nothing: every model fits the base, and none is a copy, a continuation or the opposite of another")
    console.print("\nadvice")
    for number, advice in enumerate(result.advice, 1):
        _advice(number, advice, console)


def _models(result: Doctor, console: Console) -> None:
    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    made = table("", "", "form", "architecture", "tensors", "parameters", "dtypes", "norm", "‖τ‖/‖θ₀‖")
    for one in (result.base, *result.models):
        dtypes = ", ".join(f"{count} {name}" for name, count in one.dtypes.items())
        norm = "–" if one.norm is None else f"{one.norm:.4g}"
        shift = "–" if one.shift is None or one is result.base else f"{one.shift:.4f}"
        made.add_row(one.name, one.form, one.architecture, str(one.tensors), f"{one.parameters:,}", dtypes, norm, shift)
    print_table(made)
    for one in (result.base, *result.models):
        for line in (*one.problems, *one.beside):
            console.print(line)
        if one.tied:
            console.print(f"{one.name}: tied: {', '.join(one.tied)}")


def _groups(result: Doctor) -> None:
    from statistics import median

    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    if not result.compared:
        return
    if len(result.compared) > WIDEST:
        return
    made = table("‖τ‖/‖θ₀‖ by kind and block", "", "tensors", *result.compared)
    for group in result.groups:
        name = group.name or "all"
        label = f"block {name}" if group.by == "layer" and name != "outside" else name
        made.add_row(label, str(group.tensors), *("–" if not group.base else f"{norm / group.base:.4f}" for norm in group.norms))
    print_table(made)
    if result.spectra:
        ranks = table(
            "effective rank of the task vectors' matrices: median, and of the full rank", "", "matrices", "median", "share"
        )
        for name in result.compared:
            found = [one for one in result.spectra if one.model == name]
            share = median(one.effective_rank / one.full for one in found)
            ranks.add_row(name, str(len(found)), f"{median(one.effective_rank for one in found):.1f}", f"{100 * share:.1f} %")
        print_table(ranks)
    if len(result.compared) > 1:
        cosine = table("cosine of the task vectors", "", *result.compared)
        for name, row in zip(result.compared, result.groups[0].cosine, strict=True):
            cosine.add_row(name, *(f"{value:+.3f}" for value in row))
        print_table(cosine)


def _pairs(result: Doctor, *, every: bool) -> None:
    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    rows = sorted(result.pairs, key=lambda pair: -max(pair.a_on_b or 0.0, pair.b_on_a or 0.0, abs(pair.cosine)))
    shown = rows if every else rows[:PAIRS]
    if not shown:
        return
    caption = (
        "" if len(shown) == len(rows) else f"the {len(shown)} of {len(rows)} pairs that do most to each other; --pairs lists all"
    )
    made = table(
        caption, "a · b", "cosine", "overlap", "sign conflict", "inputs shared", "outputs shared", "a does to b", "b does to a"
    )
    for pair in shown:
        made.add_row(
            f"{pair.a} · {pair.b}",
            f"{pair.cosine:+.3f}",
            f"{pair.overlap:.2f}",
            f"{pair.conflict:.2f}",
            *(
                _over(value, chance)
                for value, chance in ((pair.inputs, pair.inputs_by_chance), (pair.outputs, pair.outputs_by_chance))
            ),
            *("–" if value is None else f"{value:.2f}" for value in (pair.a_on_b, pair.b_on_a)),
        )
    print_table(made)


def _over(value: float | None, chance: float | None) -> str:
    return "–" if value is None or chance is None else f"{value:.2f} (chance {chance:.2f})"


def _harms(result: Doctor) -> None:
    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    if not result.harms:
        return
    caption = "estimated interference: 0 as the task's own model, 1 as the base (Eq. 21 of WUDI)"
    labels = [one.method if one.scale is None else f"{one.method}, λ = {one.scale:.2f}" for one in result.harms]
    if len(result.staying) > WIDEST:
        made = table(caption, "model", *labels)
        for name, *values in zip(result.staying, *(one.whole for one in result.harms), strict=True):
            made.add_row(name, *_shown(values))
    else:
        made = table(caption, "merge", *result.staying, "mean")
        for label, one in zip(labels, result.harms, strict=True):
            made.add_row(label, *_shown(one.whole), f"{sum(one.whole) / len(one.whole):.2f}")
    print_table(made)


def _tasks(result: Doctor) -> None:
    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    for one in result.tasks:
        own = one.tau_jp[result.compared.index(one.own)] if one.own in result.compared else None
        whose = f"trained on it: {one.own}" if one.own else "no model of its own"
        made = table(
            f"{one.task}: {one.n} {one.split} examples; {whose}",
            "",
            "loss",
            one.metric,
            "τJp",
            "√ over own's",
            "1 − cos x",
            "Δ‖x‖/‖x‖",
        )
        made.add_row(result.base.name, _figure(one.base_loss), _figure(one.base_score), "–", "–", "–", "–")
        for place, name in enumerate(result.compared):
            value = one.tau_jp[place]
            share = None if value is None or not own else (value / own) ** 0.5
            made.add_row(
                name,
                _figure(one.loss[place]),
                _figure(one.score[place]),
                "–" if value is None else f"{value:.3g}",
                "–" if share is None else f"{share:.2f}",
                _figure(one.direction[place]),
                _figure(one.magnitude[place]),
            )
        print_table(made)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shown(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _advice(number: int, one: Advice, console: Console) -> None:
    console.print(f"  {number}. {one.topic}: {one.sentence}")
    console.print(f"     why: {one.evidence}")
    if one.uncertainty:
        console.print(f"     but: {one.uncertainty}")
    if one.measured is not None:
        rate = one.measured
        console.print(
            f"     tried: right in {rate.hits} of {rate.n} ({100 * rate.low:.0f} to {100 * rate.high:.0f} %): {rate.what}"
        )
