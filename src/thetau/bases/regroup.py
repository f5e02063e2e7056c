"""The one way in which a bank's bases change: nodes (stored bases, vectors at hand) are grouped anew, and what changed is written.

Where the inner method is a mean or a sum, a basis is exactly linear in its members, so bases are joined and parted exactly, and their new
inner products follow from the old ones. Every other method is applied to the nodes themselves, which is not what it would have made of
all the members at once; the operation says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.bases.bank import Bank, Basis, Member, Rows, full, lower
from thetau.bases.build import evidence_of, weighted
from thetau.bases.change import Change
from thetau.bases.store import bytes_of, coefficient, lossless, slack_of, write_basis
from thetau.engine.executor import Engine
from thetau.errors import BankError
from thetau.facade import Expression, gram, merge


@final
@dataclass(frozen=True, kw_only=True)
class Node:
    """A vector that cannot be taken apart now: a stored basis (then `basis` says which), or a task's own vector."""

    vector: Expression
    members: tuple[str, ...]
    basis: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """The new bases, their inner products, and what is to be said of them."""

    bases: dict[str, Basis]
    gram: Float[Tensor, "basis basis"]
    said: tuple[str, ...]


def regroup(
    change: Change,
    bank: Bank,
    nodes: Mapping[str, Node],
    products: Float[Tensor, "node node"],
    parts: Mapping[str, Sequence[str]],
    *,
    engine: Engine | None = None,
) -> Regrouped:
    """Write the bases `parts` (basis → nodes) that are not there yet; `products` are the inner products of the nodes in their order."""
    settings, inner, order = bank.state.settings, bank.inner, list(nodes)
    exact = lossless(settings.store)
    bases: dict[str, Basis] = {}
    rows: list[Tensor] = []
    said: list[str] = []
    terms: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, listed in parts.items():
        joined = [nodes[node] for node in listed]
        weights = torch.zeros(len(order), dtype=torch.float64)
        if len(joined) == 1:
            weights[order.index(listed[0])] = 1
            rows.append(weights)
            if joined[0].basis is not None:
                bases[name] = replace(bank.bases[joined[0].basis], name=name)
                continue
        else:
            parted = [_factor(inner, node) for node in joined]
            whole = coefficient(inner, sum(len(node.members) for node in joined))
            if whole is not None and all(factor is not None for factor in parted):
                for node, factor in zip(listed, parted, strict=True):
                    assert factor is not None
                    weights[order.index(node)] = whole / factor
                rows.append(weights)
            else:
                exact = False
                rows.append(weights)
        members = tuple(sorted(task for node in joined for task in node.members))
        vector, how, remark = _joined(bank, inner, joined, {n: float(weights[order.index(n)]) for n in listed}, engine)
        said += remark(members)
        basis, read = write_basis(
            change.path,
            change.file(name),
            name,
            members,
            vector,
            how,
            store=settings.store,
            exclude=settings.exclude,
            engine=engine,
        )
        change.read += read
        change.written += basis.nbytes
        bases[name] = basis
        if how == "member" or weights.any():
            places = [order.index(node) for node in listed]
            terms[name] = [
                (float(weights[i]), float(products[i, i].clamp(min=0).sqrt()), _slack(bank, nodes[order[i]])) for i in places
            ]
        else:
            terms[name] = [] if how == "merged" else [(0.0, 0.0, None)]
    if exact:
        linear = torch.stack(rows) if rows else torch.zeros(0, len(order), dtype=torch.float64)
        found = linear @ products @ linear.T
    else:
        stored = Bank(change.path, replace(bank.state, bases=bases))
        vectors = list(stored.vectors().values())
        change.read += bytes_of(vectors)
        found = gram(vectors, exclude=settings.exclude, engine=engine)
    norms = found.diagonal().clamp(min=0).sqrt().tolist()
    bases = {name: replace(basis, norm=norm) for (name, basis), norm in zip(bases.items(), norms, strict=True)}
    slack = {name: slack_of(found, bases[name].error, bases[name].norm) for name, found in terms.items()}
    return Regrouped(
        bases={name: replace(basis, slack=slack.get(name, basis.slack)) for name, basis in bases.items()},
        gram=(found + found.T) / 2,
        said=tuple(said),
    )


def _factor(inner: object, node: Node) -> float | None:
    """c where the node counts as c · Σ of its members (a given basis too: it stands for each of them alike); None where it does not."""
    return coefficient(inner, len(node.members))  # type: ignore[arg-type]


def _slack(bank: Bank, node: Node) -> float | None:
    return 0.0 if node.basis is None else bank.bases[node.basis].slack


class _Remark:
    """What to say of a basis that could not be made exactly."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __call__(self, members: tuple[str, ...]) -> list[str]:
        return [f"{', '.join(members)}: {self.text}"] if self.text else []


def _joined(
    bank: Bank, inner: object, nodes: Sequence[Node], weights: Mapping[str, float], engine: Engine | None
) -> tuple[Expression, Literal["member", "merged", "online", "given"], _Remark]:
    if len(nodes) == 1:
        return nodes[0].vector, "member", _Remark()
    raw = all(node.basis is None or len(node.members) == 1 for node in nodes)
    given = [node for node in nodes if node.basis is not None and bank.bases[node.basis].how == "given"]
    if any(weights.values()):
        parts = {name: (weight, node.vector) for (name, weight), node in zip(weights.items(), nodes, strict=True)}
        total = weighted(parts, exclude=bank.state.settings.exclude, engine=engine)
        if given:
            return total, "given", _Remark("joined to a basis that was given as one model: it counts as its members' mean.")
        return total, "merged" if raw else "online", _Remark()
    names = ["+".join(node.members) for node in nodes]
    settings = bank.state.settings
    several = [node for node in nodes if len(node.members) > 1]
    if several and inner.chain().needs:  # type: ignore[attr-defined]
        raise BankError(
            f"{bank.path}: {settings.inner['name']} needs evidence of every vector that it merges, and the basis of {', '.join(several[0].members)} has none. "
            "Give a new vector a basis of its own (`--to new`), or rebuild with all the vectors at hand (`--vector NAME=PATH`)."
        )
    merged = merge(
        [node.vector for node in nodes],
        inner,  # type: ignore[arg-type]
        names=names,
        seed=settings.seed,
        exclude=settings.exclude,
        engine=engine,
        evidence=evidence_of(names, settings.evidence),
    )
    kind = bank.state.settings.inner["name"]
    if raw and not given:
        return merged, "merged", _Remark()
    return (
        merged,
        "given" if given else "online",
        _Remark(f"merged by {kind} from bases that stand for several tasks, not from the tasks' own vectors."),
    )


def exact_members(bank: Bank) -> dict[str, str]:
    """Tasks whose very vector is stored, and its basis: those that stand alone."""
    return {
        basis.members[0]: name
        for name, basis in bank.bases.items()
        if len(basis.members) == 1 and basis.how == "member" and basis.error == 0
    }


def with_tasks(old: Rows, before: Sequence[str], after: Mapping[str, Member], products: Mapping[tuple[str, str], float]) -> Rows:
    """The tasks' inner products with tasks added or gone; `products` are those newly known, in either order of the pair."""
    matrix = full(old)
    names = sorted(after)
    found = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            value = products.get((a, b), products.get((b, a)))
            if value is None and a in before and b in before:
                value = float(matrix[before.index(a), before.index(b)])
            if value is not None:
                found[i, j] = value
    return lower(found)
