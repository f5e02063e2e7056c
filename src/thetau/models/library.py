"""How transformers and open_clip are asked: silently, without a network, and with a clear word when they are not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from thetau.errors import CheckpointError


def package(module: str, install: str) -> Any:
    """An optional library. Raises `CheckpointError` saying what to install."""
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: open_clip's torchvision was built for another torch
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == module else f" ({error})"
        raise CheckpointError(f"running this model needs {module}{reason}. Install it: pip install '{install}'") from error


def transformers() -> Any:
    """The library; its functions carry no types."""
    return package("transformers", "thetau[models]")


def reason_of(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers; the caller's setting comes back."""
    logging: Any = transformers().utils.logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def max_length_of(folder: Path, config: Any, tokenizer: Any) -> int:
    """The longest input in tokens, from the tokenizer, the config and sentence-transformers' own file."""
    limits = [int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", 0) or 0)]
    own = folder / "sentence_bert_config.json"
    if own.is_file():
        limits.append(int(json.loads(own.read_text(encoding="utf-8")).get("max_seq_length") or 0))
    return min(limit for limit in limits if limit > 0)
