"""What the verbs of `thetau basis` that need data share: options, a bank with a live model, the similarity of a task to the bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thetau.cli.common import check_folder, engine, parse_fields
from thetau.errors import DataError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from thetau.bases import Bank
    from thetau.engine.executor import Engine
    from thetau.evaluate import Evaluator, Measure
    from thetau.evaluate.similarity import TargetSimilarity
    from thetau.facade import Expression
    from thetau.models import Encoder
    from thetau.tasks import Task

BankFolder = Annotated[Path, typer.Argument(help="The bank's folder.", metavar="BANK")]
MovedBase = Annotated[str | None, typer.Option("--base", "-b", help="Where the bank's base lies now, if it was moved.")]
Outer = Annotated[str, typer.Option("--outer", help="How bases are merged: sum, or a name from `thetau methods`.")]
OuterFields = Annotated[
    list[str] | None, typer.Option("--set", help="A field of the outer method, as density=0.2; may be repeated.")
]
Alphas = Annotated[str | None, typer.Option(help="The values to try, as 0.2,0.4,1; by default the papers' grids.")]
Model = Annotated[Path | None, typer.Option("--out", "-o", help="Write the resulting model here: a new folder.")]
Scaled = Annotated[
    float | None, typer.Option("--scale", "-s", help="Take this coefficient as it is, without any data; needs --out.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")]
Validation = Annotated[int | None, typer.Option("--validation", help="At most so many validation examples a task.", min=1)]
Test = Annotated[int | None, typer.Option("--test", help="At most so many test examples a task.", min=1)]
MaxLength = Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.", min=3)]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side of an image; by default the model's own.", min=1)]
Kind = Annotated[
    str | None, typer.Option(help="How the base is read: sentence, image, mask or text_to_text; by default as its files say.")
]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Folder in which evaluations are kept, so that they are done once.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")]
Converged = Annotated[
    str | None, typer.Option("--vector", "-v", help="The task's own fine-tuned model or saved vector: similar by its cosines.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Train the base for so many steps: similar by that vector.", min=1)]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Train the base for so many epochs instead.", min=1)]
ByHand = Annotated[list[str] | None, typer.Option("--basis", help="The basis to use, by hand; may be repeated.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate of --steps and --epochs.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Examples a step of --steps and --epochs. Default 128; few find it less surely.",
        min=1,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of the data is read, and how."""

    data: Path | None
    validation: int | None
    test: int | None
    max_length: int
    image_size: int | None
    kind: str | None
    cache: Path | None

    def limits(self) -> dict[str, int | None]:
        """Largest number of examples of a split."""
        return {"validation": self.validation, "test": self.test}


@dataclass(frozen=True, kw_only=True)
class Live:
    """A base that runs, and tasks to measure on it. `weights`: the base's own."""

    encoder: Encoder
    evaluator: Evaluator
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How the bases for a task are found: one way of these, or none."""

    vector: str | None = None
    steps: int | None = None
    epochs: int | None = None
    bases: Sequence[str] = field(default_factory=tuple)
    lr: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.ways > 1:
            raise RecipeError(["--vector, --steps, --epochs and --basis are ways to find the same thing: take one."], "options")
        if (self.lr is not None or self.batch_size is not None) and self.steps is None and self.epochs is None:
            raise RecipeError(["--lr and --batch-size are for --steps or --epochs."], "options")

    @property
    def ways(self) -> int:
        """How many were given."""
        return sum((self.vector is not None, self.steps is not None, self.epochs is not None, bool(self.bases)))


def quiet_engine() -> Engine:
    """The engine of a verb that has no options for it."""
    return engine(None, None, quiet=True)


def opened_bank(path: Path, base: str | None) -> Bank:
    """The bank, with its base. Raises `BankError`."""
    from thetau.bases import open_bank
    from thetau.facade import open_base

    bank = open_bank(path)
    if base is not None:
        bank = bank.use_base(open_base(base))
    bank.base()
    return bank


def loaded(given: Sequence[str], data: Path | None) -> list[Task]:
    """Tasks by their names or folders, each once. Raises `DataError`."""
    from thetau.tasks import load_task

    return [load_task(one, data) for one in dict.fromkeys(given)]


def live(base: str, tasks: Sequence[Task], sizes: Sizes, heads: Mapping[str, Path] | None = None) -> Live:
    """The base's encoder with an evaluator. `heads`: task → its model's folder, whose head is used if it was trained; where a folder is
    gone, that is said, and the base's frozen head is used. Raises `DataError`."""
    from thetau.evaluate import Evaluator
    from thetau.finetune.output import trained_heads
    from thetau.models import load_encoder
    from thetau.models.loading import kind_named

    encoder = load_encoder(base, kind_named(sizes.kind))
    own: dict[str, Any] = {}
    for name, folder in (heads or {}).items():
        if folder.is_dir():
            own |= {task: head for task, head in trained_heads(folder).items() if task == name}
        elif not folder.exists():
            typer.echo(
                f"{name}: its model is not at {folder}; a head that was trained with it would be missed, the base's is used.",
                err=True,
            )
    evaluator = Evaluator(
        encoder,
        tasks,
        limits=sizes.limits(),
        max_length=sizes.max_length,
        image_size=sizes.image_size,
        heads=own,
        cache=sizes.cache,
    )
    return Live(encoder=encoder, evaluator=evaluator, weights=encoder.weights())


def individuals(
    bank: Bank, one: Live, tasks: Sequence[str], given: Sequence[str], cache: Path | None
) -> tuple[dict[str, dict[str, Measure]] | None, dict[str, str]]:
    """Split → task → accuracy of the task's own model, or None where one is not at hand; and why it is not.

    `given`: TASK=MODEL, where the members' own models have been moved.
    """
    from thetau.bases.members import at_hand
    from thetau.evaluate.tuned import make_space
    from thetau.facade import as_vector
    from thetau.facade import open as open_weights

    by_hand = {}
    for text in given:
        task, equals, path = text.partition("=")
        if not equals or task not in bank.members:
            raise RecipeError(
                [f"must be TASK=MODEL with a task of the bank ({', '.join(bank.members)}). Got {text!r}."], "--model"
            )
        by_hand[task] = as_vector(open_weights(path, base=bank.base()), bank.base())
    found, lost = at_hand(bank, by_hand)
    lacking = {task: lost.get(task, "it is no task of the bank.") for task in tasks if task not in found}
    if lacking:
        return None, lacking
    measured: dict[str, dict[str, Measure]] = {"validation": {}, "test": {}}
    for task in tasks:
        space = make_space(
            one.evaluator, one.weights, {task: found[task].state_dict()}, tangent=bank.space == "tangent", cache=cache
        )
        for split, measures in measured.items():
            measures[task] = space.accuracy({task: 1.0}, task, split)
    return measured, {}


def similarity_to(bank: Bank, task: str, finding: Finding, sizes: Sizes, one: Live) -> TargetSimilarity:
    """Of a task to the bank's bases, in the way that was asked."""
    from thetau.evaluate.similarity import short_config, similarity_given, similarity_of_run, similarity_of_vector

    if finding.bases:
        return similarity_given(task, finding.bases, list(bank.bases))
    if finding.vector is not None:
        vector = own_vector(bank, finding.vector, task)
        return similarity_of_vector(task, vector, bank.similar, source=finding.vector)
    tangent = bank.space == "tangent"
    options = {"lr": finding.lr, "image_size": sizes.image_size, "max_length": sizes.max_length}
    given = {name: value for name, value in options.items() if value is not None}
    config = short_config(tangent=tangent, batch_size=finding.batch_size, **given)
    one.evaluator.load_base()
    return similarity_of_run(
        one.encoder,
        one.evaluator.tasks[task],
        bank.base(),
        bank.similar,
        steps=finding.steps,
        epochs=finding.epochs,
        config=config,
        tangent=tangent,
        run=sizes.cache,
        base_label=bank.base_label,
    )


def own_vector(bank: Bank, given: str, task: str) -> Expression:
    """A task's converged vector over the bank's base. Raises `DataError`: it is of another space, or of another base."""
    from thetau.bases.build import refuse_other_base, space_of
    from thetau.evaluate.tuned import is_tangent
    from thetau.facade import as_vector
    from thetau.facade import open as open_weights
    from thetau.finetune.output import read_record

    base = bank.base()
    vector = as_vector(open_weights(given, base=base), base).named(task)
    refuse_other_base({task: vector}, base.terms[0][1])
    path = Path(given)
    record = read_record(path) if path.is_dir() else None
    tangent = (path.exists() and is_tangent(path)) or space_of({task: vector}, base.terms[0][1]) == "tangent"
    if tangent != (bank.space == "tangent"):
        names = {True: "the tangent space", False: "the weights"}
        raise DataError(
            f"{given}: its vector belongs to {names[tangent]}, the bank's to {names[not tangent]}. Fine-tune with the bank's paradigm."
        )
    if record is not None and record.get("task") != task:
        raise DataError(f"{given}: was fine-tuned on {record.get('task')!r}, and the task is {task!r}.")
    return vector


def inner_of(name: str, fields: Sequence[str] | None) -> Any:
    """merge_in by its name, with the fields given; `mean` is `average`, and `sum` task arithmetic at λ = 1."""
    from thetau.methods import build

    values = parse_fields(fields or [])
    return build("task_arithmetic", {"scale": 1.0, **values}) if name == "sum" else build(_known(name), values)


def outer_of(name: str, fields: Sequence[str] | None) -> Any | None:
    """merge_out by its name, at λ = 1, since λ is what is chosen; None is the sum."""
    from thetau.evaluate.merging import build_method
    from thetau.tasks.suite import MethodChoice

    if name == "sum":
        if fields:
            raise RecipeError(["a sum has no fields."], "--set")
        return None
    return build_method(MethodChoice(name=name, method=_known(name), fields=parse_fields(fields or [])), "--outer")


def _known(name: str) -> str:
    return "average" if name == "mean" else name


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """The result as JSON, where that was asked."""
    from pydantic import TypeAdapter

    from thetau.checkpoint.disk import write_bytes

    if path is not None:
        write_bytes(path, TypeAdapter(Any).dump_json(dict(content), indent=1) + b"\n")


def write_model(
    bank: Bank, out: Path, coefficients: Mapping[str, float], outer: Any | None, *, machine: Engine, quiet: bool
) -> None:
    """Write θ₀ + Σ coefficient · basis, or θ₀ + λ · merge_out of the bases named, λ being the one coefficient they share; streamed."""
    from thetau.cli.common import save
    from thetau.evaluate.merging import merge_out
    from thetau.methods import plain

    vectors = {name: bank.vector(name) for name in coefficients}
    if outer is None:
        added = [value * vectors[name] for name, value in coefficients.items()]
        total = sum(added[1:], start=added[0])
    else:
        total = next(iter(coefficients.values())) * merge_out(vectors, outer, engine=machine)
    recipe = {
        "bank": str(bank.path),
        "base": bank.base_label,
        "bases": {name: list(bank.bases[name].members) for name in coefficients},
        "outer": "sum" if outer is None else plain(outer),
        "coefficients": dict(coefficients),
    }
    save(bank.base() + total, out, quiet=quiet, provenance={"recipe": recipe, "seed": 0}, engine=machine)


def check_outputs(out: Path | None, json: Path | None) -> None:
    """Refuse outputs that cannot be, before the work. Raises `OutputError`."""
    from thetau.errors import OutputError

    check_folder(json)
    check_folder(out)
    if out is not None and out.exists():
        raise OutputError(f"{out}: exists. Models are never written over older files: give a new name, or remove it first.")
