"""How token features become one vector, as sentence-transformers' own files say.

Reimers & Gurevych, EMNLP 2019, <https://arxiv.org/abs/1908.10084>. A folder without `modules.json` gets the mean over tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from thetau.errors import CheckpointError

Pooling = Literal["mean", "cls"]
_OLD_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def pooling_of(folder: Path) -> Pooling:
    """The pooling that the model in `folder` was trained with. Raises `CheckpointError` for kinds that are not supported."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return "mean"
    kind: Pooling = "mean"
    for module in _json(listing):
        last = str(module.get("type", "")).rsplit(".", 1)[-1]
        if last == "Pooling":
            kind = _kind(folder / str(module.get("path", "")) / "config.json")
        elif last not in ("Transformer", "Normalize"):  # Normalize: features have unit length here in any case
            raise CheckpointError(
                f"{listing}: modules must be Transformer, Pooling or Normalize. Got {last!r}, which is not supported."
            )
    return kind


def _kind(path: Path) -> Pooling:
    config = _json(path)
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    else:
        chosen = [_OLD_KEYS.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    match chosen:
        case ["mean"]:
            return "mean"
        case ["cls"]:
            return "cls"
    raise CheckpointError(f"{path}: pooling must be exactly one of mean and cls. Got {', '.join(map(str, chosen)) or 'none'}.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error


class FeatureModel(nn.Module):
    """A module whose features have unit length; with `normalise` false they are as the backbone gives them, and the head normalises.

    Of the linear form it matters which: f₀ + Jτ of unit features is not the unit length of f₀ + Jτ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalise = True

    def finished(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example feature"]:
        """What the module gives."""
        return nn.functional.normalize(features, dim=-1) if self.normalise else features


def pool(
    hidden: Float[Tensor, "example token feature"], mask: Int[Tensor, "example token"], kind: Pooling
) -> Float[Tensor, "example feature"]:
    """One vector for each example; padding does not count."""
    if kind == "cls":
        pooled = hidden[:, 0]
    else:
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return pooled
