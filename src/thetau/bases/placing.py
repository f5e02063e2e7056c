"""Where a new vector goes: similarities of nodes, the threshold from which it joins, and the budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.bases.bank import Bank
from thetau.bases.regroup import Node
from thetau.bases.store import coefficient, dense_bytes, lossless
from thetau.engine.work import gigabytes
from thetau.errors import BankError
from thetau.facade import Expression

JOIN = 0.1  # similarity from which a vector joins at least, where no cluster says what tasks of one kind have in common


def links_of(
    bank: Bank, nodes: Mapping[str, Node], products: Float[Tensor, "node node"], norms: Mapping[str, float]
) -> Float[Tensor, "node node"]:
    """Similarity of nodes: the mean inner product of their members, over the root mean squares of their lengths; for one task its cosine.

    The cosine of the stored vectors where they do not tell that mean: methods that are not linear, given bases, lossy forms.
    """
    scale = []
    for place, node in enumerate(nodes.values()):
        basis = None if node.basis is None else bank.bases[node.basis]
        factor = (
            None if basis is not None and (basis.how == "given" or basis.error) else coefficient(bank.inner, len(node.members))
        )
        if factor is None:
            length = float(products[place, place].clamp(min=0).sqrt())
        else:  # the members' mean is basis / (factor · n); its partner is their root mean square length
            square = sum(norms[task] ** 2 for task in node.members) / len(node.members)
            length = square**0.5 * factor * len(node.members)
        scale.append(1 / length if length else 0.0)
    weights = torch.tensor(scale, dtype=torch.float64)
    return products * weights[:, None] * weights[None, :]


def join_threshold(bank: Bank) -> float:
    """From which similarity a vector joins: the setting, or halfway between the means inside clusters and between them.

    Where no two tasks share a basis: the largest similarity of two tasks that were kept apart, and 0.1 at least.
    """
    if bank.state.settings.join is not None:
        return bank.state.settings.join
    names, matrix = bank.known()
    inside: list[float] = []
    between: list[float] = []
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            value = abs(float(matrix[i, j]) / (bank.members[a].norm * bank.members[b].norm))
            if value == value:
                (inside if bank.members[a].basis == bank.members[b].basis else between).append(value)
    if inside and between:
        return (sum(inside) / len(inside) + sum(between) / len(between)) / 2
    return max([*between, JOIN]) if not inside else min(inside)


def place(
    bank: Bank, nodes: Mapping[str, Node], links: Float[Tensor, "node node"], new: str, to: str | None, vector: Expression
) -> tuple[dict[str, list[str]], list[str]]:
    """The new bases as groups of nodes, and why."""
    order = list(nodes)
    parts = {key: [key] for key in order if key != new}
    own = _next(bank)
    name = new[1:]
    size = max((basis.nbytes for basis in bank.bases.values()), default=0)
    if not size:  # of a lossy form it is known when it is written, and checked then
        size = dense_bytes(vector, bank.state.settings.exclude) if lossless(bank.state.settings.store) else 1
    most = most_bases(bank, size)
    if most is not None and most < 1:
        raise BankError(
            f"{bank.path}: the budget of {gigabytes(bank.state.settings.max_bytes or 0)} holds no basis of {gigabytes(size)}."
        )
    if to is not None and to != "new":
        bank.basis(to)
        parts[to].append(new)
        return parts, [f"{name}: joined {to}, as told."]
    similar = {key: float(links[-1, place]) for place, key in enumerate(order) if key != new}
    opposed = bank.state.settings.opposed
    apart = -1.0 if opposed is None else opposed
    near = {key: value for key, value in similar.items() if value >= apart}
    best = max(near, key=lambda key: (abs(near[key]), key), default=None)
    threshold = join_threshold(bank)
    if to is None and best is not None and abs(near[best]) >= threshold:
        parts[best].append(new)
        return parts, [
            f"{name}: joined {best} ({some(bank.bases[best].members)}), |similarity| {abs(near[best]):.3f}; {threshold:.3f} is enough."
        ]
    why = (
        "as told"
        if to == "new"
        else f"its largest |similarity| is {abs(near[best]):.3f}, below {threshold:.3f}"
        if best
        else f"every basis is opposed to it (below {apart:g})"
        if similar
        else "the first one"
    )
    if most is None or len(bank.bases) < most:
        parts[own] = [new]
        return parts, [f"{name}: opened {own}; {why}."]
    pairs = {
        (a, b): float(links[i, j])
        for i, a in enumerate(order)
        for j, b in enumerate(order[:i])
        if float(links[i, j]) >= apart and not (to == "new" and new in (a, b))
    }
    if not pairs:
        raise BankError(
            f"{bank.path}: the budget of {most} bases is full, and no two of them may be joined. Raise it, or forget a task."
        )
    a, b = max(pairs, key=lambda pair: (abs(pairs[pair]), pair))
    keep, other = (b, a) if a == new or a > b else (a, b)
    value = pairs[(a, b)]
    if new in (a, b):
        parts[keep].append(new)
        return parts, [
            f"{name}: joined {keep}, its nearest ({value:.3f}): the budget of {most} bases is full, and no two bases are nearer."
        ]
    del parts[other]
    parts[keep] = [keep, other]
    parts[own] = [new]
    return parts, [
        f"{name}: opened {own}; {why}.",
        f"{keep} and {other} were joined (similarity {value:.3f}) to keep to the budget of {most} bases.",
    ]


def _next(bank: Bank) -> str:
    numbers = [int(name[1:]) for name in bank.bases if name[1:].isdigit()]
    return f"b{max(numbers, default=0) + 1}"


def most_bases(bank: Bank, size: int) -> int | None:
    """How many bases the budget allows."""
    settings = bank.state.settings
    limits = [settings.max_bases, None if settings.max_bytes is None else settings.max_bytes // max(1, size)]
    return min((limit for limit in limits if limit is not None), default=None)


def some(names: tuple[str, ...] | list[str]) -> str:
    """Up to six names, and how many more there are."""
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
