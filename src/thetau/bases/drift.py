"""How far a bank that grew online is from one built offline of the same vectors, in as many bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from thetau.bases.bank import Bank
from thetau.bases.build import merge_groups, similarities
from thetau.bases.cluster import agreement, cluster, spectrum
from thetau.bases.members import at_hand
from thetau.bases.store import bytes_of
from thetau.engine.executor import Engine
from thetau.facade import Expression, gram
from thetau.statistics.gram import cosines


def drift_of(
    bank: Bank, originals: Mapping[str, Expression] | None = None, *, engine: Engine | None = None
) -> tuple[dict[str, Any], int]:
    """Compare with an offline build; reads every original vector twice and more, as its inner method needs.

    Returns:
        what was found, and the bytes that were read:

        - `partition`: adjusted Rand index of the two partitions, 1 where they are the same.
        - `same_members`: basis → ‖B − B*‖/‖B*‖, B* being the inner merge of the same members in one go: what rounding, the stored form
          and merging step by step have cost; for a given basis, how far it is from that merge.
        - `nearest`: basis → the offline basis that is nearest to it and its cosine; together at most one each (an assignment).
        - `missing`: tasks whose vectors are not at hand; where there are any, nothing else is measured.
    """
    found, lost = at_hand(bank, originals)
    if lost or len(found) < 2:
        return {"missing": sorted(lost)}, 0
    settings = bank.state.settings
    similarity = similarities(found, exclude=settings.exclude, engine=engine)
    count = len(bank.bases)
    apart_at_least = spectrum(similarity).components
    offline = cluster(similarity, min(max(count, apart_at_least), len(found)), opposed=settings.opposed, seed=settings.seed)
    own = {name: basis.members for name, basis in bank.bases.items()}
    how: dict[str, Any] = {"seed": settings.seed, "exclude": settings.exclude, "engine": engine, "evidence": settings.evidence}
    again = merge_groups(found, own, bank.inner, **how)
    apart = merge_groups(found, offline.groups, bank.inner, **how)
    stored = bank.vectors()
    apart_from = [stored[name] - again[name] for name in stored]  # differences first: inner products would lose what is small
    listed = [*stored.values(), *apart.values(), *again.values(), *apart_from]
    products = gram(listed, exclude=settings.exclude, engine=engine)
    square = products.diagonal().clamp(min=0)
    whole, left = square[-2 * count : -count], square[-count:]
    same = dict(zip(stored, (left / whole.clamp(min=1e-300)).sqrt().tolist(), strict=True))
    cosine = cosines(products)[:count, count : count + len(apart)].numpy()
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-np.abs(cosine))
    names = list(apart)
    nearest = {
        list(bank.bases)[row]: {"members": list(offline.groups[names[column]]), "cosine": float(cosine[row, column])}
        for row, column in zip(rows, columns, strict=True)
    }
    labels = {task: member.basis for task, member in bank.members.items()}
    read = 3 * bytes_of(list(found.values())) + bytes_of(list(bank.vectors().values()))
    return {"partition": agreement(labels, offline.label()), "same_members": same, "nearest": nearest, "missing": []}, read
