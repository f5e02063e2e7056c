"""From output tensors to merges: those of the same models, base and kind of method are one, whatever numbers differ between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from thetau.checkpoint.arranged import Arranged, Piece
from thetau.engine.executor import Engine
from thetau.engine.merge import Merge
from thetau.engine.patchwork import Patch
from thetau.methods import plain
from thetau.parts import Method
from thetau.recipes.mergekit import methods
from thetau.recipes.mergekit.members import Model, Slot
from thetau.vectors import Combination

PieceOf = Callable[[Slot, Model, str], Piece]  # where an input's tensor of a slot comes from


def patches(slots: Sequence[Slot], piece: PieceOf, *, label: str, seed: int, engine: Engine) -> list[Patch]:
    """One merge for all tensors of the same models, base and kind of method; a number that differs between them goes by name."""
    groups: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        ids = tuple(identity for identity, _, _ in slot.inputs)
        key = (ids, slot.base[0].label if slot.base else None, type(slot.method))
        groups.setdefault(key, []).append(slot)
    found = []
    for group in groups.values():
        chosen = {slot.name: slot.method for slot in group if slot.method is not None}
        shared = methods.joined(chosen) if chosen else None
        if shared is not None or not chosen:
            found.append((group, shared))
            continue
        apart: dict[str, list[Slot]] = {}
        for slot in group:
            apart.setdefault(json.dumps(plain(chosen[slot.name]), sort_keys=True), []).append(slot)
        found += [(some, chosen[some[0].name]) for some in apart.values()]
    made = []
    for group, method in found:
        said = f"{label} of {{}} models" + (f", {len(group)} tensors" if len(found) > 1 else "")
        made.append(_patch(group, method, piece, said, seed, engine))
    return made


def _patch(slots: Sequence[Slot], method: Method | None, piece: PieceOf, label: str, seed: int, engine: Engine) -> Patch:
    first = slots[0]
    names = tuple(slot.name for slot in slots)
    arranged = [
        Arranged(
            {slot.name: piece(slot, *slot.inputs[index][1:]) for slot in slots},
            label=model.label,
            folder=None if index or first.base is not None else model.source.folder,  # the recipe compares configs by itself
        )
        for index, (_, model, _) in enumerate(first.inputs)
    ]
    if method is None:
        return Patch(Combination(((1.0, arranged[0]),), reference=arranged[0]), names)
    base = arranged[0]
    if first.base is not None:
        pieces = {slot.name: piece(slot, *slot.base) for slot in slots if slot.base is not None}
        base = Arranged(pieces, label=first.base[0].label, folder=first.base[0].source.folder)
    ground = Combination(((1.0, base),), reference=base)
    tasks = {
        identity: (Combination(((1.0, one),), reference=one) - ground).named(identity)
        for (identity, _, _), one in zip(first.inputs, arranged, strict=True)
    }
    merge = Merge(
        tasks,
        methods.narrowed(method, tuple(tasks), names).chain(),
        label=label.format(len(tasks)),
        seed=seed,
        engine=engine,
        judge=False,
    )
    merged = Combination(((1.0, merge),), reference=base)
    return Patch(merged if merge.degree else ground + merged, names)
