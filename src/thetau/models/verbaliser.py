"""Classification by a masked language model: the text is put in a sentence with a gap, and a label is the word that fills it.

As LM-BFF (Gao et al., ACL 2021, <https://arxiv.org/abs/2012.15723>) without its demonstrations. The head is the model's own
language-model head, cut to the label words and frozen, as the embeddings are: only the layers between them are trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError, nearest
from thetau.models.naming import check_fit, match_names
from thetau.models.weights import read_weights, weights_hash

_SLOT = re.compile(r"(\{\w*\})")
_KEYS = ("template", "labels", "values", "source")


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sentence with the places `{text}`, perhaps `{text2}`, and `{mask}` for a masked language model; data, not code.

    - `labels`: the names of the classes, in the order of the label numbers; for a regression the words again.
    - `words`: what the model says for each label.
    - `values`: for a regression, the number that each word stands for, increasing.
    """

    template: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    values: tuple[float, ...] | None = None

    @property
    def pair(self) -> bool:
        """Whether it takes two texts."""
        return "{text2}" in self.template

    def fill(self, text: str, text2: str | None, mask: str = "") -> str:
        """The sentence. Braces inside the texts stay as they are."""
        given = {"{text}": text, "{text2}": text2 or "", "{mask}": mask}
        return "".join(given.get(part, part) for part in _SLOT.split(self.template))


def read_prompt(path: Path, *, masked: bool) -> Prompt:
    """A prompt from its YAML file: `template`, and `labels` (class → word) or, for a regression, `values` (word → number).

    `masked`: whether the template must have a `{mask}`, or must not. Raises `DataError` listing every problem.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a mapping with `template` and `labels`. Got {type(content).__name__}.")
    problems = [f"unknown key {key!r}.{nearest(str(key), _KEYS)}" for key in content if key not in _KEYS]
    template = content.get("template")
    slots = sorted(_SLOT.findall(template)) if isinstance(template, str) else []
    allowed = [sorted([*texts, *(["{mask}"] if masked else [])]) for texts in (["{text}"], ["{text}", "{text2}"])]
    if slots not in allowed:
        mask = "exactly one {mask}" if masked else "no {mask}"
        problems.append(f"`template` must have one {{text}}, at most one {{text2}} and {mask}. Got {template!r}.")
    given = [key for key in ("labels", "values") if key in content]
    table = content[given[0]] if len(given) == 1 else None
    if not isinstance(table, dict) or len(table) < 2:
        problems.append(f"exactly one of `labels` and `values` must be given, with at least two entries. Got {given or 'none'}.")
        table = {}
    words = list(table if "values" in given else table.values())
    problems += [
        f"`{given[0]}`: a label and its word must be texts; quote them. Got {key!r}: {value!r}."
        for key, value in table.items()
        if not _word(key) or not ("values" in given or _word(value))
    ]
    if len(set(map(str, words))) != len(words):
        problems.append(f"`labels` must have different words. Got {words!r}.")
    numbers = list(table.values()) if "values" in given else []
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        problems.append(f"`values` must map words to finite numbers. Got {numbers!r}.")
    elif numbers != sorted(set(numbers)):
        problems.append(f"`values` must be increasing. Got {numbers!r}.")
    if problems:
        raise DataError(f"{path}: " + " ".join(problems))
    return Prompt(
        template=str(template),
        labels=tuple(table),
        words=tuple(words),
        values=tuple(map(float, numbers)) if "values" in given else None,
    )


def _word(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def soft_targets(labels: Tensor, values: tuple[float, ...] | None, count: int) -> Float[Tensor, "example label"]:
    """The share of each label: all on one for class numbers, and for a regression on the two words whose values are nearest.

    As LM-BFF does between two words. Raises `DataError` for numbers outside the range of `values`.
    """
    if values is None:
        return nn.functional.one_hot(labels.long(), count).float()
    grid = torch.tensor(values, dtype=torch.float32, device=labels.device)
    if ((labels < grid[0]) | (labels > grid[-1])).any():
        raise DataError(
            f"labels must be in {values[0]}..{values[-1]}, the range of the prompt's `values`. "
            f"Got {labels.min().item()}..{labels.max().item()}; correct the rows or the prompt."
        )
    number = labels.float()
    upper = torch.searchsorted(grid, number).clamp(1, count - 1)
    share = (number - grid[upper - 1]) / (grid[upper] - grid[upper - 1])
    low = nn.functional.one_hot(upper - 1, count) * (1 - share)[:, None]
    return low + nn.functional.one_hot(upper, count) * share[:, None]


def expected_value(logits: Float[Tensor, "example label"], values: tuple[float, ...]) -> Float[Tensor, " example"]:
    """A regression's prediction: the mean of `values` under the model's probabilities of their words."""
    return logits.softmax(-1) @ torch.tensor(values, dtype=logits.dtype, device=logits.device)


def fitted(encode: Callable[[str, str | None], list[int]], text: str, text2: str | None, limit: int) -> tuple[list[int], bool]:
    """The ids of `encode(text, text2)`, in at most `limit` tokens, and whether the texts were cut for it: the longer one first.

    Raises `DataError` when not even the sentence around the texts fits.
    """
    whole = encode(text, text2)
    if len(whole) <= limit:
        return whole, False
    low, high, best = 0, max(len(text), len(text2 or "")), encode("", None if text2 is None else "")
    if len(best) > limit:
        raise DataError(
            f"the template alone has {len(best)} tokens, more than `max_length`. Got {limit}; raise it or shorten the template."
        )
    while low < high:  # the largest number of characters, the same for both texts
        middle = (low + high + 1) // 2
        ids = encode(text[:middle], None if text2 is None else text2[:middle])
        if len(ids) <= limit:
            low, best = middle, ids
        else:
            high = middle - 1
    return best, True


def check_texts(prompt: Prompt, texts: Sequence[str], texts2: Sequence[str] | None, labels: Sequence[int | float]) -> None:
    """Raise `DataError` when the examples do not fit the prompt: pairs, lengths, class numbers."""
    if prompt.pair != (texts2 is not None):
        need, got = ("two texts", "one") if prompt.pair else ("one text", "two")
        raise DataError(f"the template {prompt.template!r} takes {need}. Got {got}; choose the template of this task.")
    if len(texts) != len(labels) or (texts2 is not None and len(texts2) != len(texts)):
        raise DataError(f"texts and labels must be as many. Got {len(texts)} texts and {len(labels)} labels.")
    wrong = next((label for label in labels if not (isinstance(label, int) and 0 <= label < len(prompt.words))), None)
    if prompt.values is None and wrong is not None:
        raise DataError(
            f"labels must be integers in 0..{len(prompt.words) - 1}, the prompt has {len(prompt.words)}. Got {wrong!r}."
        )


def pairs(texts: Sequence[str], texts2: Sequence[str] | None) -> Iterator[tuple[str, str | None]]:
    """Each text with its second one, or None."""
    return zip(texts, texts2 if texts2 is not None else repeat(None, len(texts)), strict=True)


@final
@dataclass(frozen=True, kw_only=True)
class MaskInputs:
    """Prompts as token ids, not padded: what `MaskEncoder` reads. `positions` is the place of each example's mask token."""

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    labels: tuple[int, ...] | tuple[float, ...]
    pad: int
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each example."""
        return tuple(map(len, self.ids))

    @cached_property
    def hash(self) -> str:
        """A digest of ids and labels."""
        return digest([self.ids, self.positions, self.labels])

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the ids alone."""
        return digest([self.ids, self.positions])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, `[example, token]` padded on the right, and `mask_position`, `[example]`."""
        return padded([self.ids[i] for i in indices], self.pad) | {
            "mask_position": torch.tensor([self.positions[i] for i in indices], dtype=torch.int64)
        }


def digest(content: object) -> str:
    """A hexadecimal digest of plain data."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a batch."""
    width = max(map(len, rows))
    ids = [[*row, *([pad] * (width - len(row)))] for row in rows]
    seen = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids, dtype=torch.int64), "attention_mask": torch.tensor(seen, dtype=torch.int64)}


def mask_inputs(
    tokenizer: Any,
    prompt: Prompt,
    texts: Sequence[str],
    texts2: Sequence[str] | None,
    labels: Sequence[int | float],
    max_length: int,
) -> MaskInputs:
    """Put examples in a template, in at most `max_length` tokens; the texts are cut, never the sentence around them.

    Raises `DataError`: the tokenizer has no mask token, a text holds one, the examples do not fit the prompt.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "a template with {mask} needs a tokenizer with a mask token; this one has none. Use a masked language model."
        )
    check_texts(prompt, texts, texts2, labels)

    def encode(text: str, text2: str | None) -> list[int]:
        return list(tokenizer(prompt.fill(text, text2, tokenizer.mask_token), verbose=False)["input_ids"])

    ids, positions, truncated = [], [], 0
    for number, (text, text2) in enumerate(pairs(texts, texts2)):
        row, cut = fitted(encode, text, text2, max_length)
        if row.count(tokenizer.mask_token_id) != 1:
            raise DataError(
                f"example {number}: a prompt must hold one mask token. Got {row.count(tokenizer.mask_token_id)}; "
                f"take {tokenizer.mask_token!r} out of the text."
            )
        ids.append(tuple(row))
        positions.append(row.index(tokenizer.mask_token_id))
        truncated += cut
    return MaskInputs(
        ids=tuple(ids), positions=tuple(positions), labels=tuple(labels), pad=int(tokenizer.pad_token_id), truncated=truncated
    )


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
@dataclass(frozen=True, kw_only=True)
class VerbaliserHead:
    """The language-model head with the rows of the label words only: a frozen copy, that later weights do not change.

    `values` is the prompt's, for a regression.
    """

    reader: nn.Module
    values: tuple[float, ...] | None = None

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """The model's own logits of the label words."""
        out: Tensor = self.reader(features)
        return out

    def linear(self, change: Tensor) -> Tensor:
        """Not defined: the head has an activation and a norm. Raises `DataError`."""
        raise DataError(
            "a language-model head is not linear in the features, so that the τJp penalty cannot read it; use a zero-shot head."
        )

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; for a regression with the targets of `soft_targets`."""
        logits = self.logits(features)
        return nn.functional.cross_entropy(logits, soft_targets(labels, self.values, logits.shape[-1]))

    def to(self, device: torch.device) -> VerbaliserHead:
        """The same head on a device."""
        return replace(self, reader=copy.deepcopy(self.reader).to(device))

    def hash(self) -> str:
        """A hexadecimal digest of the weights, the layers' kinds and the values."""
        return digest([weights_hash(self.reader.state_dict()), repr(self.reader), self.values])


def verbaliser_head(module: MaskEncoder, tokenizer: Any, prompt: Prompt) -> VerbaliserHead:
    """The head of a task, with the weights that `module` runs with now: call it while those are the base's.

    Raises `DataError` when a label word is not one token, `CheckpointError` when the model's head is not of a known form.
    """
    _, head = _parts(module.backbone)
    backbone: Any = module.backbone
    decoder = backbone.get_output_embeddings()
    ids = torch.tensor(word_ids(tokenizer, prompt), device=decoder.weight.device)
    with torch.no_grad():
        rows = nn.Linear(decoder.in_features, len(ids), bias=decoder.bias is not None, device="meta")
        rows.weight = nn.Parameter(decoder.weight[ids].clone())
        memo: dict[int, Any] = {id(decoder): rows}
        if decoder.bias is not None:
            rows.bias = nn.Parameter(decoder.bias[ids].clone())
            memo[id(decoder.bias)] = rows.bias
    # The copy meets the short decoder wherever the head has the long one.
    reader = copy.deepcopy(head, memo).eval().requires_grad_(False)
    return VerbaliserHead(reader=reader, values=prompt.values)


def word_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token of each label word, as it stands in the template. Raises `DataError` when one is not one known token."""
    before = prompt.template.split("{mask}")[0]
    space = " " if before[-1:].isspace() else ""
    found: dict[int, str] = {}
    for word in prompt.words:
        ids = list(tokenizer(space + word, add_special_tokens=False)["input_ids"])
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise DataError(f"a label must be one token of the tokenizer. {word!r} gives {tokens}; choose another word.")
        if ids[0] in found:
            raise DataError(f"labels must be different tokens. {found[ids[0]]!r} and {word!r} are the same; choose another word.")
        found[ids[0]] = word
    return list(found)


def frozen_names(module: nn.Module) -> set[str]:
    """The parameters of a `MaskEncoder` that are not trained: the embeddings with their norm, and the language-model head."""
    backbone: Any = module.backbone
    prefix, head = _parts(backbone)
    held = {id(parameter) for parameter in [*head.parameters(), *backbone.get_input_embeddings().parameters()]}
    return {
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in held or name.startswith(f"backbone.{prefix}.embeddings.")
    }


def _parts(backbone: Any) -> tuple[str, nn.Module]:
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


@final
@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model that runs, its tokenizer, and the way back to its checkpoint: the fields of `Encoder`, with another module.

    - `names`: live name (inside `module.backbone`) → name in the checkpoint.
    - `carried`: tensors of the checkpoint that the live model has no place for.
    - `dtypes`: the checkpoint's dtype of each tensor in `names`; the live model computes in float32.
    - `frozen`: parameters of `module` that no fine-tuning trains.
    """

    module: nn.Module
    tokenizer: Any
    folder: Path
    names: Mapping[str, str]
    carried: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    max_length: int
    base_hash: str
    frozen: tuple[str, ...] = ()


def load_mask_encoder(folder: Path) -> LanguageModel:
    """The masked language model in a folder, in float32 and evaluation mode; its `module` is a `MaskEncoder`.

    Raises `CheckpointError` (not readable, not a masked language model, no mask token) and `AlignmentError` (weights that are not
    those of the config).
    """
    model = load_language_model(folder, "AutoModelForMaskedLM", MaskEncoder)
    if model.tokenizer.mask_token_id is None:
        raise CheckpointError(
            f"{folder}: the tokenizer must have a mask token; it has none. Use that of a masked language model."
        )
    return replace(model, frozen=tuple(sorted(frozen_names(model.module))))


def load_language_model(folder: Path, architecture: str, wrap: Callable[[nn.Module], nn.Module]) -> LanguageModel:
    """The model in a folder by one of transformers' auto classes, with the weights of its checkpoint, inside `wrap`."""
    from thetau.models.loading import _max_length, _quiet  # the one place that opens models

    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("running a model needs transformers. Install it: pip install 'thetau[models]'") from error
    api: Any = transformers
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            backbone = getattr(api, architecture).from_config(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{folder}: {architecture} of transformers cannot open it ({reason}).") from error
    if tokenizer.pad_token_id is None:
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
    return LanguageModel(
        module=wrap(backbone).eval(),
        tokenizer=tokenizer,
        folder=folder,
        names=names,
        carried=carried,
        dtypes={name: weights[name].dtype for name in stored},
        max_length=_max_length(folder, config, tokenizer),
        base_hash=weights_hash(weights),
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
