"""`thetau diagnose`: what the papers measure, each as a JSON, a chart and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from thetau.evaluate import Evaluator
    from thetau.evaluate.spaces import Space, TangentSpace

diagnose_app = typer.Typer(
    help="Measure what the papers measure: τJp, disentanglement, kernel behaviour, cosines, α, cost.", no_args_is_help=True
)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fine-tuned models, whose records name their tasks, or TASK=MODEL; folders or files. "
        "RUN:ROW takes those of a row of a comparison of paradigms, RUN:ROW:1 those of its seed 1, RUN:ROW:0:A,B those of tasks A and B."
    ),
]
Base = Annotated[str, typer.Option("--base", "-b", help="The pre-trained model: gives architecture, tokenizer, heads.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
Limit = Annotated[int | None, typer.Option(help="At most so many examples a task, always the same ones.", min=1)]
MaxLength = Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.", min=3)]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side of an image; by default the model's own.", min=1)]
Cached = Annotated[Path | None, typer.Option("--cache", help="Folder in which evaluations are kept, so that they are done once.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the JSON and the chart.")]
Results = Annotated[Path, typer.Argument(help="The paradigms.json of `thetau suite run --paradigm`.")]


@diagnose_app.command("tau-jp")
def tau_jp(
    models: Models = None,
    *,
    out: Out,
    base: Base = "all-MiniLM-L6-v2",
    data: Data = None,
    split: Split = "test",
    limit: Limit = 300,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    cache: Cached = None,
) -> None:
    """τJp of every pair, beside cosine and the accuracy that addition keeps.

    thetau diagnose tau-jp models/* -o diagnostics
    """
    from thetau.diagnostics.interference import interference
    from thetau.plots.diagnose import interference_chart

    opened = _open(_models(models), base, data, split, limit, max_length, image_size, cache)
    result = interference(opened.space, opened.linear, opened.vectors, split=split)
    rows = [
        [f"{pair.a} · {pair.b}", f"{pair.tau_jp:.4g}", f"{pair.cosine:+.3f}", f"{100 * pair.normalised:.1f}"]
        for pair in sorted(result.pairs, key=lambda pair: -pair.tau_jp)
    ]
    _write(result, interference_chart, out, "tau_jp")
    found = "; ".join(
        f"{one.x} and {one.y}: Spearman {'–' if one.spearman is None else format(one.spearman, '+.2f')}"
        for one in result.correlations
    )
    _table(f"{found}; {len(result.pairs)} pairs, at most {max(result.n.values())} examples a task", rows, *_TAU_JP)


_TAU_JP = ("pair", "τJp", "cosine", "normalised accuracy")


@diagnose_app.command()
def disentanglement(
    models: Models = None,
    *,
    out: Out,
    base: Base = "all-MiniLM-L6-v2",
    data: Data = None,
    distance: Annotated[
        str, typer.Option(help="disagreement, of predicted labels; or kl, of the softmax of the features.")
    ] = "disagreement",
    one_way: Annotated[bool, typer.Option("--one-way", help="kl: in one direction, as the paper writes it.")] = False,
    points: Annotated[int, typer.Option(help="Values of α in [−2, 2] for each of the two vectors.", min=2)] = 15,
    split: Split = "test",
    limit: Limit = 300,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    cache: Cached = None,
) -> None:
    """The disentanglement error of two vectors over a grid of coefficients.

    thetau diagnose disentanglement models/sms_spam models/qnli -o diagnostics
    """
    from thetau.diagnostics.disentanglement import disentanglement as measure
    from thetau.errors import RecipeError
    from thetau.plots.diagnose import disentanglement_chart

    given = _models(models)
    if len(given) != 2:
        raise RecipeError([f"the disentanglement error is of two models. Got {len(given)}."], "models")
    if distance not in ("disagreement", "kl"):
        raise RecipeError([f"`--distance` must be disagreement or kl. Got {distance!r}."], "options")
    opened = _open(given, base, data, split, limit, max_length, image_size, cache)
    a, b = opened.vectors
    result = measure(
        opened.space,
        opened.evaluator,
        (a, b),
        grid=[round(-2 + 4 * i / (points - 1), 12) for i in range(points)],
        distance="kl" if distance == "kl" else "disagreement",
        symmetric=not one_way,
        split=split,
        name="tangent" if opened.space is opened.linear else "weights",
    )
    _write(result, disentanglement_chart, out, f"disentanglement-{a}-{b}-{result.distance}")
    cells = [value for row in result.error for value in row]
    inside = [
        result.error[i][j] for i, x in enumerate(result.grid) for j, y in enumerate(result.grid) if 0 <= x <= 1 and 0 <= y <= 1
    ]
    rows = [["all of the grid", _mean(cells), f"{max(cells):.4f}"], ["α in 0..1", _mean(inside), f"{max(inside, default=0):.4f}"]]
    sizes = ", ".join(f"{task} {n}" for task, n in result.n.items())
    _table(f"{a} and {b}, {result.distance}; averaged over {sizes} examples", rows, "", "mean", "largest")


@diagnose_app.command()
def kernel(
    models: Models = None,
    *,
    out: Out,
    base: Base = "all-MiniLM-L6-v2",
    data: Data = None,
    split: Split = "test",
    limit: Limit = 300,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    cache: Cached = None,
) -> None:
    """Each fine-tuned model against its own linearisation: accuracy and relative error.

    thetau diagnose kernel models/* -o diagnostics
    """
    from thetau.diagnostics.kernel import kernel_test
    from thetau.evaluate.spaces import WeightSpace
    from thetau.plots.diagnose import kernel_chart

    opened = _open(_models(models), base, data, split, limit, max_length, image_size, cache)
    model = WeightSpace(opened.evaluator, opened.weights, opened.vectors)
    result = kernel_test(model, opened.linear, opened.evaluator, list(opened.vectors), split=split)
    _write(result, kernel_chart, out, "kernel")
    rows = [
        [
            row.task,
            *(f"{100 * one.value:.1f}" for one in (row.pretrained, row.nonlinear, row.linearised)),
            f"{row.error:.3f}",
            str(row.n),
        ]
        for row in result.rows
    ]
    _table(f"{split}, in percent; error: ‖f − f₀ − Jτ‖ / ‖f − f₀‖", rows, "task", "pre-trained", "model", "linear", "error", "n")


@diagnose_app.command()
def cosine(
    group: Annotated[
        list[str], typer.Option("--group", "-g", help="NAME=MODEL,MODEL,…: the models of one paradigm; may be given again.")
    ],
    out: Out,
    base: Base = "all-MiniLM-L6-v2",
) -> None:
    """Cosine similarity of task vectors, group by group.

    thetau diagnose cosine -g standard=a,b,c -g attention=d,e,f -o diagnostics
    """
    from thetau.diagnostics.cosines import cosines
    from thetau.errors import RecipeError
    from thetau.evaluate.tuned import one_space, open_tuned, read_vectors
    from thetau.models import load_encoder
    from thetau.plots.diagnose import cosines_chart

    encoder = load_encoder(base)
    weights = encoder.weights(exact=True)
    groups = {}
    for entry in group:
        name, equals, listed = entry.partition("=")
        if not equals or not listed or name in groups:
            raise RecipeError([f"`--group` must be NAME=MODEL,MODEL,…, each name once. Got {entry!r}."], "options")
        tuned = [open_tuned(model) for model in _models(listed.split(","))]
        one_space(tuned, encoder)
        groups[name] = read_vectors(tuned, encoder, weights)
    result = cosines(groups)
    _write(result, cosines_chart, out, "cosine")
    rows = [
        [one.name, str(len(one.tasks)), "–" if one.mean_absolute is None else f"{one.mean_absolute:.4f}"] for one in result.groups
    ]
    _table("", rows, "group", "vectors", "mean |cos|")


@diagnose_app.command()
def alpha(results: Results, out: Out) -> None:
    """Accuracy over α by paradigm.

    thetau diagnose alpha runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import alpha_chart
    from thetau.studies.by_paradigm import alpha_curves
    from thetau.studies.paradigms import load_paradigm_results

    result = alpha_curves(load_paradigm_results(results))
    _write(result, alpha_chart, out, "alpha")
    rows = []
    for curve in result.curves:
        best = max(range(len(curve.alphas)), key=lambda i: curve.normalised[i])
        rows.append([curve.name, f"{curve.alphas[best]:g}", *(f"{100 * curve.normalised[i]:.1f}" for i in (best, -1))])
    _table("normalised validation accuracy, mean over tasks and seeds", rows, "paradigm", "best α", "there", "at the last α")


@diagnose_app.command()
def single(results: Results, out: Out) -> None:
    """Single-task accuracy by paradigm.

    thetau diagnose single runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import single_chart
    from thetau.studies.by_paradigm import single_tasks
    from thetau.studies.paradigms import load_paradigm_results

    result = single_tasks(load_paradigm_results(results))
    _write(result, single_chart, out, "single")
    rows = [
        [row.name, *(f"{100 * row.accuracy[task]:.1f}" for task in result.n), f"{100 * row.average:.1f}"] for row in result.rows
    ]
    _table("test, in percent, mean over seeds", rows, "paradigm", *result.n, "average")


@diagnose_app.command()
def cost(results: Results, out: Out) -> None:
    """What each paradigm costs: parameters, time, memory.

    thetau diagnose cost runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import costs_chart
    from thetau.studies.by_paradigm import costs
    from thetau.studies.paradigms import load_paradigm_results

    result = costs(load_paradigm_results(results))
    _write(result, costs_chart, out, "cost")
    rows = [
        [row.name, f"{row.trained:,}", f"{row.seconds_a_step:.3f}", f"{row.relative:.2f}", f"{row.peak_gigabytes:.2f}"]
        for row in result.rows
    ]
    _table("", rows, "paradigm", "trained", "s a step", "relative", "peak GB so far")


def _models(given: Sequence[str] | None) -> list[str]:
    """The models that were named, those of a run's row in place of `RUN:ROW`."""
    from thetau.errors import RecipeError
    from thetau.studies.paradigms import load_paradigm_results

    found: list[str] = []
    for entry in given or []:
        run, colon, row = entry.partition(":")
        listing = Path(run) / "paradigms.json"
        if Path(entry).exists() or not colon or not listing.is_file():
            found.append(entry)
            continue
        name, _, rest = row.partition(":")
        seed, _, tasks = rest.partition(":")
        rows = [one for one in load_paradigm_results(listing).of(name) if str(one.seed) == (seed or "0") and one.models]
        if not rows:
            raise RecipeError([f"{listing}: no row {name!r} of seed {seed or 0} with models of its own."], "models")
        wanted = tasks.split(",") if tasks else list(rows[0].models)
        if unknown := [task for task in wanted if task not in rows[0].models]:
            raise RecipeError([f"{listing}, row {name!r}: no task {unknown[0]!r}. Known: {', '.join(rows[0].models)}."], "models")
        found += [str(Path(run) / rows[0].models[task]) for task in wanted]
    if not found:
        raise RecipeError(["name at least one fine-tuned model."], "models")
    return found


class _Opened:
    """What the measures of models share: the base's evaluator, the vectors, the space that they live in, and the linear form."""

    evaluator: Evaluator
    weights: dict[str, Any]
    vectors: dict[str, dict[str, Any]]
    space: Space
    linear: TangentSpace


def _open(
    models: Sequence[str],
    base: str,
    data: Path | None,
    split: str,
    limit: int | None,
    max_length: int,
    image_size: int | None,
    cache: Path | None,
) -> _Opened:
    from thetau.evaluate import Evaluator
    from thetau.evaluate.spaces import TangentSpace
    from thetau.evaluate.tuned import make_space, one_space, open_tuned, read_vectors
    from thetau.models import load_encoder
    from thetau.tasks import load_task

    tuned = [open_tuned(model) for model in models]
    encoder = load_encoder(base)
    tangent = one_space(tuned, encoder)
    heads = {name: head for model in tuned for name, head in model.heads().items()}
    tasks = [load_task(model.task, data) for model in tuned]
    opened = _Opened()
    opened.evaluator = Evaluator(
        encoder, tasks, limits={split: limit}, max_length=max_length, image_size=image_size, heads=heads, cache=cache
    )
    opened.weights = encoder.weights(exact=True)
    opened.vectors = read_vectors(tuned, encoder, opened.weights)
    linear = make_space(opened.evaluator, opened.weights, opened.vectors, tangent=True, cache=cache)
    assert isinstance(linear, TangentSpace)
    opened.linear = linear
    opened.space = linear if tangent else make_space(opened.evaluator, opened.weights, opened.vectors, tangent=False)
    return opened


def _write(result: Any, chart: Callable[[Any, Path], None], out: Path, name: str) -> None:
    result.save(out / f"{name}.json")
    chart(result, out / f"{name}.png")


def _table(caption: str, rows: Sequence[Sequence[str]], *columns: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=500)).maximum)
    console.print(table)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "–"
