"""An adapter out of a model that was fine-tuned whole: the best products of a rank, or of an error, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.adapters.factors import Cut, Factors
from thetau.adapters.reading import Kind, Module
from thetau.adapters.streaming import tensors_of
from thetau.adapters.writing import Fit, Made
from thetau.checkpoint import Kind as Role
from thetau.checkpoint import kind_of, view_of
from thetau.checkpoint.naming import has_conv1d
from thetau.checkpoint.source import Spec
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError
from thetau.facade import Expression
from thetau.linalg.svd import truncated_svd
from thetau.random import element_bits
from thetau.vectors.combination import require_vector

if TYPE_CHECKING:
    from torch import Tensor


def extract(
    vector: Expression, cut: Cut, *, exclude: Sequence[str] = (), name: str | None = None, engine: Engine | None = None
) -> Made:
    """The adapter nearest to a task vector; tensors are read one at a time.

    Linear layers, embeddings and convolutions become products; norms and other small tensors that changed are saved whole, biases of
    adapted layers among them.

    Args:
        vector: `model - base`.
        cut: the rank, or the error of each layer, or both.
        exclude: shell-style patterns of tensors that are left out.
        name: what the configuration calls the base.
        engine: workers and memory.

    Raises:
        AlignmentError: this is no task vector, or nothing changed that an adapter can hold.
    """
    require_vector(vector, "An adapter")
    reference = vector.reference
    modules: dict[str, Module] = {}
    fits: list[Fit] = []
    whole: dict[str, Tensor] = {}
    notes: list[str] = []
    specs = vector.specs()
    transposed = has_conv1d({other: spec.shape for other, spec in specs.items()})
    for tensor, delta in tensors_of(vector, exclude, engine):
        norm, spec = float(delta.norm()), specs[tensor]
        if not norm:
            continue
        kind = _kind(tensor, spec)
        if kind is None and delta.ndim < 2:
            whole[tensor] = delta
        if kind is None:
            notes += [] if delta.ndim < 2 else [f"{tensor!r} is no layer that LoRA adapts, and is left out."]
            fits += [] if delta.ndim < 2 else [Fit(layer=tensor, rank=0, norm=norm, lost=norm)]
            continue
        turned = kind == "embedding" or (transposed and view_of(tensor, spec.shape).transposed)
        made, lost = _product(tensor, delta, kind, cut, norm, turned=turned)
        modules[made.path] = made
        fits.append(Fit(layer=made.path, rank=made.factors.rank, norm=norm, lost=lost))
    if not modules:
        raise AlignmentError(f"{vector.label}: changes no layer that LoRA can adapt. Leave the adapter out, or write the vector.")
    saved, to_save, bias = _whole(whole, modules, vector)
    config = {
        "base_model_name_or_path": name or (reference.label if reference is not None else None),
        "fan_in_fan_out": transposed,
        "modules_to_save": to_save or None,
        "bias": bias,
    }
    return Made(modules=modules, fits=fits, config=config, saved=saved, notes=notes)


def _kind(tensor: str, spec: Spec) -> Kind | None:
    """The kind of layer that LoRA would adapt here, if any."""
    if not tensor.endswith(".weight") or len(spec.shape) < 2:
        return None
    if len(spec.shape) > 2:
        return "conv"
    return "embedding" if kind_of(tensor, spec.shape) is Role.EMBEDDING else "linear"


def _product(tensor: str, delta: Tensor, kind: Kind, cut: Cut, norm: float, *, turned: bool) -> tuple[Module, float]:
    """The best product for one tensor, which is stored `[in, out]` where it is `turned`, and ‖what it loses‖."""
    matrix = delta.T if turned else delta.flatten(1)
    if cut.error is None and cut.rank is not None:
        u, s, v = truncated_svd(matrix, cut.rank, partial(_bits, tensor))
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = cut.ranks(s[None], norm)
    factors = Factors.of(u[None, :, :rank], s[None, :rank], vt[None, :rank])
    lost = max(0.0, norm**2 - float(s[:rank].square().sum())) ** 0.5
    inputs = (matrix.shape[1],) if kind != "conv" else tuple(delta.shape[1:])
    return Module(path=tensor.removesuffix(".weight"), kind=kind, inputs=inputs, factors=factors), lost


def _bits(tensor: str, axis: str, count: int) -> Tensor:
    return element_bits(("adapter", tensor, axis), 0, count)


def _whole(
    deltas: Mapping[str, Tensor], modules: Mapping[str, Module], vector: Expression
) -> tuple[dict[str, Tensor], list[str], str]:
    """What is saved whole: tensors by the names that PEFT gives them, the modules that it must save, and its word on biases."""
    base = vector.reference
    if base is None or not deltas:
        return {}, [], "none"
    saved: dict[str, Tensor] = {}
    to_save: set[str] = set()
    biases = False
    for tensor, delta in deltas.items():
        owner, _, end = tensor.rpartition(".")
        if owner in modules:
            saved[f"{owner}.base_layer.{end}"] = base.read(tensor).double() + delta
            biases = True
            continue
        to_save.add(owner)
        for other in base.specs:  # PEFT saves a module with all that it holds
            if other.rpartition(".")[0] == owner:
                saved[other] = base.read(other).double() + deltas.get(other, torch.zeros((), dtype=torch.float64))
    return saved, sorted(to_save), "all" if biases else "none"
