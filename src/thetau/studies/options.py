"""The options of every study. Importing them loads nothing heavy: the command line makes its own options of these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, final

from thetau.errors import RecipeError
from thetau.evaluate.options import Limit, Sample, Split
from thetau.options import Option, check_ranges

Alphas = Annotated[
    tuple[float, ...] | None,
    Option(
        "The values to try first, as 0.2,0.4,1; several widen until the best is inside. By default the papers' grids.",
        flags=("--alphas",),
        commas=True,
    ),
]


# Bases


@final
@dataclass(frozen=True, kw_only=True)
class Outer:
    """How bases are merged with each other."""

    outer: Annotated[str, Option("How bases are merged: sum, or a name from `thetau methods`.")] = "sum"
    fields: Annotated[
        Mapping[str, Any], Option("A field of the outer method, as density=0.2; may be repeated.", flags=("--set",))
    ] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """How the bases for a task are found: one way of these, or none."""

    vector: Annotated[
        str | None,
        Option("The task's own fine-tuned model or saved vector: similar by its cosines.", flags=("--vector", "-v")),
    ] = None
    steps: Annotated[int | None, Option("Train the base for so many steps: similar by that vector.", least=1)] = None
    epochs: Annotated[int | None, Option("Train the base for so many epochs instead.", least=1)] = None
    basis: Annotated[tuple[str, ...], Option("The basis to use, by hand; may be repeated.")] = ()
    lr: Annotated[float | None, Option("Learning rate of --steps and --epochs.")] = None
    batch_size: Annotated[
        int | None, Option("Examples a step of --steps and --epochs. Default 128; few find it less surely.", least=1)
    ] = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.ways > 1:
            raise RecipeError(["--vector, --steps, --epochs and --basis are ways to find the same thing: take one."], "options")
        if (self.lr is not None or self.batch_size is not None) and self.steps is None and self.epochs is None:
            raise RecipeError(["--lr and --batch-size are for --steps or --epochs."], "options")

    @property
    def ways(self) -> int:
        """How many were given."""
        return sum((self.vector is not None, self.steps is not None, self.epochs is not None, bool(self.basis)))


@final
@dataclass(frozen=True, kw_only=True)
class AddBases:
    """Of `add_bases`: θ₀ + λ merge(bases)."""

    task: Annotated[
        tuple[str, ...], Option("A task to evaluate; by default the bank's own. May be repeated.", flags=("--task", "-t"))
    ] = ()
    outer: Outer = field(default_factory=Outer)
    per_basis: Annotated[
        bool, Option("Choose a coefficient for each basis too, one after the other.", flags=("--per-basis",))
    ] = False
    sweeps: Annotated[int, Option("--per-basis: times over all bases.", least=1)] = 1
    model: Annotated[Mapping[str, Path], Option("TASK=MODEL: a task's own model, where it is no longer where it was.")] = field(
        default_factory=dict
    )
    alphas: Alphas = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.per_basis and self.outer.outer != "sum":
            raise RecipeError(
                [f"--per-basis is for a sum; {self.outer.outer} makes one vector of all bases. Leave one out."], "options"
            )


@final
@dataclass(frozen=True, kw_only=True)
class NegateBasis:
    """Of `negate_basis`: θ₀ − α τ_B, α chosen on the validation of `task` while `control` is kept."""

    task: Annotated[str, Option("The task to forget.", flags=("--task", "-t"))]
    control: Annotated[str | None, Option("The task that negation must keep.")] = None
    keep: Annotated[float, Option("Share of the control task's accuracy that negation must keep.", least=0, most=1)] = 0.95
    finding: Finding = field(default_factory=Finding)
    alphas: Alphas = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.finding.basis) > 1:
            raise RecipeError([f"negation subtracts one basis. Got {', '.join(self.finding.basis)}."], "--basis")
        if any(alpha < 0 for alpha in self.alphas or ()):
            got = ",".join(f"{alpha:g}" for alpha in self.alphas or ())
            raise RecipeError(
                [f"--alphas of a negation must be 0 or more: below 0 the basis would be added. Got {got!r}."], "options"
            )


@final
@dataclass(frozen=True, kw_only=True)
class ServeTask:
    """Of `serve_task`: a task that the bank does not know, by the bases that are similar to it."""

    task: Annotated[str, Option("The new task.", flags=("--task", "-t"))]
    finding: Finding = field(default_factory=Finding)
    threshold: Annotated[
        float | None,
        Option("Merge all bases of at least this cosine; by default the most similar one, however similar it is."),
    ] = None
    most: Annotated[int | None, Option("At most so many bases, the most similar ones.", least=1)] = None
    outer: Outer = field(default_factory=Outer)
    alphas: Alphas = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.finding.ways:
            raise RecipeError(["how is the task similar to the bases? Give --vector, --steps, --epochs or --basis."], "options")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise RecipeError([f"is a cosine, between −1 and 1. Got {self.threshold:g}."], "--threshold")
        if self.finding.basis and (self.threshold is not None or self.most is not None):
            raise RecipeError(["--basis says which bases to use; leave --threshold and --most out."], "options")


@final
@dataclass(frozen=True, kw_only=True)
class CompareBases:
    """Of `compare_bases`: Save-One, bases and Save-All with the same methods."""

    inner: Annotated[str, Option("How a cluster is merged: a name from `thetau methods`, or mean.")] = "mean"
    inner_fields: Annotated[
        Mapping[str, Any], Option("A field of the inner method, as density=0.2; may be repeated.", flags=("--inner-set",))
    ] = field(default_factory=dict)
    evidence: Annotated[
        tuple[str, ...],
        Option(
            "KIND:TASK=FILE, as fisher:sst2=sst2.safetensors: what the inner method must know of a task's data. Repeat.",
            flags=("--evidence",),
        ),
    ] = ()
    outer: Outer = field(default_factory=Outer)
    k: Annotated[
        int | Literal["auto"],
        Option("Clusters: a number, or auto for the largest gap of the spectrum.", flags=("-k",)),
    ] = "auto"
    cluster: Annotated[tuple[str, ...], Option("A,B,…: a cluster by hand; repeat. Tasks in none stand alone.")] = ()
    every: Annotated[
        bool,
        Option(
            "Compare with every partition of the tasks too: 15 of four, 52 of five, 203 of six.",
            flags=("--all-partitions",),
        ),
    ] = False
    alphas: Alphas = None


# Coefficients


@final
@dataclass(frozen=True, kw_only=True)
class Tune:
    """Of `tune`: one question about the coefficients of task vectors."""

    method: Annotated[str, Option("How the vectors are joined; their λ is what is tuned.", flags=("--method",))] = "sum"
    fields: Annotated[Mapping[str, Any], Option("A field of the method, as density=0.2.", flags=("--set",))] = field(
        default_factory=dict
    )
    negate: Annotated[bool, Option("Subtract each vector by itself; needs --control.", flags=("--negate",))] = False
    control: Annotated[str | None, Option("The task that negation must keep.")] = None
    analogy: Annotated[
        tuple[str, ...] | None,
        Option("A,B,C,D: A is to B as C is to D, with models of A, B and C; D is a task.", commas=True),
    ] = None
    left_out: Annotated[bool, Option("Merge without each task in turn, and test on it.", flags=("--left-out",))] = False
    alphas: Alphas = None

    def __post_init__(self) -> None:
        if sum((self.negate, self.analogy is not None, self.left_out)) > 1:
            raise RecipeError(["--negate, --analogy and --left-out are different questions: ask one."], "options")
        if self.negate != (self.control is not None):
            raise RecipeError(
                ["--negate needs --control TASK, the task that it must keep, and --control is for --negate."], "options"
            )
        if (self.negate or self.analogy is not None) and self.method != "sum":
            raise RecipeError(["--method is for addition and --left-out; here vectors are summed."], "options")


@final
@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Of `sweep`: a method over its fields and λ, over subsets of the tasks, without each of them, and each alone."""

    method: Annotated[str, Option("The method; sum is task arithmetic.", flags=("--method",))] = "sum"
    fields: Annotated[
        Mapping[str, Any], Option("A field of the method that does not vary, as density=0.2.", flags=("--set",))
    ] = field(default_factory=dict)
    over: Annotated[
        Mapping[str, Any],
        Option("A field that varies, as 'density=[0.1, 0.2]'; several give every combination.", flags=("--over",)),
    ] = field(default_factory=dict)
    subsets: Annotated[
        tuple[int, ...], Option("Merge so many of the tasks at a time, as 2; may be repeated.", flags=("--subsets",))
    ] = ()
    draws: Annotated[int, Option("Subsets of each size, all where there are fewer.", least=1)] = 8
    seed: Annotated[int, Option("Of the choice of subsets.", least=0)] = 0
    left_out: Annotated[bool, Option("Merge without each task in turn, and test on it.", flags=("--left-out",))] = False
    upper_bound: Annotated[bool, Option("Each task's own vector alone, its λ chosen too.", flags=("--upper-bound",))] = False
    alphas: Alphas = None

    def __post_init__(self) -> None:
        check_ranges(self)
        wrong = [name for name, values in self.over.items() if not isinstance(values, list | tuple) or not values]
        if wrong:
            raise RecipeError(
                [f"--over {wrong[0]} must be a list of values, as '{wrong[0]}=[0.1, 0.2]'. Got {self.over[wrong[0]]!r}."],
                "options",
            )
        both = [name for name in self.over if name in self.fields]
        if both:
            raise RecipeError([f"{both[0]} is given by --set and by --over: leave one out."], "options")


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """Of `search`: which fields of a recipe's method vary, what is made as good as it can, and how it is sought."""

    space: Annotated[
        tuple[str, ...],
        Option(
            "A field that varies, as 'scale=0.1..2', 'density=0.01..1 log', 'scale=0..1.5 by task by layers 4' or 'solver=[adam, gradient_flow]'; repeat.",
            flags=("--space",),
        ),
    ] = ()
    trials: Annotated[int, Option("Trials in all, those of earlier runs and of other processes counted.", least=1)] = 40
    objective: Annotated[
        tuple[str, ...],
        Option(
            "normalised (the default), worst, mean, loss, or a task's name; several give a Pareto front.", flags=("--objective",)
        ),
    ] = ()
    task: Annotated[
        tuple[str, ...],
        Option("A task to measure besides the models' own, for an objective; may be repeated.", flags=("--task", "-t")),
    ] = ()
    sampler: Annotated[Literal["tpe", "cmaes", "random"], Option("What proposes trials.", flags=("--sampler",))] = "tpe"
    halving: Annotated[
        Literal["none", "examples", "tasks", "both"],
        Option("Measure a trial on some examples, tasks or both first, and go on with the best share.", flags=("--halving",)),
    ] = "none"
    rungs: Annotated[int, Option("--halving: how often a trial is judged, the last time on everything.", least=2)] = 3
    factor: Annotated[int, Option("--halving: one of so many goes on, to so many times as much.", least=2)] = 3
    seed: Annotated[int, Option("Of what is proposed, and of the order of examples.", least=0)] = 0
    jobs: Annotated[int, Option("Processes that share the trials.", least=1)] = 1
    validation: Annotated[int | None, Option("At most so many validation examples a task.", least=1)] = None
    test: Annotated[bool, Option("Measure the best, and the recipe as it is, on test at the end.", flags=("--test",))] = False
    storage: Annotated[
        Path | None,
        Option(
            "File of the trials: a journal, or SQLite where it ends in .db; by default trials.journal in --out.",
            flags=("--storage",),
        ),
    ] = None

    def __post_init__(self) -> None:
        check_ranges(self)


@final
@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Of `evaluate_checkpoint`: what is measured, and where it is run."""

    split: Split = "test"
    heads: Annotated[
        Path | None,
        Option("A fine-tuned model's folder whose trained heads are used; by default the model's own."),
    ] = None
    head: Annotated[
        Literal["auto", "classifier", "names"],
        Option(
            "classifier: the one that the checkpoint was saved with; names: made from class names by the base; auto: the classifier where there "
            "is one, and thetau did not fine-tune the checkpoint."
        ),
    ] = "auto"
    space: Annotated[
        Literal["auto", "weights", "tangent"],
        Option("weights: run the model; tangent: its linear form; auto: as the checkpoint says."),
    ] = "auto"
    tasks: Annotated[
        bool,
        Option("Measure each task with what was made for it, where that lies beside the model.", flags=("--tasks/--no-tasks",)),
    ] = True
    surgery: Annotated[bool, Option("Use the corrections that lie beside the model.", flags=("--surgery/--no-surgery",))] = True
    router: Annotated[
        bool,
        Option(
            "Choose what was made for a task by the router that lies beside the model, and not by the task's name.",
            flags=("--router/--no-router",),
        ),
    ] = True
    mixture: Annotated[
        bool, Option("Mix MLPs by input, where a mixture lies beside the model.", flags=("--mixture/--no-mixture",))
    ] = True
    limit: Limit = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.head == "classifier" and self.heads is not None:
            raise RecipeError(
                ["--heads gives other heads than the checkpoint's classifier: leave out it or --head classifier."], "options"
            )

    def by_split(self) -> dict[str, int | None]:
        """Split → largest number of examples; None for all of them."""
        return {self.split: self.limit}


# Diagnostics


@final
@dataclass(frozen=True, kw_only=True)
class LayerSample:
    """What layers are looked at on."""

    sample: Sample = field(default_factory=lambda: Sample(limit=100))
    rows: Annotated[int, Option("Positions of each layer that are compared, about.", least=1)] = 256

    def __post_init__(self) -> None:
        check_ranges(self)


@final
@dataclass(frozen=True, kw_only=True)
class Plane:
    """Of `landscape`: the plane of the base and two models, or of three models."""

    points: Annotated[int, Option("Values of each coefficient; those of an even spacing from --low to --high.", least=2)] = 9
    low: Annotated[float, Option("The least coefficient.")] = -0.5
    high: Annotated[float, Option("The largest coefficient.")] = 1.5
    steps: Annotated[int, Option("Points of each line between two corners.", least=3)] = 11
    sample: Sample = field(default_factory=lambda: Sample(limit=100))

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.low < self.high:
            raise RecipeError([f"`--low` must be less than `--high`. Got {self.low:g} and {self.high:g}."], "options")

    @property
    def grid(self) -> list[float]:
        """The coefficients."""
        return [round(self.low + (self.high - self.low) * i / (self.points - 1), 12) for i in range(self.points)]


@final
@dataclass(frozen=True, kw_only=True)
class DisentanglementGrid:
    """Of `disentanglement`: the error of two vectors over a grid of coefficients."""

    distance: Annotated[
        Literal["disagreement", "kl"],
        Option("disagreement, of predicted labels; or kl, of the softmax of the features."),
    ] = "disagreement"
    one_way: Annotated[bool, Option("kl: in one direction, as the paper writes it.", flags=("--one-way",))] = False
    points: Annotated[int, Option("Values of α in [−2, 2] for each of the two vectors.", least=2)] = 15
    sample: Sample = field(default_factory=Sample)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.distance not in ("disagreement", "kl"):
            raise RecipeError([f"`--distance` must be disagreement or kl. Got {self.distance!r}."], "options")


@final
@dataclass(frozen=True, kw_only=True)
class LossBounds:
    """Of `bounds`: loss gaps beside the bounds of the theory."""

    split: Split = "test"
    examples: Annotated[int, Option("Examples a task, always the same ones, for losses, gradients and Hessians.", least=1)] = 64
    scale: Annotated[float | None, Option("Add the vectors with this λ too, besides their mean; the theorem needs λ = 1/T.")] = (
        None
    )
    no_smoothness: Annotated[
        bool,
        Option("Leave the Hessians out: gaps, cosines and norms only, no bounds.", flags=("--no-smoothness",)),
    ] = False
    tolerance: Annotated[float, Option("Of the power iteration: relative change, twice in a row.")] = 1e-3
    max_iterations: Annotated[
        int, Option("Of the power iteration; a norm that has not converged by then is marked.", least=1)
    ] = 100

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0 < self.tolerance < 1:
            raise RecipeError([f"`--tolerance` must be between 0 and 1. Got {self.tolerance:g}."], "options")

    def by_split(self) -> dict[str, int | None]:
        """Split → largest number of examples."""
        return {self.split: self.examples}
