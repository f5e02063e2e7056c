"""A new adapter: what became of each layer, and the files of PEFT, of kohya's scripts and of diffusers."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from thetau._lazy import torch
from thetau.adapters.reading import Module
from thetau.checkpoint.disk import new_folder, write_bytes, write_tensors
from thetau.checkpoint.lora import PREFIX
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Spelling = Literal["peft", "kohya", "diffusers"]
SHORT = {"unet": "unet", "transformer": "transformer", "text_encoder": "te", "text_encoder_2": "te2", "text_encoder_3": "te3"}


@final
@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one layer kept: its rank, the norm of what was to be kept, and the norm of what was lost."""

    layer: str
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """‖lost‖/‖all‖; 0 of nothing."""
        return self.lost / self.norm if self.norm else 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Made:
    """An adapter that was made here, in memory.

    - `modules`: its products, by layer.
    - `fits`: rank and error by layer.
    - `config`: what `adapter_config.json` takes over: task type, base, `fan_in_fan_out`.
    - `saved`: tensors that are saved whole, by the name of the model's.
    - `notes`: what a user should be told.
    """

    modules: Mapping[str, Module]
    fits: Sequence[Fit]
    config: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def error(self) -> float:
        """‖lost‖/‖all‖ over all layers."""
        norm = math.sqrt(math.fsum(fit.norm**2 for fit in self.fits))
        return math.sqrt(math.fsum(fit.lost**2 for fit in self.fits)) / norm if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Errors and ranks, by layer and whole."""
        layers = {fit.layer: {"rank": fit.rank, "norm": fit.norm, "error": fit.error} for fit in self.fits}
        return {"error": self.error, "layers": layers, "notes": list(self.notes)}

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        layout: Spelling = "peft",
        component: str = "unet",
    ) -> None:
        """Write it: a PEFT folder that `PeftModel.from_pretrained` loads, or one LoRA file of the other two spellings.

        `component` is the part of a pipeline that the layers belong to, where their names do not say it.

        Raises:
            RecipeError: the layout cannot hold what the adapter has.
            OutputError: the place is taken or cannot be written to.
        """
        path = Path(out)
        if layout != "peft":
            write_tensors(path, {name: value.to(dtype) for name, value in self._flat(layout, component).items()})
            return
        config = peft_config(self)
        tensors = {name: value.to(dtype) for name, value in peft_tensors(self, int(config["r"])).items()}
        with new_folder(path) as folder:
            write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
            write_tensors(folder / "adapter_model.safetensors", tensors)

    def _flat(self, layout: Spelling, component: str) -> dict[str, Tensor]:
        """Tensors in kohya's or diffusers' spelling; α is the rank."""
        if component not in SHORT:
            raise RecipeError([f"must be one of {', '.join(SHORT)}. Got {component!r}."], "component")
        lost = [
            path for path, module in self.modules.items() if module.kind in ("embedding", "experts") or module.bias is not None
        ]
        if lost or self.saved:
            what = (lost or list(self.saved))[0]
            raise RecipeError(
                [f"{layout} holds linear and convolution layers alone. Got {what!r}. Write PEFT's layout: `--to peft`."], "layout"
            )
        tensors: dict[str, Tensor] = {}
        for path, module in self.modules.items():
            head, _, rest = path.partition(".")
            part, inner = (head, rest) if head in SHORT else (component, path)
            a, b = _pair(module, module.factors.rank)
            if layout == "diffusers":
                tensors |= {f"{part}.{inner}.lora_A.weight": a, f"{part}.{inner}.lora_B.weight": b}
                continue
            name = f"lora_{SHORT[part]}_{inner.replace('.', '_')}"
            alpha = torch.tensor(float(module.factors.rank))
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}
        return tensors


def _pair(module: Module, rank: int) -> tuple[Tensor, Tensor]:
    """A and B as files hold them, with a rank that may be more than the product's."""
    factors = module.factors.padded(rank)
    count, d_out = factors.b.shape[:2]
    a = factors.a.reshape(count * rank, *module.inputs)
    b = factors.b.permute(1, 2, 0).reshape(d_out, rank * count)
    return a, b.reshape(d_out, -1, *[1] * (len(module.inputs) - 1))


def peft_tensors(made: Made, rank: int) -> dict[str, Tensor]:
    """Tensors as PEFT names them; experts have the common rank, since a pattern cannot name a fused parameter's wrapper."""
    tensors: dict[str, Tensor] = {}
    for path, module in made.modules.items():
        a, b = _pair(module, rank if module.kind == "experts" else module.factors.rank)
        end = "" if module.kind == "embedding" else ".weight"
        word = "lora_embedding" if module.kind == "embedding" else "lora"
        tensors |= {f"{PREFIX}{path}.{word}_A{end}": a, f"{PREFIX}{path}.{word}_B{end}": b}
        if module.bias is not None:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = module.bias
    return tensors | {f"{PREFIX}{name}": value for name, value in made.saved.items()}


def peft_config(made: Made) -> dict[str, Any]:
    """An `adapter_config.json` under which α/r is 1 for every layer."""
    ranks = {path: module.factors.rank for path, module in made.modules.items()}
    experts = [rank for path, rank in ranks.items() if made.modules[path].kind == "experts"]
    rank = max(experts or list(ranks.values()))
    single = [path for path, module in made.modules.items() if module.kind != "experts"]
    others = {f"^{re.escape(path)}": ranks[path] for path in single if ranks[path] != rank}
    kept = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "modules_to_save", "bias", "revision", "auto_mapping")
    return {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        **{key: made.config[key] for key in kept if key in made.config},
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": any(module.bias is not None for module in made.modules.values()),
        "target_modules": sorted(single),
        **({"target_parameters": made.config["target_parameters"]} if experts else {}),
    }
