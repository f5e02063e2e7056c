"""The vectors of a bank's tasks: what is recorded of each, and which of them are still at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from thetau.bases.bank import Bank, Member
from thetau.bases.build import Evidence, check_evidence
from thetau.checkpoint import Source
from thetau.errors import BankError, ThetauError
from thetau.facade import Expression, as_vector
from thetau.facade import open as open_weights


def describe(name: str, basis: str, vector: Expression, norm: float) -> Member:
    """What a bank keeps of a vector that it takes in."""
    added = _added(vector)
    label = at_home(added[0][1].label) if len(added) == 1 else vector.label
    return Member(name=name, basis=basis, source=label, fingerprint=fingerprint_of(vector), norm=norm)


def at_home(label: str) -> str:
    """A path from the root, so that a bank can be used from any folder; a hub id as it is."""
    return str(Path(label).resolve()) if Path(label).exists() else label


def recorded(evidence: Evidence | None) -> dict[str, dict[str, str]]:
    """Where files of evidence lie, as a bank keeps it; what lies in memory is not kept."""
    return {
        kind: {task: at_home(os.fspath(file)) for task, file in files.items() if isinstance(file, str | os.PathLike)}
        for kind, files in (evidence or {}).items()
    }


def evidence_with(bank: Bank, more: Evidence | None, tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the bank records of evidence, and what is given now, of these tasks. Raises `RecipeError`: another method's, or of no task."""
    check_evidence(more, bank.inner, tasks)
    known, new = bank.state.settings.evidence, recorded(more)
    both = {kind: known.get(kind, {}) | new.get(kind, {}) for kind in (*known, *new)}
    return {kind: {task: file for task, file in sorted(files.items()) if task in tasks} for kind, files in both.items()}


def fingerprint_of(vector: Expression) -> str:
    """Tells a vector from others: that of its one model or saved form, or a digest over several."""
    added = _added(vector)
    if len(added) == 1 and added[0][0] == 1:
        return added[0][1].fingerprint()
    parts = sorted(f"{weight:.17g}·{source.fingerprint()}" for weight, source in added)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _added(vector: Expression) -> list[tuple[float, Source]]:
    """The terms beside the base."""
    base = vector.reference.key if vector.reference is not None else None
    return [(weight, source) for weight, source in vector.terms if source.key != base]


def check_lengths(bank: Bank, norms: Mapping[str, float]) -> None:
    """Refuse vectors that do not have the length of those that went into the bank: fingerprints look at samples of a file alone.

    Raises:
        BankError: naming the first one.
    """
    for name, norm in norms.items():
        known = bank.members[name].norm
        if abs(norm - known) > 1e-6 * known:
            raise BankError(
                f"{bank.members[name].source}: is not the vector that went into the bank as {name}: its length is {norm:.8g}, and was {known:.8g}."
            )


def at_hand(bank: Bank, given: Mapping[str, Expression] | None = None) -> tuple[dict[str, Expression], dict[str, str]]:
    """The tasks' vectors, given or still where they were, and for every other task why there is none.

    A vector that is not the one that went into the bank does not count.
    """
    found: dict[str, Expression] = {}
    lost: dict[str, str] = {}
    for name, member in bank.members.items():
        try:
            vector = (given or {}).get(name)
            if vector is None:
                vector = as_vector(open_weights(member.source, base=bank.base()), bank.base())
        except ThetauError as error:
            lost[name] = str(error)
            continue
        if fingerprint_of(vector) != member.fingerprint:
            lost[name] = f"{vector.label}: is not the vector that went into the bank as {name} (their fingerprints differ)."
        else:
            found[name] = vector.named(name)
    return found, lost
