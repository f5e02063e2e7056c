r"""The linear layers of a live model: what goes into each and what comes out, as rows without padding.

A layer is whatever multiplies by a stored weight: a linear one, GPT-2's transposed `Conv1D`, a convolution (its input unfolded, so that a row
is what one position of the kernel sees, in the order of the weight's flattened entries), and torch's attention module, whose fused
in_proj and out_proj run inside one function where no hook sees them: it is run here piece by piece while it is watched.

Positions that a text does not have (padding) are left out: of an encoder by its attention mask, of a text-to-text decoder by the tokens
of the labels' texts, and of what the decoder reads of the encoder by the encoder's mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, final

import torch
from torch import Tensor, nn

from thetau.models import Encoder
from thetau.models.language import IGNORED
from thetau.models.library import transformers

Rows = Callable[[Tensor], Tensor]
Seen = Callable[[str, Tensor], None]


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product with a stored weight.

    - `module`: whose call it is, `weight`: the weight's name inside it.
    - `before`, `after`: input and output of the call → `[*positions, d_in]`, `[*positions, d_out]`.
    """

    module: nn.Module
    weight: str
    d_in: int
    d_out: int
    before: Rows
    after: Rows


def _as_it_is(x: Tensor) -> Tensor:
    return x


@singledispatch
def layers_of(module: nn.Module) -> list[Layer]:
    """The layers that a module itself is, without those of the modules in it."""
    return []


@layers_of.register
def _(module: nn.Linear) -> list[Layer]:
    return [
        Layer(
            module=module,
            weight="weight",
            d_in=module.in_features,
            d_out=module.out_features,
            before=_as_it_is,
            after=_as_it_is,
        )
    ]


@layers_of.register
def _(module: nn.MultiheadAttention) -> list[Layer]:
    if not _splittable(module):
        return []
    d = module.embed_dim
    return [Layer(module=module, weight="in_proj_weight", d_in=d, d_out=3 * d, before=_as_it_is, after=_as_it_is)]


@layers_of.register(nn.Conv1d)
@layers_of.register(nn.Conv2d)
def _(module: Any) -> list[Layer]:
    if module.groups != 1:
        return []
    d_in = int(module.weight[0].numel())

    def before(x: Tensor) -> Tensor:
        """`[example, position, d_in]`."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        flat = x.ndim - 2 == 1  # of one dimension: as an image of one row
        sides = [(1, *side) if flat else side for side in (module.kernel_size, module.dilation, module.stride)]
        found: Tensor = nn.functional.unfold(x[:, :, None] if flat else x, sides[0], dilation=sides[1], stride=sides[2])
        return found.transpose(1, 2)

    def after(y: Tensor) -> Tensor:
        return y.flatten(2).transpose(1, 2)

    return [
        Layer(module=module, weight="weight", d_in=d_in, d_out=int(module.out_channels), before=before, after=after),
    ]


def _know_conv1d() -> None:
    """Teach `layers_of` GPT-2's linear layer, whose weight is `[d_in, d_out]`."""
    kind = transformers().pytorch_utils.Conv1D
    if kind not in layers_of.registry:

        def layers(module: Any) -> list[Layer]:
            d_in, d_out = module.weight.shape
            return [Layer(module=module, weight="weight", d_in=d_in, d_out=d_out, before=_as_it_is, after=_as_it_is)]

        layers_of.register(kind)(layers)  # type: ignore[no-untyped-call]


def measurable(encoder: Encoder) -> dict[str, Layer]:
    """The checkpoint's name of the weight → layer; of a weight that two modules share the first one's name."""
    _know_conv1d()
    found: dict[str, Layer] = {}
    for path, module in encoder.backbone.named_modules():
        for layer in layers_of(module):
            name = encoder.names.get(f"{path}.{layer.weight}" if path else layer.weight)
            if name is not None:
                found[name] = layer
    return found


# Watching


@final
@dataclass
class Positions:
    """Which positions of the batch that is running are real."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    read: Tensor | None = None  # what a decoder reads of its encoder

    def rows(self, x: Tensor) -> Tensor:
        """`[row, feature]` of `[*positions, feature]`, without padding."""
        mask = self._mask(x)
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]

    def _mask(self, x: Tensor) -> Tensor | None:
        mask, labels = self.columns.get("attention_mask"), self.columns.get("label_ids")
        if mask is None:
            return None
        if x.shape[:-1] == mask.shape:
            return mask.bool()
        if labels is None or x.ndim != 3 or len(x) != len(mask) * len(labels):
            return None
        if self.read is not None and x.data_ptr() == self.read.data_ptr() and x.shape == self.read.shape:
            return mask.bool().repeat_interleave(len(labels), 0)
        told = (labels != IGNORED).repeat(len(mask), 1)  # a position counts where it tells a token
        return told if told.shape == x.shape[:-1] else None


@contextmanager
def watched(
    encoder: Encoder, layers: Mapping[str, Layer], seen: Seen | None = None, made: Seen | None = None
) -> Iterator[Positions]:
    """While it lasts, every call of a layer tells `seen` of its input and `made` of its output, `[*positions, feature]` both.

    Set `columns` of what is yielded to the batch before each run.
    """
    place = Positions()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    by_module: dict[int, list[tuple[str, Layer]]] = {}
    for name, layer in layers.items():
        by_module.setdefault(id(layer.module), []).append((name, layer))
    handles: list[Any] = []
    replaced: list[nn.Module] = []

    def tell(name: str, layer: Layer, given: Tensor, output: Tensor) -> None:
        if seen is not None:
            seen(name, layer.before(given))
        if made is not None:
            made(name, layer.after(output))

    def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outputs = kwargs.get("encoder_outputs")
        place.read = None if outputs is None else outputs[0]

    try:
        handles.append(encoder.backbone.register_forward_pre_hook(read, with_kwargs=True))
        for module in encoder.backbone.modules():
            mine = by_module.get(id(module), [])
            if isinstance(module, nn.MultiheadAttention) and _splittable(module):

                def inside(x: Tensor, y: Tensor, mine: list[tuple[str, Layer]] = mine) -> None:
                    for name, layer in mine:
                        tell(name, layer, x, y)

                module.forward = _Split(module, inside)  # type: ignore[method-assign]
                replaced.append(module)
            else:
                for name, layer in mine:

                    def hook(_: nn.Module, given: Any, output: Any, name: str = name, layer: Layer = layer) -> None:
                        tell(name, layer, given[0], output)

                    handles.append(module.register_forward_hook(hook))
        yield place
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward
        torch.backends.mha.set_fastpath_enabled(fast)


def _splittable(module: nn.MultiheadAttention) -> bool:
    """Whether the module's attention is one in_proj of one width, with nothing added to keys and values."""
    return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn


@final
@dataclass(frozen=True)
class _Split:
    """The call of torch's attention module in evaluation mode, piece by piece; `inside` is told of in_proj's input and output.

    Where query, key and value are different tensors in_proj has no one input, and nothing is told of it; out_proj runs as the module that it is.
    """

    module: nn.MultiheadAttention
    inside: Callable[[Tensor, Tensor], None]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        weight, bias = module.in_proj_weight, module.in_proj_bias
        one = query is key and key is value
        batched = query.ndim == 3
        first = module.batch_first or not batched  # the batch is the first dimension, or there is none
        query, key, value = (x if first else x.transpose(0, 1) for x in (query, key, value))
        if one:
            made = nn.functional.linear(query, weight, bias)
            self.inside(query, made)
            q, k, v = made.chunk(3, -1)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            pieces = zip((query, key, value), weight.chunk(3), biases, strict=True)
            q, k, v = (nn.functional.linear(*piece) for piece in pieces)
        heads = module.num_heads
        q, k, v = (x.reshape(*x.shape[:-1], heads, -1).transpose(-3, -2) for x in (q, k, v))  # [batch, head, position, d]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[..., None, None, :]):
            if mask is not None:
                grown = mask.reshape(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
                scores = scores.masked_fill(grown, -math.inf) if mask.dtype == torch.bool else scores + grown
        shares = scores.softmax(-1)
        out = module.out_proj((shares @ v).transpose(-3, -2).flatten(-2))
        told = (shares.mean(-3) if average_attn_weights else shares) if need_weights else None
        return (out if first else out.transpose(0, 1)), told


def sharing(encoder: Encoder, layers: Mapping[str, Layer], columns: Mapping[str, Tensor]) -> dict[str, str]:
    """Which layers read the very same tensors: layer → the first one that does, of those that ran at all, in the order in which they ran.

    Told by running one batch, of few examples, whose layers' inputs are all held meanwhile. A convolution, which unfolds its input, and
    a fused in_proj share with none.
    """
    held: list[Tensor] = []
    signs: dict[str, list[Any]] = {}
    ran: list[str] = []

    def note(name: str, given: Tensor) -> None:
        held.append(given)  # so that no other tensor gets its place in memory
        signs.setdefault(name, []).append((given.data_ptr(), given.shape, given.stride(), given._version))

    handles = [
        layer.module.register_forward_hook(lambda _, given, out, name=name: note(name, given[0]))
        for name, layer in layers.items()
        if layer.weight == "weight" and layer.before is _as_it_is
    ]
    try:
        with torch.no_grad(), watched(encoder, layers, seen=lambda name, _: ran.append(name)) as place:
            place.columns = columns
            encoder.module(**dict(columns))
    finally:
        for handle in handles:
            handle.remove()
    first: dict[Any, str] = {}
    return {name: first.setdefault(tuple(signs[name]), name) if name in signs else name for name in dict.fromkeys(ran)}


def groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in runs whose sizes add up to no more than a limit, in their order; what is larger alone is a run of its own."""
    found: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not found or held + size > limit:
            found.append([])
            held = 0
        found[-1].append(name)
        held += size
    return found


def batched(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices in batches of so many, the shortest examples first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + width] for start in range(0, len(order), width)]
