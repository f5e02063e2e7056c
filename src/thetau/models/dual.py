"""A tensor with a tangent: one pass through a model gives f(x; θ₀), J(x)·τ and the graph for Jᵀ·g.

A linearised step needs all three. Forward-mode differentiation of torch gives the first two and records, where gradients are
asked for, a second graph of the tangents that is never walked: time and, above all, memory. Here the primal runs through
autograd as in any training step, and the tangent beside it in `no_grad`, so that nothing of it stays. Where an operation has a
symmetric Jacobian (layer norm without its affine part, softmax, every elementwise function) its own backward kernel is the
forward rule. Operations without a rule here take torch's forward mode, one operation at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from thetau.errors import ThetauError

F = nn.functional


@final
class NoRuleError(ThetauError):
    """A model does something that this way of differentiating cannot follow; torch's own forward mode may."""


@final
class Dual(Tensor):
    """`primal` with its `tangent`, of one shape. Made by `Dual.of`, used as any tensor by a model's forward."""

    primal: Tensor
    tangent: Tensor

    @staticmethod
    def of(primal: Tensor, tangent: Tensor) -> Dual:
        """Pair the two."""
        made: Dual = Tensor._make_wrapper_subclass(
            Dual, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device, layout=primal.layout
        )
        made.primal, made.tangent = primal, tangent
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Dual({tuple(self.primal.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return _attribute(func, args[0])
        rule = _RULES.get(name)
        out = NotImplemented if rule is None else rule(func, *args, **kwargs)
        return _forward_mode(func, args, kwargs) if out is NotImplemented else out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise NoRuleError(f"{func} met a tensor with a tangent below torch's function level.")


def primal_of(value: Any) -> Any:
    """The tensor without its tangent; anything else as it is."""
    return value.primal if isinstance(value, Dual) else value


def tangent_of(value: Any) -> Tensor | None:
    """The tangent, or None where the value does not depend on the parameters."""
    return value.tangent if isinstance(value, Dual) else None


def _attribute(func: Any, dual: Dual) -> Any:
    """`.shape`, `.dtype`, `.device`, …: of the primal; views such as `.T` of both."""
    out = func(dual.primal)
    if isinstance(out, Tensor) and out.is_floating_point() and out.shape.numel() == dual.primal.numel():
        return Dual.of(out, func(dual.tangent))
    return out


def _map(values: Any, change: Callable[[Any], Any]) -> Any:
    flat, spec = tree_flatten(values)
    return tree_unflatten([change(value) for value in flat], spec)


def _pair(primals: Any, tangents: Any) -> Any:
    """Outputs of one operation: tensors or (named) tuples of them."""
    first, spec = tree_flatten(primals)
    second = tree_flatten(tangents)[0]
    pairs = [Dual.of(p, t) if isinstance(p, Tensor) and t is not None else p for p, t in zip(first, second, strict=True)]
    return tree_unflatten(pairs, spec)


def _forward_mode(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation on the primals, and once more under torch's forward mode for the tangent."""
    name = func.__name__
    if name in ("__setitem__", "set_") or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
        raise NoRuleError(f"`{name}` writes into a tensor that depends on the parameters.")
    primals = func(*_map(tuple(args), primal_of), **_map(dict(kwargs), primal_of))
    if not any(isinstance(out, Tensor) and out.is_floating_point() for out in tree_flatten(primals)[0]):
        return primals
    with torch.no_grad(), forward_ad.dual_level(), math_attention():

        def dual(value: Any) -> Any:
            if not isinstance(value, Dual):
                return value
            return forward_ad.make_dual(value.primal.detach(), value.tangent)  # type: ignore[no-untyped-call]

        outs = func(*_map(tuple(args), dual), **_map(dict(kwargs), dual))
        tangents = _map(outs, lambda out: forward_ad.unpack_dual(out).tangent if _floating(out) else None)  # type: ignore[no-untyped-call]
    return _pair(primals, tangents)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention by the kernel that has a forward derivative, and no fused path of `nn.MultiheadAttention`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# The rules. Each returns NotImplemented where it does not hold.


def _linear_map(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Views, copies and sums: the same operation on the tangent of its one tensor."""
    first, *rest = args
    if not isinstance(first, Dual) or any(isinstance(value, Dual) for value in (*rest, *kwargs.values())):
        return NotImplemented
    primals = func(first.primal, *rest, **kwargs)
    with torch.no_grad():
        tangents = func(first.tangent, *rest, **kwargs)
    return _pair(primals, tangents)


def _joined(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`cat` and `stack`: zeros where a part has no tangent."""
    primals = func([primal_of(tensor) for tensor in tensors], *args, **kwargs)
    with torch.no_grad():
        parts = [tensor.tangent if isinstance(tensor, Dual) else torch.zeros_like(tensor) for tensor in tensors]
        return Dual.of(primals, func(parts, *args, **kwargs))


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """y = xWᵀ + b: dy = dx Wᵀ + x dWᵀ + db, two products."""
    px, pw, pb = primal_of(x), primal_of(weight), primal_of(bias)
    dx, dw, db = tangent_of(x), tangent_of(weight), tangent_of(bias)
    primal = F.linear(px, pw, pb)
    with torch.no_grad():
        if dw is None:
            tangent = F.linear(dx, pw, db) if dx is not None else _wide(db, primal)
        else:
            tangent = F.linear(px, dw, db)
            if dx is not None:
                flat = tangent.view(-1, tangent.shape[-1])
                flat.addmm_(dx.reshape(-1, dx.shape[-1]).to(flat.dtype), pw.t().to(flat.dtype))
    return Dual.of(primal, tangent)


def _wide(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent.expand_as(like)


def _bilinear(func: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> Any:
    """A product of any kind: d(a·b) = da·b + a·db."""
    if rest or kwargs:
        return NotImplemented
    pa, pb, da, db = primal_of(a), primal_of(b), tangent_of(a), tangent_of(b)
    primal = func(pa, pb)
    with torch.no_grad():
        tangent = func(da, pb) if da is not None else None
        if db is not None:
            second = func(pa, db)
            tangent = second if tangent is None else tangent.add_(second)
    return Dual.of(primal, tangent) if tangent is not None else primal


def _sum(func: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> Any:
    if rest or kwargs or not _floating(primal_of(a) if isinstance(a, Dual) else primal_of(b)):
        return NotImplemented
    primal = func(primal_of(a), primal_of(b))
    da, db = tangent_of(a), tangent_of(b)
    with torch.no_grad():
        if da is not None and db is not None:
            tangent = func(da, db)
        elif da is not None:
            tangent = da if da.shape == primal.shape else da.expand_as(primal)
        else:
            tangent = func(torch.zeros_like(primal), db)  # the sign is the function's own
    return Dual.of(primal, tangent.to(primal.dtype))


def _division(func: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> Any:
    if rest or kwargs or isinstance(b, Dual):
        return NotImplemented
    with torch.no_grad():
        tangent = func(a.tangent, b)
    return Dual.of(func(a.primal, b), tangent)


def _convolution(func: Any, x: Any, weight: Any, bias: Any = None, *rest: Any, **kwargs: Any) -> Any:
    px, pw, pb = primal_of(x), primal_of(weight), primal_of(bias)
    dx, dw, db = tangent_of(x), tangent_of(weight), tangent_of(bias)
    primal = func(px, pw, pb, *rest, **kwargs)
    with torch.no_grad():
        if dw is None and dx is None:
            return Dual.of(primal, _wide(None if db is None else db.view(-1, *[1] * (primal.ndim - 2)), primal))
        parts = [] if dw is None else [func(px, dw, db, *rest, **kwargs)]
        if dx is not None:
            parts.append(func(dx, pw, db if dw is None else None, *rest, **kwargs))
        return Dual.of(primal, parts[0] if len(parts) == 1 else parts[0].add_(parts[1]))


def _embedding(func: Any, indices: Tensor, weight: Any, *rest: Any, **kwargs: Any) -> Any:
    if isinstance(indices, Dual) or kwargs.get("max_norm") is not None:
        return NotImplemented
    primal = func(indices, weight.primal, *rest, **kwargs)
    with torch.no_grad():
        return Dual.of(primal, func(indices, weight.tangent, *rest, **kwargs))


def _layer_norm(func: Any, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """The normalised part has a symmetric Jacobian: its backward kernel maps dx to dx̂."""
    px, pw, pb = primal_of(x), primal_of(weight), primal_of(bias)
    dx, dw, db = tangent_of(x), tangent_of(weight), tangent_of(bias)
    shape = list(shape)
    if px.dtype != torch.float32:
        return NotImplemented
    primal, mean, rstd = torch.native_layer_norm(px, shape, pw, pb, eps)
    with torch.no_grad():
        tangent = None
        if dw is not None:
            tangent = F.layer_norm(px, shape, dw, db, eps)
        elif db is not None:
            tangent = db.expand_as(primal)
        if dx is not None:
            hat = torch.ops.aten.native_layer_norm_backward(
                dx.contiguous(), px, shape, mean, rstd, None, None, [True, False, False]
            )[0]
            scaled = hat if pw is None else hat.mul_(pw)
            tangent = scaled if tangent is None else scaled.add_(tangent)
    return Dual.of(primal, tangent) if tangent is not None else primal


def _softmax(func: Any, x: Any, dim: int | None = None, *rest: Any, **kwargs: Any) -> Any:
    if kwargs.pop("dim", dim) is not None:
        dim = dim if dim is not None else -1
    if rest or dim is None or any(value is not None for key, value in kwargs.items() if key not in ("_stacklevel",)):
        return NotImplemented
    primal = torch.softmax(x.primal, dim)
    with torch.no_grad():
        return Dual.of(primal, torch._softmax_backward_data(x.tangent, primal, dim, primal.dtype))


def _gelu(func: Any, x: Any, approximate: str = "none") -> Any:
    with torch.no_grad():
        tangent = torch.ops.aten.gelu_backward(x.tangent, x.primal, approximate=approximate)
    return Dual.of(func(x.primal, approximate=approximate), tangent)


def _tanh(func: Any, x: Any) -> Any:
    primal = func(x.primal)
    with torch.no_grad():
        return Dual.of(primal, torch.ops.aten.tanh_backward(x.tangent, primal))


def _relu(func: Any, x: Any, inplace: bool = False) -> Any:
    primal = F.relu(x.primal)
    with torch.no_grad():
        return Dual.of(primal, torch.ops.aten.threshold_backward(x.tangent, x.primal, 0))


def _silu(func: Any, x: Any, inplace: bool = False) -> Any:
    with torch.no_grad():
        tangent = torch.ops.aten.silu_backward(x.tangent, x.primal)
    return Dual.of(F.silu(x.primal), tangent)


def _dropout(func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise NoRuleError("dropout draws at random; a model is linearised in evaluation mode.")
    return x


def _masked_fill(func: Any, x: Any, mask: Tensor, value: Any) -> Any:
    if isinstance(mask, Dual) or isinstance(value, Dual) or not isinstance(x, Dual):
        return NotImplemented
    with torch.no_grad():
        tangent = x.tangent.masked_fill(mask, 0)
    return Dual.of(func(x.primal, mask, value), tangent)


def _attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The primal by whichever kernel is fastest; the tangent from the probabilities, which are formed once and dropped.

    dS = (dQ Kᵀ + Q dKᵀ)·s, dP = P ∘ (dS − Σ P ∘ dS), dO = dP V + P dV.
    """
    if isinstance(attn_mask, Dual) or dropout_p > 0:
        return NotImplemented
    q, k, v = primal_of(query), primal_of(key), primal_of(value)
    dq, dk, dv = tangent_of(query), tangent_of(key), tangent_of(value)
    primal = func(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    with torch.no_grad():
        if enable_gqa and q.shape[-3] != k.shape[-3]:
            times = q.shape[-3] // k.shape[-3]
            k, v, dk, dv = (None if x is None else x.repeat_interleave(times, -3) for x in (k, v, dk, dv))
        assert k is not None and v is not None
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        tangent = None
        logits = (q * factor) @ k.mT
        if is_causal:
            logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -math.inf)
        if attn_mask is not None:
            logits = logits.masked_fill_(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits.add_(attn_mask)
        share = torch.softmax(logits, -1)
        if attn_mask is not None:
            share.nan_to_num_(0.0)  # a row with nothing to attend to
        del logits
        if dq is not None or dk is not None:
            change = (dq * factor) @ k.mT if dq is not None else torch.zeros_like(share)
            if dk is not None:
                change += (q * factor) @ dk.mT
            tangent = torch._softmax_backward_data(change, share, -1, share.dtype) @ v
        if dv is not None:
            tangent = share @ dv if tangent is None else tangent.add_(share @ dv)
    return Dual.of(primal, tangent) if tangent is not None else primal


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze"),
            *("expand", "expand_as", "select", "narrow", "movedim", "swapaxes", "t", "clone", "split", "chunk", "unbind"),
            *("repeat_interleave", "repeat", "roll", "flip", "to", "float", "double", "bfloat16", "half", "type_as"),
            *("mean", "neg", "__neg__", "cumsum", "gather", "index_select", "__getitem__", "split_with_sizes", "cpu"),
            *("interpolate", "avg_pool2d", "adaptive_avg_pool2d", "pad"),
        ),
        _linear_map,
    ),
    "sum": _linear_map,
    "cat": _joined,
    "concat": _joined,
    "stack": _joined,
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm", "mul", "__mul__", "__rmul__", "multiply"), _bilinear),
    **dict.fromkeys(("add", "__add__", "__radd__", "sub", "__sub__"), _sum),
    **dict.fromkeys(("div", "__truediv__", "true_divide"), _division),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "gelu": _gelu,
    "tanh": _tanh,
    "relu": _relu,
    "silu": _silu,
    "dropout": _dropout,
    "masked_fill": _masked_fill,
    "scaled_dot_product_attention": _attention,
}
