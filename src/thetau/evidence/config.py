"""What decides evidence, apart from model and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, final

from thetau.errors import RecipeError, nearest
from thetau.methods.checks import choice, flag, number, whole
from thetau.parts import check_selection


@final
@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How a mask is learned.

    - `density`: share of the entries, the largest by magnitude, that the mask begins with. `bias`: S there; minus that elsewhere.
    - `steps`, `lr`: of gradient descent on S. `lr_absolute`: take `lr` as it is (the code's is 1e7), not relative to the first gradient.
    - `regulariser`: `l1` pulls every σ(S) towards 0 (the paper), `polarise` pushes S away from 0 (the published code).
    - `strength`: each step moves S by strength · σ'(S), which is at most a quarter of it, and 0.0066 of it at S = ±5.
    - `per_class`: training examples of each class; of a regression so many in all. `batch_size`: examples a step, None for all.
    - `keep`: share of the entries that the mask has in the end, the largest S; None rounds σ(S).
    - `tensors`: where masks are learned: `all`, `linear` or patterns of the checkpoint's names; elsewhere nothing is kept.
    - `max_length`, `image_size`: of the inputs. `seed`: of the examples that are drawn and of the order of batches.
    """

    density: float = 0.01
    bias: float = 5.0
    steps: int = 10
    lr: float = 10.0
    lr_absolute: bool = False
    regulariser: Literal["l1", "polarise"] = "l1"
    strength: float = 1.0
    per_class: int = 64
    batch_size: int | None = None
    keep: float | None = None
    tensors: str | tuple[str, ...] = "all"
    max_length: int = 64
    image_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        number("MaskConfig", "density", self.density, "in (0, 1]", low=0, high=1, open_low=True)
        number("MaskConfig", "bias", self.bias, "a positive number", low=0, open_low=True)
        number("MaskConfig", "lr", self.lr, "a positive number", low=0, open_low=True)
        number("MaskConfig", "strength", self.strength, "a number of at least 0", low=0)
        flag("MaskConfig", "lr_absolute", self.lr_absolute)
        choice("MaskConfig", "regulariser", self.regulariser, ("l1", "polarise"))
        if self.keep is not None:
            number("MaskConfig", "keep", self.keep, "in (0, 1], or None to round", low=0, high=1, open_low=True)
        for name, low in (("steps", 0), ("per_class", 1), ("batch_size", 1), ("max_length", 3), ("image_size", 8), ("seed", 0)):
            if getattr(self, name) is not None or name not in ("batch_size", "image_size"):
                whole("MaskConfig", name, getattr(self, name), low=low)
        check_selection("MaskConfig", self.tensors, "base")

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> MaskConfig:
        """A config from plain keys, as a command line gives them. Raises `RecipeError`; `where` names it."""
        return _of(cls, given, where)


Labels = Literal["true", "empirical", "sampled"]


@final
@dataclass(frozen=True, kw_only=True)
class FisherConfig:
    """How a Fisher diagonal is collected.

    - `examples`: how many of the split's examples, drawn without regard to their order and always the same ones.
    - `labels`: whose gradients are squared. `true`: every label's, weighted by the probability that the model gives it; `sampled`: of
      labels drawn from these probabilities, `draws` an example; `empirical`: of the data's own label, which is another matrix.
    - `most_classes`: with more classes than this, `true` is sampled, for a class costs a backward pass.
    - `normalise`: divide by the norm over all tensors, so that no task weighs more because its gradients are longer.
    - `batch`: examples whose gradients are held at once, fewer where they would take more than `GRADIENT_BYTES`.
    - `split`, `max_length`, `image_size`: of the inputs. `seed`: of the labels that are drawn.
    - `save_every`: examples after which the state of the run is kept.
    """

    examples: int = 256
    labels: Labels = "true"
    most_classes: int = 10
    draws: int = 1
    normalise: bool = False
    batch: int = 8
    split: Literal["train", "validation", "test"] = "train"
    max_length: int = 64
    image_size: int | None = None
    seed: int = 0
    save_every: int = 64

    def __post_init__(self) -> None:
        choice("FisherConfig", "labels", self.labels, ("true", "empirical", "sampled"))
        choice("FisherConfig", "split", self.split, ("train", "validation", "test"))
        flag("FisherConfig", "normalise", self.normalise)
        limits = {"examples": 1, "most_classes": 2, "draws": 1, "batch": 1, "max_length": 3, "seed": 0, "save_every": 1}
        for name, low in limits.items():
            whole("FisherConfig", name, getattr(self, name), low=low)
        if self.image_size is not None:
            whole("FisherConfig", "image_size", self.image_size, low=8)

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> FisherConfig:
        """A config from plain keys, as a command line gives them. Raises `RecipeError`; `where` names it."""
        return _of(cls, given, where)


Config = TypeVar("Config", MaskConfig, FisherConfig)


def _of(kind: type[Config], given: Mapping[str, Any], where: str) -> Config:
    known = [one.name for one in fields(kind)]
    problems = [f"unknown key {key!r}.{nearest(key, known)}" for key in given if key not in known]
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in known
    }
    config: Config | None = None
    try:
        config = kind(**values)
    except (ValueError, TypeError) as error:
        problems.append(str(error))
    if config is None or problems:
        raise RecipeError(problems, where)
    return config
