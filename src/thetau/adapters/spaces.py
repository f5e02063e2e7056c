r"""Where products are merged: as they are, as cores of their joint spans, or along the directions that they share.

**Product**: Δ_t = B_t A_t itself, one tensor at a time. **Core space** (Panariello et al., 2025, arXiv 2509.17786): with orthonormal
bases Q_A of all rows of all A's and Q_B of all columns of all B's, Δ_t = Q_B M_t Q_Aᵀ exactly, and the cores M_t = Q_Bᵀ B_t A_t Q_A are
K·r × K·r. **KnOTS** (Stoica et al., ICLR 2025, arXiv 2410.19735): [Δ_1 … Δ_K] = U Σ [V_1 … V_K], and what is merged are the ΣV_t, with U
before the result; here through K·r × d matrices, since U lies in the span of the B's. No d × d matrix is formed in either.

Bases are those of singular vectors, as in the authors' codes, largest first. Departs from both codes: α/r is applied. A linear merge is
exactly that of the products in all three; another one depends on the basis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from thetau._lazy import torch
from thetau.adapters.factors import Cut, Factors
from thetau.adapters.reading import Adapter, Module
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.naming import view_of
from thetau.checkpoint.source import Source, Spec, span

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["product", "core", "knots"]
ROUNDING = 1e-10  # of the largest singular value: what is below it is no direction


class Place(ABC):
    """One layer in the space where it is merged."""

    @abstractmethod
    def project(self, factors: Factors) -> Tensor:
        """An adapter's layer there, `[copy, rows, columns]`."""

    @abstractmethod
    def lift(self, merged: Tensor, cut: Cut) -> tuple[Factors, float, float]:
        """The merged layer as a product, ‖all of it‖, and ‖what the cut lost‖."""


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, `[copy, d, k]`, by singular vectors: `columns` is `[copy, d, n]`, and n small."""
    u, s, _ = Factors(a=torch.eye(columns.shape[2], dtype=columns.dtype).expand(len(columns), -1, -1), b=columns).svd()
    seen = int((s > s.amax(1, keepdim=True) * ROUNDING).sum(1).max()) if s.numel() else 0
    return u[:, :, : max(1, seen)]


@final
@dataclass(frozen=True, kw_only=True)
class CorePlace(Place):
    """Core space: `left` spans the outputs, `right` the inputs."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> CorePlace:
        """The spans of all B's and all A's."""
        return cls(left=_span(torch.cat([part.b for part in parts], 2)), right=_span(torch.cat([part.a for part in parts], 1).mT))

    def project(self, factors: Factors) -> Tensor:
        """The core."""
        return (self.left.mT @ factors.b) @ (factors.a @ self.right)

    def lift(self, merged: Tensor, cut: Cut) -> tuple[Factors, float, float]:
        """Q_B M Q_Aᵀ, by the singular values of the core."""
        u, s, vt = torch.linalg.svd(merged, full_matrices=False)
        rank = cut.ranks(s)
        made = Factors.of(self.left @ u[:, :, :rank], s[:, :rank], vt[:, :rank] @ self.right.mT)
        return made, float(merged.norm()), float(s[:, rank:].norm())


@final
@dataclass(frozen=True, kw_only=True)
class KnotsPlace(Place):
    """KnOTS: `left` are the left singular vectors of all products side by side."""

    left: Tensor

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> KnotsPlace:
        """U, of a matrix whose Gram matrix is K·r × K·r in the span of the B's."""
        basis = _span(torch.cat([part.b for part in parts], 2))
        inner = [basis.mT @ part.b for part in parts]
        gram = torch.stack([b @ (part.a @ part.a.mT) @ b.mT for b, part in zip(inner, parts, strict=True)]).sum(0)
        values, vectors = torch.linalg.eigh(gram)
        kept = int((values > values.amax(1, keepdim=True) * ROUNDING**2).sum(1).max())
        return cls(left=basis @ vectors.flip(2)[:, :, : max(1, kept)])

    def project(self, factors: Factors) -> Tensor:
        """ΣV_t = UᵀΔ_t."""
        return (self.left.mT @ factors.b) @ factors.a

    def lift(self, merged: Tensor, cut: Cut) -> tuple[Factors, float, float]:
        """U before what was merged."""
        factors, lost = cut.apply(Factors(a=merged, b=self.left))
        return factors, float(merged.norm()), lost


def name_of(module: str, copy: int, copies: int) -> str:
    """What a method calls a layer's tensor: the base's name, with the number of an expert."""
    return f"{module}.weight" if copies == 1 else f"{module}.{copy}.weight"


class Products(Source):
    """An adapter's products as a task vector that is made when it is read: rows of B·A as the base stores them."""

    degree = 0
    partial = True

    def __init__(self, adapter: Adapter) -> None:
        self.label, self.key = adapter.label, f"products:{id(adapter)}"
        self._adapter = adapter
        self._places: dict[str, tuple[str, int]] = {}
        self.specs: Mapping[str, Spec] = {}
        specs: dict[str, Spec] = {}
        for path in adapter.paths:
            module = adapter.module(path)
            copies, d_out = module.factors.b.shape[:2]
            for copy in range(copies):
                name = name_of(path, copy, copies)
                self._places[name] = (path, copy)
                shape = (d_out, *module.inputs)
                shape = (shape[1], shape[0]) if turned(module, name, shape) else shape
                specs[name] = Spec(name=name, shape=shape, dtype=Dtype.F32, file=adapter.label)
        self.specs = specs

    def fingerprint(self) -> str:
        """Not meaningful: it is computed."""
        return self.key

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the product, float32."""
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        path, copy = self._places[name]
        module = self._adapter.module(path)
        a, b = module.factors.a[copy], module.factors.b[copy]
        rows = a[:, start:stop].T @ b.T if turned(module, name, spec.shape) else (b[start:stop] @ a)
        return rows.reshape(stop - start, *spec.shape[1:]).float()


def turned(module: Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the base stores `[d_in, d_out]`."""
    return module.kind == "embedding" or view_of(name, shape).transposed
