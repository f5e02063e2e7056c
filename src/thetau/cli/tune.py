"""`thetau tune`: coefficients chosen on validation, numbers reported on test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thetau.cli.tables import parse_grid, percent, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from thetau.evaluate import Evaluator
    from thetau.evaluate.spaces import Space
    from thetau.evaluate.tuned import Tuned
    from thetau.studies import Addition, Analogy, Negation, OutOfDistribution


def tune(
    models: Annotated[
        list[str], typer.Argument(help="Fine-tuned models, whose records name their tasks, or TASK=MODEL; folders or files.")
    ],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The pre-trained model: gives architecture, tokenizer, heads.")
    ] = "all-MiniLM-L6-v2",
    method: Annotated[str, typer.Option("--method", help="How the vectors are joined; their λ is what is tuned.")] = "sum",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, as density=0.2.")] = None,
    negate: Annotated[bool, typer.Option("--negate", help="Subtract each vector by itself; needs --control.")] = False,
    control: Annotated[str | None, typer.Option(help="The task that negation must keep.")] = None,
    analogy: Annotated[
        str | None, typer.Option(help="A,B,C,D: A is to B as C is to D, with models of A, B and C; D is a task.")
    ] = None,
    left_out: Annotated[bool, typer.Option("--left-out", help="Merge without each task in turn, and test on it.")] = False,
    alphas: Annotated[str | None, typer.Option(help="The values to try, as 0.2,0.4,1; by default the papers' grids.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")
    ] = None,
    validation: Annotated[int | None, typer.Option(help="At most so many validation examples a task.", min=1)] = None,
    test: Annotated[int | None, typer.Option(help="At most so many test examples a task.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.", min=3)] = 64,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side of an image; by default the model's own.", min=1)] = None,
    kind: Annotated[
        str | None, typer.Option(help="How the base is read: sentence, image, mask or text_to_text; by default as its files say.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder in which evaluations are kept, so that they are done once.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")] = None,
) -> None:
    """Choose α on validation and report on test: addition (or any method's λ), negation, an analogy, tasks left out.

    Vectors of the tangent space are evaluated in the linear form, where every α is free.

    thetau tune runs/demo/finetuned/sms_spam/* runs/demo/finetuned/qnli/* --method ties
    """
    from thetau.cli.common import check_folder, parse_fields
    from thetau.errors import DataError, RecipeError
    from thetau.evaluate import Evaluator
    from thetau.evaluate.cache import write_atomically
    from thetau.evaluate.tuned import make_space, one_space, open_tuned, read_vectors
    from thetau.models import load_encoder
    from thetau.models.loading import kind_named
    from thetau.studies.arithmetic import ADDITION, NEGATION, negation, out_of_distribution
    from thetau.studies.arithmetic import analogy as find_analogy
    from thetau.tasks import load_task

    check_folder(json)
    if sum((negate, analogy is not None, left_out)) > 1:
        raise RecipeError(["--negate, --analogy and --left-out are different questions: ask one."], "options")
    if negate != (control is not None):
        raise RecipeError(
            ["--negate needs --control TASK, the task that it must keep, and --control is for --negate."], "options"
        )
    if (negate or analogy or left_out) and method != "sum":
        raise RecipeError(["--method is for addition; here vectors are summed."], "options")
    tuned = [open_tuned(model) for model in models]
    encoder = load_encoder(base, kind_named(kind))
    tangent = one_space(tuned, encoder)
    names = [model.task for model in tuned]
    parts = [part.strip() for part in (analogy or "").split(",") if part.strip()]
    if analogy is not None and (len(parts) != 4 or not set(parts[:3]) <= set(names)):
        raise RecipeError(
            [f"--analogy must be A,B,C,D with models of A, B and C ({', '.join(names)}). Got {analogy!r}."], "options"
        )
    wanted = [parts[3]] if parts else names
    tasks = [load_task(name, data) for name in dict.fromkeys([*wanted, *([control] if control else [])])]
    own: dict[str, Any] = {name: head for model in tuned for name, head in model.heads().items()}
    limits = {"validation": validation, "test": test}
    evaluator = Evaluator(encoder, tasks, limits=limits, max_length=max_length, image_size=image_size, heads=own, cache=cache)
    weights = encoder.weights()
    vectors = read_vectors(tuned, encoder, weights)
    space = make_space(evaluator, weights, vectors, tangent=tangent, cache=cache)
    grid = parse_grid(alphas)
    result: Any
    if negate:
        assert control is not None
        result = [negation(space, name, control, grid=grid or NEGATION) for name in names]
        shown = _negations(result)
    elif parts:
        result = find_analogy(space, *parts, grid=grid or ADDITION)
        shown = _analogy(result)
    elif left_out:
        result = out_of_distribution(space, names, grid=grid or ADDITION)
        shown = _left_out(result)
    else:
        if set_ and method == "sum":
            raise DataError("--set gives fields of a --method; a sum has none.")
        result = _added(space, evaluator, tuned, method, parse_fields(set_ or []), grid or ADDITION, tangent=tangent, cache=cache)
        shown = _addition(result, method)
    if json is not None:
        from pydantic import TypeAdapter

        facts = {"models": models, "base": base, "method": method, "space": "tangent" if tangent else "weights"}
        content = {**facts, "limits": limits, "result": TypeAdapter(Any).dump_python(result, mode="json")}
        write_atomically(json, TypeAdapter(Any).dump_json(content, indent=1) + b"\n")
    from rich.console import Console

    Console().print(shown)


def _added(
    space: Space,
    evaluator: Evaluator,
    tuned: Sequence[Tuned],
    method: str,
    fields: dict[str, Any],
    grid: Sequence[float],
    *,
    tangent: bool,
    cache: Path | None,
) -> Addition:
    from thetau.evaluate.merging import build_method, merged_vector
    from thetau.evaluate.tuned import make_space
    from thetau.studies.arithmetic import addition
    from thetau.tasks.suite import MethodChoice

    names = [model.task for model in tuned]
    if method == "sum":
        return addition(space, names, grid=grid)
    built = build_method(MethodChoice(name=method, method=method, fields=fields))
    folder = evaluator.encoder.folder
    individual = {split: {name: space.accuracy({name: 1.0}, name, split) for name in names} for split in ("validation", "test")}
    vector = merged_vector(folder, [model.path for model in tuned], names, built)
    evaluator.load_base()
    merged = make_space(evaluator, evaluator.encoder.weights(), {"merged": vector}, tangent=tangent, cache=cache)
    return addition(merged, names, grid=grid, vectors={"merged": 1.0}, individual=individual)


def _addition(found: Addition, method: str) -> Table:
    what = "the sum" if method == "sum" else method
    made = table(
        f"{what} on test, in percent; α is the best of {len(found.trials)} by average normalised validation accuracy",
        *("task", "n", "individual", "α = 1", f"α = {found.tuned.alpha:g}", "95 % interval"),
    )
    for name, one in found.tuned.accuracy.items():
        interval = f"{percent(one.low)} – {percent(one.high)}"
        alone, at_one = found.individual[name].value, found.one_shot.accuracy[name].value
        made.add_row(name, str(one.n), percent(alone), percent(at_one), percent(one.value), interval)
    made.add_section()
    mean = sum(one.value for one in found.individual.values()) / len(found.individual)
    made.add_row("average", "", percent(mean), percent(found.one_shot.absolute), percent(found.tuned.absolute), "")
    made.add_row("normalised", "", "", percent(found.one_shot.normalised), percent(found.tuned.normalised), "")
    return made


def _negations(found: Sequence[Negation]) -> Table:
    made = table(
        "in percent, on test; α has the lowest validation value of the task that keeps 95 % of the control's. "
        "α = 0: nothing above it does",
        *("task", "α", "target", "before", "control", "before"),
    )
    for one in found:
        kept = (one.tuned.target.value, one.pretrained_target.value, one.tuned.control.value, one.pretrained_control.value)
        made.add_row(one.task, f"{one.tuned.alpha:g}", *map(percent, kept))
    return made


def _analogy(found: Analogy) -> Table:
    made = table(
        f"{found.a} is to {found.b} as {found.c} is to {found.d}; on test, in percent, n = {found.base.n}",
        *("", "pre-trained", "α = 1", f"α = {found.alpha:g}"),
    )
    made.add_row(found.d, *map(percent, (found.base.value, found.one_shot.value, found.tuned.value)))
    return made


def _left_out(found: Sequence[OutOfDistribution]) -> Table:
    made = table("the sum of the other tasks' vectors, on test, in percent", "task left out", "α", "pre-trained", "merged")
    for one in found:
        made.add_row(one.task, f"{one.alpha:g}", percent(one.base.value), percent(one.merged.value))
    return made
