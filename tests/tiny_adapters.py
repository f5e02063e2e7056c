"""Small models with every kind of layer that adapters change, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class Pictures(nn.Module):
    """Convolutions of one and two dimensions, some with a 1 × 1 kernel, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.out = nn.Linear(5, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.point(self.conv(pixels).relu()).flatten(2)
        out: Tensor = self.out(self.line(hidden).relu().mean(-1))
        return out


class Experts(nn.Module):
    """Fused experts: gate and up `[expert, 2 · hidden, in]`, down `[expert, in, hidden]`; or transposed."""

    def __init__(self, width: int = 6, hidden: int = 8, *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(3, 2 * hidden, width), (3, width, hidden)]
        shapes = [(count, b, a) for count, a, b in shapes] if transposed else shapes
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))

    def forward(self, hidden: Tensor) -> Tensor:
        up, down = ((part if self.is_transposed else part.transpose(1, 2)) for part in (self.gate_up_proj, self.down_proj))
        gate, value = (hidden @ up).chunk(2, -1)
        return (gate.relu() * value) @ down


class Mixture(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = Experts(**options)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.experts(self.first(hidden)).sum(0)
        return out


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8
    )
    return transformers.LlamaForCausalLM(config)


TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 3], [2, 2, 19, 0]])}
PIXELS = {"pixels": torch.linspace(-1, 1, 2 * 3 * 25).reshape(2, 3, 5, 5)}
HIDDEN = {"hidden": torch.linspace(-1, 1, 24).reshape(4, 6)}


def unet() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            "down_blocks.0.attentions.0.to_q.weight": torch.randn(4, 4),
            "down_blocks.0.attentions.0.to_q.bias": torch.randn(4),
            "down_blocks.0.resnets.0.conv1.weight": torch.randn(4, 3, 3, 3),
        }
