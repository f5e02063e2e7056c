"""The online bank: insert, forget, rebuild, each in storage that grows with the bases and not with the tasks.

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Fig. 2 and Section 5.2 describe the setting; the operations are ours. What a bank
cannot know any more (inner products with tasks that were merged away before) it says it does not know.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from thetau.bases.bank import Bank, Basis, State, open_bank
from thetau.bases.build import Evidence, merge_groups, refuse_other_base, space_of, weighted
from thetau.bases.change import Change, changing
from thetau.bases.cluster import Similarity, cluster
from thetau.bases.drift import drift_of
from thetau.bases.members import at_hand, check_lengths, describe, evidence_with
from thetau.bases.placing import links_of, most_bases, place, some
from thetau.bases.regroup import Node, exact_members, regroup, with_tasks
from thetau.bases.store import bytes_of, coefficient, slack_of, write_basis
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.engine.work import gigabytes
from thetau.errors import AlignmentError, BankError, RecipeError
from thetau.facade import Expression, gram
from thetau.vectors.combination import require_vector

Given = Mapping[str, Expression]


def insert(
    bank: Bank | str | os.PathLike[str],
    vector: Expression,
    name: str,
    *,
    to: str | None = None,
    allow_far: bool = False,
    drift: bool = False,
    originals: Given | None = None,
    evidence: Evidence | None = None,
    engine: Engine | None = None,
    wait: float = 600.0,
) -> Bank:
    """Add a task vector: it joins the basis that it is similar to, opens one, or has the two nearest bases joined to make room.

    One pass over the bases tells the similarities. That of a vector and a cluster is the mean inner product with its members over the root
    mean square of their lengths, which a mean or a sum gives exactly (the cosine with the basis where it does not: other methods, lossy forms).

    Args:
        bank: the bank, or its folder.
        vector: a task vector over the bank's base.
        name: what the task is called; new to the bank.
        to: the basis that it joins, or `new` for one of its own, whatever the similarities say.
        allow_far: take a vector that is too long for fine-tuning of this base.
        drift: measure how far the bank then is from one built offline; reads all the original vectors (or `originals`) again.
        evidence: of the new task, by kind and task, where the inner method needs it.

    Raises:
        BankError: the name is taken, the budget has no room for even one basis, or the bank is damaged or held by another process.
        AlignmentError: the vector is zero, of another base, of another paradigm, or does not fit.
    """
    opened = _opened(bank)
    require_vector(vector, "A bank of bases")
    with changing(opened.path, wait=wait) as change:
        now = _knowing(_fresh(opened, change), evidence, name)
        if name in now.members:
            raise BankError(f"{now.path}: has a task {name!r} already. Forget it first, or give another name (NAME=PATH).")
        base = now.base().terms[0][1]
        refuse_other_base({name: vector}, base)
        if now.members and space_of({name: vector}, base) != now.space:
            raise AlignmentError(
                f"{name}: belongs to {_space(space_of({name: vector}, base))}, the vectors of {now.path} to {_space(now.space)}."
            )
        nodes = {key: Node(vector=v, members=now.bases[key].members, basis=key) for key, v in now.vectors().items()}
        new = f"+{name}"
        nodes[new] = Node(vector=vector.named(name), members=(name,))
        listed = [node.vector for node in nodes.values()]
        change.read += bytes_of(listed)
        products = gram(listed, exclude=now.state.settings.exclude, engine=engine)
        norm = float(products[-1, -1].clamp(min=0).sqrt())
        _check_length(name, norm, now, allow_far)
        links = links_of(now, nodes, products, {**{m.name: m.norm for m in now.members.values()}, name: norm})
        parts, said = place(now, nodes, links, new, to, vector)
        found = regroup(change, now, nodes, products, parts, engine=engine)
        members = {
            task: replace(now.members[task], basis=basis) if task in now.members else describe(task, basis, vector, norm)
            for basis, one in found.bases.items()
            for task in one.members
        }
        order = list(nodes)
        known = {(name, task): float(products[-1, order.index(key)]) for task, key in exact_members(now).items()}
        unknown = [task for task in now.members if task not in exact_members(now)]
        if unknown:
            said.append(
                f"Inner products of {name} with {some(unknown)} are unknowable: the bank does not hold their vectors any more."
            )
        state = replace(
            now.state,
            members=dict(sorted(members.items())),
            bases=found.bases,
            gram=with_tasks(now.state.gram, sorted(now.members), members, {**known, (name, name): norm**2}),
            basis_gram=_rows(found.gram),
            space=now.space if now.members else space_of({name: vector}, base),
        )
        _check_budget(now.path, state.settings.max_bytes, found.bases)
        every = {**(originals or {}), name: vector}
        return _finish(change, state, now, "insert", (name,), (*said, *found.said), drift, every, engine)


def forget(
    bank: Bank | str | os.PathLike[str],
    name: str,
    *,
    vectors: Given | None = None,
    drop_basis: bool = False,
    drift: bool = False,
    engine: Engine | None = None,
    wait: float = 600.0,
) -> Bank:
    """Remove a task's contribution, as exactly as the bank still can, and say how exact that is.

    A task that stands alone is removed with its basis. From a mean or a sum its own vector is subtracted, where that is at hand
    (`vectors`, or still where it was). Otherwise, and where the basis is stored in a lossy form, it is merged anew from the other members'
    vectors, where these are at hand. The bank's history keeps the task's name.

    Args:
        vectors: task → vector, where these lie elsewhere now.
        drop_basis: where nothing else can be done, remove the whole basis; its other tasks are lost with it.

    Raises:
        BankError: there is no such task, or its contribution cannot be taken out with what is at hand; nothing was changed.
    """
    opened = _opened(bank)
    with changing(opened.path, wait=wait) as change:
        now = _fresh(opened, change)
        basis = now.basis(now.basis_of(name))
        others = tuple(task for task in basis.members if task != name)
        gone: tuple[str, ...] = (name,)
        bases = dict(now.bases)
        if not others:
            del bases[basis.name]
            said = [f"{name}: gone with its basis {basis.name}; exact."]
        else:
            found, lost = at_hand(now, vectors)
            whole, rest = coefficient(now.inner, len(basis.members)), coefficient(now.inner, len(others))
            linear = whole is not None and rest is not None and basis.how != "given"
            anew = all(task in found for task in others)
            subtract = linear and name in found and not (basis.error and anew)
            if subtract or anew:
                used = [found[task] for task in ((name,) if subtract else others)]
                lengths = gram(used, exclude=now.state.settings.exclude, engine=engine).diagonal().clamp(min=0).sqrt().tolist()
                check_lengths(now, dict(zip((name,) if subtract else others, lengths, strict=True)))
            if subtract:
                assert whole is not None and rest is not None
                left = weighted(
                    {"basis": (rest / whole, now.vector(basis.name)), "task": (-rest, found[name])},
                    exclude=now.state.settings.exclude,
                    engine=engine,
                )
                made = _rewritten(change, now, basis, others, left, "member" if len(others) == 1 else "online", engine)
                terms = [(rest / whole, basis.norm, basis.slack), (rest, now.members[name].norm, 0.0)]
                said = [f"{name}: its vector was subtracted from {basis.name};"]
            elif anew:
                settings = now.state.settings
                left = merge_groups(
                    found,
                    {basis.name: others},
                    now.inner,
                    evidence=settings.evidence,
                    seed=settings.seed,
                    exclude=settings.exclude,
                    engine=engine,
                )[basis.name]
                made = _rewritten(change, now, basis, others, left, "member" if len(others) == 1 else "merged", engine)
                terms = [] if rest is None else [(rest, now.members[task].norm, 0.0) for task in others]
                lost_model = " The model that was given for it is gone." if basis.how == "given" else ""
                said = [f"{name}: {basis.name} was merged anew from the vectors of {some(others)};{lost_model}"]
            elif drop_basis:
                gone, made = basis.members, None
                said = [
                    f"{name}: gone with its basis {basis.name}; exact, and {some(others)} {'are' if len(others) > 1 else 'is'} lost too."
                ]
            else:
                reasons = " ".join(lost[task] for task in (name, *others) if task in lost)
                how = f"merged by {now.state.settings.inner['name']}" if basis.how != "given" else "given as one model"
                raise BankError(
                    f"{now.path}: cannot take {name} out of {basis.name} ({', '.join(basis.members)}, {how}). "
                    f"Give {'its vector, or ' if linear else ''}the vectors of {some(others)} (`--vector NAME=PATH`), or drop the whole basis "
                    f"(`--drop-basis`). {reasons}"
                )
            if made is None:
                del bases[basis.name]
            else:
                bases[basis.name] = made
        kept = {task: member for task, member in now.members.items() if task not in gone}
        after = Bank(now.path, replace(now.state, bases=bases, members=kept))
        products, bases = _measured(change, after, engine)
        if basis.name in bases:
            found_one = bases[basis.name]
            bases[basis.name] = replace(found_one, slack=slack_of(terms, found_one.error, found_one.norm))
            said[0] += _exactness(bases[basis.name])
        state = replace(
            after.state,
            settings=replace(now.state.settings, evidence=evidence_with(now, None, list(kept))),
            bases=bases,
            gram=with_tasks(now.state.gram, sorted(now.members), kept, {}),
            basis_gram=_rows(products),
        )
        said.append("The old file is deleted, not overwritten; copies and backups of the bank still hold it.")
        done = _finish(change, state, now, "forget", gone, tuple(said), drift, vectors, engine)
        if (done.path / basis.file).exists():
            raise BankError(
                f"{done.path / basis.file}: {name} is out of the bank, but this file of before cannot be deleted. Delete it."
            )
        return done


def rebuild(
    bank: Bank | str | os.PathLike[str],
    *,
    k: int | Literal["auto"] = "auto",
    k_min: int | None = None,
    k_max: int | None = None,
    vectors: Given | None = None,
    evidence: Evidence | None = None,
    drift: bool = False,
    engine: Engine | None = None,
    wait: float = 600.0,
) -> Bank:
    """Cluster anew, from the tasks' own vectors where these are at hand, and from the stored bases where they are not.

    Tasks that were merged before, and whose vectors are gone, stay together: their inner products are unknowable. So do those whose basis
    was given as one model.

    Raises:
        BankError: the bank is damaged, empty or held by another process. RecipeError: `k` is out of range.
    """
    opened = _opened(bank)
    with changing(opened.path, wait=wait) as change:
        now = _knowing(_fresh(opened, change), evidence)
        found, lost = at_hand(now, vectors)
        nodes: dict[str, Node] = {}
        said: list[str] = []
        for key, basis in now.bases.items():
            if basis.how != "given" and all(task in found for task in basis.members):
                nodes |= {task: Node(vector=found[task], members=(task,)) for task in basis.members}
            else:
                nodes[" + ".join(basis.members)] = Node(vector=now.vector(key), members=basis.members, basis=key)
                if len(basis.members) > 1:
                    gone = [task for task in basis.members if task in lost]
                    why = (
                        "their basis was given as one model"
                        if basis.how == "given"
                        else f"the vectors of {some(gone)} are not at hand"
                    )
                    said.append(f"{', '.join(basis.members)}: stay together; {why}.")
        if len(nodes) < 2:
            raise BankError(f"{now.path}: has {len(nodes)} part{'s' * (len(nodes) != 1)} that could be clustered, and needs two.")
        nodes = {key: nodes[key] for key in sorted(nodes)}
        listed = [node.vector for node in nodes.values()]
        change.read += bytes_of(listed)
        products = gram(listed, exclude=now.state.settings.exclude, engine=engine)
        lengths = dict(zip(nodes, products.diagonal().clamp(min=0).sqrt().tolist(), strict=True))
        check_lengths(now, {task: lengths[task] for task, node in nodes.items() if node.basis is None})
        similarity = Similarity(names=tuple(nodes), gram=products, base_norm=now.state.base_norm)
        settings = now.state.settings
        most = most_bases(now, max((basis.nbytes for basis in now.bases.values()), default=1))
        if k != "auto" and k_max is not None and k > k_max:
            raise RecipeError([f"`k` must be at most `k_max`, {k_max}. Got {k}."], "rebuild")
        top = min(n for n in (k_max, most, len(nodes) - 1 if k_max is None else None) if n is not None)
        if k_min is not None and k_min > top:
            raise RecipeError(
                [f"`k_min` must be at most {top}, which `k_max`, the budget or the parts allow. Got {k_min}."], "rebuild"
            )
        if k != "auto" and most is not None and k > most:
            raise BankError(f"{now.path}: the budget holds {most} bases. Got k = {k}.")
        clustering = cluster(similarity, k, k_min=k_min, k_max=top, opposed=settings.opposed, seed=settings.seed)
        said += clustering.notes
        if most is not None and len(clustering.groups) > most:
            raise BankError(
                f"{now.path}: with opposed and unconnected vectors apart there would be {len(clustering.groups)} bases, and the budget holds {most}. "
                "Raise it, or give a smaller k."
            )
        parts = {name: list(members) for name, members in clustering.groups.items()}
        made = regroup(change, now, nodes, products, parts, engine=engine)
        members = {task: replace(now.members[task], basis=basis) for basis, one in made.bases.items() for task in one.members}
        if set(members) != set(now.members):
            raise BankError(
                f"{now.path}: the clusters lack {', '.join(sorted(set(now.members) - set(members)))}. Please report it. Nothing was changed."
            )
        very = exact_members(now)
        single = {
            node.members[0]: place
            for place, node in enumerate(nodes.values())
            if len(node.members) == 1 and (node.basis is None or node.members[0] in very)
        }
        known = {(a, b): float(products[i, j]) for a, i in single.items() for b, j in single.items()}
        state = replace(
            now.state,
            members=dict(sorted(members.items())),
            bases=made.bases,
            gram=with_tasks(now.state.gram, sorted(now.members), members, known),
            basis_gram=_rows(made.gram),
            spectrum=clustering.spectrum,
        )
        _check_budget(now.path, settings.max_bytes, made.bases)
        return _finish(change, state, now, "rebuild", tuple(state.members), (*said, *made.said), drift, vectors, engine)


def _opened(bank: Bank | str | os.PathLike[str]) -> Bank:
    return bank if isinstance(bank, Bank) else open_bank(bank)


def _fresh(opened: Bank, change: Change) -> Bank:
    """The newest state, with the base that was opened for the old one."""
    return Bank(change.path, change.state).use_base(opened.base())


def _knowing(bank: Bank, evidence: Evidence | None, *more: str) -> Bank:
    """The bank with evidence that is given now, of its tasks and `more`. Raises `RecipeError`."""
    known = evidence_with(bank, evidence, [*bank.members, *more])
    state = replace(bank.state, settings=replace(bank.state.settings, evidence=known))
    return Bank(bank.path, state).use_base(bank.base())


def _check_length(name: str, norm: float, bank: Bank, allow_far: bool) -> None:
    if norm == 0:
        raise AlignmentError(f"{name}: the task vector is zero, so it has no direction. The model equals its base: leave it out.")
    if not allow_far and norm > FAR * bank.state.base_norm > 0:
        raise AlignmentError(
            f"{name}: its task vector has {norm / bank.state.base_norm:.2f} of the length of {bank.base_label}; fine-tuning gives less "
            f"than {FAR:g}. It is probably of another base: `thetau inspect` tells. Leave it out, or allow it (`--allow-far`)."
        )


def _check_budget(path: Path, most: int | None, bases: Mapping[str, Basis]) -> None:
    total = sum(basis.nbytes for basis in bases.values())
    if most is not None and total > most:
        raise BankError(
            f"{path}: the bases would take {gigabytes(total)}, and the budget is {gigabytes(most)}. Raise it, store them smaller, or forget "
            "a task. Nothing was changed."
        )


def _rewritten(
    change: Change,
    bank: Bank,
    basis: Basis,
    members: tuple[str, ...],
    vector: Expression,
    how: Literal["member", "merged", "online"],
    engine: Engine | None,
) -> Basis:
    settings = bank.state.settings
    made, read = write_basis(
        change.path,
        change.file(basis.name),
        basis.name,
        members,
        vector,
        how,
        store=settings.store,
        exclude=settings.exclude,
        engine=engine,
    )
    change.read += read
    change.written += made.nbytes
    return made


def _measured(change: Change, bank: Bank, engine: Engine | None) -> tuple[Tensor, dict[str, Basis]]:
    """Inner products of the bases as they are stored, and the bases with their norms."""
    if not bank.bases:
        return torch.zeros(0, 0, dtype=torch.float64), {}
    listed = list(bank.vectors().values())
    change.read += bytes_of(listed)
    products = gram(listed, exclude=bank.state.settings.exclude, engine=engine)
    norms = products.diagonal().clamp(min=0).sqrt().tolist()
    return products, {name: replace(one, norm=norm) for (name, one), norm in zip(bank.bases.items(), norms, strict=True)}


def _exactness(made: Basis) -> str:
    """How exact what is left is: the bound on everything that rounding and stored forms have done."""
    if made.slack is None:
        return " how far it then is from a merge of its tasks in one go is not known."
    share = made.slack / made.norm if made.norm else 0.0
    if made.error or share > 1e-3:
        return f" not exact: its stored forms leave up to {made.slack:.2g} of length ({share:.1%} of the basis)."
    return " exact." if made.slack == 0 else f" exact but for rounding to float32, at most {share:.1e} of the basis."


def _finish(
    change: Change,
    state: State,
    before: Bank,
    kind: str,
    names: tuple[str, ...],
    said: tuple[str, ...],
    drift: bool,
    originals: Given | None,
    engine: Engine | None,
) -> Bank:
    after = Bank(change.path, state).use_base(before.base())
    found = None
    if drift:
        found, read = drift_of(after, originals, engine=engine)
        change.read += read
    done = change.commit(state, change.operation(kind, names, said, found))
    return done.use_base(before.base())


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _space(space: str) -> str:
    return "the tangent space" if space == "tangent" else "the model's weights"
