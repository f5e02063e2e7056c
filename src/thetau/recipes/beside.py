"""Tokenizers and chat templates of models that are merged, compared with those of the base, which the output keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from thetau.checkpoint.safetensors import exists, read_text
from thetau.checkpoint.source import Source
from thetau.errors import ThetauError
from thetau.recipes.mergekit.tokenizer import DOCUMENT
from thetau.recipes.mergekit.tokens import Speaker, differing


def beside(base: Source, models: Mapping[str, Source]) -> list[str]:
    """A sentence for each model whose tokenizer or template differs from the base's; models without such files say nothing."""
    found: list[str] = []
    for label, model in models.items():
        if base.folder is None or model.folder is None or base.folder == model.folder:
            continue
        if exists(base.folder / DOCUMENT) and exists(model.folder / DOCUMENT):
            try:
                found += differing(
                    [
                        Speaker(label=base.label, folder=base.folder, source=base),
                        Speaker(label=label, folder=model.folder, source=model),
                    ]
                )
            except ThetauError as error:  # a comparison that cannot be made is no reason not to merge
                found.append(f"{label}: its tokenizer could not be compared with {base.label}'s: {error}")
        mine, theirs = _template(base.folder), _template(model.folder)
        if mine is not None and theirs is not None and mine != theirs:
            found.append(
                f"{label}: its chat template differs from that of {base.label}. "
                "The output takes the base's, or the one that `config: NAME` (`--config`) names."
            )
    return found


def _template(folder: Path) -> str | None:
    """A model's chat template as text; None where it has none that can be read."""
    try:
        if exists(folder / "chat_template.jinja"):
            return read_text(folder / "chat_template.jinja")
        config = json.loads(read_text(folder / "tokenizer_config.json")) if exists(folder / "tokenizer_config.json") else {}
    except (ThetauError, ValueError, RecursionError):
        return None
    template = config.get("chat_template") if isinstance(config, dict) else None
    return template if isinstance(template, str) else None
