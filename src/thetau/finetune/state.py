"""The state of an unfinished run on disk: what is trained, the optimiser's moments, each process's random state, the
losses so far.

One safetensors file, replaced whole at each save. A run that finds it goes on where it was, to the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thetau.checkpoint.disk import write_tensors
from thetau.errors import OutputError

_FILE = "state.safetensors"


@final
@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state: `step` steps are done."""

    step: int
    losses: list[float]
    penalties: list[float]
    tensors: dict[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class StateFolder:
    """Where a run keeps its state, beside its output; `key` is the run's content, another run's state is not read."""

    folder: Path
    key: str

    @classmethod
    def beside(cls, out: Path, key: str) -> StateFolder:
        """The folder of a run that writes to `out`; two runs never share one."""
        return cls(folder=out.parent / f".{out.name}.{key[:8]}.training", key=key)

    def save(self, step: int, tensors: Mapping[str, Tensor], losses: list[float], penalties: list[float]) -> None:
        """Replace the state. Raises `OutputError`."""
        note = json.dumps({"key": self.key, "step": step, "losses": losses, "penalties": penalties})
        write_tensors(self.folder / _FILE, tensors, {"thetau.state": note})

    def load(self) -> Saved | None:
        """The last state, or None where there is none of this run."""
        path = self.folder / _FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {}).get("thetau.state", "{}"))
                if note.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Saved(step=note["step"], losses=note["losses"], penalties=note["penalties"], tensors=tensors)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise OutputError(
                f"{path}: the state of an unfinished run cannot be read ({error}). Remove {self.folder} to begin again."
            ) from error

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def random_state(device: torch.device) -> Tensor:
    """torch's random state: of the CPU, and of the GPU where the model is on one."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go on from a `random_state`."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
