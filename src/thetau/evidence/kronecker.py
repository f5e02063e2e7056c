r"""Second moments of the inputs and of the output gradients of every linear layer, from data.

The factors of K-FAC (Martens and Grosse, ICML 2015, <https://arxiv.org/abs/1503.05671>): with y = W a at each position (token or patch),
A = E[a aᵀ] and G = E[g gᵀ], g being the gradient in y of one example's loss; E sums over positions and averages over examples.
Positions that a text does not have (padding) count in neither. The loss's labels are drawn from the model's own predictions (the Fisher
matrix), or are the data's (the empirical one), for which the gradients vanish on what a model has learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError
from thetau.evidence.files import read_facts, save_evidence
from thetau.models import Encoder
from thetau.tasks.encoding import ordered_batches
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs

Labels = Literal["model", "data"]


@final
@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of one layer: `inputs` is A, `gradients` is G, both float32; `examples` is how many they were averaged over."""

    inputs: Float[Tensor, "d_in d_in"]
    gradients: Float[Tensor, "d_out d_out"]
    examples: int


def collect_moments(
    encoder: Encoder, inputs: Inputs, head: AnyHead, *, labels: Labels = "model", limit: int | None = None, seed: int = 0
) -> dict[str, Moments]:
    """By the checkpoint's name of the layer's weight, with the weights that `encoder` runs with now.

    Every `nn.Linear` of the backbone whose weight the checkpoint names is measured; layers of another class (GPT-2's Conv1D) are not.
    `limit` takes the first examples; `seed` is of the labels that are drawn. Raises `DataError`: no example, or no such layer.
    """
    if labels not in ("model", "data"):
        raise DataError(f"`collect_moments(labels=...)` must be model or data. Got {labels!r}.")
    count = len(inputs) if limit is None else min(limit, len(inputs))
    layers = _layers(encoder)
    if count < 1 or not layers:
        raise DataError(
            f"second moments need at least one example and one linear layer. Got {count} examples and {len(layers)} layers."
        )
    sums = {
        name: (
            torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64),
            torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64),
        )
        for name, layer in layers.items()
    }
    generator = torch.Generator().manual_seed(seed)
    lengths = list(inputs.lengths)[:count]
    encoder.module.eval()
    with torch.enable_grad(), _watched(layers, sums) as place:
        for indices in ordered_batches(lengths):
            columns = inputs.batch(indices)
            place.mask = columns.get("attention_mask")
            features = encoder.module(**columns)
            loss = head.loss(features, _labels(features, head, inputs, indices, labels, generator)) * len(indices)  # a sum
            outputs = [output for output in place.outputs.values() if output.requires_grad]
            for name, gradient in zip(place.outputs, torch.autograd.grad(loss, outputs, allow_unused=True), strict=True):
                if gradient is not None:
                    rows = gradient.reshape(-1, gradient.shape[-1])
                    sums[name][1].add_((rows.T @ rows).double())
            place.outputs.clear()
    return {
        name: Moments(inputs=(a / count).float(), gradients=(g / count).float(), examples=count) for name, (a, g) in sums.items()
    }


def save_moments(moments: Mapping[str, Moments], path: Path) -> None:
    """Write as safetensors, whole or not at all. Raises `OutputError`."""
    content = {f"{side}/{name}": getattr(one, side) for name, one in moments.items() for side in ("inputs", "gradients")}
    examples = str(next((one.examples for one in moments.values()), 0))
    save_evidence(path, "kronecker", content, {"examples": examples})


def load_moments(path: Path) -> dict[str, Moments]:
    """Read what `save_moments` wrote. Raises `CheckpointError`."""
    note = read_facts(path, "kronecker")
    try:
        content = load_file(path)
        names = [key.removeprefix("inputs/") for key in content if key.startswith("inputs/")]
        return {
            name: Moments(
                inputs=content[f"inputs/{name}"], gradients=content[f"gradients/{name}"], examples=int(note.get("examples", 0))
            )
            for name in names
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as second moments ({error}). Collect them again.") from error


def _layers(encoder: Encoder) -> dict[str, nn.Linear]:
    """The checkpoint's name of the weight → layer."""
    return {
        encoder.names[f"{name}.weight"]: module
        for name, module in encoder.backbone.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in encoder.names
    }


def _labels(
    features: Tensor, head: AnyHead, inputs: Inputs, indices: list[int], labels: Labels, generator: torch.Generator
) -> Tensor:
    if labels == "data":
        return torch.tensor([inputs.labels[i] for i in indices])
    with torch.no_grad():
        return torch.multinomial(head.logits(features).softmax(-1), 1, generator=generator)[:, 0]


class _Place:
    """What the hooks share during one batch."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}


@contextmanager
def _watched(layers: Mapping[str, nn.Linear], sums: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[_Place]:
    """Sum up a aᵀ as the layers run, and keep their outputs for the gradient."""
    place = _Place()

    def watch(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            rows = given[0].detach()
            if place.mask is not None and rows.shape[:-1] == place.mask.shape:
                rows = rows[place.mask.bool()]
            rows = rows.reshape(-1, rows.shape[-1])
            sums[name][0].add_((rows.T @ rows).double())
            place.outputs[name] = output

        return layers[name].register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        yield place
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
