"""Hidden states of a language model at prompts, for the gates of a mixture of experts.

The model runs in float32 whatever its weights are stored in, and never lies in memory as a whole: of the embedding the prompts' own rows are
read, and a layer's weights come when its turn is and go after it. Prompts are padded on the right, where a causal model cannot see it, and
padding is never counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.checkpoint import Source
from thetau.errors import AlignmentError, CheckpointError
from thetau.models.library import quiet, reason_of, transformers
from thetau.recipes.mergekit.moe.gates import ACTIVATIONS, View

EMBEDDING = "model.embed_tokens.weight"
PREFIX = "model."


def prompt_states(source: Source, prompts: Sequence[str], view: View) -> Float[Tensor, "prompt layer hidden"]:
    """What enters each layer of the model at each prompt, in float32.

    Args:
        source: the model's weights, under the names of the hub; its folder holds config and tokenizer.
        prompts: texts; the tokenizer's first token, where it has one, is put before each.
        view: `last` for the state at the last token, `mean` for the mean over the tokens, `embedding` for the sum of the tokens'
            embeddings, with one layer and without running the model.

    Raises:
        CheckpointError: there is no config or tokenizer that transformers can open, or a prompt has no token, or too many.
        AlignmentError: the weights are not those of the config.
    """
    folder = source.folder
    if folder is None:
        raise CheckpointError(
            f"{source.label}: gates from prompts need the base's config and tokenizer, and it has no folder. Name its folder."
        )
    tokens = _tokens(folder, prompts, source.specs[EMBEDDING].shape[0])
    rows = _rows(source, sorted({token for one in tokens for token in one}))
    with torch.no_grad():
        if view == "embedding":
            return torch.stack([torch.stack([rows[token] for token in one]).double().sum(0).float()[None] for one in tokens])
        return _run(source, folder, tokens, rows, mean=view == "mean")


def _tokens(folder: Path, prompts: Sequence[str], vocabulary: int) -> list[list[int]]:
    with quiet():
        try:
            tokenizer = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # another library's code on a file of anybody's
            raise CheckpointError(
                f"{folder}: transformers cannot open its tokenizer, which gates from prompts need ({reason_of(error)}). "
                "Put it beside the weights, or take `gate_mode: random`."
            ) from error
        begin = tokenizer.bos_token or ""
        found = [list(map(int, tokenizer(begin + text, add_special_tokens=False)["input_ids"])) for text in prompts]
    for text, one in zip(prompts, found, strict=True):
        if not one or max(one) >= vocabulary:
            why = "gives no token" if not one else f"gives the token {max(one)}, of {vocabulary} that the embedding has"
            raise CheckpointError(f"{folder}: the prompt {text[:60]!r} {why}. Is the tokenizer that of these weights?")
    return found


def _rows(source: Source, tokens: Sequence[int]) -> dict[int, Tensor]:
    """Rows of the embedding by token, float32."""
    return {token: source.read(EMBEDDING, token, token + 1)[0].float() for token in tokens}


def _run(source: Source, folder: Path, tokens: Sequence[Sequence[int]], rows: dict[int, Tensor], *, mean: bool) -> Tensor:
    model, config = _hollow(folder)
    layers: Any = model.get_submodule("layers")
    longest = max(map(len, tokens))
    if longest > int(config.max_position_embeddings):
        raise CheckpointError(
            f"{folder}: a prompt has {longest} tokens; the model takes at most {config.max_position_embeddings}. Shorten it."
        )
    _fill(model, {name: name for name in _outside(model)}, source)
    states = torch.empty(len(tokens), len(layers), int(config.hidden_size))
    wide = 4 * (8 * int(config.hidden_size) + 4 * int(config.intermediate_size)) * longest
    step = max(1, ACTIVATIONS // wide)
    for first in range(0, len(tokens), step):
        part = tokens[first : first + step]
        lengths = torch.tensor([len(one) for one in part])
        inputs = torch.zeros(len(part), int(lengths.max()), states.shape[-1])
        for row, one in enumerate(part):
            inputs[row, : len(one)] = torch.stack([rows[token] for token in one])
        watch = [
            handle
            for index, layer in enumerate(layers)
            for handle in _watch(layer, f"layers.{index}.", source, states[first : first + step, index], lengths, mean)
        ]
        try:
            model(inputs_embeds=inputs, use_cache=False)
        finally:
            for handle in watch:
                handle.remove()
    return states


def _hollow(folder: Path) -> tuple[nn.Module, Any]:
    """The model without weights, and its config; what it computes for itself (rotary frequencies) is there."""
    api = transformers()
    with quiet():
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                model = api.AutoModel.from_config(config)
            for name, module in list(model.named_modules()):
                if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                    model.set_submodule(name, type(module)(config))
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder}: transformers cannot build its model ({reason_of(error)}).") from error
    return model.eval(), config


def _outside(model: nn.Module) -> list[str]:
    """Names of the tensors outside the layers, less the embedding, whose rows are given."""
    return [name for name, _ in model.named_parameters() if not name.startswith("layers.") and PREFIX + name != EMBEDDING]


def _fill(module: nn.Module, names: dict[str, str], source: Source) -> None:
    """Put stored weights, in float32, where the module has none; `names` maps its own names to those within the model."""
    for name, theirs in names.items():
        stored = PREFIX + theirs
        shape = tuple(module.get_parameter(name).shape)
        got = source.specs[stored].shape if stored in source.specs else None
        if got != shape:
            has = "is not there" if got is None else f"has shape {list(got)}"
            raise AlignmentError(
                f"{source.label}: {stored!r} {has}; the config asks for {list(shape)}. Is config.json that of these weights?"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(source.read(stored).float(), requires_grad=False))


def _watch(
    layer: nn.Module, prefix: str, source: Source, out: Tensor, lengths: Tensor, mean: bool
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Before a layer runs, note what enters it and fetch its weights; afterwards, let them go."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state: Tensor = args[0] if args else kwargs["hidden_states"]
        if mean:
            real = torch.arange(state.shape[1]) < lengths[:, None]
            out.copy_(state.double().masked_fill(~real[..., None], 0).sum(1) / lengths[:, None])
        else:
            out.copy_(state[torch.arange(len(lengths)), lengths - 1])
        _fill(module, {name: prefix + name for name, _ in module.named_parameters()}, source)

    def after(module: nn.Module, *_: object) -> None:
        module.to("meta")

    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)
