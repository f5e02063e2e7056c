"""Counter-based randomness: a function of a key and an element's index, so that order, blocks, workers and passes cannot matter.

Each 32-bit index goes through two keyed rounds of a bijective integer mixer (xor-shift and multiply, the constants of C. Wellons'
hash prospector, <https://nullprogram.com/blog/2018/07/31/>); keys come from BLAKE2 of everything that names the stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from thetau._lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

SIGN_FREE = 0x7FFFFFFF
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def element_bits(key: tuple[object, ...], start: int, count: int) -> Int[Tensor, " count"]:
    """Integers in [0, 2³¹) for the elements `start` to `start + count`."""
    out = torch.empty(count, dtype=torch.int32)
    done = 0
    while done < count:  # pieces in which the index's upper half is constant; it goes into the key
        upper, lower = divmod(start + done, 1 << 31)
        piece = min(count - done, (1 << 31) - lower)
        k0, k1 = _keys((*key, upper))
        x = torch.arange(lower, lower + piece, dtype=torch.int64).to(torch.int32)
        out[done : done + piece] = _mix(_mix(x ^ k0) ^ k1)
        done += piece
    return out.bitwise_and_(SIGN_FREE)


def stream(*key: object) -> Callable[[str, int], Tensor]:
    """The bits of a key as a function of an axis and a count, as `thetau.linalg` takes them."""
    return lambda axis, count: element_bits((*key, axis), 0, count)


def stream_keys(key: tuple[object, ...], element: int) -> tuple[int, int]:
    """The two keys of the 2³¹ elements among which one lies."""
    return _keys((*key, element >> 31))


def _keys(key: tuple[object, ...]) -> tuple[int, int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def _mix(x: Int[Tensor, " count"]) -> Int[Tensor, " count"]:
    x ^= (x >> 16) & 0xFFFF  # a logical shift
    x *= _M1
    x ^= (x >> 15) & 0x1FFFF
    x *= _M2
    x ^= (x >> 16) & 0xFFFF
    return x
