"""What a form of quantised weights is: it finds its weights among stored tensors, and reads their rows as numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model's files say of its quantisation.

    - `file`: where it stands, for messages.
    - `method`: the name of the method in lower case, as `gptq`; empty where there is no such file and nothing is said.
    - `table`: all that is said.
    """

    file: str = ""
    method: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weight(ABC):
    """A weight that is stored in parts.

    - `name`, `shape`: those of the weight itself, as a model of full precision has it.
    - `parts`: the stored tensors that it is made of, by the part that they play.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]

    @abstractmethod
    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, of which there is at least one, in float32: `[stop - start, *shape[1:]]`, before any rounding to a narrower dtype."""


class Form(ABC):
    """A way of storing quantised weights.

    - `title`: what messages call it.
    - `methods`: the `quant_method`s of configs that go with it.
    """

    title: str
    methods: tuple[str, ...]

    @abstractmethod
    def find(self, stored: Source, said: Said) -> Iterable[Weight]:
        """Every weight of this form among the stored tensors.

        Raises:
            CheckpointError: parts are missing, of a wrong shape or dtype, or the config says otherwise.
        """


def damaged(stored: Source, name: str, problem: str) -> NoReturn:
    """Refuse a stored tensor."""
    raise CheckpointError(f"{stored.specs[name].file}: {name!r} {problem}")


def part(stored: Source, name: str, sibling: str, of: str) -> str:
    """The name of another part of the weight, which must be there; `of` is the form."""
    if sibling not in stored.specs:
        damaged(
            stored,
            name,
            f"is a weight in {of} and its {sibling!r} is missing. Give the whole checkpoint: codes mean nothing without their scales.",
        )
    return sibling


def check_shape(stored: Source, name: str, want: tuple[int, ...], why: str) -> None:
    """Refuse a part of another shape than the weight's others ask for."""
    got = stored.specs[name].shape
    if got != want:
        damaged(stored, name, f"must have shape {list(want)} ({why}). Got {list(got)}: these files do not belong together.")


def check_index(stored: Source, name: str, codes: str, groups: int) -> None:
    """Refuse an index that gives an input a group that has no scale."""
    index = stored.read(name)
    if index.dtype.is_floating_point or (index.numel() and (int(index.min()) < 0 or int(index.max()) >= groups)):
        damaged(stored, name, f"must give each input of {codes!r} one of its {groups} groups.")
