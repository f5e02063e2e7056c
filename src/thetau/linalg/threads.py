"""How many threads torch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from thetau._lazy import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One, as in the engine's workers: small matrices are slower on many threads, by far where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
