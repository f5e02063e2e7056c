"""What decides a fine-tuning run, apart from model and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any, final

from thetau.errors import RecipeError, nearest
from thetau.finetune.paradigms import PARADIGMS


@final
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """AdamW on the cross-entropy of a frozen head, with warm-up and a cosine schedule.

    - `paradigm`: how the model is trained; `standard` trains every parameter of the encoder.
    - `steps`, `batch_size`: optimiser steps and examples a step.
    - `lr`: the highest learning rate; reached after `warmup` (a share of the steps), then lowered to 0 along a cosine.
    - `weight_decay`: of matrices only, not of biases and norms.
    - `max_grad_norm`: gradients are scaled down to this norm over all parameters.
    - `max_length`: tokens of an example; longer ones are cut.
    - `seed`: of the order of examples and of dropout.
    """

    paradigm: str = "standard"
    steps: int = 200
    batch_size: int = 16
    lr: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.paradigm not in PARADIGMS:
            raise ValueError(
                f"`FinetuneConfig(paradigm=...)` must be one of {', '.join(PARADIGMS)}. "
                f"Got {self.paradigm!r}.{nearest(self.paradigm, PARADIGMS)}"
            )
        for name, low in (("steps", 1), ("batch_size", 1), ("max_length", 3), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"`FinetuneConfig({name}=...)` must be an integer of at least {low}. Got {value!r}.")
        for name, low, high, open_low in (
            ("lr", 0, inf, True),
            ("warmup", 0, 1, False),
            ("weight_decay", 0, inf, False),
            ("max_grad_norm", 0, inf, True),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value < high or (open_low and value == low):
                raise ValueError(
                    f"`FinetuneConfig({name}=...)` must be in {'(' if open_low else '['}{low}, {high}). Got {value!r}."
                )

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> FinetuneConfig:
        """A config from plain keys, as a YAML file or a command line gives them. Raises `RecipeError`; `where` names it."""
        known = [field.name for field in fields(cls)]
        problems = [f"unknown key {key!r}.{nearest(key, known)}" for key in given if key not in known]
        try:
            config = cls(**{key: value for key, value in given.items() if key in known})
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise RecipeError(problems, where=where)
        return config
