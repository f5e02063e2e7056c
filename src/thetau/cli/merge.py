"""`thetau merge`: many models into one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thetau.cli.common import Json, Machine, Places, Writing, save
from thetau.cli.options import parse_fields, with_options
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.recipes import MergekitRecipe, Recipe

LONG = 600.0  # seconds of arithmetic from which a run shows its plan first


@with_options
def merge(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML, ours or mergekit's; or give its parts as options.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Where the result goes: a new folder, or a URL.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="A name from `thetau methods`.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that the others were fine-tuned from.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A fine-tuned model, LoRA adapter or saved task vector; `name=path` names the task. Repeat."
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the method, `field=value` or `then.field=value`; may be repeated."),
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option("--evidence", help="What the method must know of a task's data: `fisher:task=file`. Repeat."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            "--rename", help="`pattern=replacement`, a regular expression in the names of the models' tensors; may be repeated."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="Whose config, tokenizer and template the output takes: `base`, or a model by its name."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of randomised methods.")] = None,
    shard_size: Annotated[str | None, typer.Option("--shard-size", help="Largest file, such as 5GB.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="`model`, or `vector` for the merged task vector itself.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (passes, bytes, memory, operations) and stop.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue a begun output, to the same bits; and keep what was done if this run ends early."
        ),
    ] = False,
    tasks: Annotated[
        bool,
        typer.Option(
            "--tasks", help="Keep beside the model what emr, tall_masks or twin makes for single tasks; `evaluate` uses it."
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Write report.html into the output too: recipe, lineage, licences, layers, checks."),
    ] = False,
    *,
    writing: Writing,
    places: Places,
    json: Annotated[Path | None, typer.Option("--json", help="With --dry-run: write the plan here as JSON too.")] = None,
    machine: Machine,
) -> None:
    """Merge models that were fine-tuned from one base.

    thetau merge --method ties --base base --model sst2 --model mnli --set density=0.1 -o merged

    prints what was left out, what is tied, norms that look wrong, and: merged: 103 tensors, 90.9 MB
    """
    from thetau.cli.plan import described, show
    from thetau.engine.planning import plan, reading_rate
    from thetau.engine.work import gigabytes
    from thetau.facade import complete, config_folder, dtype_of, from_recipe
    from thetau.recipes import Recipe, from_mapping, load
    from thetau.recipes.schema import parse_evidence, parse_size

    if json is not None and not dry_run:
        raise RecipeError(["`--json` writes the plan of `--dry-run`. What a merge did stands in its `thetau.json`."], "options")
    Json(json=json).check()
    given: dict[str, Any] = {
        "base": base,
        "models": [_entry(entry) for entry in model] if model else None,
        "method": {"name": method, **parse_fields(fields or [])} if method else None,
        "evidence": parse_evidence(evidence or []) or None,
        "config": config,
        "rename": _renames(rename or []) or None,
        "exclude": list(writing.left_out.exclude) or None,
        "seed": seed,
        "dtype": writing.dtype,
        "quantise": writing.quantise,
        "shard_size": shard_size,
        "output": output,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if recipe is not None:
        loaded = load(recipe)
        if fields and not method:
            raise RecipeError(["`--set` belongs to `--method`; change the recipe's `method` instead."], "options")
        chosen = _with_options(loaded, given, recipe)
    else:
        if fields and not method:
            raise RecipeError(["`--set` needs `--method`."], "options")
        chosen = from_mapping(given, "options")
    if tasks:
        _check_tasks(chosen, out)
    engine = machine.engine(device=places.device, tf32=places.tf32, executor=places.executor, address=places.address)
    expression = from_recipe(chosen, engine=engine)
    planned = plan(expression, engine=engine, dtype=dtype_of(chosen.dtype), quantise=chosen.quantise)
    if dry_run:
        reading = reading_rate(expression)
        Json(json=json).write(described(planned, reading=reading))
        show(planned, reading=reading)
        return
    if out is None:
        raise RecipeError(["`--out` is missing: where shall the result go?"], "options")
    if report:
        _check_report(out)
    if planned.seconds > LONG:
        show(planned, to_stderr=True)  # nobody should find out after an hour that a solver takes days
    if planned.download and not machine.quiet:
        typer.echo(f"downloading {gigabytes(planned.download)} into the hub's cache", err=True)
    options: dict[str, Any] = {"engine": engine, "dtype": chosen.dtype, "shard_bytes": parse_size(chosen.shard_size)}
    options |= {"quantise": chosen.quantise, "resume": resume, "config": config_folder(chosen)}
    done = save(expression, out, quiet=machine.quiet, provenance={"recipe": complete(chosen), "seed": chosen.seed}, **options)
    if tasks:
        from thetau.compression import keep_parts

        assert isinstance(chosen, Recipe)
        kept = keep_parts(chosen, out, engine=engine)
        if not machine.quiet:
            typer.echo(f"{Path(out) / 'tasks'}: for {', '.join(kept)}", err=True)
    if report:
        from thetau.report import REPORT, page_of, write

        write(page_of(Path(out), said=done.warnings, engine=engine), Path(out) / REPORT)
        if not machine.quiet:
            typer.echo(f"{Path(out) / REPORT}", err=True)


def _check_tasks(recipe: Recipe | MergekitRecipe, out: str | None) -> None:
    """Refuse `--tasks` before the work.

    Raises `RecipeError`: a recipe of mergekit's, an output elsewhere, a method that makes nothing for single tasks, models that are not called by their tasks.
    """
    from thetau.checkpoint.remote import is_url
    from thetau.compression.beside import check_parts
    from thetau.recipes import Recipe

    if not isinstance(recipe, Recipe):
        raise RecipeError(["goes with a recipe of ours. `thetau convert` makes one."], "--tasks")
    if out is not None and (is_url(out) or out.endswith(".safetensors")):
        raise RecipeError([f"goes into the model's folder on a disk. Got {out}."], "--tasks")
    check_parts(recipe)
    if misnamed := _misnamed(recipe):
        raise RecipeError(misnamed, "--tasks")


def _misnamed(recipe: Recipe) -> list[str]:
    """What is wrong with the models' names, by which `evaluate` finds what was made for a task."""
    from thetau.facade import recipe_vectors
    from thetau.finetune.output import read_record
    from thetau.vectors.identity import identities

    problems = []
    for entry, name in zip(recipe.entries(), identities(recipe_vectors(recipe)[1]), strict=True):
        record = read_record(Path(entry.path)) if entry.name is None else None
        task = name if record is None else str(record["task"])
        if name != task or "/" in name:
            shown = "TASK" if "/" in task else task
            problems.append(
                f"{entry.path} is called {name!r}, by which `evaluate` finds no task. "
                f"Name it: {{path: {entry.path}, name: {shown}}}, or -m {shown}={entry.path}."
            )
    return problems


def _check_report(out: str) -> None:
    """Refuse a report that could not be written, before the merge.

    Raises:
        RecipeError: the output is no folder on a disk. OutputError: jinja2 is not installed.
    """
    from thetau.checkpoint.remote import is_url
    from thetau.report import check

    if is_url(out) or out.endswith(".safetensors"):
        raise RecipeError([f"`--report` is written into the output's folder, and {out} is none. Leave it out."], "options")
    check()


def _with_options(loaded: Recipe | MergekitRecipe, given: dict[str, Any], path: Path) -> Recipe | MergekitRecipe:
    """A recipe with what the command line says instead.

    Raises:
        RecipeError: it says what a recipe of mergekit's says itself.
    """
    from thetau.recipes import MergekitRecipe, from_mapping

    if not given:
        return loaded
    if not isinstance(loaded, MergekitRecipe):
        return from_mapping({**loaded.model_dump(), **given}, f"{path} with options")
    problems = [
        f"`--{key}` does not go with a recipe of mergekit's, which says it itself. `thetau convert {path}` makes one of ours."
        for key in ("base", "models", "method", "evidence", "output", "rename", "config")
        if key in given
    ]
    if problems:
        raise RecipeError(problems, "options")
    checked = from_mapping({"base": "", "models": [""], "method": "average", **given}, "options")
    given = {key: checked.model_dump()[key] for key in given}
    return replace(loaded, **{**given, "exclude": tuple(given.get("exclude", loaded.exclude))})


def _renames(given: list[str]) -> dict[str, str]:
    """`pattern=replacement`, the last `=` between them.

    Raises:
        RecipeError: all that are not of that form.
    """
    problems = [
        f"`--rename` takes `pattern=replacement`, such as `^encoder=backbone`. Got {text!r}."
        for text in given
        if "=" not in text[1:]
    ]
    if problems:
        raise RecipeError(problems, "options")
    return {pattern: replacement for pattern, _, replacement in (text.rpartition("=") for text in given)}


def _entry(text: str) -> str | dict[str, str]:
    """`path` or `name=path`."""
    name, equals, path = text.partition("=")
    return {"name": name, "path": path} if equals and not Path(text).exists() else text
