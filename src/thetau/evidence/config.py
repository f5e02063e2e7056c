"""What decides evidence, apart from model and data."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, final

from thetau.errors import RecipeError, nearest
from thetau.fields import AtLeast, Within, check
from thetau.methods.fields import NotNegative, Portion, Positive, Tensors

Kind = TypeVar("Kind", bound="Config")


class Config(ABC):  # noqa: B024  what is abstract is that it has no fields
    """Fields with ranges, checked, and made from plain keys."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls: type[Kind], given: Mapping[str, Any], where: str) -> Kind:
        """A config from plain keys, as a command line gives them. Raises `RecipeError`; `where` names it."""
        known = [one.name for one in fields(cls)]  # type: ignore[arg-type]  # every kind of it is a dataclass
        problems = [f"unknown key {key!r}.{nearest(key, known)}" for key in given if key not in known]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in known
        }
        config: Kind | None = None
        try:
            config = cls(**values)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if config is None or problems:
            raise RecipeError(problems, where)
        return config


Labels = Literal["true", "empirical", "sampled"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Sizes(Config):
    """How inputs are read, and what is drawn.

    - `max_length`, `image_size`: of the inputs. `seed`: of all that is drawn.
    """

    max_length: Annotated[int, AtLeast(3)] = 64
    image_size: Annotated[int | None, AtLeast(8)] = None
    seed: Annotated[int, AtLeast(0)] = 0


@dataclass(frozen=True, kw_only=True)
class Summed(Sizes):
    """What is a sum over examples.

    - `examples`: how many of the split's examples, drawn without regard to their order and always the same ones.
    - `labels`: whose gradients count. `true`: every label's, weighted by the probability that the model gives it; `sampled`: of
      labels drawn from these probabilities, `draws` an example; `empirical`: of the data's own label, which is another matrix.
    - `most_classes`: with more classes than this, `true` is sampled, for a class costs a backward pass.
    """

    examples: Annotated[int, AtLeast(1)] = 256
    labels: Labels = "true"
    most_classes: Annotated[int, AtLeast(2)] = 10
    draws: Annotated[int, AtLeast(1)] = 1
    split: Split = "train"


@dataclass(frozen=True, kw_only=True)
class Taught(Sizes):
    """What is learned from examples whose labels are never looked at.

    - `examples`: at most so many of the split, of each task; None for all. `split`: the authors' is `test`; here it is `validation` by default, so
      that a test measures.
    """

    examples: Annotated[int | None, AtLeast(1)] = None
    split: Split = "validation"


@final
@dataclass(frozen=True, kw_only=True)
class MaskConfig(Sizes):
    """How a mask is learned.

    - `density`: share of the entries, the largest by magnitude, that the mask begins with. `bias`: S there; minus that elsewhere.
    - `steps`, `lr`: of gradient descent on S. `lr_absolute`: take `lr` as it is (the code's is 1e7), not relative to the first gradient.
    - `regulariser`: `l1` pulls every σ(S) towards 0 (the paper), `polarise` pushes S away from 0 (the published code).
    - `strength`: each step moves S by strength · σ'(S), which is at most a quarter of it, and 0.0066 of it at S = ±5.
    - `per_class`: training examples of each class; of a regression so many in all. `batch_size`: examples a step, None for all.
    - `keep`: share of the entries that the mask has in the end, the largest S; None rounds σ(S).
    - `tensors`: where masks are learned: `all`, `linear` or patterns of the checkpoint's names; elsewhere nothing is kept.
    - `seed`: of the examples that are drawn and of the order of batches.
    """

    density: Portion = 0.01
    bias: Positive = 5.0
    steps: Annotated[int, AtLeast(0)] = 10
    lr: Positive = 10.0
    lr_absolute: bool = False
    regulariser: Literal["l1", "polarise"] = "l1"
    strength: NotNegative = 1.0
    per_class: Annotated[int, AtLeast(1)] = 64
    batch_size: Annotated[int, AtLeast(1)] | None = None
    keep: Annotated[float, Within("(0, 1]", none="to round")] | None = None
    tensors: Tensors = "all"


@final
@dataclass(frozen=True, kw_only=True)
class FisherConfig(Summed):
    """How a Fisher diagonal is collected.

    - `normalise`: divide by the norm over all tensors, so that no task weighs more because its gradients are longer.
    - `batch`: examples whose gradients are held at once, fewer where they would take more than `GRADIENT_BYTES`.
    - `save_every`: examples after which the state of the run is kept.
    """

    normalise: bool = False
    batch: Annotated[int, AtLeast(1)] = 8
    save_every: Annotated[int, AtLeast(1)] = 64


@final
@dataclass(frozen=True, kw_only=True)
class MomentConfig(Summed):
    """How second moments of inputs (`gram`) or of output gradients (`gradients`) are collected.

    - `labels`, `most_classes`, `draws`: of the gradients; inputs need none.
    - `batch`: examples that run at once.
    - `memory`: bytes that the sums may take, 8 an entry. Layers that do not fit are measured in a run of their own over the examples.
    - `save_every`: examples after which the state of the run is kept.
    """

    batch: Annotated[int, AtLeast(1)] = 32
    memory: Annotated[int, AtLeast(1)] = 4_000_000_000
    save_every: Annotated[int, AtLeast(1)] = 256


@final
@dataclass(frozen=True, kw_only=True)
class CoefficientConfig(Taught):
    """How AdaMerging's coefficients are learned.

    - `granularity`: one coefficient a task and `tensor` (the authors' "layer-wise"), a task and `layer` of blocks, or a `task` alone.
    - `start`: every coefficient before the first step. `lr`, `steps`: of Adam (β 0.9 and 0.999). `batch`: examples a task and step.
    - `clamp`: keep coefficients in [0, 1] in the forward pass, as the authors' code; one that has left it gets no gradient.
    - `most`: without `clamp` a coefficient beyond ± this ends the run, for it diverges.
    - `window`: steps over which predictions are counted: where all of them fall on one class, and did not at first, the run stops.
    - `seed`: of the order of batches. `save_every`: steps after which the state is kept.
    """

    granularity: Literal["tensor", "layer", "task"] = "tensor"
    start: float = 0.3
    lr: NotNegative = 1e-3
    steps: Annotated[int, AtLeast(0)] = 500
    batch: Annotated[int, AtLeast(1)] = 32
    clamp: bool = True
    most: Positive = 5.0
    window: Annotated[int, AtLeast(1)] = 10
    save_every: Annotated[int, AtLeast(1)] = 25


@final
@dataclass(frozen=True, kw_only=True)
class SurgeryConfig(Taught):
    """How a correction of a merged model's features is learned.

    - `rank`: of the correction. `updates`: of Adam, `lr` its step, `batch` the examples of each.
    - `seed`: of the first matrix and of the order of batches.
    """

    rank: Annotated[int, AtLeast(1)] = 16
    updates: Annotated[int, AtLeast(0)] = 1000
    lr: Positive = 1e-3
    batch: Annotated[int, AtLeast(1)] = 16


@final
@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Taught):
    """How the routers of a mixture of MLPs (WEMoE) are learned.

    - `depth`: linear layers of a router; 0 is one number a task and block, whatever the input. `start`: what each task gets at first.
    - `lr`, `steps`: of Adam, the step falling to 0 as a cosine. `batch`: examples a task and step.
    - `most`: a share beyond ± this ends the run, for it diverges.
    - `window`: steps over which predictions are counted: where all of them fall on one class, and did not at first, the run stops.
    - `seed`: of the first routers and the order of batches. `save_every`: steps after which the state is kept.
    """

    depth: Annotated[int, Within("[0, 2]")] = 2
    start: float = 0.3
    lr: NotNegative = 1e-4
    steps: Annotated[int, AtLeast(0)] = 1000
    batch: Annotated[int, AtLeast(1)] = 16
    most: Positive = 10.0
    window: Annotated[int, AtLeast(1)] = 10
    save_every: Annotated[int, AtLeast(1)] = 50


@final
@dataclass(frozen=True, kw_only=True)
class TwinConfig(Taught):
    """How the router of Twin-Merging is learned: which task an input is of, from a merged model's features.

    - `hidden`: width of its hidden layer. `lr`, `epochs`, `batch`: of Adam, over the tasks' examples together.
    - `mode`: what it is used for: `soft` mixes the tasks' parts by their probabilities, `top` takes the likeliest task's alone.
    - `hold`: every so many-th example of a task is not learned from; those tell how often the router is right. 0 learns from all.
    - `seed`: of the first matrices and the order of batches.
    """

    hidden: Annotated[int, AtLeast(1)] = 256
    lr: Positive = 5e-4
    epochs: Annotated[int, AtLeast(0)] = 50
    batch: Annotated[int, AtLeast(1)] = 64
    mode: Literal["soft", "top"] = "soft"
    hold: Annotated[int, AtLeast(0)] = 5
    examples: Annotated[int | None, AtLeast(1)] = 500


@final
@dataclass(frozen=True, kw_only=True)
class RouterConfig(Config):
    """How the routers of a merged mixture are calibrated.

    - `ridge`: what holds a router where the merge put it, as a share of the mean square of its inputs' entries.
    - `rounds`: passes of the merged model after each of which all routers are solved; as many as it has layers with routers make one of them
      after the other, from below.
    - `hold`: every so many-th text of a task is not fitted to; the errors on these texts tell whether the fit holds for others. 0 fits to all.
    - `tokens`: at most so many of each task's texts; the texts after them are left out. `length`: tokens that a text is cut to.
    - `batch`: texts that run at once.
    - `memory`: bytes that the sums of the routers' inputs may take. Routers that do not fit are measured in a pass of their own.
    """

    ridge: Annotated[float, Within("[1e-8, inf)")] = 0.01
    rounds: Annotated[int, AtLeast(1)] = 1
    hold: Annotated[int, AtLeast(0)] = 5
    tokens: Annotated[int, AtLeast(1)] = 16_384
    length: Annotated[int, AtLeast(2)] = 512
    batch: Annotated[int, AtLeast(1)] = 8
    memory: Annotated[int, AtLeast(1)] = 4_000_000_000
