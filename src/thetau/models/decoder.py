"""A language model that runs with the weights of an expression, and the tokens of texts as it reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from thetau.checkpoint import Source
from thetau.checkpoint.config import config_for
from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.facade import Expression
from thetau.models.library import quiet, reason_of, transformers
from thetau.models.meta import library_of, meta_model

_SHOWN = 3


@final
@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model of transformers in float32 and evaluation mode; `label` is what messages call it."""

    module: nn.Module
    label: str

    def run(self, tokens: Sequence[Sequence[int]]) -> None:
        """Run texts together, padded on the right, where a causal model cannot see it.

        What is of interest is read by hooks: the head does not run, and nothing is returned of what comes out.
        """
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
        inner: Any = self.module
        with torch.no_grad():
            inner.base_model(input_ids=ids, attention_mask=self.real(tokens).long(), use_cache=False)

    @staticmethod
    def real(tokens: Sequence[Sequence[int]]) -> Bool[Tensor, "text position"]:
        """Which positions of a batch are a text's."""
        lengths = torch.tensor([len(text) for text in tokens])
        return torch.arange(int(lengths.max())) < lengths[:, None]

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        inner: Any = self.module
        return int(inner.get_input_embeddings().weight.shape[0])


def load_decoder(model: Expression, label: str) -> Decoder:
    """The model of these weights, by the config beside them. All of it lies in memory, in float32.

    Raises:
        CheckpointError: it has no config, or transformers does not know the model or cannot read its weights.
        AlignmentError: weights that the model needs are missing, or some have no place in it.
        DataError: it is no decoder alone.
    """
    hollow: Any = meta_model(_config(_home(model), label))
    if hollow is None:
        raise CheckpointError(f"{label}: {_UNKNOWN}")
    config = deepcopy(hollow.config)
    if config.is_encoder_decoder:
        raise DataError(f"{label}: is a text-to-text model. Texts alone run through a decoder; a decoder's checkpoint is needed.")
    config.dtype = torch.float32
    weights = model.state_dict(dtype="float32")
    with quiet():
        try:
            made, told = type(hollow).from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
        except Exception as error:  # another library's code on a file of anybody's
            raise CheckpointError(f"{label}: transformers cannot load its weights ({reason_of(error)}).") from error
    for key, said in (("missing_keys", "are missing"), ("unexpected_keys", "have no place in the model")):
        names = sorted(map(str, told[key]))
        if names:
            shown = ", ".join(names[:_SHOWN])
            raise AlignmentError(f"{label}: {len(names)} tensors {said}: {shown}. Is config.json that of these weights?")
    return Decoder(module=made.float().eval(), label=label)


def read_tokens(model: Expression, label: str, texts: Sequence[str]) -> list[list[int]]:
    """What the tokenizer beside a model makes of texts, its special tokens included.

    Raises:
        CheckpointError: there is no tokenizer that transformers can open.
    """
    folder = _home(model).folder
    if not has_tokenizer(model):  # transformers would make one up of nothing
        raise CheckpointError(f"{label}: has no tokenizer, which must read the text. Put its files beside the weights.")
    with quiet():
        try:
            tokenizer: Any = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # another library's code on a file of anybody's
            raise CheckpointError(
                f"{label}: transformers cannot open its tokenizer ({reason_of(error)}). Put the tokenizer beside the weights."
            ) from error
        return [list(map(int, tokenizer(text)["input_ids"])) for text in texts]


def has_tokenizer(model: Expression) -> bool:
    """Whether the files of a tokenizer lie beside a model."""
    folder = _home(model).folder
    return folder is not None and any((folder / name).is_file() for name in _TOKENIZERS)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def _home(model: Expression) -> Source:
    """The source that says what the model is: its base, or the model itself."""
    if not model.is_model or model.reference is None:
        raise CheckpointError(f"{model.label}: a model is needed to run, this is a task vector. Add it to its base first.")
    return model.reference


def live_names(model: Expression, label: str) -> dict[str, str]:
    """Stored name → name in the live model, of the tensors that are one of its parameters.

    Raises:
        CheckpointError: there is no config, or transformers does not know the model.
    """
    config = _config(_home(model), label)
    hollow, known = meta_model(config), library_of(config)
    if hollow is None or known is None:
        raise CheckpointError(f"{label}: {_UNKNOWN}")
    parameters = {name for name, _ in hollow.named_parameters()}
    return {name: live for name in _home(model).specs if (live := known.live(name)) in parameters}


_UNKNOWN = "transformers cannot build the model of its config.json, which must run."


def _config(source: Source, label: str) -> str:
    config = config_for(source)
    if not config:
        raise CheckpointError(
            f"{label}: has no config.json, and the model must run. Put it beside the weights, with the tokenizer."
        )
    return json.dumps(config)
