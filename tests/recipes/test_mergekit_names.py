"""Layers, towers, vocabularies and depths as mergekit's 62 definitions list them, told here from the names alone.

The table comes from `experiments/mergekit_names/run.py`. Where we differ, the difference is named here, with its reason.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from thetau.checkpoint import Source, open_source
from thetau.checkpoint.config import depth_entries
from thetau.recipes.mergekit import modules
from thetau.recipes.mergekit.layout import Layout, is_after, renamed
from thetau.recipes.mergekit.tokens import is_vocabulary

TABLE = json.loads((Path(__file__).parent / "data" / "mergekit_names.json").read_text(encoding="utf-8"))
DEFINITIONS: dict[str, dict[str, Any]] = TABLE["definitions"]
LAYERS, WIDTH, TOKENS = 3, 8, 97
NOT_THEIRS = {
    # The definition begins its layers at 0, where the model has its embedding, and so asks for `layers.0.ln`, which no checkpoint has.
    "phi-1": "layers.0 is the embedding, and the layer behind the last one the head",
}
# Listed before the layers, but what runs behind them: the last norm of LFM2.
AFTER_ALL_THE_SAME = {"lfm2": {"model.embedding_norm.weight"}}
# Layers of a bridge between towers, which are two linear layers of one MLP, `mlp.0` and `mlp.2`; mergekit counts `mlp.0` and `mlp.1`.
LOOSE = re.compile(r"^visual\.merger\.mlp\.")
Entry = tuple[str, str, int]  # module, place, layer


def mended(name: str) -> str:
    """A name as checkpoints have it: Whisper's definition lacks a dot after `model.decoder`."""
    return re.sub(r"^model\.decoder(?=[a-z])", "model.decoder.", name).replace("${num_layers}", str(LAYERS))


@cache
def known(key: str) -> dict[str, Entry]:
    return {
        mended(name.replace("#", str(index))): (module, place, index)
        for module, lists in DEFINITIONS[key]["modules"].items()
        for place in ("before", "layers", "after")
        for name in lists[place]
        for index in (range(LAYERS) if place == "layers" else [0])
    }


@cache
def tokens(key: str) -> set[str]:
    return {mended(name) for lists in DEFINITIONS[key]["modules"].values() for name in lists["tokens"]}


@cache
def model(key: str) -> Source:
    """Zeros under these names: what counts tokens has 97 rows, norms and biases one axis."""

    def shape(name: str) -> tuple[int, ...]:
        first = TOKENS if name in tokens(key) else WIDTH
        if re.search(r"norm|(^|\.)ln|bias", name, re.IGNORECASE):
            return (first,)
        return (first, WIDTH, 3) if "conv" in name else (first, WIDTH)

    return open_source({name: torch.zeros(shape(name)) for name in known(key)})


def test_all_definitions_are_there() -> None:
    assert (TABLE["mergekit"], len(DEFINITIONS)) == ("0.1.5", 62)


@pytest.mark.parametrize("key", [key for key in DEFINITIONS if key not in NOT_THEIRS])
def test_layers_and_what_stands_before_and_after_them(key: str) -> None:
    source = model(key)
    layout = Layout.of(source)
    for name, (_, place, index) in known(key).items():
        found = layout.places[name]
        if place == "layers" and not LOOSE.search(name):
            assert (found.container is not None, found.index) == (True, index), name
        else:
            assert found.container is None, name
            after = place == "after" or name in AFTER_ALL_THE_SAME.get(key, ())
            assert is_after(name, source.specs[name].shape) is after, name


@pytest.mark.parametrize("key", DEFINITIONS)
def test_the_tensors_that_count_tokens(key: str) -> None:
    source = model(key)
    assert {name for name in known(key) if is_vocabulary(name, source.specs[name].shape, TOKENS)} == tokens(key)


@pytest.mark.parametrize("key", DEFINITIONS)
def test_the_modules_of_a_model(key: str) -> None:
    names = [None if name == "default" else name for name in DEFINITIONS[key]["modules"]]
    towers = modules.towers(Layout.of(model(key)), model(key), names)
    for name in names:
        chosen, problem = modules.chosen(name, towers, cut=False)
        assert problem is None
        theirs = {tensor for tensor, (module, _, _) in known(key).items() if module == (name or "default")}
        assert {tensor for tower in chosen for tensor in tower.tensors} == theirs


@pytest.mark.parametrize("key", [key for key in DEFINITIONS if key not in NOT_THEIRS])
def test_the_entry_for_the_number_of_layers(key: str) -> None:
    config: dict[str, Any] = {}
    lists = DEFINITIONS[key]["modules"]
    for count, given in enumerate(lists.values(), LAYERS):
        if given["depth"]:
            *outer, last = given["depth"].split(".")
            table = config
            for word in outer:
                table = table.setdefault(word, {})
            table[last] = count
    layout = Layout.of(model(key))
    for name, (module, place, _) in known(key).items():
        entry, container = lists[module]["depth"], layout.places[name].container
        if place == "layers" and entry:
            assert container is not None
            assert depth_entries(config, container) == [tuple(entry.split("."))]


def test_layouts_ask_for_other_spellings() -> None:
    """The parts of a block by the words of two versions of transformers, and a norm's old words."""
    old = ["layers.0.attention.attention.query.weight", "layers.1.attention.attention.query.weight", "norm.gamma"]
    new = ["layers.0.attention.q_proj.weight", "layers.1.attention.q_proj.weight", "norm.weight"]
    mine, theirs = (Layout.of(open_source({name: torch.ones(2, 2) for name in names})) for names in (old, new))
    assert renamed(mine, theirs) == dict(zip(new, old, strict=True))
