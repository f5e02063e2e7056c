"""How a basis is put on the disk, and what a change reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from thetau.bases.bank import Basis, digest_of
from thetau.checkpoint import matches
from thetau.compression import Form, LowRank, Precision, Sparse, compress
from thetau.engine.executor import Engine
from thetau.engine.planning import plan
from thetau.errors import RecipeError, nearest
from thetau.facade import Expression
from thetau.facade import open as open_weights
from thetau.methods import Average, TaskArithmetic
from thetau.parts import Method

FLOAT_ERROR = 2.0**-24  # of one rounding to float32


_FORMS: dict[str, type[Form]] = {"sparse": Sparse, "low_rank": LowRank, "precision": Precision}
DENSE: dict[str, Any] = {"form": "dense"}


def check_store(store: Mapping[str, Any]) -> dict[str, Any]:
    """How bases are stored, checked: `{"form": "dense"}` in float32, or `sparse`, `low_rank`, `precision` with the form's fields.

    Raises:
        RecipeError: there is no such form, or a field is out of range.
    """
    given = dict(store)
    if given == DENSE:
        return given
    form_of(given)
    return given


def form_of(store: Mapping[str, Any]) -> Form:
    """The compressed form of a setting. Raises `RecipeError`."""
    given = dict(store)
    name = given.pop("form", None)
    if name not in _FORMS:
        raise RecipeError([f"`form` must be dense, {', '.join(_FORMS)}. Got {name!r}.{nearest(str(name), _FORMS)}"], "store")
    try:
        return _FORMS[name](**given)
    except (TypeError, ValueError) as error:
        raise RecipeError([str(error)], "store") from error


def lossless(store: Mapping[str, Any]) -> bool:
    """Whether what is stored is what was computed, in float32."""
    return dict(store) == DENSE


def write_basis(
    folder: Path,
    file: str,
    name: str,
    members: tuple[str, ...],
    vector: Expression,
    how: Literal["member", "merged", "online", "given"],
    *,
    store: Mapping[str, Any],
    exclude: Iterable[str] = (),
    engine: Engine | None = None,
) -> tuple[Basis, int]:
    """Write a basis's file, and say what it is and how many bytes were read for it. Its norm is measured by the caller.

    Raises:
        OutputError: it cannot be written. CheckpointError: an input is damaged.
    """
    read = plan(vector, engine=engine or Engine()).read
    error = 0.0
    if lossless(store):
        vector.save(folder / file, exclude=list(exclude), engine=engine)
    else:
        error = compress(vector, folder / file, form_of(store), exclude=list(exclude), engine=engine).error
    stored = open_weights(folder / file).terms[0][1]
    basis = Basis(
        name=name,
        members=tuple(sorted(members)),
        file=file,
        nbytes=(folder / file).stat().st_size,
        fingerprint=stored.fingerprint(),
        digest=digest_of(folder / file),
        norm=0.0,
        how=how,
        error=error,
    )
    return basis, read


def slack_of(parts: Sequence[tuple[float, float, float | None]], error: float, norm: float) -> float | None:
    """How far a stored Σ weight · vector can be from the exact one: `parts` are (weight, norm, slack of the vector).

    One rounding a term, one a product and one at the end, each of at most 2⁻²⁴ of what is rounded; then the stored form's error, which is
    relative to what was given to it, of length ‖stored‖ / (1 − error) at most.
    """
    if error >= 1 or any(slack is None for _, _, slack in parts):
        return None
    inherited = sum(abs(weight) * (slack or 0.0) for weight, _, slack in parts)
    rounded = (2 * len(parts) + 1) * FLOAT_ERROR * sum(abs(weight) * norm for weight, norm, _ in parts) if len(parts) > 1 else 0.0
    return inherited + rounded + error / (1 - error) * norm


def dense_bytes(vector: Expression, exclude: Iterable[str] = ()) -> int:
    """Bytes of a basis in float32 before it is written; its file has a header too, of a few kilobytes."""
    left = list(exclude)
    return 4 * sum(
        spec.elements for name, spec in vector.specs().items() if spec.dtype.is_floating_point and not matches(name, left)
    )


def bytes_of(vectors: Iterable[Expression]) -> int:
    """Bytes of the files below some vectors, each once."""
    sources = {source.key: source for vector in vectors for source in vector.sources()}
    return sum(spec.nbytes for source in sources.values() for spec in source.specs.values())


def coefficient(inner: Method, count: int) -> float | None:
    """c where a basis of `count` members is c · Σ τ_i: exactly linear in its members; None for every other method."""
    if isinstance(inner, Average | TaskArithmetic) and isinstance(inner.scale, int | float) and inner.scale:
        scale = float(inner.scale)
        return 1.0 if count == 1 else scale / count if isinstance(inner, Average) else scale
    return None
