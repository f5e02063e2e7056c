r"""The default merge of adapters: outputs kept apart, inputs made orthogonal, and a length that the adapters themselves say.

Ours. What an adapter learns first is B, which starts at zero: its columns lie among the gradients of the layer's outputs. A starts at random
and moves little, so that its rows are no sample of the layer's inputs, and adapters that began from one seed all but share them. So tasks can be
told apart by their outputs and not by their inputs (docs/adapters.md has the figures). With Δ_t = U_t S_t V_tᵀ and U = [U_1 … U_K]:

- *outputs*: Û = (1 + ρ) U (UᵀU + ρI)⁻¹, the damped dual basis. At ρ = 0, UᵀÛ = I: seen in the outputs of task t, the merged layer is Δ_t. A
  minimiser of interference as WUDI's is, on the side of the outputs; ρ bounds what nearly equal outputs amplify by (1 + ρ) / (2√ρ).
- *inputs*: V̂, the nearest matrix with orthonormal columns to V = [V_1 … V_K], as in TSV-M (Gargiulo et al., CVPR 2025,
  <https://arxiv.org/abs/2412.00081>).
- *length*: M = Û S V̂ᵀ is made rms_t ‖Δ_t‖ / √c long, c being the mean over tasks of ⟨M, Δ_t⟩ / (‖M‖ rms ‖Δ‖), at least 1 / K. That is
  the geometric mean of two lengths: the one at which M holds every task's vector in full, on average, and that of a task's vector.

One adapter is left as it is, equal adapters give that adapter, the order of adapters does not matter, and c·Δ_t for every t gives c times the
merge. Copies of a layer (experts) are merged one by one. All is done on matrices of K·r columns; none of the base's size is made.

Use it for LoRA adapters where nothing can be tuned. With data to tune λ, tune `scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.adapters.adding import all_paths, remade, saved, shared_config, summed_bias, together
from thetau.adapters.factors import Cut, Factors
from thetau.adapters.reading import Adapter, Module
from thetau.adapters.writing import Fit, Made
from thetau.checkpoint.source import Source
from thetau.errors import RecipeError
from thetau.linalg.svd import svd

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-10  # of the largest singular value: what is below it is no direction


def clear_merge(
    adapters: Sequence[Adapter],
    *,
    damping: float = 0.1,
    scale: float = 1.0,
    cut: Cut | None = None,
    base: Source | None = None,
) -> Made:
    """One adapter of several, whose rank is the sum of theirs unless it is cut.

    Args:
        adapters: opened ones, of one base.
        damping: ρ; 0 keeps the outputs of different tasks apart entirely, and large values leave them as they are.
        scale: λ, of the merged layers; 1 is meant.
        cut: to which rank or error.
        base: the model, which only tensors that are saved whole need; of these and of biases the mean is taken.

    Raises:
        RecipeError: no adapter, or a number is out of its range.
        AlignmentError: adapters of other bases.
    """
    if not adapters:
        raise RecipeError(["a merge needs at least one adapter. Got none."], "clear")
    if not 0 <= damping < float("inf") or not -float("inf") < scale < float("inf"):
        raise RecipeError(
            [f"`damping` must be at least 0 and `scale` a number, both finite. Got {damping} and {scale}."], "clear"
        )
    mean = [1 / len(adapters)] * len(adapters)
    modules: dict[str, Module] = {}
    fits: list[Fit] = []
    for path in all_paths(adapters):
        parts, weights = together(adapters, path, mean)
        factors = cleared([part.factors for part in parts], damping)
        factors = Factors(a=factors.a, b=scale * factors.b)
        norm = factors.norm
        made, lost = cut.apply(factors) if cut is not None else (factors, 0.0)
        modules[path] = remade(parts[0], made, summed_bias(parts, weights))
        fits.append(Fit(layer=path, rank=made.rank, norm=norm, lost=lost))
    return Made(modules=modules, fits=fits, config=shared_config(adapters), saved=saved(adapters, mean, base))


def cleared(parts: Sequence[Factors], damping: float) -> Factors:
    """One layer: every copy by itself, brought to one rank with zeros."""
    copies = [
        _copy([Factors(a=part.a[i : i + 1], b=part.b[i : i + 1]) for part in parts], damping) for i in range(len(parts[0].a))
    ]
    rank = max(copy.rank for copy in copies)
    padded = [copy.padded(rank) for copy in copies]
    return Factors(a=torch.cat([copy.a for copy in padded]), b=torch.cat([copy.b for copy in padded]))


def _copy(parts: Sequence[Factors], damping: float) -> Factors:
    """One matrix of each adapter; those whose matrix is zero, of which any vectors are as good as others, are left out."""
    left, values, right = [], [], []
    moving = [part for part in parts if part.norm > 0]
    if not moving:
        return Factors(a=torch.zeros_like(parts[0].a), b=torch.zeros_like(parts[0].b))
    for part in moving:
        u, s, vt = part.svd()
        seen = int((s[0] > s.max() * ROUNDING).sum())
        left.append(u[0, :, :seen])
        values.append(s[0, :seen])
        right.append(vt[0, :seen].mT)
    u, s, v = torch.cat(left, 1), torch.cat(values), torch.cat(right, 1)
    merged = Factors(a=_polar(v).mT[None], b=(_apart(u, damping) * s)[None])
    count = len(moving)
    norm, mean = merged.norm, (sum(part.norm**2 for part in moving) / count) ** 0.5
    if norm <= ROUNDING * mean:  # the vectors cancel one another
        return Factors(a=merged.a, b=torch.zeros_like(merged.b))
    held = sum(inner(merged, part) for part in moving) / count
    cosine = max(1 / count, held / (norm * mean))
    return Factors(a=merged.a, b=merged.b * (mean / cosine**0.5 / norm))


def _apart(u: Tensor, damping: float) -> Tensor:
    """(1 + ρ) U (UᵀU + ρI)⁻¹; at ρ = 0 by the pseudo-inverse, since vectors of several tasks may depend on one another."""
    values, vectors = torch.linalg.eigh(u.mT @ u)
    divided = values + damping
    kept = divided > values.max() * len(values) * torch.finfo(u.dtype).eps
    inverse = torch.where(kept, 1 / divided.where(kept, 1.0), 0.0)
    found: Tensor = (1 + damping) * u @ ((vectors * inverse) @ vectors.mT)
    return found


def _polar(v: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or the nearest partial isometry where columns depend on one another."""
    left, s, right = svd(v)
    seen = int((s > s[0] * max(v.shape) * torch.finfo(v.dtype).eps).sum())
    found: Tensor = left[:, :seen] @ right[:seen]
    return found


def inner(one: Factors, other: Factors) -> float:
    """⟨B₁A₁, B₂A₂⟩, without a product."""
    return float(((one.b.mT @ other.b) * (one.a @ other.a.mT)).sum())
