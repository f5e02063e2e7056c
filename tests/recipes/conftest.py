"""What the tests of recipes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import run
from foreign import Ended, Tensors, keep, weights


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors]]:
    """A base of four layers and three that are close to it, as folders beside one another."""
    folder = tmp_path_factory.mktemp("models")
    base = weights(4, 0)
    states = {"base": base, **{name: weights(4, seed, near=base) for seed, name in enumerate("abc", 1)}}
    for name, state in states.items():
        keep(folder / name, state)
    return folder, states


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return lambda *arguments: Ended(*run(capsys, *arguments))
