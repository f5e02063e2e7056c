"""What a recipe may say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from thetau.errors import RecipeError

FLOAT_NAMES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
Quantise = Literal["fp8-tensor", "fp8-row", "fp8-block"]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


class ModelEntry(BaseModel):
    """One fine-tuned model, adapter or saved task vector; `over` is the model that an adapter belongs to, if it is not the recipe's base."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str
    name: str | None = Field(default=None, min_length=1)
    over: str | None = None


class SliceSource(BaseModel):
    """A run of a model's layers, the end excluded; `model` is its name or its path."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    layers: list[int] = Field(min_length=2, max_length=2)


class SliceEntry(BaseModel):
    """A run of the output's layers: equally many of each source, and of the base where the method has one (by default the same numbers)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sources: list[SliceSource] = Field(min_length=1)
    base_layers: list[int] | None = Field(default=None, min_length=2, max_length=2)


class Recipe(BaseModel):
    """A merge.

    - `base`: the model that the others were fine-tuned from; methods that merge models as they are can do without, and the result then takes
      its names, dtypes, config and tokenizer from the first model.
    - `models`: checkpoints, LoRA adapters or saved task vectors; each a path or hub id, or `{path, name}`.
    - `method`: a method's name, or `{name, fields...}`.
    - `evidence`: what the method must know of the tasks' data, by kind and task: `fisher: {sst2: sst2.safetensors}`.
    - `slices`: where the output's layers come from, run by run; `modules` the same for a model with several towers, by their names.
    - `tokenizer`: whose vocabulary the output has: `{source: union}`, `base` or a model, with `tokens` and `pad_to_multiple_of`.
    - `chat_template`: a template, a known name, or `auto`.
    - `rename`: regular expressions and what replaces them in the names of the models' tensors (not the base's), where these are called otherwise.
    - `config`: whose config, tokenizer and template the output takes: `base`, or a model by its name or path.
    - `exclude`: patterns of tensors that are left out (task heads); the output keeps the base's.
    - `output`: `model`, or `vector` for the merged task vector itself.
    - `seed`: of randomised methods.
    - `dtype`: of the output; by default the base's.
    - `quantise`: matrices of a language model's blocks in fp8, with scales: `fp8-block`, `fp8-row` or `fp8-tensor`.
    - `shard_size`: largest file, such as `5GB`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base: str | None = None
    models: list[str | ModelEntry] = Field(min_length=1)
    method: str | dict[str, Any]
    evidence: dict[str, dict[str, str]] = {}
    slices: list[SliceEntry] = []
    modules: dict[str, list[SliceEntry]] = {}
    tokenizer: dict[str, Any] | str | None = None
    chat_template: str | None = None
    rename: dict[str, str] = {}
    config: str | None = None
    exclude: list[str] = []
    output: Literal["model", "vector"] = "model"
    seed: int = 0
    dtype: str | None = None
    quantise: Quantise | None = None
    shard_size: str | int = "5GB"

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in FLOAT_NAMES:
            raise ValueError(f"must be one of {', '.join(FLOAT_NAMES)}")
        return value

    @field_validator("shard_size")
    @classmethod
    def _shard_size(cls, value: str | int) -> str | int:
        parse_size(value)
        return value

    @property
    def arranged(self) -> bool:
        """Whether layers or rows are moved about."""
        return bool(self.slices or self.modules) or self.tokenizer is not None or self.chat_template is not None

    def entries(self) -> list[ModelEntry]:
        """The models, each with its path."""
        return [ModelEntry(path=model) if isinstance(model, str) else model for model in self.models]


def parse_size(value: str | int) -> int:
    """`"5GB"` → 5,000,000,000 bytes; powers of ten.

    Raises:
        ValueError: it is no size, or not positive.
    """
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"a size is a number of bytes with a unit, such as 512MB or 5GB. Got {value!r}")
        size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise ValueError(f"a size must be positive. Got {value!r}")
    return size


def parse_evidence(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """`kind:task=file` by kind and task.

    Raises:
        RecipeError: all that are not of that form, or of a task for the second time.
    """
    found: dict[str, dict[str, str]] = {}
    problems = []
    for text in given:
        place, equals, path = text.partition("=")
        kind, colon, task = place.partition(":")
        if not (equals and colon and kind and task and path):
            problems.append(f"`--evidence` takes `kind:task=file`, such as `fisher:sst2=sst2.safetensors`. Got {text!r}.")
        elif task in found.get(kind, {}):
            problems.append(f"`--evidence {kind}:{task}` is given twice: {found[kind][task]} and {path}. Leave one out.")
        found.setdefault(kind, {})[task] = path
    if problems:
        raise RecipeError(problems, "options")
    return found
