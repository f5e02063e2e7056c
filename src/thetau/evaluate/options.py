"""What a session is opened with: where its data lie, how much of them is read, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from thetau.options import Option, check_ranges

BASE = "all-MiniLM-L6-v2"
DataFolder = Annotated[Path | None, Option("Folder of task folders; looked at before the shipped tasks.", flags=("--data",))]
Kind = Annotated[
    str | None, Option("How the base is read: sentence, image, mask, text_to_text or causal; by default as its files say.")
]
Features = Annotated[
    Literal["unit", "raw"],
    Option(
        "unit: of unit length, before they are linearised; raw: as the papers' code, linearised first and normalised by the head."
    ),
]
Split = Annotated[str, Option("train, validation or test.")]
Limit = Annotated[int | None, Option("At most so many examples a task, always the same ones.", least=1)]


@final
@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The model that the others were fine-tuned from."""

    base: Annotated[str, Option("The pre-trained model: gives architecture, tokenizer, heads.", flags=("--base", "-b"))] = BASE


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where the tasks' data are, how an example is read, and where evaluations are kept."""

    data: DataFolder = None
    max_length: Annotated[int, Option("Tokens of an example; longer ones are cut.", least=3)] = 64
    image_size: Annotated[int | None, Option("Pixels a side of an image; by default the model's own.", least=1)] = None
    kind: Kind = None
    features: Features = "unit"
    cache: Annotated[
        Path | None, Option("Folder in which evaluations are kept, so that they are done once.", flags=("--cache",))
    ] = None

    def __post_init__(self) -> None:
        check_ranges(self)


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many examples of each task are read, of the two splits on which coefficients are chosen and reported."""

    validation: Annotated[int | None, Option("At most so many validation examples a task.", least=1)] = None
    test: Annotated[int | None, Option("At most so many test examples a task.", least=1)] = None

    def __post_init__(self) -> None:
        check_ranges(self)

    def by_split(self) -> dict[str, int | None]:
        """Split → largest number of examples; None for all of them."""
        return {"validation": self.validation, "test": self.test}


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """One split, and how many examples of it."""

    split: Split = "test"
    limit: Limit = 300

    def __post_init__(self) -> None:
        check_ranges(self)

    def by_split(self) -> dict[str, int | None]:
        """Split → largest number of examples; None for all of them."""
        return {self.split: self.limit}


@final
@dataclass(frozen=True, kw_only=True)
class Few:
    """A few examples of each task."""

    split: Split = "validation"
    examples: Annotated[int | None, Option("At most so many examples a task, always the same ones.", least=1)] = 64

    def __post_init__(self) -> None:
        check_ranges(self)
