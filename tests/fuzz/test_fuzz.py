"""The fuzz targets' corpus, every input; and some mutations of each. `make fuzz` goes on for longer."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from mutate import mutate
from run import anonymous
from targets import TARGETS, corpus

CORPUS = corpus()
GROWTH = 64_000_000  # bytes
MUTATIONS = 150


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "name"), [(target, name) for target, inputs in CORPUS.items() for name in inputs])
def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str) -> None:
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    TARGETS[target](CORPUS[target][name], folder)  # warms imports
    before, begin = anonymous(), time.process_time()
    read = TARGETS[target](CORPUS[target][name], folder)
    assert time.process_time() - begin < 20, "a small file must not ask for endless work"
    assert anonymous() - before < GROWTH
    assert not (folder / "ran").exists(), "code in a file was run"
    assert read or name != "good", "the good input must be read"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_mutations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    chance, seeds = random.Random(1), list(CORPUS[target].values())
    before = anonymous()
    for _ in range(MUTATIONS):
        TARGETS[target](mutate(chance.choice(seeds), chance.choice(seeds), chance), folder)
    assert anonymous() - before < 2 * GROWTH
