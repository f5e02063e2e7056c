r"""A live encoder whose MLPs are mixed for each input: θ₀ + Σ_t w_t(x) τ_t, w being what a small router makes of the block's own input.

Weight-ensembling mixture of experts (Tang et al., ICML 2024, <https://arxiv.org/abs/2402.00433>). A block's router reads what enters its MLP at each position
and the mean over the positions is w, one number a task, with no softmax; padding counts nowhere. All linear layers of the block's MLP, biases too, are
mixed by the same w.

An input's mixed weights are made when its turn is and forgotten: a product runs over a few examples at once, and the backward pass makes the weights anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.checkpoint import Kind, Roles
from thetau.errors import DataError
from thetau.models.encoder import Encoder

_ENTRIES = 1 << 24  # of mixed weights that are held at once
_KINDS = ("sentence", "image", "mask")  # of encoders whose blocks see each example once
_BIAS = "bias"


@final
@dataclass(frozen=True, kw_only=True)
class Router:
    """w = b₂ (depth 0), W₂ h + b₂ (1) or W₂ ReLU(W₁ h + b₁) + b₂ (2), meant over the positions.

    `tensors`: `second_bias` `[task]`, `second` `[task, d]`, `first` `[d, d]`, `first_bias` `[d]`, as many as the depth has.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def drawn(cls, depth: int, width: int, tasks: int, start: float, generator: torch.Generator) -> Router:
        """One that gives about `start` to every task: matrices of deviation 0.01, as the authors'."""
        made: dict[str, Tensor] = {"second_bias": torch.full((tasks,), float(start))}
        if depth >= 1:
            made["second"] = 0.01 * torch.randn(tasks, width, generator=generator)
        if depth >= 2:
            made["first"] = 0.01 * torch.randn(width, width, generator=generator)
            made["first_bias"] = torch.zeros(width)
        return cls(tensors=made)

    def __call__(
        self, inputs: Float[Tensor, "example position feature"], mask: Float[Tensor, "example position"] | None
    ) -> Float[Tensor, "example task"]:
        """How much of each task's vector each example gets; the positions that `mask` leaves out count nowhere."""
        known = self.tensors
        if "second" not in known:
            return known["second_bias"].expand(len(inputs), -1)
        hidden = inputs
        if "first" in known:
            hidden = nn.functional.linear(hidden, known["first"], known["first_bias"]).relu()
        count = hidden.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
        hidden = (hidden if mask is None else hidden * mask[..., None]).sum(1) / count
        found: Tensor = nn.functional.linear(hidden, known["second"], known["second_bias"])  # linear, so the mean goes before it
        return found


@final
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What mixes a model's MLPs.

    - `blocks`: block → the checkpoint's names of its MLP's weights, in the order in which they run.
    - `routers`: of each block. `vectors`: the checkpoint's name of a weight or bias → what each task adds to it, `[task, *shape]`.
    """

    tasks: tuple[str, ...]
    blocks: Mapping[str, tuple[str, ...]]
    routers: Mapping[str, Router]
    vectors: Mapping[str, Tensor]

    def hash(self) -> str:
        """A hexadecimal digest of all that decides what it makes."""
        digest = hashlib.blake2b(repr((self.tasks, sorted(self.blocks.items()))).encode(), digest_size=16)
        parts = {f"{block}/{name}": tensor for block, router in self.routers.items() for name, tensor in router.tensors.items()}
        for name, tensor in sorted((parts | dict(self.vectors)).items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def mlp_blocks(encoder: Encoder, columns: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Block → the names of its MLP's linear weights, in the order in which they run on a batch of one example.

    Raises:
        DataError: the encoder is of another kind, has no MLP that can be mixed, or runs its blocks with another axis for the examples.
    """
    if encoder.kind not in _KINDS:
        raise DataError(
            f"{encoder.folder}: is of kind {encoder.kind}, and MLPs are mixed by input in encoders of {', '.join(_KINDS)}: there each block sees each "
            "example once. Merge it without a mixture."
        )
    found: dict[str, list[str]] = {}
    strange: list[str] = []

    def note(block: str, name: str, given: Tensor) -> None:
        if given.ndim != 3 or len(given) != 1:
            strange.append(f"{name} reads {list(given.shape)}")
        found.setdefault(block, []).append(name)

    layers = _layers(encoder)
    handles = [
        module.register_forward_pre_hook(lambda _, given, block=block, name=name: note(block, name, given[0]))
        for name, (block, module) in layers.items()
    ]
    try:
        with torch.no_grad():
            encoder.module(**columns)
    finally:
        for handle in handles:
            handle.remove()
    again = [name for names in found.values() for name in names if names.count(name) > 1]
    if strange or again:
        raise DataError(
            f"{encoder.folder}: MLPs are mixed where each reads `[example, position, feature]` once. "
            f"Got {strange[0] if strange else f'{again[0]} twice'}. Merge it without a mixture."
        )
    if not found:
        raise DataError(
            f"{encoder.folder}: no linear layer of an MLP inside a block is known by its name, so there is nothing to mix."
        )
    return {block: tuple(names) for block, names in found.items()}


def _layers(encoder: Encoder) -> dict[str, tuple[str, nn.Linear]]:
    """The checkpoint's name of each MLP weight → its block, and the module whose weight it is."""
    shapes = {
        encoder.names[live]: tuple(tensor.shape)
        for live, tensor in encoder.backbone.state_dict().items()
        if live in encoder.names
    }
    roles = Roles(shapes=shapes, folder=encoder.folder if (encoder.folder / "config.json").is_file() else None)
    found: dict[str, tuple[str, nn.Linear]] = {}
    for path, module in encoder.backbone.named_modules():
        name = encoder.names.get(f"{path}.weight")
        if name is None or not isinstance(module, nn.Linear):
            continue
        role = roles.role(name, shapes[name])
        if role.kind is Kind.MLP and role.layer is not None:
            found[name] = (_block(name, role.layer), module)
    return found


def _block(name: str, layer: int) -> str:
    """What stands before the end of a block's number, so that blocks of two towers differ."""
    words = name.split(".")
    end = next((place for place, word in enumerate(words) if word == str(layer)), None)
    return str(layer) if end is None else ".".join(words[: end + 1])


def mixed_names(encoder: Encoder, blocks: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint's names of all that is mixed: the blocks' weights, and their biases where they have any."""
    live = {stored: name for name, stored in encoder.names.items()}
    found = []
    for weight in (name for names in blocks.values() for name in names):
        bias = encoder.names.get(f"{live[weight].removesuffix('weight')}{_BIAS}")
        found += [weight] if bias is None else [weight, bias]
    return found


@final
@dataclass
class Running:
    """What is known of the batch that runs: its mask, and each block's w, `[example, task]`, once its MLP has begun."""

    mask: Tensor | None = None
    examples: int = 0
    shares: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def mixing(encoder: Encoder, mixture: Mixture, base: Mapping[str, Tensor]) -> Iterator[tuple[Encoder, Running]]:
    """While it lasts, the encoder's MLPs are mixed by input, whichever weights are loaded into it for all else.

    Args:
        base: θ₀ of what is mixed, by the checkpoint's names.

    Yields:
        The encoder under a form of its own, for caches, and what is known of the batch that ran last.

    Raises:
        DataError: the mixture is of another model's layers.
    """
    device = next(encoder.module.parameters()).device
    layers, running = _layers(encoder), Running()
    lost = [name for names in mixture.blocks.values() for name in names if name not in layers]
    names = [] if lost else mixed_names(encoder, mixture.blocks)
    wrong = [name for name in names if name not in mixture.vectors or mixture.vectors[name].shape[1:] != base[name].shape]
    if lost or wrong:
        raise DataError(
            f"{encoder.folder}: the mixture is of another model: {(lost + wrong)[0]!r} is not there, or of another shape."
        )
    start = {name: base[name].to(device, torch.float32) for name in names}
    added = {name: mixture.vectors[name].to(device, torch.float32) for name in names}
    routers = {
        block: Router(tensors={name: tensor.to(device) for name, tensor in router.tensors.items()})
        for block, router in mixture.routers.items()
    }

    def begin(_: nn.Module, args: Any, columns: Mapping[str, Tensor]) -> None:
        mask = columns.get("attention_mask")
        running.mask = None if mask is None else mask.float()
        running.examples = len(next(iter(columns.values())))
        running.shares.clear()

    def shares_of(block: str, inputs: Tensor) -> Tensor:
        if block not in running.shares:
            if inputs.ndim != 3 or len(inputs) != running.examples:
                raise DataError(
                    f"{encoder.folder}: block {block} reads {list(inputs.shape)}, where `[example, position, feature]` of {running.examples} examples is "
                    "needed to mix its MLP."
                )
            running.shares[block] = routers[block](inputs, running.mask)
        return running.shares[block]

    handle = encoder.module.register_forward_pre_hook(begin, with_kwargs=True)
    replaced: list[nn.Module] = []
    try:
        for block, weights in mixture.blocks.items():
            for name in weights:
                module = layers[name][1]
                bias = _bias_of(encoder, name)
                module.forward = _Mixed(  # type: ignore[method-assign, assignment]
                    block=block,
                    shares_of=shares_of,
                    weight=start[name],
                    vectors=added[name],
                    bias=None if bias is None else start[bias],
                    biases=None if bias is None else added[bias],
                )
                replaced.append(module)
        yield replace(encoder, form=f"{encoder.form}, mixture {mixture.hash()}"), running
    finally:
        handle.remove()
        for one in replaced:
            del one.forward


def _bias_of(encoder: Encoder, weight: str) -> str | None:
    named = mixed_names(encoder, {"": (weight,)})
    return named[1] if len(named) > 1 else None


@final
@dataclass(frozen=True, kw_only=True)
class _Mixed:
    """A linear layer's call with weights of each example's own."""

    block: str
    shares_of: Callable[[str, Tensor], Tensor]
    weight: Tensor
    vectors: Tensor
    bias: Tensor | None
    biases: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        shares = self.shares_of(self.block, inputs)
        made: Tensor = _MixedProduct.apply(inputs, shares, self.weight, self.vectors)  # type: ignore[no-untyped-call]
        if self.bias is not None and self.biases is not None:
            made = made + (self.bias + shares @ self.biases)[:, None]
        return made


class _MixedProduct(torch.autograd.Function):
    """x (W + Σ_t w_t τ_t)ᵀ of each example, a few at once; gradients of x and w alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shares: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, shares, weight, vectors)
        made = [torch.bmm(inputs[part], _mixed(shares[part], weight, vectors).mT) for part in _parts(len(inputs), weight)]
        return torch.cat(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, shares, weight, vectors = ctx.saved_tensors
        (gradient,) = gradients
        below, slopes = [], []
        for part in _parts(len(inputs), weight):
            below.append(torch.bmm(gradient[part], _mixed(shares[part], weight, vectors)))
            slopes.append(torch.bmm(gradient[part].mT, inputs[part]).flatten(1) @ vectors.flatten(1).T)
        return torch.cat(below), torch.cat(slopes), None, None


def _mixed(shares: Tensor, weight: Tensor, vectors: Tensor) -> Float[Tensor, "example d_out d_in"]:
    made: Tensor = weight + (shares @ vectors.flatten(1)).reshape(-1, *weight.shape)
    return made


def _parts(examples: int, weight: Tensor) -> list[slice]:
    step = max(1, _ENTRIES // max(1, weight.numel()))
    return [slice(first, first + step) for first in range(0, examples, step)]
