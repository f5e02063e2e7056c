"""`thetau search`: the best values of a recipe's fields, on validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json
from thetau.cli.options import with_options
from thetau.cli.tables import percent, show, table
from thetau.evaluate.options import Reading
from thetau.studies.options import Search

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.evaluate.measures import Measure
    from thetau.studies.searching.results import Searched


@with_options
def search(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML, ours, whose models are on this machine.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder of search.json, search.png, the best recipes and the trials; a search goes on in it."
        ),
    ],
    options: Search,
    reading: Reading,
    json: Json,
) -> None:
    """Search any fields of a recipe's method on validation, with Optuna; the same command again goes on, or shares the trials of another process.

    thetau search recipe.yaml --space 'scale=0..1.5 by task' --trials 60 --objective normalised --objective worst -o runs/search
    """
    from dataclasses import replace

    from thetau.checkpoint.disk import check_place
    from thetau.errors import RecipeError
    from thetau.plots.search import search_chart
    from thetau.recipes import Recipe, load
    from thetau.studies.searching import search as run
    from thetau.studies.searching import write_best

    json.check()
    loaded = load(recipe)
    if not isinstance(loaded, Recipe):
        raise RecipeError([f"a search takes a recipe of ours. `thetau convert {recipe}` makes one."], str(recipe))
    check_place(out / "search.json")
    chosen = replace(options, storage=options.storage or out / "trials.journal")
    found = run(loaded, chosen, reading=reading, say=lambda line: typer.echo(line, err=True))
    found.save(out / "search.json")
    json.save(found)
    search_chart(found, out / "search.png")
    written = write_best(found, out)
    show(_table(found))
    if found.test:
        show(_tested(found))
    typer.echo(f"{out}: search.json, search.png, {', '.join(path.name for path in written)}")


def _table(found: Searched) -> Table:
    """The recipe as it was, and the best, on validation."""
    states = [one.state for one in found.trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed") if state in states)
    caption = f"on validation, in percent but for losses and perplexities; {len(states)} trials: {counted}. The best of many is favoured by chance"
    made = table(caption, "trial", *found.objectives, *found.tasks)
    shown = dict.fromkeys([*([found.start] if found.start is not None else []), *found.best])
    for number in shown:
        one = found.trial(number)
        objectives = [
            f"{value:.3f}" if found.objectives[name] == "smaller" else percent(value) for name, value in one.objectives.items()
        ]
        name = f"{number}, as the recipe" if number == found.start else str(number)
        made.add_row(name, *objectives, *(_value(one.accuracy[task]) for task in found.tasks))
    return made


def _tested(found: Searched) -> Table:
    made = table(
        f"on test, in percent but for perplexities; n = {', '.join(sorted({str(one.n) for one in found.test[0].accuracy.values()}))} a task",
        *("trial", "average", "normalised", *found.tasks),
    )
    for one in found.test:
        name = "the recipe" if one.number is None else str(one.number)
        means = ("" if mean is None else percent(mean) for mean in (one.absolute, one.normalised))
        made.add_row(name, *means, *map(_value, one.accuracy.values()))
    return made


def _value(one: Measure) -> str:
    """A task's value in percent, or its perplexity."""
    from thetau.evaluate.measures import perplexities

    return f"{one.value:.3f}" if perplexities({"": one}) else percent(one.value)
