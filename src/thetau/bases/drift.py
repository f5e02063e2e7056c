"""How far a bank that grew online is from one built offline of the same vectors, in as many bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from thetau.bases.bank import Bank
from thetau.bases.build import merge_groups, similarities
from thetau.bases.cluster import agreement, cluster
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
          and merging step by step have cost.
        - `nearest`: basis → the offline basis that is nearest to it and its cosine; together at most one each (an assignment).
        - `missing`: tasks whose vectors are not at hand; where there are any, nothing else is measured.
    """
    found, lost = at_hand(bank, originals)
    if lost or len(found) < 2:
        return {"missing": sorted(lost)}, 0
    settings = bank.state.settings
    similarity = similarities(found, exclude=settings.exclude, engine=engine)
    count = len(bank.bases)
    offline = cluster(similarity, min(count, len(found)), opposed=settings.opposed, seed=settings.seed)
    own = {name: basis.members for name, basis in bank.bases.items()}
    how: dict[str, Any] = {"seed": settings.seed, "exclude": settings.exclude, "engine": engine}
    again = merge_groups(found, own, bank.inner, **how)
    apart = merge_groups(found, offline.groups, bank.inner, **how)
    listed = [*bank.vectors().values(), *again.values(), *apart.values()]
    products = gram(listed, exclude=settings.exclude, engine=engine)
    same = {}
    for place, name in enumerate(bank.bases):
        square = products[place, place] - 2 * products[place, place + count] + products[place + count, place + count]
        same[name] = float((square.clamp(min=0) / products[place + count, place + count].clamp(min=1e-300)).sqrt())
    cosine = cosines(products)[:count, 2 * count :].numpy()
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
