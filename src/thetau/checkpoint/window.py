"""Rows of one tensor, in every source that is asked for; each source is read once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Readable(Protocol):
    """What a window reads from."""

    key: str

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows as stored."""


class Window:
    """Rows `start:stop` of one reference tensor in every source that is asked for. A 0-d tensor has shape `[1]` here."""

    def __init__(self, name: str, start: int, stop: int) -> None:
        self.name, self.start, self.stop = name, start, stop
        self._rows: dict[tuple[str, str], Tensor] = {}
        self._lender: Window | None = None
        self._shared: str | None = None
        self.results: dict[Hashable, tuple[Tensor, ...]] = {}  # what merges made of whole tensors, or of units of them
        self._renamed: dict[str, Window] = {}

    def called(self, name: str) -> Window:
        """The same rows for a merge whose base calls this tensor otherwise."""
        return self if name == self.name else self._renamed.setdefault(name, Window(name, self.start, self.stop))

    def sharing(self, source: Readable | None) -> Window:
        """A new window over the same rows that keeps what is read of one source, the base, in this one."""
        other = Window(self.name, self.start, self.stop)
        other._lender, other._shared = self, source.key if source is not None else None
        return other

    def rows(self, source: Readable, name: str, start: int, stop: int) -> Tensor:
        """Rows as stored."""
        if self._lender is not None and source.key == self._shared:
            return self._lender.rows(source, name, start, stop)
        key = (source.key, name)
        if key not in self._rows:
            found = source.read(name, self.start, self.stop)
            self._rows[key] = found.reshape(1) if found.ndim == 0 else found
        return self._rows[key][start - self.start : stop - self.start]
