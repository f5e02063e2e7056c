"""An encoder that runs: tokens or pixels in, one vector an example out, with whichever weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import CheckpointError
from thetau.models.naming import check_fit
from thetau.models.pooling import FeatureModel, Pooling, pool

Kind = Literal["sentence", "image", "mask", "text_to_text", "causal"]
Channels = tuple[float, float, float]


@final
class TextEncoder(FeatureModel):
    """A transformers encoder with its pooling, as one module: `forward(**columns) → [example, feature]`, rows of unit length unless raw.

    A plain module of tensors to a tensor, so that `torch.func` can take it apart.
    """

    def __init__(self, backbone: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling: Pooling = pooling

    def forward(self, **columns: Tensor) -> Float[Tensor, "example feature"]:
        """`columns` are what the tokenizer gives: `input_ids`, `attention_mask` and perhaps `token_type_ids`, all `[example,
        token]`.
        """
        hidden = self.backbone(**columns).last_hidden_state
        return self.finished(pool(hidden, columns["attention_mask"], self.pooling))


@final
@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """What a model wants of its images: the side in pixels, the side of a patch, each channel's mean and deviation in [0, 1].

    `fixed`: it takes images of this side only.
    """

    size: int
    patch: int
    mean: Channels
    std: Channels
    fixed: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A live encoder, its tokenizer, and the way back to its checkpoint.

    - `module`: columns → features `[example, feature]`. `kind` says of what: sentences or pairs (unit vectors), images (unit
      vectors), a text with a gap (the state at the gap), a prompt (log-likelihoods of the labels' texts), or what a causal model is to say (logits).
    - `names`: live name (inside the backbone) → name in the checkpoint.
    - `carried`: tensors of the checkpoint that the live model has no place for (integer buffers, heads); written back unchanged.
    - `dtypes`: the checkpoint's dtype of each tensor in `names`; the live model computes in float32.
    - `max_length`: the longest input in tokens, or the number of patches.
    - `base_hash`: the content of the weights that it was loaded with.
    - `form`: what it computes apart from weights, for the keys of caches.
    - `frozen`: parameters of `module` that no fine-tuning trains.
    - `tokenizer` is None for images, `image` for texts.
    - `raw`: features are not brought to unit length; heads do it (`raw_features`).
    """

    module: nn.Module
    folder: Path
    names: Mapping[str, str]
    carried: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    max_length: int
    base_hash: str
    form: str
    kind: Kind = "sentence"
    tokenizer: Any = None
    image: ImageForm | None = None
    frozen: tuple[str, ...] = ()
    raw: bool = False

    @property
    def backbone(self) -> nn.Module:
        """The model of the library that it comes from, inside `module`."""
        return self.module.get_submodule("backbone")

    def load(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Run with `weights` (the base's names) from now on; `origin` is what errors call them.

        Values are copied, so the caller's tensors stay its own. Raises `AlignmentError` when names or shapes do not fit.
        """
        live = self.backbone.state_dict()
        check_fit({self.names[name]: tuple(live[name].shape) for name in self.names}, self.carried, weights, origin)
        with torch.no_grad():
            for name, stored in self.names.items():
                live[name].copy_(weights[stored])  # state_dict shares memory with the parameters

    def weights(self, *, exact: bool = False) -> dict[str, Tensor]:
        """A copy of what it runs with, under the checkpoint's names and dtypes, the carried tensors included.

        `exact` keeps float32 where the checkpoint's dtype would round.
        """
        live = self.backbone.state_dict()
        own = {
            stored: live[name].detach().to(live[name].dtype if exact else self.dtypes[stored], copy=True)
            for name, stored in self.names.items()
        }
        return own | {name: tensor.clone() for name, tensor in self.carried.items()}

    def parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `weights` (the checkpoint's names) that are parameters of `module`, by their names in it."""
        known = {name for name, _ in self.module.named_parameters()}
        return {
            f"backbone.{name}": weights[stored]
            for name, stored in self.names.items()
            if f"backbone.{name}" in known and stored in weights
        }


def raw_features(encoder: Encoder) -> Encoder:
    """The same encoder without the normalisation of its features, as in the papers' code, where the head normalises: what is linearised and penalised is
    then the features themselves. Raises `CheckpointError` for language models, whose features have no unit length.
    """
    match encoder.module:
        case FeatureModel():
            encoder.module.normalise = False
            return replace(encoder, form=f"{encoder.form}, raw", raw=True)
    raise CheckpointError(
        f"{encoder.folder}: raw features are of encoders whose features are brought to unit length. This one is of kind "
        f"{encoder.kind}; leave `--features raw` out."
    )
