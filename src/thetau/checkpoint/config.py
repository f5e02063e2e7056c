"""A model's `config.json` as it stands, and what of it tells its depth, its vocabulary and its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thetau.checkpoint.safetensors import read_text
from thetau.errors import CheckpointError

FILE = "config.json"


def has_config(folder: Path | None) -> bool:
    """Whether a model's folder has one."""
    return folder is not None and (folder / FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The config, a table.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or no table.
    """
    try:
        config = json.loads(read_text(folder / FILE))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / FILE}: not valid JSON ({error}). Mend it, then run again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / FILE}: must hold a table. Got {type(config).__name__}.")
    return config
