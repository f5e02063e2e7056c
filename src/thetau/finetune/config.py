"""What decides a fine-tuning run, apart from model and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, Literal, final

from thetau.errors import RecipeError, nearest
from thetau.finetune.paradigms import Paradigm, paradigm_of

_CHOICES = {
    "penalty": ("cyclic", "strict", "incremental"),
    "penalty_of": ("features", "logits"),
    "penalty_norm": ("squared", "plain"),
    "precision": ("float32", "bfloat16", "float16"),
}
# Fields that change nothing in what is computed.
_OUTSIDE = ("save_every", "device")


@final
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """AdamW on the loss of a task's head, with warm-up and a cosine schedule.

    - `paradigm`: how the model is trained (`thetau.finetune.paradigms`): standard, attention, linear, taujp, lora, mtl, joined by `+`.
    - `scope`: what is trained, where it is not the paradigm's own: all, attention, attention+bias, attention+mlp,
      attention+mlp+bias, or patterns of parameter names.
    - `steps`, `batch_size`: optimiser steps and examples a step, taken in `accumulation` parts.
    - `lr`: the highest learning rate; reached after `warmup` (a share of the steps), then lowered to 0 along a cosine.
    - `weight_decay`: decoupled, of matrices only, not of biases and norms; it pulls θ, not τ, in every paradigm.
    - `max_grad_norm`: gradients are scaled down to this norm over all parameters.
    - `max_length`: tokens of an example; longer ones are cut. `image_size`: pixels a side, None for the model's own.
    - `seed`: of the order of examples and of dropout.
    - `strength`: λ of the τJp penalty. `penalty`: `cyclic` takes one of the other tasks a step (Eq. 11), `strict` all of them
      (Eq. 10), `incremental` one a step of those learnt before. `penalty_batch`: examples of each, None for an eighth of the batch.
    - `penalty_of`: the change of the features, or of the other task's logits. `penalty_norm`: the paper's squared norm, or the
      norm itself, as in the authors' code.
    - `rank`, `lora_alpha`, `lora_targets`: of the adapters; None takes the attention and MLP weights.
    - `train_head`: train the task's linear head too, from where the frozen one would stand (Kumar et al., ICLR 2022,
      <https://arxiv.org/abs/2202.10054>); it is kept beside the encoder.
    - `precision`: of the forward pass, by autocast. `device`: None takes a GPU where there is one.
    - `save_every`: steps between resumable states, 0 for none.
    """

    paradigm: str = "standard"
    scope: str | None = None
    steps: int = 200
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 64
    image_size: int | None = None
    seed: int = 0
    strength: float = 0.1
    penalty: Literal["cyclic", "strict", "incremental"] = "cyclic"
    penalty_of: Literal["features", "logits"] = "features"
    penalty_norm: Literal["squared", "plain"] = "squared"
    penalty_batch: int | None = None
    rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] | None = None
    train_head: bool = False
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    save_every: int = 0

    def __post_init__(self) -> None:
        paradigm_of(self.paradigm)
        for name, low in (
            *(("steps", 1), ("batch_size", 1), ("accumulation", 1), ("max_length", 3), ("seed", 0), ("rank", 1)),
            *(("save_every", 0), ("image_size", 8), ("penalty_batch", 1)),
        ):
            value = getattr(self, name)
            if value is None and name in ("image_size", "penalty_batch"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"`FinetuneConfig({name}=...)` must be an integer of at least {low}. Got {value!r}.")
        for name, low, high, open_low in (
            ("lr", 0, inf, True),
            ("warmup", 0, 1, False),
            ("weight_decay", 0, inf, False),
            ("max_grad_norm", 0, inf, True),
            ("strength", 0, inf, False),
            ("lora_alpha", 0, inf, True),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value < high or (open_low and value == low):
                raise ValueError(
                    f"`FinetuneConfig({name}=...)` must be in {'(' if open_low else '['}{low}, {high}). Got {value!r}."
                )
        if not isinstance(self.train_head, bool):
            raise ValueError(f"`FinetuneConfig(train_head=...)` must be true or false. Got {self.train_head!r}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`FinetuneConfig({name}=...)` must be one of {', '.join(choices)}. Got {getattr(self, name)!r}."
                )
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"`FinetuneConfig(accumulation=...)` must be at most the batch size, {self.batch_size}. Got {self.accumulation}."
            )
        if self.lora_targets is not None:
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    @property
    def how(self) -> Paradigm:
        """The paradigm, with this config's scope."""
        return paradigm_of(self.paradigm)

    @property
    def trains(self) -> str:
        """The scope that is trained."""
        return self.scope or self.how.scope

    @property
    def other_batch(self) -> int:
        """Examples of each other task in the penalty."""
        return self.penalty_batch or max(1, self.batch_size // 8)

    def content(self) -> dict[str, Any]:
        """The fields on which the result depends, those at their defaults left out, so that a new field changes no old key."""
        defaults = FinetuneConfig()
        given = asdict(self)
        return {
            name: value
            for name, value in given.items()
            if name not in _OUTSIDE and (value != getattr(defaults, name) or name in _FIRST)
        }

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> FinetuneConfig:
        """A config from plain keys, as a YAML file or a command line gives them; `preset` names one of `PRESETS`.

        Raises `RecipeError`; `where` names it.
        """
        known = [field.name for field in fields(cls)]
        given = dict(given)
        preset = given.pop("preset", None)
        problems = []
        if preset is not None and preset not in PRESETS:
            problems.append(f"`preset` must be one of {', '.join(PRESETS)}. Got {preset!r}.{nearest(str(preset), PRESETS)}")
        given = {**PRESETS.get(preset or "", {}), **given}
        problems += [f"unknown key {key!r}.{nearest(key, known)}" for key in given if key not in known]
        try:
            config = cls(**{key: value for key, value in given.items() if key in known})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if problems:
            raise RecipeError(problems, where=where)
        return config


# Fields of the first format, which its keys always name.
_FIRST = ("paradigm", "steps", "batch_size", "lr", "warmup", "weight_decay", "max_grad_norm", "max_length", "seed")

# The settings of the τJp and attention-only papers, after Ilharco et al., ICLR 2023.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 2000, "batch_size": 128, "lr": 1e-5, "warmup": 0.1, "weight_decay": 0.1},
}
