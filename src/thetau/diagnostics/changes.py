"""What a merge did to its base, tensor by tensor, and how much of each model is in it: one streaming pass over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from thetau.checkpoint import Roles, Source, align
from thetau.diagnostics.results import Result
from thetau.engine.executor import Engine
from thetau.facade import Expression, as_vector, grams
from thetau.vectors.identity import identities

if TYPE_CHECKING:
    import torch

OUTSIDE = "outside"  # of the blocks


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor, or several together.

    - `base`: ‖θ₀‖. `norm`: ‖τ‖ of the merge. `norms`: of each model, `inner`: ⟨τ, τ_i⟩ with the merge's, both in the order of `compared`.
    """

    name: str
    kind: str
    layer: str
    shape: tuple[int, ...]
    base: float
    norm: float
    norms: tuple[float, ...]
    inner: tuple[float, ...]

    @property
    def shift(self) -> float | None:
        """‖τ‖/‖θ₀‖; None where the base is 0."""
        return self.norm / self.base if self.base else None

    @property
    def cosines(self) -> tuple[float | None, ...]:
        """Of the merge's vector with each model's; None where one of them is 0."""
        return tuple(
            max(-1.0, min(1.0, inner / (self.norm * norm))) if self.norm and norm else None
            for inner, norm in zip(self.inner, self.norms, strict=True)
        )

    @property
    def parameters(self) -> int:
        """Entries of a single tensor."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True, kw_only=True)
class Changes(Result):
    """All tensors that the merge changed or could have. `compared`: the models whose vectors are set beside the merge's."""

    compared: tuple[str, ...]
    tensors: tuple[Change, ...]

    def together(self, key: Callable[[Change], str]) -> dict[str, Change]:
        """The tensors of one key as one, in the order in which keys first come.

        Examples:
            >>> one = Change(name="w", kind="mlp", layer="0", shape=(1,), base=3.0, norm=0.3, norms=(), inner=())
            >>> two = Change(name="v", kind="mlp", layer="1", shape=(1,), base=4.0, norm=0.4, norms=(), inner=())
            >>> Changes(compared=(), tensors=(one, two)).together(lambda tensor: tensor.kind)["mlp"].norm
            0.5
        """
        groups: dict[str, list[Change]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor), []).append(tensor)
        return {name: _sum(name, members) for name, members in groups.items()}


def _sum(name: str, members: Sequence[Change]) -> Change:
    def root(values: Sequence[float]) -> float:
        return math.sqrt(math.fsum(value * value for value in values))

    models = range(len(members[0].norms))
    return Change(
        name=name,
        kind=members[0].kind if len({one.kind for one in members}) == 1 else "",
        layer=members[0].layer if len({one.layer for one in members}) == 1 else "",
        shape=(sum(one.parameters for one in members),),
        base=root([one.base for one in members]),
        norm=root([one.norm for one in members]),
        norms=tuple(root([one.norms[i] for one in members]) for i in models),
        inner=tuple(math.fsum(one.inner[i] for one in members) for i in models),
    )


def changes(
    base: Expression,
    merged: Expression,
    models: Sequence[Expression],
    *,
    names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Changes:
    """What `merged` differs from `base` by, beside what each of `models` does.

    Raises:
        AlignmentError: one of them does not fit the base. CheckpointError: one holds NaN or infinite values.

    Examples:
        >>> import thetau
        >>> base, a = thetau.open("base"), thetau.open("a")
        >>> found = changes(base, base + 0.5 * (a - base), [a])
        >>> whole = found.together(lambda tensor: "whole")["whole"]
        >>> round(whole.norm / whole.norms[0], 3), round(whole.cosines[0], 3)
        (0.5, 1.0)
    """
    vectors = [as_vector(merged, base), *(as_vector(model, base) for model in models)]
    compared = tuple(names) if names is not None else tuple(identities(models))
    found: Mapping[str, torch.Tensor] = grams([base, *vectors], exclude=exclude, engine=engine)
    specs, roles = base.specs(), _roles(base)
    rows = []
    for name, gram in found.items():
        spec = specs[name]
        role = roles.role(name, spec.shape)
        lengths = gram.diagonal().clamp(min=0).sqrt().tolist()
        rows.append(
            Change(
                name=name,
                kind=role.kind.value,
                layer=OUTSIDE if role.layer is None else str(role.layer),
                shape=spec.shape,
                base=lengths[0],
                norm=lengths[1],
                norms=tuple(lengths[2:]),
                inner=tuple(gram[1, 2:].tolist()),
            )
        )
    return Changes(compared=compared, tensors=tuple(rows))


def check_fit(base: Expression, model: Expression) -> None:
    """Refuse a model that does not fit the base; headers alone are read. Raises `AlignmentError`."""
    sources = {source.key: source for source in [*base.sources(), *as_vector(model, base).sources()]}
    align(base.specs(), base.label, list(sources.values()), ())


def _roles(base: Expression) -> Roles:
    source: Source = base.terms[0][1]
    return Roles.of(source)
