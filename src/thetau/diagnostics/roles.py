"""What each tensor of a checkpoint is taken for, and how that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from thetau.checkpoint import Role, Roles, Source
from thetau.checkpoint.roles import Origin


@final
@dataclass(frozen=True, kw_only=True)
class RoleRow:
    """Tensors of one pattern, `*` standing for the block's number.

    `origin`: what decided. `confirmed`: whether the module tree says the same; `tree`: what it says where that is something else.
    """

    pattern: str
    tensors: int
    kind: str
    layers: tuple[int, ...]
    origin: Origin
    confirmed: bool
    tree: str | None = None

    @property
    def told(self) -> str:
        """What the role is told from."""
        return f"{self.origin} and module tree" if self.confirmed and self.origin != "module tree" else self.origin


@final
@dataclass(frozen=True, kw_only=True)
class RoleTable:
    """The rows in the order of the files, and the number of tensors."""

    rows: tuple[RoleRow, ...]
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def verdict(self) -> list[str]:
        """What was guessed, and what the module tree says of the names, in sentences."""
        said = []
        guessed = [row for row in self.rows if row.origin == "guess"]
        if guessed:
            count = sum(row.tensors for row in guessed)
            said.append(
                f"{count} tensors are guessed from names that leave a doubt ({', '.join(row.pattern for row in guessed[:3])}). A config.json "
                "that transformers knows, beside the weights, would settle it."
            )
        other = [row for row in self.rows if row.tree is not None]
        said += [f"{row.pattern}: the name says {row.kind}, the module tree {row.tree}; the name is followed." for row in other]
        same = sum(row.tensors for row in self.rows if row.confirmed)
        if same:
            said.append(f"The module tree of config.json takes {same} of {self.tensors} tensors for the same.")
        return said


def roles(source: Source) -> RoleTable:
    """The roles of a source's tensors, as merges take them; only headers are read. The module tree is built to compare it with the names."""
    known = Roles.of(source)
    groups: dict[tuple[str, str, Origin, bool, str | None], list[int | None]] = {}
    for name, spec in source.specs.items():
        role = known.role(name, spec.shape)
        tree = known.tree.get(name)
        same = tree == (role.kind, role.layer)
        other = None if tree is None or same else f"{tree[0]}, layer {tree[1]}"
        groups.setdefault((_pattern(name, role), str(role.kind), role.origin, same, other), []).append(role.layer)
    rows = tuple(
        RoleRow(
            pattern=pattern,
            tensors=len(layers),
            kind=kind,
            layers=tuple(sorted({layer for layer in layers if layer is not None})),
            origin=origin,
            confirmed=same,
            tree=other,
        )
        for (pattern, kind, origin, same, other), layers in groups.items()
    )
    return RoleTable(rows=rows, tensors=len(source.specs))


def _pattern(name: str, role: Role) -> str:
    """The name with `*` for the block's number, at its first place."""
    if role.layer is None:
        return name
    parts = name.split(".")
    place = parts.index(str(role.layer))
    return ".".join([*parts[:place], "*", *parts[place + 1 :]])


def ranges(layers: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` → `"0–2, 5"`; `"–"` for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "–"
