"""A chain at work: blocks of rows through transforms, reduction and post-stages, or a whole tensor where some part wants it so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.window import Window
from thetau.engine.aligned import Aligned
from thetau.engine.executor import Engine
from thetau.engine.guard import Guard
from thetau.engine.window import blocks
from thetau.errors import PartError, ThetauError
from thetau.parts import BlockReduction, Emit, Part, Reduction, Site, State, StreamReduction, WholeReduction
from thetau.sums import sum_in_order, weighted_sum


def part_call(part: Part, site: Site, call: Callable[..., Any], *given: Any) -> Any:
    """What a part gives; an error that is not ours leaves with the part's and the tensor's name.

    Raises:
        PartError: the part failed.
    """
    try:
        return call(*given)
    except (ThetauError, MemoryError):
        raise
    except Exception as error:
        raise PartError(f"{type(part).__name__} failed at {site.name!r}: {type(error).__name__}: {error}") from error


def shaped(part: Part, site: Site, value: Tensor, want: Sequence[int]) -> Tensor:
    """The value, if it has the shape that the contract says.

    Raises:
        PartError: it has not.
    """
    if tuple(value.shape) != tuple(want):
        raise PartError(f"{type(part).__name__} gave shape {list(value.shape)} at {site.name!r}, where {list(want)} is due.")
    return value


class Apply:
    """The last pass of a chain over aligned task vectors, given the state of every stage."""

    def __init__(self, aligned: Aligned, engine: Engine, guard: Guard, states: Sequence[State], *, check: bool) -> None:
        self.aligned, self.engine, self.guard = aligned, engine, guard
        self.states = states
        self.check = check  # whether the guard must still look at what is read

    def trusting(self) -> Apply:
        """The same over what the guard has looked at."""
        return Apply(self.aligned, self.engine, self.guard, self.states, check=False)

    @property
    def _post_states(self) -> Sequence[State]:
        return self.states[len(self.aligned.chain.transforms) + 1 :]

    # Blocks.

    def block(self, window: Window, start: int, stop: int) -> Tensor:
        """Merged rows of the window's tensor."""
        aligned = self.aligned
        if window.name not in aligned.chosen:
            return self._outside(window, start, stop)
        if aligned.chain.access != "block":
            merged = self.tensor(window)[0][start - window.start : stop - window.start]
        else:
            site = aligned.site_at(window, start, stop)
            merged = self.merged(self.transformed(window, start, stop, site), site)
        return merged

    def emitted(self, emit: Emit, name: str, window: Window, start: int, stop: int) -> Tensor:
        """Rows of one of several outputs."""
        aligned = self.aligned
        site = aligned.site_at(window, start, stop)
        if not aligned.by_blocks(emit):
            merged, stack = (
                rows.narrow(rows.ndim - len(site.shape or (1,)), start, stop - start)
                for rows in self.tensor(window, emit.reads_merged)
            )
        else:
            stack = self.transformed(window, start, stop, site)
            merged = self.merged(stack, site) if emit.reads_merged else stack[0]
        state = self.states[-1] if aligned.chain.emit is emit else None
        rows = part_call(emit, site, emit.emit, name, merged if emit.reads_merged else None, stack, state, site)
        return shaped(emit, site, rows, stack.shape[1:])

    def transformed(self, window: Window, start: int, stop: int, site: Site, upto: int | None = None) -> Tensor:
        """The stack `[task, rows, *rest]` after the chain's transforms, or the first of them."""
        return self.transform(self.stack(window, start, stop), site, upto)

    def stack(self, window: Window, start: int, stop: int) -> Tensor:
        """The stack as the parts get it: task vectors, or models where the chain works on them."""
        aligned = self.aligned
        stack = aligned.reading.stack(aligned.vectors, window, start, stop)
        if self.check:
            self.guard.look(aligned.tasks, stack, aligned.reading, aligned.vectors, window, start, stop, self.aligned.yardstick)
        return stack

    def transform(self, stack: Tensor, site: Site, upto: int | None = None) -> Tensor:
        """A stack after the chain's transforms, or the first of them."""
        for part, state in zip(self.aligned.chain.transforms[:upto], self.states, strict=False):
            stack = shaped(part, site, part_call(part, site, part.apply, stack, state, site), stack.shape)
        return stack

    def merged(self, stack: Tensor, site: Site, upto: int | None = None, vectors: Tensor | None = None) -> Tensor:
        """A block after the reduction and the post-stages, or the first of them; `vectors` is the stack before the transforms."""
        chain = self.aligned.chain
        reduction, state = (
            chain.reduction,
            self.states[len(chain.transforms)] if len(self.states) > len(chain.transforms) else None,
        )
        assert isinstance(reduction, BlockReduction | WholeReduction)
        merged = shaped(reduction, site, part_call(reduction, site, reduction.reduce, stack, state, site), stack.shape[1:])
        return self.posted(merged, stack, site, upto, vectors=vectors)

    def posted(
        self,
        merged: Tensor,
        stack: Tensor | None,
        site: Site,
        upto: int | None = None,
        *,
        vectors: Tensor | None = None,
        outside: bool = False,
    ) -> Tensor:
        """A merged block after the post-stages, or the first of them."""
        for part, state in zip(self.aligned.chain.post[:upto], self._post_states, strict=False):
            if part.everywhere or not outside:
                seen = None if not part.reads_stack else vectors if part.reads_vectors and vectors is not None else stack
                merged = shaped(part, site, part_call(part, site, part.adjust, merged, seen, state, site), merged.shape)
        return merged

    def _outside(self, window: Window, start: int, stop: int) -> Tensor:
        """The mean or the sum, where the chain does not act; the stages that act everywhere follow. Of models, the base or their mean."""
        aligned, chain = self.aligned, self.aligned.chain
        if window.name not in aligned.specs:  # of a stored tensor of which something else is moved
            return torch.zeros((stop - start, *aligned.alignment.specs[window.name].shape[1:]), dtype=aligned.reading.dtype)
        if chain.models and chain.selection.elsewhere == "base":
            return aligned.base(window, start, stop)
        site = aligned.site(window.name, start)
        stack = aligned.reading.stack(aligned.vectors, window, start, stop)
        self.guard.look(aligned.tasks, stack, aligned.reading, aligned.vectors, window, start, stop, self.aligned.yardstick)
        if chain.models:
            return sum_in_order(stack[int(chain.with_base) :]) / (len(stack) - int(chain.with_base))
        total = weighted_sum(stack, chain.reduction.weights(site))
        merged = total / len(aligned.tasks) if chain.selection.elsewhere == "mean" else total
        return self.posted(merged, None, site, outside=True)

    # Whole tensors.

    def tensor(self, window: Window, merge: bool = True) -> tuple[Tensor, Tensor]:
        """A whole merged tensor and, where something after the reduction reads it, its transformed stack; kept in the window."""
        key = id(self.aligned)
        if key not in window.results:
            window.results[key] = self._stream(window) if self.aligned.chain.access == "stream" else self._whole(window, merge)
        merged, stack = window.results[key]
        return merged, stack

    def _whole(self, window: Window, merge: bool) -> tuple[Tensor, Tensor]:
        """The stack of a tensor at once."""
        aligned, chain = self.aligned, self.aligned.chain
        spec = aligned.alignment.specs[window.name]
        site = aligned.site_at(window, 0, spec.rows)
        vectors = self.stack(window, 0, spec.rows) if chain.reads_vectors and merge else None
        if any(part.access == "whole" for part in chain.transforms):
            stack = self.transformed(window, 0, spec.rows, site)
        else:
            pieces = [self.transformed(window, a, b, aligned.site_at(window, a, b)) for a, b in blocks(spec, 0, spec.rows)]
            stack = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if not merge:
            return stack[0], stack
        if isinstance(chain.reduction, BlockReduction):
            return self.merged(stack, site, vectors=vectors), stack
        with self.engine.there():
            merged = self._matrices_merged(chain.reduction, stack, site)
        return self.posted(merged, stack, site, vectors=vectors), stack

    def _matrices_merged(self, reduction: Reduction, stack: Tensor, site: Site) -> Tensor:
        """A whole stack through a reduction that is no elementwise one, one logical matrix after the other."""
        if isinstance(reduction, StreamReduction):
            matrices = ((task, row.reshape(len(row), -1)) for task, row in zip(self.aligned.tasks, stack, strict=True))
            return self._fed(reduction, matrices, site)
        assert isinstance(reduction, WholeReduction)
        state = self.states[len(self.aligned.chain.transforms)]
        given = stack.to(self.engine.place).contiguous()
        out = part_call(reduction, site, reduction.reduce, given, state, site)
        return shaped(reduction, site, out, given.shape[1:]).cpu()

    def _stream(self, window: Window) -> tuple[Tensor, Tensor]:
        """A whole tensor, fed task by task."""
        aligned, reduction = self.aligned, self.aligned.chain.reduction
        assert isinstance(reduction, StreamReduction)
        spec = aligned.alignment.specs[window.name]
        site = aligned.site(window.name)
        merged = self._fed(reduction, self._matrices(window), site)
        merged = self.posted(merged.reshape(spec.shape), None, site)
        return merged, merged[None][:0]

    def _fed(self, reduction: StreamReduction, matrices: Iterator[tuple[str, Tensor]], site: Site) -> Tensor:
        """A matrix, of the tensor's shape, from a streaming reduction that gets each task's."""
        d_out, d_in = self.aligned.matrix(site.name)
        with self.engine.there():
            total = part_call(reduction, site, reduction.init, d_out, d_in, len(self.aligned.tasks))
        spec = self.aligned.alignment.specs[site.name]
        for task, matrix in matrices:
            one = self.aligned.site_at(Window(site.name, 0, spec.rows), 0, spec.rows, (task,))
            given = self.engine.there_as_float32(matrix)
            with self.engine.there():
                total = part_call(reduction, site, reduction.add, total, given, one)
        with self.engine.there():
            merged = shaped(reduction, site, part_call(reduction, site, reduction.result, total, site), (d_out, d_in)).cpu()
        return merged.reshape(spec.shape)

    def _matrices(self, window: Window) -> Iterator[tuple[str, Tensor]]:
        """Each task's transformed tensor as `[rows, rest]` in the dtype that is worked in, one at a time where the transforms allow it."""
        aligned = self.aligned
        spec = aligned.alignment.specs[window.name]
        flat = (spec.rows, spec.row_elements)
        if not aligned.chain.by_task:
            pieces = [self.transformed(window, a, b, aligned.site_at(window, a, b)) for a, b in blocks(spec, 0, spec.rows)]
            for index, task in enumerate(aligned.tasks):
                yield task, torch.cat([piece[index] for piece in pieces]).reshape(flat)
            return
        shared = aligned.alignment.seen(aligned.reference) if aligned.reference is not None else None
        for task, vector in zip(aligned.tasks, aligned.vectors, strict=True):
            one = window.sharing(shared)  # drops this task's own rows when it is done
            out = self.engine.room((1, spec.rows, *spec.shape[1:]), aligned.reading.dtype)
            for start, stop in blocks(spec, 0, spec.rows):
                aligned.reading.evaluate(vector, one, start, stop, out[0, start:stop])
                if self.check:
                    base = self.aligned.yardstick if task == aligned.tasks[0] else None
                    self.guard.look([task], out[:, start:stop], aligned.reading, [vector], one, start, stop, base)
                if aligned.chain.transforms:
                    out[:, start:stop] = self.transform(out[:, start:stop], aligned.site_at(one, start, stop, (task,)))
            yield task, out[0].reshape(flat)
