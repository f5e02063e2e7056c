"""Image encoders: DINOv2 (Oquab et al., 2023, <https://arxiv.org/abs/2304.07193>), ViT and CLIP through transformers, CLIP through
open_clip.

Positional encodings are interpolated to the size of the images, save for open_clip, whose towers have one size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.checkpoint.locate import OPEN_CLIP
from thetau.checkpoint.names import bare
from thetau.errors import CheckpointError
from thetau.models.encoder import Channels, Encoder, ImageForm
from thetau.models.library import package, quiet, reason_of, transformers
from thetau.models.naming import match_names
from thetau.models.pooling import FeatureModel
from thetau.models.weights import read_weights, weights_hash

VisionPooling = Literal["cls", "pooled", "projected"]

IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # ViT's own image processor
MODEL_TYPES = {"dinov2": IMAGENET, "vit": HALF, "clip": CLIP, "clip_vision_model": CLIP}


@final
class VisionEncoder(FeatureModel):
    """A transformers vision model with its pooling: `forward(pixel_values) → [example, feature]`, rows of unit length unless raw.

    - `pooling`: `cls`, the first token of the last hidden state (DINOv2, ViT: after the last norm); `pooled`, CLIP's normed first
      token; `projected`, CLIP's image embedding, in the space of its texts.
    """

    def __init__(self, backbone: nn.Module, pooling: VisionPooling = "cls") -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling: VisionPooling = pooling
        config: Any = backbone.config
        # DINOv2 interpolates of itself; the others do when they are told to.
        self._own_size = None if config.model_type == "dinov2" else int(config.image_size)

    def forward(self, pixel_values: Float[Tensor, "example 3 height width"]) -> Float[Tensor, "example feature"]:
        """`pixel_values` are normalised as the model expects, any multiple of its patch in height and width."""
        told = {} if self._own_size in (None, pixel_values.shape[-1]) else {"interpolate_pos_encoding": True}
        output = self.backbone(pixel_values=pixel_values, **told)
        match self.pooling:
            case "projected":
                features = output.image_embeds
            case "pooled":
                features = output.pooler_output
            case _:
                features = output.last_hidden_state[:, 0]
        return self.finished(features)


@final
class OpenClipVision(FeatureModel):
    """open_clip's visual tower, `model.visual`, with open_clip's own names: `forward(pixel_values) → [example, feature]`, rows of
    unit length.
    """

    pooling: VisionPooling = "projected"

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.backbone = visual

    def forward(self, pixel_values: Float[Tensor, "example 3 height width"]) -> Float[Tensor, "example feature"]:
        """`pixel_values` are normalised and of the tower's own size."""
        return self.finished(self.backbone(pixel_values))


def load_vision_encoder(folder: Path, size: int | None = None) -> Encoder:
    """The image encoder in a folder, in float32 and evaluation mode, for images of `size` pixels a side.

    Without `size`, that of `preprocessor_config.json`, else of the config. Raises `CheckpointError` (not readable, no image
    encoder, a size that does not fit) and `AlignmentError` (weights that are not those of the config).
    """
    if (folder / OPEN_CLIP).is_file():
        return _open_clip_encoder(folder, size)
    config = config_of(folder)
    kind = str(config.model_type)
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{folder}: an image encoder's model_type must be one of {', '.join(MODEL_TYPES)}. Got {kind!r}.")
    weights = read_weights(folder)
    backbone, pooling = _backbone(folder, config, weights)
    names = matched(backbone, weights, str(folder))
    own = _json(folder / "preprocessor_config.json")
    default = MODEL_TYPES[kind]
    return _finished(
        VisionEncoder(backbone.float(), pooling),
        folder,
        names,
        weights,
        ImageForm(
            size=_side(own.get("crop_size")) or _side(own.get("size")) or _side(backbone.config.image_size)
            if size is None
            else size,
            patch=_side(backbone.config.patch_size),
            mean=_channels(folder, own, "image_mean", default[0]),
            std=_channels(folder, own, "image_std", default[1]),
        ),
        frozen=tuple(f"backbone.{name}" for name in names if name.endswith("mask_token")),  # only masked pre-training uses it
    )


def _finished(
    module: VisionEncoder | OpenClipVision,
    folder: Path,
    names: dict[str, str],
    weights: dict[str, Tensor],
    image: ImageForm,
    frozen: tuple[str, ...] = (),
) -> Encoder:
    """The encoder with its weights in it."""
    if image.size < image.patch or image.size % image.patch:
        raise CheckpointError(
            f"{folder}: the image size must be a multiple of the patch of {image.patch} pixels. Got {image.size}."
        )
    stored = set(names.values())
    encoder = Encoder(
        module=module.eval(),
        folder=folder,
        names=names,
        carried={name: tensor for name, tensor in weights.items() if name not in stored},
        dtypes={name: weights[name].dtype for name in stored},
        base_hash=weights_hash(weights),
        kind="image",
        form=module.pooling,
        image=image,
        max_length=(image.size // image.patch) ** 2,
        frozen=frozen,
    )
    encoder.load(weights, str(folder))
    return encoder


def config_of(folder: Path) -> Any:
    """transformers' config. Raises `CheckpointError`."""
    api = transformers()
    try:
        with quiet():
            return api.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config.json ({reason_of(error)}).") from error


def _backbone(folder: Path, config: Any, weights: Mapping[str, Tensor]) -> tuple[Any, VisionPooling]:
    """A model of the right class with any weights, and its pooling."""
    api = transformers()
    # The weights that are drawn here are overwritten; the fork leaves the caller's random state alone.
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            match str(config.model_type):
                case "dinov2":
                    return api.Dinov2Model(config), "cls"
                case "vit":
                    return api.ViTModel(config, add_pooling_layer=False), "cls"
                case "clip":
                    config.vision_config.projection_dim = config.projection_dim
                    return api.CLIPVisionModelWithProjection(config.vision_config), "projected"
            if "visual_projection.weight" in weights:
                return api.CLIPVisionModelWithProjection(config), "projected"
            return api.CLIPVisionModel(config), "pooled"
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: transformers cannot build the model of its config.json ({error}).") from error


def matched(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> dict[str, str]:
    """Live name → name in the checkpoint, whichever version of transformers gave either."""
    live = {bare(name): name for name in module.state_dict()}
    stored = {live.get(bare(name), name): name for name in weights}
    found = match_names(module, {name: weights[own] for name, own in stored.items()}, "", origin)
    return {name: stored[own] for name, own in found.items()}


def _side(value: Any) -> int:
    """A number of pixels out of the forms that configs have; 0 where there is none."""
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or value.get("height")
    if isinstance(value, list | tuple):
        value = value[0] if value else 0
    return value if isinstance(value, int) else 0


def _channels(folder: Path, own: Mapping[str, Any], key: str, default: Channels) -> Channels:
    value = own.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(one, int | float) for one in value):
        raise CheckpointError(f"{folder / 'preprocessor_config.json'}: `{key}` must be three numbers. Got {value!r}.")
    return float(value[0]), float(value[1]), float(value[2])


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object. Got {type(content).__name__}.")
    return content


# open_clip: a folder with open_clip_config.json and the weights of both towers.


def open_clip_model(folder: Path) -> Any:
    """Both towers with any weights."""
    api = package("open_clip", "open_clip_torch")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its warning that the weights are random: they are read below
    with torch.random.fork_rng(devices=[]):
        try:
            # `load_weights`, `pretrained_text`: thetau reads the weights itself, and nothing is to be downloaded.
            return api.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).float().eval()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: open_clip cannot build the model of its {OPEN_CLIP} ({error}).") from error
        finally:
            logging.disable(before)


def _open_clip_encoder(folder: Path, size: int | None) -> Encoder:
    visual = open_clip_model(folder).visual
    own = _side(visual.image_size)
    patch = _side(getattr(visual, "patch_size", 0)) or gcd(own, 32)  # towers without patches
    if size not in (None, own):
        raise CheckpointError(f"{folder}: this open_clip tower reads images of {own} pixels only. Got the size {size}.")
    weights = read_weights(folder)
    # The text tower has names of the same kind without the prefix, so they must not be there to be found.
    visible = {name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")}
    names = {name: f"visual.{found}" for name, found in match_names(visual, visible, "", str(folder)).items()}
    mean, std = (cast("Channels", tuple(map(float, values))) for values in (visual.image_mean, visual.image_std))
    return _finished(
        OpenClipVision(visual), folder, names, weights, ImageForm(size=own, patch=patch, mean=mean, std=std, fixed=True)
    )
