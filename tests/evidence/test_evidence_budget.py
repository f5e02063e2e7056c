"""Fisher and RegMean of a model that is larger than the memory that merges may take: collected from live models, merged from files, to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import thetau
from thetau.engine.executor import Engine
from thetau.engine.planning import plan
from thetau.errors import ThetauError
from thetau.evidence import FisherConfig, MomentConfig, collect_fisher, collect_second_moments
from thetau.methods import Fisher, RegMean
from thetau.models import load_encoder, read_weights
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

NAMES = ("animals", "weather")
LAYERS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of twelve narrow blocks, two models near it, and their Fishers and Gram matrices."""
    import transformers

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("budget")
    make_model(root / "base")
    config = transformers.AutoConfig.from_pretrained(root / "base")
    config.num_hidden_layers = LAYERS
    config.save_pretrained(root / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {name: tensor.detach().clone() for name, tensor in transformers.BertModel(config).state_dict().items()}
        save_file(weights, root / "base/model.safetensors", metadata={"format": "pt"})
        for name in NAMES:
            (root / name).mkdir()
            moved = {key: tensor + 0.01 * torch.randn(tensor.shape) for key, tensor in weights.items()}
            save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
            (root / name / "config.json").write_text(json.dumps(config.to_dict()))
    for name in NAMES:
        encoder, task = load_encoder(root / "base"), load_task(make_task(root / "data", name))
        own = read_weights(root / name)
        few: dict[str, Any] = {"examples": 6, "max_length": 24}
        collect_fisher(encoder, task, own, root / f"{name}-fisher.safetensors", FisherConfig(**few))
        # 12 layers' sums take 8 · (5 · 16² + 32²) bytes each; four runs over the examples hold a few layers at a time.
        moments = MomentConfig(memory=100_000, **few)
        collect_second_moments(encoder, task, own, root / f"{name}-gram.safetensors", "gram", moments)
        collect_second_moments(encoder, task, own, root / f"{name}-whole.safetensors", "gram", MomentConfig(**few))
    return root


@pytest.mark.parametrize(("kind", "method"), [("fisher", Fisher()), ("gram", RegMean())], ids=["fisher", "regmean"])
def test_a_merge_within_less_than_one_model(place: Path, tmp_path: Path, kind: str, method: Any) -> None:
    base: Any = thetau.open(place / "base")
    vectors = [thetau.open(place / name) - base for name in NAMES]
    evidence = {kind: {name: place / f"{name}-{kind}.safetensors" for name in NAMES}}
    merged = base + thetau.merge(vectors, method, names=NAMES, evidence=evidence)
    small, large = Engine(workers=1, window=64, max_memory=90_000), Engine(workers=2)
    size = sum(tensor.nbytes for tensor in load_file(place / "base/model.safetensors").values())
    assert small.max_memory < size, "less than one model, of three that are read and their evidence"
    planned = plan(merged, engine=small)
    assert planned.memory <= small.max_memory
    merged.save(tmp_path / "small", engine=small)
    merged.save(tmp_path / "large", engine=large)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "large"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    with pytest.raises(
        ThetauError, match=r"the memory budget is .*Raise it \(`--max-memory`\) or choose a method that needs less"
    ):
        merged.save(tmp_path / "less", engine=Engine(workers=1, window=64, max_memory=300))
    assert not (tmp_path / "less").exists()


def test_grams_in_runs_of_few_layers_are_those_of_one_run(place: Path) -> None:
    for name in NAMES:
        parts, whole = (load_file(place / f"{name}-{how}.safetensors") for how in ("gram", "whole"))
        assert set(parts) == set(whole)
        assert all(torch.equal(tensor, whole[key]) for key, tensor in parts.items())
