"""Language models that classify: a masked one up to its head, and a text-to-text one that scores the labels' texts.

Masked as in LM-BFF (Gao et al., ACL 2021, <https://arxiv.org/abs/2012.15723>): a label is the word that fills the gap of a sentence.
Text-to-text as T5 (Raffel et al., JMLR 2020, <https://arxiv.org/abs/1910.10683>) and Flan-T5, but instead of writing freely and
comparing strings, every label is scored: no answer falls outside the labels, and the scores are differentiable features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError
from thetau.models.encoder import Encoder
from thetau.models.library import max_length_of, quiet, reason_of, transformers
from thetau.models.naming import check_fit, match_names
from thetau.models.weights import read_weights, weights_hash

IGNORED = -100
_NEEDED = ("input_ids", "attention_mask", "label_ids")


@final
class MaskEncoder(nn.Module):
    """A masked language model up to its head: `forward(**columns) → [example, feature]`, the hidden state at the mask token.

    `backbone` is the whole model, its head included, so that names and checkpoints are those of the model; the head does not run.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **columns: Tensor) -> Float[Tensor, "example feature"]:
        """`columns`: `input_ids`, `attention_mask`, perhaps `token_type_ids`, all `[example, token]`, and `mask_position`,
        `[example]`.
        """
        if "mask_position" not in columns:
            raise DataError(f"`mask_position` must be among the columns. Got {', '.join(columns)}; make them with `mask_inputs`.")
        position = columns.pop("mask_position")
        base: Any = self.backbone.base_model
        hidden: Tensor = base(**columns).last_hidden_state
        return hidden[torch.arange(len(position), device=position.device), position]


@final
class TextToText(nn.Module):
    """T5 as one module of tensors to a tensor: `forward(**columns) → [example, label]`, log-likelihoods of the labels' texts."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **columns: Tensor) -> Float[Tensor, "example label"]:
        """The sum over each label's tokens of their log-probabilities, in nats. The encoder runs once an example.

        `columns`: `input_ids` and `attention_mask`, `[example, token]`, and `label_ids`, `[label, label_token]`, the same labels for
        the whole batch, padded with −100.
        """
        missing = [name for name in _NEEDED if name not in columns]
        if missing:
            raise DataError(
                f"columns must have {', '.join(_NEEDED)}. Got none for {', '.join(missing)}; make them with `label_inputs`."
            )
        labels, seen = columns["label_ids"], columns["attention_mask"]
        backbone: Any = self.backbone
        hidden: Tensor = backbone.encoder(input_ids=columns["input_ids"], attention_mask=seen).last_hidden_state
        count = len(labels)
        ids = labels.repeat(len(hidden), 1)  # for each example all the labels
        counted = ids != IGNORED
        start = torch.full_like(ids[:, :1], int(backbone.config.decoder_start_token_id))
        shifted = torch.cat([start, ids[:, :-1]], 1)
        pad = int(backbone.config.pad_token_id)
        logits: Tensor = backbone(
            encoder_outputs=(hidden.repeat_interleave(count, 0),),
            attention_mask=seen.repeat_interleave(count, 0),
            decoder_input_ids=shifted.masked_fill(shifted == IGNORED, pad),
            use_cache=False,
        ).logits
        told = logits.log_softmax(-1).gather(-1, ids.masked_fill(~counted, pad).unsqueeze(-1)).squeeze(-1)
        return (told * counted).sum(-1).reshape(-1, count)


def load_mask_encoder(folder: Path) -> Encoder:
    """The masked language model in a folder, in float32 and evaluation mode; its `module` is a `MaskEncoder`.

    Raises `CheckpointError` (not readable, not a masked language model, no mask token) and `AlignmentError` (weights that are not
    those of the config).
    """
    model = load_language_model(folder, "AutoModelForMaskedLM", MaskEncoder)
    if model.tokenizer.mask_token_id is None:
        raise CheckpointError(
            f"{folder}: the tokenizer must have a mask token; it has none. Use that of a masked language model."
        )
    return replace(model, kind="mask", frozen=tuple(sorted(frozen_names(model.module))))


def load_text_to_text(folder: Path) -> Encoder:
    """The text-to-text model in a folder, in float32 and evaluation mode; its `module` is a `TextToText`.

    Raises `CheckpointError` (not readable, not such a model) and `AlignmentError` (weights that are not those of the config).
    """
    model = load_language_model(folder, "AutoModelForSeq2SeqLM", TextToText)
    if model.tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer must have a token that ends a text; it has none. Use the model's own.")
    return replace(model, kind="text_to_text")


def load_language_model(folder: Path, architecture: str, wrap: Callable[[nn.Module], nn.Module]) -> Encoder:
    """The model in a folder by one of transformers' auto classes, with the weights of its checkpoint, inside `wrap`."""
    api = transformers()
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            backbone = getattr(api, architecture).from_config(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"{folder}: {architecture} of transformers cannot open it ({reason_of(error)}).") from error
    if tokenizer.pad_token_id is None and architecture != "AutoModelForCausalLM":  # whose mask hides any padding
        raise CheckpointError(f"{folder}: the tokenizer must have a padding token; it has none.")
    weights = read_weights(folder)
    decoder = backbone.get_output_embeddings()
    heads = [name for name in backbone.state_dict() if not name.startswith(f"{backbone.base_model_prefix}.")]
    if architecture == "AutoModelForMaskedLM" and decoder is not None and not any(name in weights for name in heads):
        raise CheckpointError(
            f"{folder}: the checkpoint must hold the language-model head ({heads[0]}, …); it holds the encoder only. "
            "Use the checkpoint of the masked language model."
        )
    names = match_names(backbone, weights, "", str(folder))
    live = backbone.state_dict()
    stored = set(names.values())
    carried = {name: tensor for name, tensor in weights.items() if name not in stored}
    check_fit({known: tuple(live[name].shape) for name, known in names.items()}, carried, weights, str(folder))
    _untie(backbone, names, weights)
    live = backbone.float().state_dict()
    with torch.no_grad():
        for name, known in names.items():
            live[name].copy_(weights[known])
    return Encoder(
        module=wrap(backbone).eval(),
        tokenizer=tokenizer,
        folder=folder,
        names=names,
        carried=carried,
        dtypes={name: weights[name].dtype for name in stored},
        max_length=max_length_of(folder, config, tokenizer),
        base_hash=weights_hash(weights),
        form=architecture,
    )


def _untie(backbone: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Give a tensor of its own to each parameter that the architecture ties to another one and the checkpoint does not.

    Flan-T5 is such: transformers ties its decoder to the embeddings unless the values differ.
    """
    live = backbone.state_dict()
    first: dict[int, str] = {}
    for name, known in names.items():
        kept = first.setdefault(live[name].data_ptr(), known)
        if live[name].numel() and kept != known and not torch.equal(weights[kept], weights[known]):
            path, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(path), leaf, nn.Parameter(live[name].detach().clone()))


def frozen_names(module: nn.Module) -> set[str]:
    """The parameters of a `MaskEncoder` that are not trained: the embeddings with their norm, and the language-model head."""
    backbone: Any = module.backbone
    prefix, head = encoder_and_head(backbone)
    held = {id(parameter) for parameter in [*head.parameters(), *backbone.get_input_embeddings().parameters()]}
    return {
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in held or name.startswith(f"backbone.{prefix}.embeddings.")
    }


def encoder_and_head(backbone: Any) -> tuple[str, nn.Module]:
    """The encoder's name, and the one module beside it that ends in the decoder."""
    prefix = str(backbone.base_model_prefix)
    decoder = backbone.get_output_embeddings()
    others = {name: child for name, child in backbone.named_children() if name != prefix}
    heads = [child for child in others.values() if decoder is not None and any(part is decoder for part in child.modules())]
    extra = [name for name, child in others.items() if child not in heads and any(True for _ in child.parameters())]
    if len(heads) != 1 or heads[0] is decoder or extra or not isinstance(decoder, nn.Linear):
        raise CheckpointError(
            f"{type(backbone).__name__}: the language-model head must be one module that ends in a linear decoder, as in BERT and "
            f"RoBERTa. Got {', '.join(others) or 'none'}; use a model of these families."
        )
    return prefix, heads[0]
