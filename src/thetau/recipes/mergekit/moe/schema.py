"""What a `mergekit-moe` config may say, and what of it can be told to be wrong before a model is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator

from thetau.errors import RecipeError, nearest
from thetau.recipes.mergekit.reference import Reference, parse
from thetau.recipes.schema import FLOAT_NAMES

GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"]
DRAWN = ("random", "uniform_random")


def _model(value: Any, info: Any) -> Reference:
    try:
        return parse(value, "it", (info.context or {}).get("folder"))
    except RecipeError as error:
        raise ValueError(" ".join(error.problems)) from error


Model = Annotated[Reference, PlainValidator(_model)]


class Expert(BaseModel):
    """A dense model whose MLPs become one expert in every layer.

    - `positive_prompts`, `negative_prompts`: texts that the gate shall send to this expert, and away from it.
    - `noise_scale`: standard deviation of normal noise on its three matrices.
    - `residual_scale`: factor of the matrix that writes to the residual stream, noise included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source_model: Model
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None

    @field_validator("noise_scale", "residual_scale")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be finite")
        return value

    @property
    def scale(self) -> float:
        """Of the matrix that writes to the residual stream."""
        return 1.0 if self.residual_scale is None else self.residual_scale

    @property
    def noise(self) -> float:
        """Standard deviation of the noise; 0 for none."""
        return self.noise_scale or 0.0

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The positive and the negative ones."""
        return tuple(self.positive_prompts or ()), tuple(self.negative_prompts or ())


class MoeRecipe(BaseModel):
    """A mixture of experts. `seed` is ours: of random gates and of noise; an output's record holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base_model: Model
    experts: list[Expert] = Field(min_length=1)
    shared_experts: list[Expert] = []
    gate_mode: GateMode = "hidden"
    dtype: str | None = None
    experts_per_token: int = Field(default=2, ge=1)
    architecture: str | None = None
    seed: int = 0

    @field_validator("shared_experts", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        name = value.removeprefix("torch.") if value else None
        if name is not None and name not in FLOAT_NAMES:
            raise ValueError(f"must be one of {', '.join(FLOAT_NAMES)}")
        return name

    @property
    def everyone(self) -> list[tuple[str, Expert]]:
        """The experts and the shared ones, each with its place in the recipe."""
        routed = [(f"experts.{index}", one) for index, one in enumerate(self.experts)]
        return routed + [(f"shared_experts.{index}", one) for index, one in enumerate(self.shared_experts)]

    def plain(self) -> dict[str, Any]:
        """The recipe with its defaults as plain values, which this schema reads again."""
        said = self.model_dump(exclude={"base_model", "experts", "shared_experts"})
        made = {"base_model": self.base_model.plain(), "experts": [_plain(one) for one in self.experts], **said}
        return made | ({"shared_experts": [_plain(one) for one in self.shared_experts]} if self.shared_experts else {})


def read_moe(
    document: Mapping[str, Any], where: str, folder: Path | None, *, seed: int = 0, allow_same: bool = False
) -> MoeRecipe:
    """Validate a config. A seed that it names goes before the one given.

    Raises:
        RecipeError: all that is wrong with it.
    """
    try:
        recipe = MoeRecipe.model_validate({"seed": seed, **document}, context={"folder": folder})
    except ValidationError as error:
        raise RecipeError(_problems(error), where) from error
    problems = _senseless(recipe, allow_same)
    if problems:
        raise RecipeError(problems, where)
    return recipe


def _senseless(recipe: MoeRecipe, allow_same: bool) -> list[str]:
    problems: list[str] = []
    experts, mode = recipe.experts, recipe.gate_mode
    if len(experts) < recipe.experts_per_token:
        problems.append(
            f"experts_per_token: must be at most the number of experts, {len(experts)}. Got {recipe.experts_per_token}."
        )
    if mode in DRAWN:
        return problems
    problems += [
        f"experts.{index}: `gate_mode: {mode}` needs `positive_prompts`, texts that shall go to this expert. Got none."
        for index, expert in enumerate(experts)
        if not expert.positive_prompts
    ]
    problems += [
        f"{place}: `negative_prompts` need `positive_prompts` beside them. Got none."
        for place, expert in recipe.everyone[len(experts) :]
        if expert.negative_prompts and not expert.positive_prompts
    ]
    problems += [
        f"{place}: a prompt must hold some text. Got {text!r}."
        for place, expert in recipe.everyone
        for prompts in expert.prompts
        for text in prompts
        if not text.strip()
    ]
    if len(experts) > 1 and experts[0].positive_prompts and len({expert.prompts for expert in experts}) == 1:
        problems.append(
            "experts: the prompts are the same for all, so no gate could tell them apart. Give each texts of what it is for."
        )
    if len(experts) > 1 and len({expert.source_model for expert in experts}) == 1 and not allow_same:
        problems.append(
            f"experts: all are the same model, {experts[0].source_model}, so the mixture costs more and gives what that model gives. "
            "Name other models; or take `gate_mode: random` for a model that is to be trained on."
        )
    return problems


def _plain(expert: Expert) -> dict[str, Any]:
    said = expert.model_dump(exclude={"source_model"}, exclude_none=True)
    return {"source_model": expert.source_model.plain(), **said}


def _problems(error: ValidationError) -> list[str]:
    found = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        where, known = ".".join(place), Expert.model_fields if len(place) > 1 else MoeRecipe.model_fields
        if item["type"] == "extra_forbidden":
            found.append(f"unknown key {where!r}.{nearest(place[-1], known)} Known: {', '.join(known)}.")
        elif item["type"] == "missing":
            found.append(f"{where} is missing.")
        elif item["type"] == "literal_error":
            modes = GateMode.__args__  # type: ignore[attr-defined]
            got = item["input"]
            found.append(f"{where}: must be one of {', '.join(modes)}. Got {got!r}.{nearest(str(got), modes)}")
        else:
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            found.append(f"{where}: {message}. Got {item['input']!r}.")
    return found
