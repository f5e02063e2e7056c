"""That the tests do check the shapes of thetau's annotations: of arguments, of what is returned, of a dataclass's fields."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import checker
from thetau.linalg.gram import commutator, gram_of

WRONG = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

Square = Float[Tensor, "side side"]

def halved(rows: Float[Tensor, "row d_in"]) -> Square:
    return rows[:1]

@dataclass
class Pair:
    one: Square
"""


def test_arguments() -> None:
    assert gram_of(torch.eye(2, 3)).shape == (3, 3)
    with pytest.raises(TypeCheckError, match="rows"):
        gram_of(torch.ones(3))
    with pytest.raises(TypeCheckError, match="other"):
        commutator(torch.eye(2), torch.eye(3), torch.eye(2))


def test_what_is_returned_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_shapes.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.meta_path", [*sys.meta_path])
    checker.install("wrong_shapes")
    wrong = importlib.import_module("wrong_shapes")
    with pytest.raises(TypeCheckError, match="return value"):
        wrong.halved(torch.eye(2))
    with pytest.raises(TypeCheckError, match="one"):
        wrong.Pair(torch.ones(2, 3))
    assert wrong.Pair(torch.eye(2)).one.shape == (2, 2)
