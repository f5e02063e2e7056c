"""Merges of adapters among which the default was chosen, as functions of their cores in core space, and of how long the result is.

With Δ_t = U_t S_t V_tᵀ, most of them are Û S V̂ᵀ: left and right singular vectors of all tasks side by side, as they are, orthogonalised
(TSV-M does both), or replaced by their dual basis, which is the minimum of WUDI's interference on that side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thetau.linalg.svd import orthonormal

Side = Literal["own", "orthogonal", "dual", "damped dual"]
Cores = Sequence[Tensor]
Length = Literal["", "full", "said"]
DAMPING = 0.1
SEEN = 1e-9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A merge and the λ's at which it was tried; `length`: λ is a multiple of what `full` or `said` makes of it."""

    name: str
    merged: Callable[[Cores], Tensor]
    scales: tuple[float, ...] = (1.0,)
    length: Length = ""

    def solve(self, cores: Cores) -> Tensor:
        """The merged core at λ = 1."""
        merged = self.merged(cores)
        match self.length:
            case "full":
                return merged * held_in_full(merged, cores)
            case "said":
                return merged * said(merged, cores)
        return merged


def candidates() -> list[Candidate]:
    """All that were tried, in this order."""
    made = [
        Candidate(name="sum", merged=total, scales=(0.3, 0.6)),
        Candidate(name="both orthogonal (TSV-M)", merged=sided("orthogonal", "orthogonal"), scales=(0.6, 1.0, 1.6, 2.2)),
        Candidate(name="outputs orthogonal", merged=sided("orthogonal", "own"), scales=(0.5, 1.0, 1.6)),
        Candidate(name="inputs orthogonal", merged=sided("own", "orthogonal"), scales=(0.5, 1.0)),
        Candidate(name="outputs dual", merged=sided("dual", "own"), scales=(0.45, 0.6, 1.0, 1.6)),
        Candidate(name="inputs dual (WUDI)", merged=sided("own", "dual"), scales=(1.0, 2.0)),
        Candidate(name="flattened sum (Iso-C)", merged=lambda cores: spectrum(total(cores), 0.0), scales=(0.6, 1.0, 1.6, 2.2)),
    ]
    made += [
        Candidate(name=name, merged=sided(left, right), scales=(0.6, 1.0), length="full")
        for name, left, right in (
            ("both orthogonal (TSV-M)", "orthogonal", "orthogonal"),
            ("outputs orthogonal", "orthogonal", "own"),
            ("outputs dual", "dual", "own"),
        )
    ]
    dual = sided("dual", "own")
    return [
        *made,
        Candidate(name="outputs dual, by a flow as bilateral's", merged=flowed),
        Candidate(name="outputs dual, flattened", merged=lambda cores: spectrum(dual(cores), 0.0), scales=(1.6,)),
        Candidate(name="outputs dual, half flattened", merged=lambda cores: spectrum(dual(cores), 0.5)),
        Candidate(name="sum, half flattened", merged=lambda cores: spectrum(total(cores), 0.5)),
        Candidate(
            name="tasks half flattened, outputs dual", merged=lambda cores: dual([even(core) for core in cores]), scales=(0.6,)
        ),
        Candidate(name="outputs dual, inputs orthogonal", merged=sided("dual", "orthogonal"), scales=(0.5, 0.6, 0.75)),
        Candidate(
            name="outputs dual, clipped at the tasks' largest", merged=lambda cores: clipped(dual(cores), cores), scales=(0.8,)
        ),
        Candidate(
            name="outputs damped dual, inputs orthogonal",
            merged=sided("damped dual", "orthogonal"),
            scales=(0.87, 1.0, 1.15),
            length="said",
        ),
        Candidate(name="both orthogonal (TSV-M)", merged=sided("orthogonal", "orthogonal"), length="said"),
        Candidate(name="outputs damped dual", merged=sided("damped dual", "own"), length="said"),
        Candidate(name="flattened sum (Iso-C)", merged=lambda cores: spectrum(total(cores), 0.0), length="said"),
    ]


def total(cores: Cores) -> Tensor:
    """Task arithmetic."""
    return torch.stack(list(cores)).sum(0)


def sided(left: Side, right: Side) -> Callable[[Cores], Tensor]:
    """Û S V̂ᵀ."""

    def merged(cores: Cores) -> Tensor:
        found = [singular(core) for core in cores]
        u, s, v = (torch.cat([one[at] for one in found], -1) for at in range(3))
        return (basis(u, left) * s) @ basis(v, right).T

    return merged


def singular(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V without zeros."""
    u, s, vt = torch.linalg.svd(core)
    seen = int((s > s[0] * SEEN).sum())
    return u[:, :seen], s[:seen], vt[:seen].T


def basis(vectors: Tensor, side: Side) -> Tensor:
    """What stands for the singular vectors of all tasks."""
    match side:
        case "orthogonal":
            return orthonormal(vectors)
        case "dual":
            return torch.linalg.pinv(vectors, rtol=SEEN).T
        case "damped dual":
            gram = vectors.T @ vectors
            return (1 + DAMPING) * torch.linalg.solve(gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype), vectors.T).T
    return vectors


def flowed(cores: Cores) -> Tensor:
    """From the sum down WUDI's loss of the outputs' side, stopped at 1 / mean eigenvalue."""
    grams = [core @ core.T / core.square().sum() for core in cores]
    start, pull = total(cores), torch.stack([gram @ core for gram, core in zip(grams, cores, strict=True)]).sum(0)
    values, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
    values = values.clamp(min=0)
    time = 1 / values[values > values.max() * SEEN].mean()
    step = torch.where(values > values.max() * SEEN, (1 - torch.exp(-values * time)) / values, time)
    residual = pull - (vectors * values) @ (vectors.T @ start)
    return start + (vectors * step) @ (vectors.T @ residual)


def spectrum(merged: Tensor, power: float) -> Tensor:
    """Singular values to a power, with the sum that they had; at 0 all directions, the unseen ones too, get the mean."""
    u, s, vt = torch.linalg.svd(merged)
    changed = s.clamp(min=s[0] * SEEN) ** power
    return (u * (changed * s.sum() / changed.sum())) @ vt


def even(core: Tensor) -> Tensor:
    """Square roots of the singular values, at the norm that the task's core has."""
    u, s, v = singular(core)
    root = s.sqrt()
    return (u * (root * s.norm() / root.norm())) @ v.T


def clipped(merged: Tensor, cores: Cores) -> Tensor:
    """No singular value above the largest of the tasks'."""
    u, s, vt = torch.linalg.svd(merged)
    return (u * s.clamp(max=max(float(torch.linalg.matrix_norm(core, 2)) for core in cores))) @ vt


def held_in_full(merged: Tensor, cores: Cores) -> float:
    """The multiple at which the merge holds every task's vector in full, on average: Σ⟨λM, Δ_t⟩ = Σ‖Δ_t‖²."""
    return sum(float(core.square().sum()) for core in cores) / sum(float((merged * core).sum()) for core in cores)


def said(merged: Tensor, cores: Cores) -> float:
    """The multiple at which the merge is rms ‖Δ_t‖ / √c long, c its mean cosine with the tasks' vectors: `clear`'s length."""
    mean = (sum(float(core.square().sum()) for core in cores) / len(cores)) ** 0.5
    cosine = sum(float((merged * core).sum()) for core in cores) / len(cores) / (float(merged.norm()) * mean)
    return mean / max(cosine, 1 / len(cores)) ** 0.5 / float(merged.norm())
