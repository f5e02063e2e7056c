"""Our reading and merging of adapters against PEFT's: the largest differences, as a table in JSON.

    python -m experiments.adapters.parity [--out experiments/adapters/parity.json]

`forms`: weights and outputs of an adapter over its base against `merge_and_unload`. `combinations`: one adapter of three against
`add_weighted_adapter`, as relative errors of the products; where PEFT works on A and B apart (`linear`, `ties`, `dare_…`), the distance of
its result from the dense sum, or from the dense merge, is what its row says. DARE is compared without drops, since masks differ.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import thetau
from experiments.common import EXPERIMENTS, machine, write_result
from thetau.adapters import Cut, add, merge, open_adapter
from thetau.methods import TaskArithmetic, Ties
from thetau.parts import Method

RESULTS = EXPERIMENTS / "adapters" / "parity.json"
WEIGHTS = [1.0, -0.5, 0.75]
Build = Callable[[], nn.Module]


class Pictures(nn.Module):
    """Convolutions of one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.line = nn.Conv1d(8, 5, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[batch, 3, height, width]` → `[batch, 5]`."""
        out: Tensor = self.line(self.conv(pixels).relu().flatten(2)).mean(-1)
        return out


def llama() -> nn.Module:
    """A tiny Llama."""
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """A tiny GPT-2, whose layers are stored transposed."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))


TEXT = {"input_ids": torch.tensor([[1, 5, 7, 3, 39], [2, 2, 19, 0, 30]])}
IMAGES = {"pixels": torch.linspace(-1, 1, 2 * 3 * 36).reshape(2, 3, 6, 6)}
FORMS: Mapping[str, tuple[Build, Any, Mapping[str, Tensor]]] = {
    "LoRA": (llama, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), TEXT),
    "rsLoRA": (llama, peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]), TEXT),
    "rank and alpha patterns": (
        llama,
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        TEXT,
    ),
    "embeddings and head": (llama, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), TEXT),
    "modules to save": (llama, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), TEXT),
    "trained tokens": (llama, peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 5]), TEXT),
    "DoRA": (llama, peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]), TEXT),
    "DoRA, embedding": (llama, peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"]), TEXT),
    "DoRA, transposed": (
        gpt2,
        peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        TEXT,
    ),
    "biases of B, transposed": (gpt2, peft.LoraConfig(r=4, lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True), TEXT),
    "convolutions": (Pictures, peft.LoraConfig(r=4, target_modules=["conv", "line"]), IMAGES),
    "convolutions, DoRA": (Pictures, peft.LoraConfig(r=4, use_dora=True, target_modules=["conv", "line"]), IMAGES),
    "LoHa": (llama, peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"]), TEXT),
    "LoKr": (llama, peft.LoKrConfig(r=2, alpha=8, target_modules=["q_proj", "down_proj"]), TEXT),
    "(IA)³": (llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), TEXT),
}


def shaken(model: nn.Module, seed: int) -> None:
    """Random values added to everything that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or what the model gives."""
    with torch.no_grad():
        out = model.eval()(**inputs)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def form(build: Build, config: Any, inputs: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """The largest differences in weights and outputs, beside the largest change that the adapter makes."""
    torch.manual_seed(0)
    model = build()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = peft.get_peft_model(model, config)
    shaken(tuned, 1)
    tuned.save_pretrained(folder)
    merged = tuned.merge_and_unload()
    want, got = merged.state_dict(), thetau.open(folder, base=base).state_dict()
    torch.manual_seed(0)
    ours = build()
    ours.load_state_dict(got)
    return {
        "weights": max(float((got[name] - value).abs().max()) for name, value in want.items()),
        "outputs": float((outputs(ours, inputs) - outputs(merged, inputs)).abs().max()),
        "moved": max(float((want[name] - value).abs().max()) for name, value in base.items()),
    }


def products(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """PEFT's product of each layer."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach().double()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.lora_A
    }


def distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all layers."""
    lost = math.fsum(float((got[name] - value).square().sum()) for name, value in want.items())
    return math.sqrt(lost / math.fsum(float(value.square().sum()) for value in want.values()))


def combinations(folder: Path) -> dict[str, dict[str, float]]:
    """Each combination of PEFT against ours and against the dense one."""
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(
            llama(), peft.LoraConfig(r=4, lora_alpha=4 + 4 * seed, target_modules=["q_proj", "down_proj"])
        )
        shaken(tuned, seed + 1)
        tuned.save_pretrained(folder / name)
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(llama(), folder / "a", adapter_name="a")
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    opened = [open_adapter(folder / name) for name in names]
    each = [products(model, name) for name in names]

    def theirs(kind: str, weights: list[float], **options: Any) -> dict[str, Tensor]:
        label = f"{kind} {weights} {options}".replace(".", "_")
        model.add_weighted_adapter(names, weights, label, combination_type=kind, **options)
        return products(model, label)

    def summed(weights: list[float]) -> dict[str, Tensor]:
        return {layer: sum(w * one[layer] for w, one in zip(weights, each, strict=True)) for layer in each[0]}  # type: ignore[misc]

    def ours(method: Method | None, rank: int | None = None) -> dict[str, Tensor]:
        cut = Cut(rank=rank) if rank is not None else None
        made = add(opened, WEIGHTS, cut=cut) if method is None else merge(opened, method, cut=cut or Cut(rank=99))
        return {layer: module.factors.dense()[0] for layer, module in made.modules.items()}

    ones = [1.0, 1.0, 1.0]
    ties = Ties(density=0.5, trim="tensor", count="floor", cancelled="positive")
    dense = summed(WEIGHTS)
    rows: dict[str, dict[str, float]] = {
        "cat": {
            "ours": distance(ours(None), theirs("cat", WEIGHTS)),
            "theirs from the dense sum": distance(theirs("cat", WEIGHTS), dense),
        },
        "svd, rank 4": {
            "ours": distance(ours(None, 4), theirs("svd", WEIGHTS, svd_rank=4)),
            "theirs from the dense sum": distance(theirs("svd", WEIGHTS, svd_rank=4), dense),
        },
        "ties_svd, rank 8": {"ours": distance(ours(ties, 8), theirs("ties_svd", ones, svd_rank=8, density=0.5))},
        "dare_linear_svd, no drops": {
            "ours": distance(ours(TaskArithmetic(scale=1.0), 12), theirs("dare_linear_svd", ones, svd_rank=12, density=1.0))
        },
        "dare_ties_svd, no drops": {
            "ours": distance(
                ours(Ties(density=1.0, trim="tensor", cancelled="positive"), 32),
                theirs("dare_ties_svd", ones, svd_rank=32, density=1.0),
            )
        },
        "linear": {
            "ours": distance(ours(None), dense),
            "theirs from the dense sum": distance(theirs("linear", WEIGHTS), dense),
        },
        "dare_linear, no drops": {
            "ours": distance(ours(None), dense),
            "theirs from the dense sum": distance(theirs("dare_linear", WEIGHTS, density=1.0), dense),
        },
        "ties": {"theirs from the dense merge": distance(theirs("ties", ones, density=0.5), ours(ties, 99))},
    }
    return rows


def run() -> dict[str, Any]:
    """The whole table."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # PEFT's and transformers' advice
        folder = Path(place)
        forms = {
            name: form(build, config, inputs, folder / str(index))
            for index, (name, (build, config, inputs)) in enumerate(FORMS.items())
        }
        return {
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "machine": machine(),
            "forms": forms,
            "combinations": combinations(folder),
        }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    found = run()
    write_result(out, found)
    for name, row in (found["forms"] | found["combinations"]).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in row.items()))


if __name__ == "__main__":
    main()
