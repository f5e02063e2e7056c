"""A PEFT LoRA adapter as a task vector: rows of B·A·scale, never a whole model.

Format: `adapter_config.json` beside `adapter_model.safetensors`, <https://huggingface.co/docs/peft/developer_guides/checkpoint>.
Covers linear, transposed (Conv1D) and embedding layers, rank-stabilised scaling, rank and alpha patterns, trained biases,
`modules_to_save`, and DoRA (its norm runs over one output row, so rows suffice). What it does not cover is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.memory import open_torch
from thetau.checkpoint.names import names_of
from thetau.checkpoint.naming import view_of
from thetau.checkpoint.safetensors import open_file, read_text
from thetau.checkpoint.source import Source, Spec, span
from thetau.checkpoint.ties import spread
from thetau.errors import AlignmentError, CheckpointError, nearest

PREFIX = "base_model.model."
REFUSED = (
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that change the base's own weights
BLOCK = 1 << 16  # elements that are multiplied at once, always the same ones, so that no way of reading changes a bit


@dataclass(frozen=True)
class _Delta:
    """How one base tensor changes: a low-rank product, new values in its place, or both."""

    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    replace: str | None = None
    scale: float = 1.0
    transposed: bool = False  # the stored base weight is [in, out]
    embedding: bool = False


class LoraSource(Source):
    """The difference that an adapter makes to its base: names are the base's; absent names do not change."""

    degree = 0
    partial = True

    def __init__(self, folder: Path, base: Source) -> None:
        self.folder: Path | None = folder
        self.label = str(folder)
        self.over = base
        self._base = base = spread(base)
        config = _config(folder / "adapter_config.json")
        self.apart = not config.get("ensure_weight_tying")
        safe, weights = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
        weights = safe if safe.exists() else weights
        self._weights: Source = open_file(weights) if weights == safe else open_torch(weights)
        self._deltas = _deltas(self.label, config, self._weights.specs, base)
        self.specs = {name: replace(spec, file=str(weights)) for name, spec in base.specs.items() if name in self._deltas}
        used = {name for delta in self._deltas.values() for name in (delta.a, delta.b, delta.magnitude, delta.replace)}
        for name, spec in self._weights.specs.items():
            if name not in used:
                self.specs[saved_name(name)] = replace(spec, name=saved_name(name))
        self.key = f"lora:{self._weights.key}:{base.key}"
        self._notes = (f"{folder}: LoRA adapter, restored over {base.label} in {len(self._deltas)} tensors.",)
        self._check_shapes()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the difference, in float32: `[stop - start, *shape[1:]]`."""
        spec, delta = self.specs[name], self._deltas[name]
        start, stop = span(spec, start, stop)
        if delta.a is None:
            assert delta.replace is not None
            return self._weights.read(delta.replace, start, stop).float() - self._base.read(name, start, stop).float()
        step = max(1, BLOCK // max(1, spec.row_elements))
        first = start - start % step
        blocks = [self._block(delta, name, low, min(low + step, spec.rows)) for low in range(first, stop, step)]
        rows = torch.cat(blocks) if blocks else torch.empty((0, *spec.shape[1:]))
        return rows[start - first : stop - first]

    def _block(self, delta: _Delta, name: str, start: int, stop: int) -> Tensor:
        assert delta.a is not None and delta.b is not None
        if delta.embedding or delta.transposed:  # the weight is [in, out] where A is [rank, in] and B is [out, rank]
            rows = self._weights.read(delta.a)[:, start:stop].float().T @ self._weights.read(delta.b).float().T
        else:
            rows = self._weights.read(delta.b, start, stop).float() @ self._weights.read(delta.a).float()
        rows = rows * delta.scale
        if delta.magnitude is None and delta.replace is None:
            return rows
        base = self._base.read(name, start, stop).float()
        moved = rows + (self._weights.read(delta.replace, start, stop).float() if delta.replace else base)
        if delta.magnitude is not None:
            norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
            moved = moved * (self._weights.read(delta.magnitude, start, stop).float().reshape(-1, 1) / norm)
        return moved - base

    def fingerprint(self) -> str:
        """That of the adapter's own file."""
        return self._weights.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """Those of the adapter's own file."""
        return self._weights.header_hashes()

    def changed_files(self) -> list[str]:
        """The adapter's file, if it is no longer what was opened."""
        return self._weights.changed_files()

    def _check_shapes(self) -> None:
        shapes = {name: spec.shape for name, spec in self._weights.specs.items()}
        for name, delta in self._deltas.items():
            want = self._base.specs[name].shape
            if delta.replace:
                self._check_shape(name, shapes[delta.replace], want)
            if delta.a is not None and delta.b is not None:
                a, b = shapes[delta.a], shapes[delta.b]
                if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                    raise AlignmentError(
                        f"{self.label}: {delta.a!r} {list(a)} and {delta.b!r} {list(b)} do not multiply; only matrices are supported."
                    )
                self._check_shape(name, (a[1], b[0]) if delta.embedding or delta.transposed else (b[0], a[1]), want)
            if delta.magnitude is not None and prod(shapes[delta.magnitude]) != want[0]:
                self._check_shape(delta.magnitude, shapes[delta.magnitude], want[:1])

    def _check_shape(self, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
        if got != want:
            raise AlignmentError(
                f"{self.label}: the adapter changes {name!r} by shape {list(got)}, the base {self._base.label} has {list(want)}. "
                "Give the base it was trained on."
            )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").exists()


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable adapter configuration ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{path}: only LoRA adapters can be restored as task vectors. Got peft_type {got!r}.")
    used = [key for key in REFUSED if config.get(key)]
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(MOVES_BASE):
        raise CheckpointError(
            f"{path}: `init_lora_weights: {begun}` changed the base's own weights, so the adapter is no difference from the base. "
            "Save it with PEFT's `path_initial_model_for_weight_conversion`, or merge it with `merge_and_unload` first."
        )
    if used:
        raise CheckpointError(
            f"{path}: uses {', '.join(used)}, which thetau cannot restore. Merge the adapter with PEFT's `merge_and_unload` first."
        )
    return config


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern names the end of a module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _scale(label: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """α/r, or α/√r where rank-stabilised, as the configuration says for this module.

    Raises:
        CheckpointError: the configuration is no valid one, or not that of these weights.
    """
    try:
        said = _pattern(config.get("rank_pattern"), module, config.get("r", rank))
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", said)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{label}: `adapter_config.json` gives {module!r} no usable rank or alpha ({error}).") from error
    if said != rank or not rank:
        raise CheckpointError(f"{label}: `adapter_config.json` gives {module!r} rank {said!r}, its weights have rank {rank}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _transposed(config: Mapping[str, Any], name: str, a: Spec, b: Spec, base: Source) -> bool:
    """Whether the base stores `[in, out]`. The flag holds for all targets, so shapes and names go first: PEFT mixes layers too."""
    shape = base.specs[name].shape
    if len(shape) == 2 and shape[0] != shape[1]:
        return shape == (a.shape[-1], b.shape[0])
    conv1d = any(view_of(other, spec.shape).transposed for other, spec in base.specs.items())
    return view_of(name, shape).transposed if conv1d else bool(config.get("fan_in_fan_out"))


def _deltas(label: str, config: Mapping[str, Any], specs: Mapping[str, Spec], base: Source) -> dict[str, _Delta]:
    found: dict[str, _Delta] = {}
    problems: list[str] = []
    parts: dict[str, dict[str, str]] = {}
    for name in specs:
        path = name.removeprefix(PREFIX)
        match = re.match(r"(.*)\.lora_(embedding_)?(A|B|magnitude_vector)(?:\.weight)?$", path)
        if match:
            kind = {"A": "a", "B": "b"}.get(match[3], "magnitude")
            parts.setdefault(match[1], {})[kind] = name
            if match[2]:
                parts[match[1]]["embedding"] = "yes"
            continue
        target = _base_name(saved_name(name), base)
        if target is None and ".lora_" in name:
            problems.append(
                f"{label}: {name!r} is a part of LoRA that thetau does not know. Merge the adapter with PEFT's `merge_and_unload` first."
            )
            continue
        if target is None:
            continue  # a head that the base lacks: alignment says so, or `exclude` names it
        if target in found:
            problems.append(f"{label}: {name!r} and {found[target].replace!r} both stand for {target!r}.")
        else:
            found[target] = _Delta(replace=name)
    for module, part in parts.items():
        target = _base_name(f"{module}.weight", base)
        if target is None:
            problems.append(
                f"{label}: the adapter changes {module + '.weight'!r}, which the base {base.label} lacks.{nearest(module + '.weight', base.specs)}"
            )
        elif "a" not in part or "b" not in part:
            problems.append(f"{label}: {module!r} has only one of its two LoRA matrices.")
        else:
            a, b = specs[part["a"]], specs[part["b"]]
            if len(a.shape) < 2 or len(b.shape) < 2:
                problems.append(f"{label}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} must be matrices.")
                continue
            found[target] = _Delta(
                a=part["a"],
                b=part["b"],
                magnitude=part.get("magnitude"),
                replace=found[target].replace if target in found else None,
                scale=_scale(label, config, module, a.shape[0]),
                transposed="embedding" not in part and _transposed(config, target, a, b, base),
                embedding="embedding" in part,
            )
    if not found and not problems:
        problems.append(f"{label}: the adapter changes nothing.")
    if any(d.magnitude and (d.transposed or d.embedding) for d in found.values()):
        problems.append(
            f"{label}: DoRA on transposed or embedding layers cannot be restored. Merge it with PEFT's `merge_and_unload` first."
        )
    if problems:
        raise AlignmentError("\n".join(problems))
    return found


def saved_name(name: str) -> str:
    """What a module calls a tensor that an adapter saves whole."""
    return name.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def _base_name(path: str, base: Source) -> str | None:
    """The base's name for an adapter's path, whatever library named it."""
    return names_of(base).find(path, among=base.label)
