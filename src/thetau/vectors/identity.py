"""What a task is called: the name that recipes, fields by task and randomness know it by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from thetau.errors import RecipeError
from thetau.vectors.combination import Combination


def identities(vectors: Sequence[Combination], names: Sequence[str] | None = None) -> list[str]:
    """A distinct name for each task, the same whatever their order.

    The given names; or each vector's own, which is the last part of its path; where these meet, the shortest ends of the paths that
    differ; for weights in memory a hash of their values. The very same vector given twice gets a number.

    Raises:
        RecipeError: the given names are too few, too many, empty or not distinct.
    """
    if names is not None:
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if len(names) != len(vectors) or twice or not all(names):
            raise RecipeError(
                [f"`names` must be {len(vectors)} different names, none of them empty. Got {list(names)}."], "merge"
            )
        return list(names)
    own = [vector.name or _tail(vector, 1) for vector in vectors]
    depth = 1
    while True:
        clashing = {name for name in own if own.count(name) > 1}
        deepest = max((len(PurePath(path).parts) for path in map(_path, vectors) if path), default=0)
        if not clashing or depth >= deepest:
            break
        depth += 1
        own = [_tail(vector, depth) if name in clashing else name for vector, name in zip(vectors, own, strict=True)]
    seen: dict[str, int] = {}
    out = []
    for name in own:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def _path(vector: Combination) -> str | None:
    """Where the one model, adapter or saved vector of this vector lies; None where there are several, or none on disk."""
    base = vector.reference.key if vector.reference is not None and not vector.is_model else None
    added = [source for weight, source in vector.terms if weight > 0 and source.key != base]
    return added[0].label if len(added) == 1 and added[0].folder is not None else None


def _tail(vector: Combination, depth: int) -> str:
    path = _path(vector)
    if path is not None:
        return str(PurePath(*PurePath(path).parts[-depth:]))
    return "vector " + " ".join(sorted(f"{weight:+g}·{source.fingerprint()[:12]}" for weight, source in vector.terms))
