"""Documents in JSON, and the check that JSON can hold one, made before the work whose result it is to describe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thetau.errors import OutputError

SHOWN = 5  # problems that a message names


def as_json(document: Any, path: Path, *, indent: int = 2) -> bytes:
    """A document in JSON. `path`: the output that it belongs to. Raises `OutputError`: JSON cannot hold it."""
    try:
        return (json.dumps(document, indent=indent) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        check_json(document, path)
        raise OutputError(f"{path}: cannot be written as JSON ({error}).") from error


def check_json(document: Any, path: Path, what: str = "document") -> None:
    """Refuse a document that JSON cannot hold. `path`: the output that it belongs to; `what`: the document, in a word.

    Raises:
        OutputError: it names each place, as `recipe.method.scale`, and the type of the value there.
    """
    problems = list(_problems(document, "", ()))
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise OutputError(
            f"{path}: the {what} can hold only what JSON can: strings, finite numbers, true, false, null, lists and mappings with "
            f"strings as keys. Got {', '.join(problems[:SHOWN])}{more}. Give plain values there."
        )


def _problems(value: Any, place: str, above: tuple[int, ...]) -> Iterator[str]:
    here = f"`{place.removeprefix('.')}`" if place else "the whole"
    match value:
        case None | bool() | str() | int():
            return
        case float():
            if not math.isfinite(value):
                yield f"{value} at {here}"
        case dict() | list() | tuple():
            if id(value) in above:
                yield f"a {_kind(value)} that holds itself at {here}"
                return
            inner = (*above, id(value))
            if isinstance(value, dict):
                for key, held in value.items():
                    if not isinstance(key, str):
                        yield f"a key of type {_kind(key)} ({key!r}) at {here}"
                    yield from _problems(held, f"{place}.{key}", inner)
            else:
                for number, held in enumerate(value):
                    yield from _problems(held, f"{place}[{number}]", inner)
        case _:
            yield f"a value of type {_kind(value)} at {here}"


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
