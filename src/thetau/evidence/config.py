"""What decides a mask, apart from model, vector and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, final

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
        known = [one.name for one in fields(cls)]
        problems = [f"unknown key {key!r}.{nearest(key, known)}" for key in given if key not in known]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in known
        }
        try:
            config = cls(**values)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if problems:
            raise RecipeError(problems, where)
        return config
