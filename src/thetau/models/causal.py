"""Causal language models: the logits of given tokens, and greedy generation, in batches.

A batch may be padded on either side: the mask hides what is padded, and positions count the real tokens alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError
from thetau.models.encoder import Encoder
from thetau.models.language import load_language_model
from thetau.models.library import quiet, reason_of, transformers

NOWHERE = -1
_PART = 1 << 24  # logits that are looked at together
Side = Literal["left", "right"]
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a prompt, and of what follows it."""


@final
class CausalModel(nn.Module):
    """A causal language model as a module of tensors to a tensor: the logits from which given tokens are told."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.takes = frozenset(inspect.signature(backbone.forward).parameters)
        declared: Any = backbone
        self.recurrent: bool = declared._is_stateful  # its state may have read what is padded on the left

    def forward(
        self,
        input_ids: Int[Tensor, "example token"],
        attention_mask: Int[Tensor, "example token"],
        places: Int[Tensor, "example answer_token"],
    ) -> Float[Tensor, "example answer_token word"]:
        """The logits at `places`, those tokens whose followers are asked for; 0 where an example has fewer and its place is −1."""
        there = places != NOWHERE
        kept = torch.unique(places[there])
        more = {"logits_to_keep": kept} if "logits_to_keep" in self.takes else {}
        if "position_ids" in self.takes and not bool(attention_mask[:, 0].all()):
            more["position_ids"] = positions(attention_mask)
        logits: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more).logits
        at = places.clamp(min=0)
        if "logits_to_keep" in self.takes:
            at = torch.searchsorted(kept, at).clamp(max=len(kept) - 1)
        rows = torch.arange(len(places), device=places.device)[:, None]
        return logits[rows, at] * there[:, :, None]


def positions(attention_mask: Int[Tensor, "example token"]) -> Int[Tensor, "example token"]:
    """The place of each real token among those of its example."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def load_causal(folder: Path) -> Encoder:
    """The causal language model in a folder, in float32 and evaluation mode; its `module` is a `CausalModel`.

    Raises `CheckpointError` (not readable, not such a model, no tokenizer) and `AlignmentError` (weights that are not those of the config).
    """
    return replace(load_language_model(folder, "AutoModelForCausalLM", CausalModel), kind="causal")


def padding_of(tokenizer: Any) -> int:
    """What fills a batch; any token does, since the mask hides it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(number for number in known if number is not None))


def pair_columns(pairs: Sequence[Pair], pad: int, side: Side = "right") -> dict[str, Tensor]:
    """What `CausalModel` reads for pairs of a prompt, of at least one token, and what follows it."""
    rows = [[*prompt, *answer][:-1] for prompt, answer in pairs]  # of the last token nothing is asked
    width, most = max(map(len, rows)), max(len(answer) for _, answer in pairs)
    ids, seen, places = [], [], []
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        filling = width - len(row)
        shift = filling if side == "left" else 0
        before, after = [filling, 0] if side == "left" else [0, filling]
        ids.append([*[pad] * before, *row, *[pad] * after])
        seen.append([*[0] * before, *[1] * len(row), *[0] * after])
        first = shift + len(prompt) - 1
        places.append([*range(first, first + len(answer)), *[NOWHERE] * (most - len(answer))])
    return {name: torch.tensor(one) for name, one in (("input_ids", ids), ("attention_mask", seen), ("places", places))}


def answer_tokens(pairs: Sequence[Pair], fill: int) -> Int[Tensor, "example answer_token"]:
    """The tokens that follow the prompts, filled up on the right."""
    most = max(len(answer) for _, answer in pairs)
    return torch.tensor([[*answer, *[fill] * (most - len(answer))] for _, answer in pairs])


@torch.inference_mode()
def likelihoods(model: CausalModel, pairs: Sequence[Pair], pad: int, side: Side = "right") -> Float[Tensor, " pair"]:
    """The log-likelihood in nats of what follows each prompt, summed over its tokens.

    Raises `DataError` where the weights give NaN or Inf.
    """
    columns = pair_columns(pairs, pad, side)
    logits = model(**columns)
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the model's logits must be finite; these weights give NaN or Inf, so no figure would mean anything.")
    there = columns["places"] != NOWHERE
    asked = answer_tokens(pairs, 0)
    step = max(
        1, _PART // (logits.shape[0] * logits.shape[-1])
    )  # so that long texts and large vocabularies need no second copy of the logits
    parts = zip(torch.split(logits, step, 1), torch.split(asked, step, 1), strict=True)
    told = torch.cat([_told(one, tokens) for one, tokens in parts], 1)
    return (told * there).sum(-1)


def _told(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of tokens, in float64."""
    exact = logits.double()
    return exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - exact.logsumexp(-1)


@final
@dataclass(frozen=True, kw_only=True)
class Said:
    """What was generated after a prompt, without the token that ended it. `finished`: an end token or a stop string came."""

    tokens: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    most: int,
    context: int,
    ends: frozenset[int] = frozenset(),
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[Said]:
    """The most likely token again and again after each prompt of at least one token, until an end token, until `stopped` says so of what
    was said, or after `most` tokens, or where the context is full.

    Raises `DataError` where the weights give NaN or Inf.
    """
    said: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    alive = list(range(len(prompts)))
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(one)), *one] for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    backbone: Any = model.backbone
    kept = {"logits_to_keep": 1} if "logits_to_keep" in model.takes else {}
    caches = "past_key_values" in model.takes  # a recurrent model keeps a state of another kind: it reads all again
    cache: Any = None
    while alive:
        fed, at = (ids, positions(mask)) if cache is None else (ids[:, -1:], positions(mask)[:, -1:])
        more = ({"position_ids": at} if "position_ids" in model.takes else {}) | ({"past_key_values": cache} if caches else {})
        out = backbone(input_ids=fed, attention_mask=mask, use_cache=caches, **more, **kept)
        cache = out.get("past_key_values")
        logits = out.logits[:, -1]
        if not bool(torch.isfinite(logits).all()):
            raise DataError("the model's logits must be finite; these weights give NaN or Inf, so nothing can be generated.")
        following = logits.argmax(-1)
        going = []
        for row, (prompt, token) in enumerate(zip(alive, following.tolist(), strict=True)):
            if token in ends:
                finished[prompt] = True
                continue
            said[prompt].append(token)
            finished[prompt] = stopped(said[prompt])
            if not finished[prompt] and len(said[prompt]) < most and len(prompts[prompt]) + len(said[prompt]) < context:
                going.append(row)
        if len(going) < len(alive):
            chosen = torch.tensor(going, dtype=torch.long)
            alive, ids, mask, following = [alive[row] for row in going], ids[chosen], mask[chosen], following[chosen]
            if cache is not None and alive:
                cache.batch_select_indices(chosen)
        ids = torch.cat([ids, following[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(following[:, None])], 1)
    return [Said(tokens=tuple(one), finished=done) for one, done in zip(said, finished, strict=True)]


def end_tokens(encoder: Encoder) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer, the config and the generation config of a model."""
    backbone: Any = encoder.backbone
    listed: list[Any] = [encoder.tokenizer.eos_token_id, backbone.config.eos_token_id]
    if (encoder.folder / "generation_config.json").is_file():
        with quiet():
            try:
                listed.append(transformers().GenerationConfig.from_pretrained(encoder.folder, local_files_only=True).eos_token_id)
            except Exception as error:  # another library's code on a file of anybody's
                raise CheckpointError(
                    f"{encoder.folder / 'generation_config.json'}: cannot be read ({reason_of(error)})."
                ) from error
    numbers = [one for given in listed for one in (given if isinstance(given, list | tuple) else [given])]
    return frozenset(int(one) for one in numbers if one is not None)


def check_tokenizer(encoder: Encoder, folder: Path) -> None:
    """Refuse a model whose tokenizer, where one lies beside it, gives other tokens than that of `encoder`'s. Raises `DataError`, `CheckpointError`."""
    if folder == encoder.folder or not any((folder / name).is_file() for name in _TOKENIZERS):
        return
    with quiet():
        try:
            other: Any = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # another library's code on a file of anybody's
            raise CheckpointError(f"{folder}: transformers cannot open its tokenizer ({reason_of(error)}).") from error
    mine, theirs = encoder.tokenizer.get_vocab(), other.get_vocab()
    differing = sorted(word for word in mine.keys() | theirs.keys() if mine.get(word) != theirs.get(word))
    if differing:
        shown = ", ".join(f"{word!r} ({mine.get(word, 'none')} and {theirs.get(word, 'none')})" for word in differing[:_SHOWN])
        raise DataError(
            f"{folder}: has another tokenizer than {encoder.folder}: {len(differing)} tokens have other numbers, such as {shown}. "
            "Measure it by its own tokenizer: give it as --base too; or put the base's tokenizer beside it."
        )


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHOWN = 3
