"""Gates of a mixture against those that mergekit-moe 0.1.5 makes of the same base and prompts, kept by `make_moe.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity.make_moe import CASES, document
from thetau.facade import Expression
from thetau.recipes.mergekit.moe import moe
from tiny import one_thread  # noqa: F401
from tiny_decoders import dense

pytestmark = pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")  # random models are strangers
FILE = Path(__file__).parent / "data" / "moe.safetensors"


@pytest.fixture(scope="module")
def kept() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def paths(kept: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The base with the very weights that mergekit had; the experts' play no part in gates."""
    root = tmp_path_factory.mktemp("dense")
    found = [str(dense(root / f"m{seed}", "llama", seed)) for seed in range(3)]
    save_file({name[5:]: value for name, value in kept.items() if name.startswith("base:")}, f"{found[0]}/model.safetensors")
    return found


def gates(paths: list[str], case: str) -> Tensor:
    made = moe(document(paths[0], paths[1:], case))
    tensors = Expression(((1.0, made),), reference=made).state_dict()
    return torch.stack([tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(3)])


@pytest.mark.parametrize("case", ["cheap_embed", "hidden", "hidden_avg"])
def test_gates_are_mergekits(case: str, paths: list[str], kept: dict[str, Tensor]) -> None:
    assert torch.allclose(gates(paths, case), kept[case], atol=2e-5)


def test_a_mean_over_prompts_of_several_lengths_is_of_real_tokens(paths: list[str], kept: dict[str, Tensor]) -> None:
    """mergekit takes padding into the mean, so that a prompt's gate depends on how long the prompts beside it are; ours does not."""
    ours, theirs = gates(paths, "hidden_avg_padded"), kept["hidden_avg_padded"]
    assert (ours - theirs).abs().max() > 0.05
    mode, prompts = CASES["hidden_avg_padded"]
    assert mode == "hidden_avg" and len({len(text.split()) for text in prompts[0]}) > 1
