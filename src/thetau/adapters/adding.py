"""Sums of adapters with weights and signs, exactly: the ranks are put beside one another.

PEFT's `linear` adds A's and B's apart, so that (A₁ + A₂)(B₁ + B₂) holds products of one adapter's A with another's B; its `cat` is this
sum. What modules save whole (heads, norms) has no product and is summed over the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thetau.adapters.factors import Cut, Factors
from thetau.adapters.reading import Adapter, Module
from thetau.adapters.writing import Fit, Made
from thetau.checkpoint.lora.targets import base_name, saved_name
from thetau.checkpoint.source import Source
from thetau.errors import AlignmentError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def add(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, cut: Cut | None = None, base: Source | None = None
) -> Made:
    """Σ w·Δ of some adapters as one adapter; `cut` brings its rank down again, by the best approximation.

    Args:
        adapters: opened ones, of one base.
        weights: one each, with their signs; 1 by default.
        cut: to which rank or error; by default the ranks are summed, and nothing is lost.
        base: the model, which only tensors that are saved whole need.

    Raises:
        RecipeError: weights that are not as many or not finite, or saved tensors without a base.
        AlignmentError: adapters of other bases.
    """
    given = list(weights) if weights is not None else [1.0] * len(adapters)
    if not adapters or len(given) != len(adapters) or not all(map(math.isfinite, given)):
        raise RecipeError([f"`weights` must be finite numbers, one for each of {len(adapters)} adapters. Got {given}."], "add")
    modules: dict[str, Module] = {}
    fits: list[Fit] = []
    for path in all_paths(adapters):
        parts, mine = together(adapters, path, given)
        exact = Factors.joined([part.factors for part in parts], mine)
        norm = exact.norm
        made, lost = cut.apply(exact) if cut is not None else (exact, 0.0)
        modules[path] = remade(parts[0], made, summed_bias(parts, mine))
        fits.append(Fit(layer=path, rank=made.rank, norm=norm, lost=lost))
    return Made(modules=modules, fits=fits, config=shared_config(adapters), saved=saved(adapters, given, base))


def all_paths(adapters: Sequence[Adapter]) -> list[str]:
    """Every module that some adapter adapts, sorted."""
    return sorted({path for adapter in adapters for path in adapter.paths})


def together(adapters: Sequence[Adapter], path: str, weights: Sequence[float]) -> tuple[list[Module], list[float]]:
    """One module of those that adapt it, and their weights.

    Raises:
        AlignmentError: its shapes differ.
    """
    found = [
        (adapter, adapter.module(path), weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if path in adapter.paths
    ]
    first = found[0][1]
    for adapter, module, _ in found[1:]:
        want = (first.kind, first.inputs, first.factors.b.shape[:2])
        got = (module.kind, module.inputs, module.factors.b.shape[:2])
        if got != want:
            raise AlignmentError(
                f"{adapter.label}: {path!r} is {got[0]} with inputs {list(got[1])} and {got[2][1]} outputs, in {found[0][0].label} "
                f"{want[0]} with {list(want[1])} and {want[2][1]}. Give adapters of one base."
            )
    return [module for _, module, _ in found], [weight for _, _, weight in found]


def remade(like: Module, factors: Factors, bias: Tensor | None = None) -> Module:
    """A module with another product."""
    return Module(path=like.path, kind=like.kind, inputs=like.inputs, factors=factors, bias=bias)


def summed_bias(modules: Sequence[Module], weights: Sequence[float]) -> Tensor | None:
    """Σ w·bias of those that have one."""
    parts = [weight * module.bias for module, weight in zip(modules, weights, strict=True) if module.bias is not None]
    return sum(parts[1:], parts[0]) if parts else None


def shared_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """What a new adapter's configuration takes over: the first's, and every module that one of them saves."""
    config = dict(adapters[0].config)
    modules = sorted({str(name) for adapter in adapters for name in adapter.config.get("modules_to_save") or ()})
    biases = [adapter.config.get("bias", "none") for adapter in adapters if adapter.config.get("bias", "none") != "none"]
    return config | {"modules_to_save": modules or None, "bias": biases[0] if biases else "none"}


def saved(adapters: Sequence[Adapter], weights: Sequence[float], base: Source | None) -> dict[str, Tensor]:
    """θ₀ + Σ w·(θ − θ₀) of what is saved whole, by the names that the adapters give.

    Raises:
        RecipeError: there is such a tensor, and no base.
        AlignmentError: the base lacks it.
    """
    out: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, path in adapter.saved.items():
            if base is None:
                raise RecipeError(
                    [f"{adapter.label} saves {path!r} whole, which can be added only over the model. Give it: `--base`."],
                    "adapters",
                )
            target = base_name(saved_name(path), base)
            if target is None:
                raise AlignmentError(
                    f"{adapter.label}: saves {path!r}, which the base {base.label} lacks. Give the base it was trained on."
                )
            ground = base.read(target).double()
            out[path] = out.get(path, ground) + weight * (adapter.read(name).double() - ground)
    return out
