"""RobustMerge: A and B merged apart, after small entries are pruned and the directions of A that lose most are raised.

Zeng et al., NeurIPS 2025, <https://arxiv.org/abs/2502.17159>, and the authors' code (AuroraZengfh/RobustMerge 1212802), where the paper and
it differ. Of each adapter the largest `density` of A's and of B's entries are kept. A direction r of task t counts
s_t[r] = max(‖A_t[r]‖₁ / ‖kept A_t[r]‖₁, its `quantile` over r). A = λ Σ_t kept A_t, and column r of B is λ Σ_t s_t[r]·kept B_t[r] / Σ_t s_t[r],
with λ = 2 on either side as their code has it: K equal adapters give 4K times their pruned product, so tune `scale`.

Departs from the code: α/r is applied, in B; directions whose A is pruned empty count 1, where the code divides by zero; the order
of tensors in the file does not matter.

Use it where adapters of one rank must stay of that rank and no matrix of the base's size may be made; it needs no data, and adapters that
began from one A, since it adds A's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.adapters.adding import all_paths, remade, saved, shared_config, summed_bias, together
from thetau.adapters.factors import Factors
from thetau.adapters.reading import Adapter, Module
from thetau.adapters.writing import Fit, Made
from thetau.checkpoint.source import Source
from thetau.errors import AlignmentError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def robust_merge(
    adapters: Sequence[Adapter],
    *,
    density: float = 0.2,
    quantile: float = 0.8,
    scale: float = 2.0,
    base: Source | None = None,
) -> Made:
    """RobustMerge of adapters of one rank; its error is 0, since nothing is cut.

    Args:
        adapters: opened ones, of one base.
        density: share of A's and B's entries that is kept, in (0, 1].
        quantile: of s over the directions, below which none counts, in [0, 1].
        scale: λ on either side.
        base: the model, which only tensors that are saved whole need; of these and of biases the mean is taken.

    Raises:
        RecipeError: a number is out of its range.
        AlignmentError: adapters of several ranks, or of other bases.
    """
    if not 0 < density <= 1 or not 0 <= quantile <= 1:
        raise RecipeError([f"`density` must be in (0, 1] and `quantile` in [0, 1]. Got {density} and {quantile}."], "robustmerge")
    mean = [1 / len(adapters)] * len(adapters)
    modules: dict[str, Module] = {}
    fits: list[Fit] = []
    for path in all_paths(adapters):
        parts, weights = together(adapters, path, mean)
        if len({part.factors.rank for part in parts}) > 1:
            raise AlignmentError(
                f"RobustMerge adds A's row by row, so that adapters must have one rank. At {path!r} they have "
                f"{', '.join(str(part.factors.rank) for part in parts)}. Merge in core space instead: `--space core`."
            )
        factors = _merged([part.factors for part in parts], density, quantile, scale)
        modules[path] = remade(parts[0], factors, summed_bias(parts, weights))
        fits.append(Fit(layer=path, rank=factors.rank, norm=factors.norm, lost=0.0))
    return Made(modules=modules, fits=fits, config=shared_config(adapters), saved=saved(adapters, mean, base))


def _merged(parts: Sequence[Factors], density: float, quantile: float, scale: float) -> Factors:
    """One layer."""
    total: Tensor = torch.zeros_like(parts[0].a)
    above, below = torch.zeros_like(parts[0].b), torch.zeros_like(parts[0].a[:, :, 0])
    for part in parts:
        a, b = _pruned(part.a, density), _pruned(part.b, density)
        left = a.abs().sum(2)
        s = torch.where(left > 0, part.a.abs().sum(2) / left.where(left > 0, 1.0), 1.0)
        s = torch.maximum(s, torch.quantile(s, quantile, dim=1, keepdim=True))
        total = total + a
        above, below = above + s[:, None, :] * b, below + s
    return Factors(a=scale * total, b=scale * above / below[:, None, :])


def _pruned(matrix: Tensor, density: float) -> Tensor:
    """The largest entries of each copy, the rest zero."""
    flat = matrix.abs().flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    cut = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values
    return matrix.where(matrix.abs() >= cut[:, None, None], 0)
