"""What routes tokens to experts: gates from the base's hidden states at prompts, from embeddings alone, or drawn at random.

A gate's row is the unit vector of what an expert's prompts look like to the layer, less what its negative ones do, as in mergekit. Departs
from it where it counts padding: a mean is over real tokens only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

from thetau._lazy import torch
from thetau.checkpoint import Source, Spec
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.source import Demand, span
from thetau.errors import CheckpointError
from thetau.linalg.sketch import gaussian
from thetau.plan import Pass, Step
from thetau.random import element_bits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

States: TypeAlias = "Callable[[Source, Sequence[str], View], Tensor]"  # → [prompt, layer, hidden]

Prompts = tuple[tuple[str, ...], tuple[str, ...]]  # positive, negative
View = Literal["last", "mean", "embedding"]

VIEWS: Mapping[str, View] = {"hidden": "last", "hidden_last": "last", "hidden_avg": "mean", "cheap_embed": "embedding"}
PARALLEL = 12 / 13  # cosine from which on two gates are hardly two: mergekit's condition number of 5
ACTIVATIONS = 1 << 28  # bytes that a run of prompts takes beside one layer's weights, about
_TINY = 1e-8
_DRAWN_AT_ONCE = 1 << 16


class _Builder:
    """Who runs the base over prompts: named as `module:function` and loaded where gates need it, for live models live above this room."""

    def __init__(self) -> None:
        self.where = ""

    def states(self, source: Source, prompts: Sequence[str], view: View) -> Tensor:
        if not self.where:
            raise CheckpointError("Nothing here runs models, which gates from prompts need. Import `thetau.facade` first.")
        module, _, function = self.where.partition(":")
        build: States = import_module(module).__dict__[function]
        return build(source, prompts, view)


_BUILDER = _Builder()


def bring_states(where: str) -> None:
    """Say who runs models: `module:function` of (base, prompts, view) → float32 `[prompt, layer, hidden]`.

    `last` is what enters each layer at a prompt's last token, `mean` its mean over the tokens, `embedding` the sum of the tokens' embeddings,
    with one layer. It raises `CheckpointError` where the base cannot run.
    """
    _BUILDER.where = where


class Gates(Source):
    """The gates of all layers from prompts, made once, before the first row is written.

    `routed` are the experts' prompts, of which each gives a row of every gate; `shared` those of shared experts, whose gates stand alone.
    """

    def __init__(
        self,
        base: Source,
        mode: str,
        routed: Sequence[Prompts],
        names: Sequence[str],
        width: int,
        *,
        shared: Sequence[Prompts] = (),
        shared_names: Sequence[str] = (),
    ) -> None:
        self.base, self.mode, self.routed, self.shared = base, mode, tuple(routed), tuple(shared)
        self.names, self.shared_names = tuple(names), tuple(shared_names)
        self.label = f"gates by {mode}"
        heights = [*((name, len(routed)) for name in names), *((name, len(shared)) for name in shared_names)]
        self.specs = {name: Spec(name=name, shape=(rows, width), dtype=Dtype.F32, file=self.label) for name, rows in heights}
        self.key = f"gates:{self._digest(base.key)}"
        self._values: dict[str, Tensor] = {}
        self._said: list[str] = []

    def _digest(self, base: str) -> str:
        said = (base, self.mode, self.routed, self.shared, self.names, self.shared_names)
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()

    def fingerprint(self) -> str:
        """Of the base, the prompts and the mode."""
        return self._digest(self.base.fingerprint())

    def children(self) -> Sequence[Source]:
        """The base."""
        return (self.base,)

    def prepare(self) -> None:
        """Run the base over all prompts.

        Raises:
            CheckpointError: it cannot run, or gives values that are not finite.
        """
        if self._values:
            return
        self.base.prepare()
        everyone = [*self.routed, *self.shared]
        texts = [text for positive, negative in everyone for text in (*positive, *negative)]
        states = _BUILDER.states(self.base, texts, VIEWS[self.mode])
        if not bool(torch.isfinite(states).all()):
            raise CheckpointError(
                f"{self.base.label}: gives hidden states that are not finite at these prompts, so no gate can be made of them. "
                "Check its weights with `thetau inspect`, or take `gate_mode: random`."
            )
        gates = gates_of(states, everyone, mean=self.mode != "cheap_embed").expand(-1, len(self.names), -1)
        count = len(self.routed)
        values = {name: gates[:count, layer].contiguous() for layer, name in enumerate(self.names)}
        values |= {name: gates[count:, layer].contiguous() for layer, name in enumerate(self.shared_names)}
        self._said, self._values = degenerate(gates[:count]), values

    def passes(self) -> Sequence[Pass]:
        """One walk over the base, layer by layer; of embeddings, only the prompts' rows are read."""
        if self.mode == "cheap_embed":
            return ()
        layers: dict[str, list[Spec]] = {}
        for name, spec in self.base.specs.items():
            if name.startswith("model.layers."):
                layers.setdefault(".".join(name.split(".")[:3]), []).append(spec)
        steps = [
            Step(layer, sum(one.nbytes for one in specs), ACTIVATIONS + 4 * sum(one.elements for one in specs))
            for layer, specs in layers.items()
        ]
        return (Pass("run the base over the prompts, a layer at a time", tuple(steps)),)

    def demand(self, name: str) -> Demand:
        """Nothing more: they lie in memory."""
        return Demand(0)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a gate: unit vectors in float32."""
        self.prepare()
        start, stop = span(self.specs[name], start, stop)
        return self._values[name][start:stop]

    def warnings(self, base: Source | None) -> Sequence[str]:
        """Gates that are nearly the same, and gates that are zero."""
        return self._said


def gates_of(
    states: Float[Tensor, "prompt layer hidden"], experts: Sequence[Prompts], *, mean: bool
) -> Float[Tensor, "expert layer hidden"]:
    """Unit vectors in float32: of each expert the mean over its positive prompts less that over its negative ones.

    Without `mean` both are sums scaled to length 1 before they are subtracted, as mergekit has it for embeddings.
    """
    found, at = [], 0
    for positive, negative in experts:
        parts = []
        for prompts in (positive, negative):
            taken = states[at : at + len(prompts)].double()
            at += len(prompts)
            if prompts:
                parts.append(taken.mean(0) if mean else _unit(taken.sum(0)))
        found.append(_unit(parts[0] - parts[1] if len(parts) > 1 else parts[0]))
    return torch.stack(found).float()


def _unit(values: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
    length: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values / length.clamp(min=_TINY)


def degenerate(gates: Float[Tensor, "expert layer hidden"]) -> list[str]:
    """A sentence for each two experts whose gates are nearly parallel, and each whose gate is zero, with the layers."""
    unit = _unit(gates.double()).transpose(0, 1)
    cosines = unit @ unit.mT
    said = []
    for expert in range(len(gates)):
        still = (torch.linalg.vector_norm(gates[expert].double(), dim=-1) < 0.5).nonzero().flatten().tolist()
        if still:
            said.append(
                f"The gate of expert {expert} is zero in {_layers(still, gates.shape[1])}: its positive and negative prompts look the "
                "same there. Give prompts that differ more."
            )
        for other in range(expert):
            near = (cosines[:, expert, other] > PARALLEL).nonzero().flatten().tolist()
            if near:
                worst = float(cosines[:, expert, other].max())
                said.append(
                    f"The gates of experts {other} and {expert} are nearly parallel in {_layers(near, gates.shape[1])} (cosine up to "
                    f"{worst:.3f}), so tokens will go to both or to neither. Give prompts that differ more, or negative prompts."
                )
    return said


def _layers(which: Sequence[int], count: int) -> str:
    if len(which) == count:
        return "every layer" if count > 1 else "layer 0"
    return f"layer{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}"


class Drawn(Source):
    """Random numbers under given names and shapes, a function of the seed, the name and the element alone; none is kept in memory.

    Standard normal ones, or uniform in [−1, 1). Noise is of degree 0: what is added to a model's weights.
    """

    partial = True

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, seed: int, what: Literal["noise", "gate"], uniform: bool = False
    ) -> None:
        self.seed, self.what, self.uniform = seed, what, uniform
        self.degree = 0 if what == "noise" else 1
        self.label = f"{'uniform' if uniform else 'normal'} {what} of seed {seed}"
        self.specs = {name: Spec(name=name, shape=shape, dtype=Dtype.F32, file=self.label) for name, shape in shapes.items()}
        self.key = f"drawn:{self.fingerprint()}"

    def fingerprint(self) -> str:
        """Of all that the numbers depend on."""
        said = (self.what, self.uniform, self.seed, sorted((name, spec.shape) for name, spec in self.specs.items()))
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()

    def demand(self, name: str) -> Demand:
        """No byte is read; what is drawn at once lies in memory in float64."""
        spec = self.specs[name]
        return Demand(0, 8 * 8 * max(_DRAWN_AT_ONCE, spec.row_elements), by="torch")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows in float32."""
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        first, last = start * spec.row_elements, stop * spec.row_elements
        out = torch.empty(last - first)
        for at in range(first, last, _DRAWN_AT_ONCE):
            end = min(at + _DRAWN_AT_ONCE, last)
            out[at - first : end - first] = self._draw(name, at, end - at)
        return out.reshape(stop - start, *spec.shape[1:])

    def _draw(self, name: str, first: int, count: int) -> Tensor:
        key = ("mixture", self.what, self.seed, name)
        if self.uniform:
            return (element_bits((*key, "u"), first, count).double() / (1 << 30) - 1).float()
        return gaussian(1, count, lambda axis, many: element_bits((*key, axis), first, many))[0].float()
