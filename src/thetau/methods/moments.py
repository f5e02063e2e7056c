"""What methods share that weigh layers by second moments of their inputs or gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.errors import AlignmentError
from thetau.parts import Site, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def proportions(site: Site, coefficients: Varying) -> list[float]:
    """Coefficients so scaled that a mean with them is their weighted mean."""
    given = site.per_task(coefficients)
    return [len(given) * one / sum(given) for one in given]


def check_moments(matrix: Float[Tensor, "side side"], kind: str, site: Site) -> None:
    """Nothing where a matrix of second moments can be one.

    Raises:
        AlignmentError: it holds NaN or infinite values, or squares that are negative.
    """
    task = site.tasks[0]
    if not bool(torch.isfinite(matrix).all()):
        raise AlignmentError(f"{task}: its evidence `{kind}` holds NaN or infinite values at {site.name!r}. Collect it again.")
    if bool((matrix.diagonal() < 0).any()):
        raise AlignmentError(
            f"{task}: its evidence `{kind}` has negative squares at {site.name!r}, so it is no matrix of second moments. Collect it again."
        )
