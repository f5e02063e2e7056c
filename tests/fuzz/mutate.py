"""Mutations that know a little of what they change: numbers, brackets, names, lengths, and plain bytes."""

from __future__ import annotations

import random
import re
import struct

NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"4294967296",
    b"9223372036854775807",
    b"-9223372036854775808",
    b"1e400",
    b"NaN",
    b"1.5",
    b"true",
    b"null",
    b'""',
    b"[]",
    b"{}",
]
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\\u0000",
    b"\\ud800",
    b"../",
    b"/etc/passwd",
    b"*",
    b"&a",
    b"!!python/name:os",
    b"<<",
    b"\0",
    b"\xff",
]


def mutate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A few changes of `data`, with pieces of `other`; a safetensors header's length is mended half of the time."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        data = chance.choice((_bytes, _number, _piece, _cut, _repeat, _splice))(data, other, chance)
    if len(data) > 9 and chance.random() < 0.5:
        end = data.rfind(b"}}")
        if end > 8:
            data = struct.pack("<Q", end + 2 - 8) + data[8:]
    return data[:200_000]


def _bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    content = bytearray(data or b"\0")
    for _ in range(chance.randint(1, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def _number(data: bytes, other: bytes, chance: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return _bytes(data, other, chance)
    one = chance.choice(found)
    return data[: one.start()] + chance.choice(NUMBERS) + data[one.end() :]


def _piece(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randint(0, len(data))
    return data[:place] + chance.choice(PIECES) + data[place + chance.randint(0, 3) :]


def _cut(data: bytes, other: bytes, chance: random.Random) -> bytes:
    a, b = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    return data[:a] + data[b:]


def _repeat(data: bytes, other: bytes, chance: random.Random) -> bytes:
    a, b = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    return data[:b] + data[a:b] * chance.choice((1, 2, 50)) + data[b:]


def _splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]
