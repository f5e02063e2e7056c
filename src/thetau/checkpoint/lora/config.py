"""What `adapter_config.json` says: the kind of adapter, ranks and scales by module, and what cannot be restored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thetau.checkpoint.safetensors import read_text
from thetau.errors import CheckpointError

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
KINDS = ("LORA", "LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS")
REFUSED = (
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that change the base's own weights
REMEDY = "Merge the adapter with PEFT's `merge_and_unload` first."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an adapter's configuration says, or what a file without one stands for.

    - `label`: what messages call the adapter.
    - `values`: the configuration as PEFT writes it.
    - `stated`: whether there is one; without it a rank is what the tensors have, and α is the rank unless the file holds it.
    """

    label: str
    values: Mapping[str, Any]
    stated: bool = True

    @property
    def kind(self) -> str:
        """PEFT's name for the kind of adapter."""
        return str(self.values["peft_type"]) if self.stated else "LORA"

    def scale(self, module: str, rank: int | None) -> float:
        """α/r, or α/√r where rank-stabilised, as the configuration says for this module; `rank` is what its tensors have, if they say.

        Raises:
            CheckpointError: the configuration is no valid one, or not that of these weights.
        """
        if not self.stated:
            if not rank:
                raise CheckpointError(f"{self.label}: {module!r} has rank 0 and changes nothing. Take it out of the adapter.")
            return 1.0
        patterned = self.values
        try:
            said = pattern(patterned.get("rank_pattern"), module, patterned.get("r", rank))
            name = "lora_alpha" if self.kind == "LORA" else "alpha"
            alpha = float(pattern(patterned.get("alpha_pattern"), module, patterned.get(name, said)))
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise CheckpointError(
                f"{self.label}: `adapter_config.json` gives {module!r} no usable rank or alpha ({error})."
            ) from error
        rank = said if rank is None and isinstance(said, int) else rank
        if said != rank or not rank:
            raise CheckpointError(
                f"{self.label}: `adapter_config.json` gives {module!r} rank {said!r}, its weights have rank {rank}."
            )
        return alpha / (math.sqrt(rank) if patterned.get("use_rslora") else rank)

    def tokens(self, module: str) -> list[int] | None:
        """The rows of an embedding that were trained alone, where the configuration says which.

        Raises:
            CheckpointError: they are no list of row numbers.
        """
        said = self.values.get("token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
        if isinstance(said, Mapping):
            said = pattern(said, module, None)
        if said is not None and not (isinstance(said, list) and all(type(row) is int and row >= 0 for row in said)):
            raise CheckpointError(f"{self.label}: `trainable_token_indices` must be row numbers. Got {said!r} for {module!r}.")
        return said

    def feeds_forward(self, module: str) -> bool:
        """Whether (IA)³ scales this module's inputs, not its outputs: PEFT's `feedforward_modules`."""
        said = self.values.get("feedforward_modules") or []
        if isinstance(said, str):
            return re.fullmatch(said, module) is not None
        return any(module.endswith(end) for end in said)

    def base_name(self) -> str | None:
        """The model that the adapter says it was trained on."""
        said = self.values.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / CONFIG).exists()


def pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern names the end of a module's path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_settings(path: Path, label: str) -> Settings:
    """A configuration that can be restored.

    Raises:
        CheckpointError: it is damaged, or of a kind that is no change of weights.
    """
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable adapter configuration ({error}).") from error
    got = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
    if not isinstance(values, dict) or got not in KINDS:
        raise CheckpointError(
            f"{path}: only {', '.join(KINDS)} adapters can be restored as task vectors. Got peft_type {got!r}. {REMEDY}"
        )
    begun = str(values.get("init_lora_weights", "")).lower()
    if begun.startswith(MOVES_BASE):
        raise CheckpointError(
            f"{path}: `init_lora_weights: {begun}` changed the base's own weights, so the adapter is no difference from the base. "
            "Save it with PEFT's `path_initial_model_for_weight_conversion`, or merge it with `merge_and_unload` first."
        )
    used = [key for key in REFUSED if values.get(key)]
    if used:
        raise CheckpointError(f"{path}: uses {', '.join(used)}, which thetau cannot restore. {REMEDY}")
    return Settings(label=label, values=values)
