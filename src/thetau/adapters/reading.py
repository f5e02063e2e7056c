"""A LoRA adapter as products by module, read when they are asked for; α/r lies in B."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from thetau.adapters.factors import Factors
from thetau.checkpoint.lora import Settings, is_adapter
from thetau.checkpoint.lora.layout import Layout
from thetau.checkpoint.lora.layout import Module as Names
from thetau.checkpoint.lora.source import open_weights, settings_of
from thetau.errors import AlignmentError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "conv", "embedding", "experts"]
UNREAD = {
    "magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w2": "LoKr",
    "ia3_l": "(IA)³",
    "trainable_tokens_delta": "trained tokens",
}


@final
@dataclass(frozen=True, kw_only=True)
class Module:
    """What an adapter does to one layer: Δ = B·A as `[d_out, d_in]`, whatever the base stores.

    `inputs` is A's shape after the rank: `(in,)`, or `(in, *kernel)` of a convolution. `bias` is what is added to the layer's bias.
    """

    path: str
    kind: Kind
    inputs: tuple[int, ...]
    factors: Factors
    bias: Tensor | None = None

    @property
    def tensor(self) -> str:
        """What the base calls the tensor."""
        return f"{self.path}.weight"


@final
class Adapter:
    """A LoRA adapter, opened: only headers and the configuration are read.

    - `label`: the path that was given.
    - `settings`: what its configuration says.
    - `paths`: the modules that it adapts, sorted.
    - `saved`: tensors that are saved whole (heads, norms, biases), name in the file → name in the model.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.label = f"{path}#{name}" if name else str(path)
        self._weights = open_weights(path)
        found: tuple[Settings, Layout] = settings_of(path, self.label, self._weights, name)
        self.settings, layout = found
        self._modules: Mapping[str, Names] = {
            (module.path if not module.component else f"{module.component}.{module.path}"): module
            for module in layout.modules.values()
        }
        self.saved: Mapping[str, str] = layout.saved
        self.flat = layout.flat
        for module in layout.modules.values():
            _refuse(self.label, self.settings, module)

    @property
    def paths(self) -> Sequence[str]:
        """The modules that it adapts, sorted."""
        return sorted(self._modules)

    @property
    def config(self) -> Mapping[str, Any]:
        """What `adapter_config.json` holds; empty where there is none."""
        return self.settings.values

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Rank by module."""
        return {path: self.module(path).factors.rank for path in self.paths}

    def read(self, name: str) -> Tensor:
        """A tensor that is saved whole, by its name in the file."""
        return self._weights.read(name)

    def module(self, path: str) -> Module:
        """One module's product.

        Raises:
            CheckpointError: A or B holds NaN or infinite values, or the configuration says another rank.
            AlignmentError: A and B do not multiply.
        """
        names = self._modules[path]
        embedding = "embedding_A" in names.parts
        pair = [names.parts["embedding_A" if embedding else "A"], names.parts["embedding_B" if embedding else "B"]]
        a, b = (self._finite(name) for name in pair)
        if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != b.shape[1]:
            raise AlignmentError(f"{self.label}: {pair[0]!r} {list(a.shape)} and {pair[1]!r} {list(b.shape)} do not multiply.")
        inputs = tuple(a.shape[1:])
        a, b = a.flatten(1).double(), b.flatten(1).double()
        count = self._experts(path, len(a))
        scale = self.settings.scale(names.path, len(a) // count)
        if "alpha" in names.parts:
            scale = float(self.read(names.parts["alpha"])) / len(a)
        stacked = Factors(a=a.reshape(count, -1, a.shape[1]), b=scale * b.reshape(len(b), -1, count).permute(2, 0, 1))
        bias = names.parts.get("B.bias")
        return Module(
            path=path,
            kind="embedding" if embedding else "experts" if count > 1 else "conv" if len(inputs) > 1 else "linear",
            inputs=inputs,
            factors=stacked,
            bias=scale * self._finite(bias).double() if bias else None,
        )

    def _finite(self, name: str) -> Tensor:
        tensor = self.read(name)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{self.label}: {name!r} holds NaN or infinite values. Train the adapter again, or take an earlier state."
            )
        return tensor

    def _experts(self, path: str, rows: int) -> int:
        """How many products a module's A holds: one, or one for each expert where it stands for a fused parameter."""
        rank = self.config.get("r")
        fused = self.config.get("target_parameters") and isinstance(rank, int) and rank > 0 and rows > rank and rows % rank == 0
        owner = path.replace(".base_layer", "")
        ends = [str(target).rpartition(".")[0] for target in self.config.get("target_parameters") or ()]
        return rows // int(rank or 1) if fused and any(owner == end or owner.endswith(f".{end}") for end in ends) else 1


def _refuse(label: str, settings: Settings, module: Names) -> None:
    """Nothing, for a product of low rank. Raises `CheckpointError`."""
    found = [what for part, what in UNREAD.items() if part in module.parts]
    if settings.kind != "LORA" or found:
        what = found[0] if found else settings.kind
        raise CheckpointError(
            f"{label}: {what} at {module.path!r} is no product of low rank, so that it cannot be added to others as it is. Write the model "
            "(`thetau vector apply`), and take an adapter out of it: `thetau adapter extract`."
        )
    if not ({"A", "B"} <= module.parts.keys() or {"embedding_A", "embedding_B"} <= module.parts.keys()):
        raise CheckpointError(
            f"{label}: {module.path!r} has only one of its two LoRA matrices. Copy or download the adapter again."
        )


def open_adapter(what: str | os.PathLike[str]) -> Adapter:
    """Open a LoRA adapter: a PEFT folder (`folder#name` where it holds several), or a LoRA file of kohya's scripts or of diffusers.

    Raises:
        CheckpointError: nothing is there, or it is no LoRA adapter.
    """
    text = os.fspath(what)
    path = Path(text)
    if path.exists():
        return Adapter(path)
    folder, _, name = text.rpartition("#")
    if folder and Path(folder).exists():
        inner = Path(folder) / name
        return Adapter(inner) if is_adapter(inner) else Adapter(Path(folder), name)
    raise CheckpointError(f"{text}: no such adapter. Give a PEFT folder, or a LoRA file of kohya's scripts or of diffusers.")
