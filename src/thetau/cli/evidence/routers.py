"""`thetau evidence routers`: a merged mixture of experts whose routers say again what those of the tasks' own models say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from thetau.cli.common import Json, Out, save
from thetau.cli.options import with_options
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.evidence.routers import Calibrated


@final
@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """The text, and how routers are calibrated on it; what is not given is as `RouterConfig` has it."""

    text: Annotated[
        Mapping[str, Path], Option("TASK=FILE: text of a task, UTF-8, a text a line; once a task.", flags=("--text",))
    ] = field(default_factory=dict)
    ridge: Annotated[float | None, Option("What holds routers where the merge put them, as a share. Default 0.01.")] = None
    rounds: Annotated[int | None, Option("Passes of the merged model, each with the routers of the last. Default 1.")] = None
    tokens: Annotated[int | None, Option("Of each task's text, at most. Default 16384.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as batch=4.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"ridge": self.ridge, "rounds": self.rounds, "tokens": self.tokens}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def routers(
    models: Annotated[list[str], typer.Argument(help="TASK=MODEL: each task's fine-tuned model, adapter or hub id.")],
    merged: Annotated[str, typer.Option("--merged", help="The merged mixture of experts: its folder.")],
    out: Out,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that adapters belong to.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    *,
    options: Calibrating,
    json: Json,
) -> None:
    """Calibrate the routers of a merged mixture of experts, and write the model with them. All other tensors stay as they are.

    Each router is fitted by ridge regression, on the merged model's hidden states, to what the router of the task's own model says of the same text.

    thetau evidence routers code=models/code chat=models/chat --merged merged --text code=code.txt --text chat=chat.txt -o calibrated
    """
    from thetau.checkpoint.disk import check_new, check_place
    from thetau.errors import RecipeError
    from thetau.evidence import RouterConfig, calibrate_routers
    from thetau.facade import open as open_weights
    from thetau.finetune.progress import bar

    json.check()
    check_place(out)
    check_new(out)
    config = RouterConfig.of(options.given(), "thetau evidence routers")
    named = {task: path for task, equals, path in (text.partition("=") for text in models) if equals}
    if len(named) < len(models):
        raise RecipeError([f"each model must be given once, as TASK=MODEL. Got {', '.join(models)}."], "options")
    opened = open_weights(merged)
    tuned = {task: open_weights(path, base=base, name=task) for task, path in named.items()}
    texts = {task: _lines(path) for task, path in options.text.items()}
    with bar("routers", 1.0, "") as progress:
        result = calibrate_routers(opened, tuned, texts, config, tick=progress.advance)
        progress.finish("routers")
    save(result.model, out, quiet=quiet)
    json.write(result.to_json())
    if not quiet:
        _show(result)


def _lines(path: Path) -> list[str]:
    """The texts of a file. Raises `DataError`."""
    from thetau.errors import DataError

    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). Give a file with a text a line.") from error


def _show(result: Calibrated) -> None:
    from thetau.cli.tables import show, table

    said = ", ".join(f"{count} tokens of {task}" for task, count in result.tokens.items())
    columns = ("merged", "calibrated", *(("held back: merged", "calibrated") if result.held_before else ()))
    made = table(f"‖y − W h‖ / ‖y‖ over {said}", "router", *columns)
    for name in result.before:
        errors = [kind[name] for kind in (result.before, result.after, result.held_before, result.held_after) if kind]
        made.add_row(name, *(f"{error:.4f}" for error in errors))
    show(made)
    for note in result.notes:
        typer.echo(f"· {note}", err=True)
