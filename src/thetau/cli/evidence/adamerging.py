"""`thetau evidence adamerging`: how much of each task vector to add at each tensor, learned from unlabelled examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from thetau.cli.common import Json, Out, TunedModels, check_folder
from thetau.cli.evidence.common import tell
from thetau.cli.options import parse_fields, with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.evidence import CoefficientConfig
    from thetau.evidence.adamerging import Coefficients


@final
@dataclass(frozen=True, kw_only=True)
class Learning:
    """How coefficients are learned; what is not given is as `CoefficientConfig` has it."""

    over: Annotated[str, Option("The method whose transforms the vectors go through first, such as ties or awd.")] = (
        "task_arithmetic"
    )
    fields: Annotated[
        tuple[str, ...], Option("A field of that method, as density=0.2; may be repeated.", flags=("--field",))
    ] = ()
    steps: Annotated[int | None, Option("Of Adam. Default 500.")] = None
    granularity: Annotated[str | None, Option("One coefficient a task and tensor, layer, or task alone. Default tensor.")] = None
    examples: Annotated[int | None, Option("Unlabelled examples of each task. Default all of the split.")] = None
    split: Annotated[str | None, Option("Of which split; the authors' is test. Default validation.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as lr=0.01.", flags=("--set",))] = field(
        default_factory=dict
    )
    dry_run: Annotated[bool, Option("Say what a step takes, and learn nothing.", flags=("--dry-run",))] = False

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"steps": self.steps, "granularity": self.granularity, "examples": self.examples, "split": self.split}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def adamerging(models: TunedModels, out: Out, backbone: Backbone, options: Learning, reading: Reading, json: Json) -> None:
    """Learn AdaMerging's coefficients: the merged model is to be certain of unlabelled examples of every task.

    The folder gets a file a task. A run that was cut off goes on where it was. Merge with `method: {name: adamerging}` and
    `evidence: {coefficients: {sst2: out/sst2.safetensors, …}}`, which needs no data.

    thetau evidence adamerging runs/demo/finetuned/*/* --over ties --field density=0.2 -o coefficients
    """
    from thetau.errors import DataError
    from thetau.evaluate.session import Session
    from thetau.evidence import CoefficientConfig, learn_coefficients
    from thetau.evidence.adamerging import demand, step_seconds
    from thetau.finetune.progress import bar
    from thetau.methods import AdaMerging, build

    json.check()
    check_folder(out)
    sizes = {"max_length": reading.max_length, "image_size": reading.image_size}
    config = CoefficientConfig.of({**sizes, **options.given()}, "thetau evidence adamerging")
    method = AdaMerging(then=build(options.over, parse_fields(options.fields, "--field")))
    session = Session.open(models, base=backbone.base, reading=reading)
    if session.tangent:
        raise DataError(
            "these models belong to the tangent space; coefficients are learned for vectors of the model's own space."
        )
    if options.dry_run:
        needed = demand([parameter.numel() for parameter in session.encoder.module.parameters()], len(session.models))
        seconds = step_seconds(session.encoder, session.evaluator.tasks, config, heads=session.evaluator.heads)
        json.write({**needed, "seconds": seconds, "steps": config.steps})
        _say(needed, len(session.models), config, seconds)
        return
    with bar("adamerging", config.steps, "steps") as progress:
        result = learn_coefficients(
            session.encoder,
            session.evaluator.tasks,
            session.expressions(),
            out,
            config,
            method=method,
            heads=session.evaluator.heads,
            origins={model.task: str(model.path) for model in session.models},
            tick=lambda step, entropy: progress.advance(1),
        )
        progress.finish("adamerging")
    json.write(result.to_json())
    _show(result)


def _say(needed: Mapping[str, int], tasks: int, config: CoefficientConfig, seconds: float) -> None:
    from thetau.cli.plan import duration

    typer.echo(
        f"a step runs the merged model forward and backward over {tasks} × {config.batch} examples, and reads "
        f"{needed['read'] / 1e9:.2f} GB of vectors. It holds {needed['memory'] / 1e9:.2f} GB beside the activations, whatever the number of tasks; "
        f"the vectors take {needed['disk'] / 1e9:.2f} GB of disk. "
        f"It took {seconds:.2f} s here just now, with vectors in memory: {config.steps} steps are {duration(seconds * config.steps)}."
    )


def _show(result: Coefficients) -> None:
    from thetau.cli.tables import show, table

    made = table(
        f"{result.steps} steps, {result.seconds:.2f} s each, {result.tensors} tensors, one coefficient a task and {result.granularity}",
        *("task", "examples", "mean coefficient", "entropy at first", "at last"),
    )
    for task in result.tasks:
        first, last = result.entropy[task]
        made.add_row(task, str(result.examples[task]), f"{result.mean[task]:.3f}", f"{first:.3f}", f"{last:.3f}")
    show(made)
    tell(f"{result.folder}: a file of coefficients for each of {len(result.tasks)} tasks", result.notes, cached=result.cached)
