"""Second moments of linear layers against per-example, per-token loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from synthetic import relative
from thetau.errors import CheckpointError, DataError
from thetau.evaluate import Evaluator
from thetau.evidence.kronecker import collect_moments, load_moments, save_moments
from thetau.models import load_encoder
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    return Evaluator(
        load_encoder(make_model(tmp_path / "base")), [load_task(make_task(tmp_path / "data", "animals"))], max_length=32
    )


@pytest.mark.parametrize("layer", ["encoder.layer.0.intermediate.dense", "encoder.layer.0.attention.self.value"])
def test_moments_are_those_of_a_loop_over_examples(evaluator: Evaluator, layer: str) -> None:
    """One example at a time there is no padding; labels of the data, so that nothing is drawn."""
    encoder, inputs, head = evaluator.encoder, evaluator.inputs("animals", "train"), evaluator.heads["animals"]
    found = collect_moments(encoder, inputs, head, labels="data", limit=12)
    module = encoder.backbone.get_submodule(layer)
    seen: list[torch.Tensor] = []

    def hook(_: object, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.extend((given[0][0], output))

    handle = module.register_forward_hook(hook)
    a: torch.Tensor | float = 0.0
    g: torch.Tensor | float = 0.0
    for index in range(12):
        seen.clear()
        loss = head.loss(encoder.module(**inputs.batch([index])), torch.tensor([inputs.labels[index]]))
        (gradient,) = torch.autograd.grad(loss, [seen[1]])
        for token in range(len(seen[0])):
            a = a + torch.outer(seen[0][token], seen[0][token]).detach() / 12
            g = g + torch.outer(gradient[0, token], gradient[0, token]) / 12
    handle.remove()
    assert isinstance(a, torch.Tensor)
    assert isinstance(g, torch.Tensor)
    one = found[f"{layer}.weight"]
    assert one.examples == 12
    assert relative(one.inputs, a) < 1e-4
    assert relative(one.gradients, g) < 1e-4
    assert len({len(inputs.batch([i])["input_ids"][0]) for i in range(12)}) > 1  # there was something to pad


def test_drawn_labels_follow_the_seed_and_hooks_are_gone(evaluator: Evaluator) -> None:
    encoder, inputs, head = evaluator.encoder, evaluator.inputs("animals", "train"), evaluator.heads["animals"]
    first, again, other = (collect_moments(encoder, inputs, head, seed=seed) for seed in (0, 0, 1))
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(first[name].gradients, again[name].gradients)
    assert not torch.equal(first[name].gradients, other[name].gradients)
    assert torch.equal(first[name].inputs, other[name].inputs)
    assert float(torch.linalg.eigvalsh(first[name].gradients)[0]) > -1e-9
    assert not any(module._forward_hooks for module in encoder.module.modules())
    assert all(parameter.grad is None for parameter in encoder.module.parameters())
    assert not any("LayerNorm" in key or "embeddings" in key for key in first)


def test_saved_and_read_again(evaluator: Evaluator, tmp_path: Path) -> None:
    found = collect_moments(evaluator.encoder, evaluator.inputs("animals", "train"), evaluator.heads["animals"], limit=4)
    save_moments(found, tmp_path / "a" / "moments.safetensors")
    read = load_moments(tmp_path / "a" / "moments.safetensors")
    assert sorted(read) == sorted(found)
    for name, one in found.items():
        assert torch.equal(read[name].inputs, one.inputs)
        assert torch.equal(read[name].gradients, one.gradients)
        assert read[name].examples == 4
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="bad: cannot be read as evidence"):
        load_moments(tmp_path / "bad")


def test_what_cannot_be_measured(evaluator: Evaluator) -> None:
    encoder, inputs, head = evaluator.encoder, evaluator.inputs("animals", "train"), evaluator.heads["animals"]
    with pytest.raises(DataError, match="Got 0 examples and 7 layers"):
        collect_moments(encoder, inputs, head, limit=0)
