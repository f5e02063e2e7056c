"""Codes times scales on a grid: one scale for a tensor, a row, a block, or a group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.quantised.form import Weight, damaged
from thetau.checkpoint.quantised.reading import exponents
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

Block = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Scaled(Weight):
    """A weight (code − zero) · scale, a code an entry. `block`: rows and columns that share a scale.

    Parts: `codes`, as the weight is shaped; `scale` on the grid of blocks, and `zero` as it, if there is one.
    """

    block: Block

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32; of stacked experts, whole ones."""
        codes = stored.read(self.parts["codes"], start, stop).float()
        if "zero" in self.parts:
            codes -= self._spread(stored, "zero", start, stop)
        return codes.mul_(self._spread(stored, "scale", start, stop))

    def _spread(self, stored: Source, which: str, start: int, stop: int) -> Tensor:
        """A grid's values for these rows, in a shape that broadcasts over them."""
        spec, (high, wide) = stored.specs[self.parts[which]], self.block
        if spec.elements == 1:
            return _number(stored.read(spec.name)).reshape(())
        if len(self.shape) == 3:
            grid = _number(stored.read(spec.name, start, stop)).reshape(stop - start, *self._grid())
            return grid.repeat_interleave(high, 1)[:, : self.shape[1]].repeat_interleave(wide, 2)[..., : self.shape[2]]
        first = start // high
        grid = _number(stored.read(spec.name, first, -(-stop // high))).reshape(-1, self._grid()[1])
        tall = grid.repeat_interleave(high, 0)[start - first * high : stop - first * high]
        return tall if grid.shape[1] == 1 else tall.repeat_interleave(wide, 1)[:, : self.shape[1]]

    def _grid(self) -> Block:
        return grid_of(self.shape, self.block)


def grid_of(shape: tuple[int, ...], block: Block) -> Block:
    """Blocks along the last two axes of a weight."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def block_of(stored: Source, codes: str, scale: str, blocks: list[Block]) -> Block:
    """Rows and columns that share a scale, told from the shapes: the whole tensor, one row, or one of the given blocks.

    Raises:
        CheckpointError: the scales fit none of them.
    """
    shape, got = stored.specs[codes].shape, stored.specs[scale].shape
    if len(shape) not in (2, 3):
        damaged(stored, codes, f"is a quantised tensor of shape {list(shape)}; only matrices and stacks of them are.")
    whole = (shape[-2], shape[-1])
    if prod(got) == 1 and len(shape) == 2:
        return whole
    lead = shape[:-2]
    every = [*blocks, (1, shape[-1]), *([whole] if lead else [])]
    fitting = [block for block in every if got in _shapes(shape, block)]
    if not fitting:
        wanted = ", ".join(str([*lead, *grid_of(shape, block)]) for block in every)
        damaged(
            stored,
            scale,
            f"has shape {list(got)}, which are no scales of {codes!r} {list(shape)}: they must be a single number or have shape {wanted}.",
        )
    return fitting[0]


def _shapes(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """How scales of these blocks may be shaped: axes of one block may be left out at the end."""
    lead, grid = shape[:-2], grid_of(shape, block)
    found = [(*lead, *grid)]
    if grid[1] == 1:
        found.append((*lead, grid[0]))
    if lead and grid == (1, 1):
        found.append(lead)
    return found


def _number(values: Tensor) -> Tensor:
    return exponents(values) if values.dtype == torch.uint8 else values.float()
