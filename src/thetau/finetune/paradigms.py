"""How a task is fine-tuned, as data for the one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Paradigm:
    """`trainable` says by its name in the encoder whether a parameter is trained."""

    name: str
    trainable: Callable[[str], bool]


def _everything(name: str) -> bool:
    return True


PARADIGMS = {paradigm.name: paradigm for paradigm in (Paradigm(name="standard", trainable=_everything),)}
