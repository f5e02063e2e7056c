"""How an adapter changes one base tensor, by rows: products of low rank, Hadamard and Kronecker products, scalings, single rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, final

from thetau._lazy import torch
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Form = Literal["rows", "columns", "experts", "experts transposed"]


class Change(ABC):
    """One change of one tensor; `uses` are the adapter's tensors that it is made of.

    `shape` is that of the base tensor. `tied` is whether PEFT makes it on what is tied to that tensor too, unless that has a change of its own.
    """

    tied: ClassVar[bool] = False

    @property
    @abstractmethod
    def uses(self) -> tuple[str, ...]:
        """The adapter's tensors that it is made of."""

    @abstractmethod
    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """What does not fit, in words; None where all does."""


class Addition(Change):
    """What is added to a tensor."""

    @abstractmethod
    def rows(self, weights: Source, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows of what is added, float32, `[stop - start, *shape[1:]]`."""


class Overlay(Change):
    """What is made of a tensor's own values."""

    @abstractmethod
    def onto(self, rows: Tensor, weights: Source, start: int, stop: int) -> Tensor:
        """The rows after it."""


def _floats(weights: Source, name: str) -> Tensor:
    return weights.read(name).float()


@final
@dataclass(frozen=True, kw_only=True)
class Product(Addition):
    """B·A times a scale: A `[rank, in, *kernel]`, B `[out, rank, 1…]`.

    `form` says how the base stores it: by `rows` `[out, in, *kernel]`; by `columns` `[in, out]` (Conv1D, embeddings); or `experts`
    `[expert, out, in]` and `experts transposed` `[expert, in, out]`, where A is `[expert · rank, in]` and B `[out, rank · expert]`.
    """

    a: str
    b: str
    scale: float
    form: Form = "rows"

    @property
    def uses(self) -> tuple[str, ...]:
        """A and B."""
        return self.a, self.b

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether A and B multiply, and to the base's shape."""
        a, b = shapes[self.a], shapes[self.b]
        if len(a) < 2 or len(b) < 2 or len(a) != len(b) or set(b[2:]) - {1}:
            return f"{self.a!r} {list(a)} and {self.b!r} {list(b)} must be two matrices, or two convolutions of which B is 1 × 1."
        if a[0] != b[1]:
            grouped = " A convolution in groups has no low-rank difference." if len(a) > 2 and b[1] and a[0] % b[1] == 0 else ""
            return f"{self.a!r} {list(a)} and {self.b!r} {list(b)} do not multiply.{grouped}"
        made: tuple[int, ...] = (b[0], *a[1:])
        if self.form == "columns":
            made = (a[1], b[0])
        if self.form == "experts":
            made = (shape[0], b[0], a[1])
        if self.form == "experts transposed":
            made = (shape[0], a[1], b[0])
        return None if made == shape else f"by shape {list(made)}"

    def rows(self, weights: Source, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows of the product."""
        if self.form == "columns":
            rows = weights.read(self.a)[:, start:stop].float().T @ _floats(weights, self.b).T
        elif self.form == "rows":
            a, b = _floats(weights, self.a).flatten(1), weights.read(self.b, start, stop).float().flatten(1)
            rows = (b @ a).reshape(stop - start, *shape[1:])
        else:
            count = shape[0]
            a, b = _floats(weights, self.a), _floats(weights, self.b)
            inner = a.reshape(count, -1, a.shape[1])[start:stop]
            outer = b.reshape(b.shape[0], -1, count)[:, :, start:stop].permute(2, 0, 1)
            rows = outer @ inner
            rows = rows.transpose(1, 2) if self.form == "experts transposed" else rows
        return rows * self.scale


@final
@dataclass(frozen=True, kw_only=True)
class Bias(Addition):
    """The bias of B, times the scale, which is added to the layer's own."""

    name: str
    scale: float

    @property
    def uses(self) -> tuple[str, ...]:
        """The bias."""
        return (self.name,)

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether it has the layer's outputs."""
        return None if shapes[self.name] == shape else f"by shape {list(shapes[self.name])}"

    def rows(self, weights: Source, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Its entries."""
        return weights.read(self.name, start, stop).float() * self.scale


@final
@dataclass(frozen=True, kw_only=True)
class Hadamard(Addition):
    """LoHa, (W₁ₐ W₁ᵦ) ⊙ (W₂ₐ W₂ᵦ) times a scale; with cores T₁, T₂ for convolutions. Hyeon-Woo et al., FedPara, arXiv 2108.06098."""

    first: tuple[str, str]
    second: tuple[str, str]
    cores: tuple[str, str] | None
    scale: float

    @property
    def uses(self) -> tuple[str, ...]:
        """Four matrices, and two cores."""
        return (*self.first, *self.second, *(self.cores or ()))

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether both products have the base's entries."""
        for a, b in (self.first, self.second):
            rows, columns = shapes[a], shapes[b]
            if len(rows) != 2 or len(columns) != 2 or rows[0 if self.cores else 1] != columns[0]:
                return f"{a!r} {list(rows)} and {b!r} {list(columns)} do not multiply."
            made = (rows[1], columns[1]) if self.cores else (rows[0], columns[1])
            if made != ((shape[0], shape[1]) if self.cores else (shape[0], prod(shape[1:]))):
                return f"by shape {list(made)}"
        return None

    def rows(self, weights: Source, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows of the entrywise product."""
        if self.cores is None:
            one, two = (weights.read(a, start, stop).float() @ _floats(weights, b) for a, b in (self.first, self.second))
        else:
            one, two = (
                torch.einsum(
                    "ijkl,jr,ip->prkl", _floats(weights, core), _floats(weights, b), weights.read(a)[:, start:stop].float()
                )
                for (a, b), core in zip((self.first, self.second), self.cores, strict=True)
            )
        return (one * two * self.scale).reshape(stop - start, *shape[1:])


@final
@dataclass(frozen=True, kw_only=True)
class Kronecker(Addition):
    """LoKr, W₁ ⊗ W₂ times a scale, either of them whole or a product of two (for W₂ with a core too)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: float

    @property
    def uses(self) -> tuple[str, ...]:
        """Two to five tensors."""
        return self.first + self.second

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether there are as many entries as in the base."""
        entries = 1
        for names in (self.first, self.second):
            found = [shapes[name] for name in names]
            if len(names) == 1:
                entries *= prod(found[0])
            elif len(names) == 2:
                entries *= found[0][0] * found[1][-1] if len(found[0]) == len(found[1]) == 2 and found[0][1] == found[1][0] else 0
            else:
                entries *= found[1][-1] * found[2][-1] * prod(found[0][2:])
        return None if entries == prod(shape) else f"by {entries} entries"

    def rows(self, weights: Source, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows of the Kronecker product."""
        one, two = (self._factor(weights, names) for names in (self.first, self.second))
        if two.ndim == 3:  # PEFT sets the kernels of one-dimensional convolutions against W₁'s columns
            return (torch.kron(one, two) * self.scale).reshape(shape)[start:stop]
        index = torch.arange(start, stop)
        left, right = one[index // len(two)], two[index % len(two)]
        rows = left[:, :, None] * right.flatten(1)[:, None, :] if two.ndim == 2 else torch.einsum("rc,rdkl->rcdkl", left, right)
        return rows.reshape(stop - start, *shape[1:]) * self.scale

    @staticmethod
    def _factor(weights: Source, names: tuple[str, ...]) -> Tensor:
        found = [_floats(weights, name) for name in names]
        if len(found) == 3:
            return torch.einsum("ijkl,ip,jr->prkl", *found)
        return found[0] @ found[1] if len(found) == 2 else found[0]


@final
@dataclass(frozen=True, kw_only=True)
class Scaling(Overlay):
    """(IA)³: outputs, or inputs, times a learnt vector. `axis` is the base tensor's axis that it runs along."""

    name: str
    axis: int

    @property
    def uses(self) -> tuple[str, ...]:
        """The vector."""
        return (self.name,)

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether it is as long as its axis."""
        return None if prod(shapes[self.name]) == shape[self.axis] else f"by shape {list(shapes[self.name])}"

    def onto(self, rows: Tensor, weights: Source, start: int, stop: int) -> Tensor:
        """The rows, scaled."""
        vector = _floats(weights, self.name).flatten()
        vector = vector[start:stop] if self.axis == 0 else vector
        return rows * vector.reshape([-1 if axis == self.axis else 1 for axis in range(rows.ndim)])


@final
@dataclass(frozen=True, kw_only=True)
class Rows(Overlay):
    """New values of some rows: the tokens that were trained. PEFT trains those of a tied head with them."""

    tied: ClassVar[bool] = True

    name: str
    indices: tuple[int, ...]

    @property
    def uses(self) -> tuple[str, ...]:
        """The new rows."""
        return (self.name,)

    def problem(self, shapes: Shapes, shape: tuple[int, ...]) -> str | None:
        """Whether there are as many rows as numbers, and the base has them."""
        got = shapes[self.name]
        if len(self.indices) != (got[0] if got else 0) or got[1:] != shape[1:] or max(self.indices, default=0) >= shape[0]:
            return f"in {len(self.indices)} rows up to {max(self.indices, default=0)}, by shape {list(got)}"
        return None

    def onto(self, rows: Tensor, weights: Source, start: int, stop: int) -> Tensor:
        """The rows, those that were trained in their places."""
        values, out = _floats(weights, self.name), rows.clone()
        for place, row in enumerate(self.indices):
            if start <= row < stop:
                out[row - start] = values[place]
        return out
