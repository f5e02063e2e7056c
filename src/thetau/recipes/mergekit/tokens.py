"""The vocabulary of a merged model: its tokenizer's files, and which row of which model each row of its embeddings is.

Rows follow tokens, as in mergekit: a model's own row where it knows the token; else the only one that knows it, else the base's, else the
mean over those that know it, zeros where none does. Bytes are moved row by row when they are read; no embedding matrix is held.

Departs from mergekit 0.1.5:
- No row is lost: the output keeps the number of embedding rows of the model that gives the tokenizer, its spare rows as they are
  (mergekit cuts to the tokenizer's length: 152,064 rows became 151,665).
- In a union, ordinary tokens of further models become ordinary tokens, in the order of models and ids (there: added tokens, which are
  looked for in the raw text and tear words apart, in an order that changes from run to run).
- Tokens beyond a model's rows are left out of tokenizers of every kind, and said (there: of BPE; elsewhere a `KeyError`).
- A model without a tokenizer is an error (there: it is taken to share the base's).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import numpy as np
from thetau.checkpoint.arranged import MEAN, ZERO, Piece, RowMap
from thetau.checkpoint.config import has_config, read_config
from thetau.checkpoint.naming import Kind, kind_of, layer_of
from thetau.checkpoint.safetensors import exists
from thetau.checkpoint.source import Source
from thetau.errors import AlignmentError, RecipeError, nearest
from thetau.recipes.mergekit.templates import chosen_template
from thetau.recipes.mergekit.tokenizer import (
    DOCUMENT,
    Tokenizer,
    cut,
    has_tokenizer,
    joined,
    read_tokenizer,
    some,
    with_template,
    written,
)

if TYPE_CHECKING:
    from jaxtyping import Int

UNION, BASE = "union", "base"

# Tensors whose first axis counts tokens, by name: what turns tokens into vectors, and what turns vectors into scores of tokens.
_INPUT = re.compile(
    r"(?:^|\.)(?:(?:[a-z]+_)?embed_tokens(?:_per_layer)?|wte|word_embeddings?|tok(?:en)?_embed(?:ding|dings|s)?|embed_in|shared)\.weight$"
    r"|^(?:\w+\.)*embeddings?\.weight$"
)
_OUTPUT = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_layer|vocab_projector|generator_lm_head|text_head)(?:\.(?:linear|decoder))?\.(?:weight|bias)$"
    r"|^lm_head\.bias$|(?:^|\.)predictions\.(?:decoder\.(?:weight|bias)|bias)$|^(?:model\.)?(?:output|proj_out|decoder)\.(?:weight|bias)$"
    r"|^layers\.\d+\.(?:wte|linear)\.(?:weight|bias)$"
)
_OTHER = re.compile(
    r"pos(?:ition|itional|_emb|_ids)|(?:^|[._])type|segment|relative|patch|(?:^|\.)wpe|norm|(?:^|[._])ln", re.IGNORECASE
)


def embedding_rows(source: Source, config: Mapping[str, Any]) -> int | None:
    """How many rows a model's token embedding has; what its config says where no tensor is known as one. None where neither tells."""
    sized = vocabulary_size(config)
    rows = [spec.shape[0] for name, spec in source.specs.items() if len(spec.shape) == 2 and _is_input(name)]
    if sized in rows or not rows:
        return sized
    return rows[0]


def _is_input(name: str) -> bool:
    return _INPUT.search(name) is not None and _OTHER.search(name) is None


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """A config's `vocab_size`, or that of the part of it that describes a text model; None where there is none."""
    if isinstance(config.get("vocab_size"), int):
        return int(config["vocab_size"])
    parts = [part for key in ("text_config", *sorted(config)) if isinstance(part := config.get(key), Mapping)]
    return next((size for part in parts if (size := vocabulary_size(part)) is not None), None)


def is_vocabulary(name: str, shape: Sequence[int], rows: int | Collection[int]) -> bool:
    """Whether a tensor's first axis counts tokens, in a model with so many of them.

    `rows` is the model's number of embedding rows, or several that count, such as its `vocab_size` besides.

    Examples:
        >>> is_vocabulary("model.embed_tokens.weight", (32000, 64), 32000)
        True
        >>> is_vocabulary("embeddings.position_embeddings.weight", (512, 64), 512)
        False
    """
    sizes = (rows,) if isinstance(rows, int) else rows
    if len(shape) not in (1, 2) or shape[0] not in sizes or _OTHER.search(name) is not None:
        return False
    if _INPUT.search(name) is not None:
        return len(shape) == 2
    if _OUTPUT.search(name) is not None:
        return True
    return layer_of(name) is None and kind_of(name, tuple(shape)) is Kind.EMBEDDING


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Where the row of one token comes from, for models that do not know it; for all of them with `force`.

    - `model`: the label of a model, which knows the token, or whose row `token` or `token_id` it is. None where the rule decides.
    - `zero`: the row is zeros.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a recipe says about the tokenizer.

    - `source`: `union`, `base`, or the label of the model whose tokenizer the output has.
    - `tokens`: token → where its row comes from; tokens that the tokenizer lacks are added to it.
    - `pad_to_multiple_of`: the number of rows is rounded up to a multiple of this.
    - `chat_template`: `auto`, a known name, or a template.
    """

    source: str = UNION
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None

    @classmethod
    def read(
        cls,
        said: Mapping[str, Any] | str,
        *,
        chat_template: str | None = None,
        label: Callable[[Any], str] = str,
    ) -> TokenizerSettings:
        """The settings from a recipe's `tokenizer` table, or its `tokenizer_source`; `label` turns what names a model there into its label.

        Raises:
            RecipeError: all that is wrong with it, each problem with its place.
        """
        if isinstance(said, str):
            return cls(source=said if said in (UNION, BASE) else label(said), chat_template=chat_template)
        problems: list[str] = [
            f"unknown key {key!r}.{nearest(key, _KEYS)} Known: {', '.join(_KEYS)}." for key in said if key not in _KEYS
        ]
        source = said.get("source", UNION)
        if not isinstance(source, str | Mapping):
            problems.append(f"source: must be `union`, `base` or a model. Got {source!r}.")
        pad = said.get("pad_to_multiple_of")
        if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or pad < 1):
            problems.append(f"pad_to_multiple_of: must be a whole number of at least 1. Got {pad!r}.")
        given = said.get("tokens") or {}
        tokens: dict[str, TokenSource] = {}
        if not isinstance(given, Mapping):
            problems.append(f"tokens: must be a table from tokens to their sources. Got {type(given).__name__}.")
            given = {}
        for token, one in given.items():
            try:
                tokens[str(token)] = _token_source(one, label)
            except RecipeError as error:
                problems += [f"tokens.{token}: {problem}" for problem in error.problems]
        if problems:
            raise RecipeError(problems, "tokenizer")
        return cls(
            source=source if source in (UNION, BASE) else label(source),
            tokens=tokens,
            pad_to_multiple_of=pad,
            chat_template=chat_template,
        )


_KEYS = ("source", "tokens", "pad_to_multiple_of")


def _token_source(said: Any, label: Callable[[Any], str]) -> TokenSource:
    if not isinstance(said, Mapping) or not set(said) <= {"source", "force"}:
        raise RecipeError([f"must be a table with `source` and, where wanted, `force`. Got {said!r}."])
    force, source = said.get("force", False), said.get("source")
    if not isinstance(force, bool):
        raise RecipeError([f"force: must be true or false. Got {force!r}."])
    if source is None:
        return TokenSource(force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenSource(model=label(source), force=force)
    match source["kind"]:
        case "zero":
            return TokenSource(zero=True, force=force)
        case "model_token":
            token, index = source.get("token"), source.get("token_id")
            if (token is None) == (index is None) or source.get("model") is None:
                raise RecipeError(
                    [f"source: a `model_token` has a `model` and either `token` or `token_id`. Got {dict(source)!r}."]
                )
            if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
                raise RecipeError([f"source: token_id must be a whole number of at least 0. Got {index!r}."])
            return TokenSource(model=label(source["model"]), token=token, token_id=index, force=force)
    raise RecipeError([f"source: its kind must be `model_token` or `zero`. Got {source['kind']!r}."])


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model of a recipe with the files that tell its vocabulary.

    - `label`: what the recipe calls it.
    - `folder`: where its tokenizer lies.
    - `source`: its weights, of which only names and shapes are looked at here.
    - `config`: its config; read from the folder where it is None.
    - `merged`: whether it is one of those that are merged. One that only lends a tokenizer or a token is not.
    """

    label: str
    folder: Path | None
    source: Source
    config: Mapping[str, Any] | None = None
    merged: bool = True

    @property
    def told(self) -> Mapping[str, Any]:
        """Its config, empty where it has none."""
        if self.config is not None:
            return self.config
        return read_config(self.folder) if self.folder is not None and has_config(self.folder) else {}

    @cached_property
    def rows(self) -> int:
        """How many tokens its embedding has rows for.

        Raises:
            AlignmentError: no tensor is known as a token embedding, and no config says its size.
        """
        rows = embedding_rows(self.source, self.told)
        if rows is None:
            raise AlignmentError(
                f"{self.label}: has no token embedding, and no `vocab_size` in its config. Tokenizer settings are for language models: "
                "leave `tokenizer` and `tokenizer_source` out."
            )
        return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """The output's vocabulary, and how every model's rows are put into its order.

    - `tokens`: token → id.
    - `rows`: rows of the output's embeddings, spare and padding ones included.
    - `real`: rows before the padding.
    - `files`: the tokenizer's files by name; None for one that must not be taken over from a model's folder.
    - `notes`: what a user should be told.
    - `known`: label → token → id there, of the tokens that have a row there.
    - `owner`: the model whose tokenizer this is, or was before tokens were added.
    - `base`: the base's label, which decides where several know a token that others lack.
    """

    tokens: Mapping[str, int]
    rows: int
    real: int
    files: Mapping[str, bytes | None]
    notes: tuple[str, ...]
    settings: TokenizerSettings
    known: Mapping[str, Mapping[str, int]]
    merged: tuple[str, ...]
    owner: str
    base: str | None
    _maps: dict[Any, tuple[RowMap | None, tuple[str, ...]]] = field(default_factory=dict, repr=False)

    @cached_property
    def _places(self) -> Mapping[str, Int[np.ndarray, " rows"]]:
        """Label → for each real row of the output, the row of the same token there, −1 where it has none."""
        return {label: self._place(ids) for label, ids in self.known.items()}

    def _place(self, ids: Mapping[str, int]) -> Int[np.ndarray, " rows"]:
        out = np.full(self.real, -1, np.int64)
        for token, index in self.tokens.items():
            out[index] = ids.get(token, -1)
        return out

    @cached_property
    def _spare(self) -> Int[np.ndarray, " rows"]:
        """Real rows that no token has."""
        return np.setdiff1d(np.arange(self.real), np.fromiter(self.tokens.values(), np.int64, len(self.tokens)))

    def piece(
        self,
        label: str,
        name: str,
        tensor_of: Callable[[str], tuple[Source, str] | None],
        among: Sequence[str] | None = None,
    ) -> Piece:
        """One model's tensor of the output's name, its rows in the output's order.

        `tensor_of` gives the tensor that plays this role in the model of a label, None where it has none. `among` are the models that are
        merged into this tensor, in the recipe's order; all by default.

        Raises:
            AlignmentError: a model that must give a row has no such tensor, or one of another width.
        """
        places = {one: tensor_of(one) for one in dict.fromkeys((label, *(among or self.merged)))}
        for said in self.settings.tokens.values():
            if said.model is not None and said.model not in places:
                places[said.model] = tensor_of(said.model)
        if self.owner not in places:
            places[self.owner] = tensor_of(self.owner)
        own = places[label]
        if own is None:
            raise AlignmentError(
                f"{label}: has no tensor for {name!r}, whose first axis counts tokens. Use models of one architecture."
            )
        there = {one: place for one, place in places.items() if place is not None}
        counts = {one: source.specs[theirs].rows for one, (source, theirs) in there.items()}
        voting = tuple(one for one in (among or self.merged) if one in there)
        key = (label, voting, tuple(counts.items()))
        if key not in self._maps:
            self._maps[key] = self._mapped(label, name, counts, voting)
        rows, donors = self._maps[key]
        return Piece(own[0], own[1], rows, tuple(there[donor] for donor in donors))

    def _mapped(
        self, label: str, name: str, counts: Mapping[str, int], voting: tuple[str, ...]
    ) -> tuple[RowMap | None, tuple[str, ...]]:
        """The row map of one model, and the further models that it takes rows of."""
        ids = {one: np.where(self._places[one] < count, self._places[one], -1) for one, count in counts.items()}
        order = [label, *(one for one in counts if one != label)]
        number = {one: index for index, one in enumerate(order)}
        origin, row = np.full(self.real, ZERO, np.int64), np.zeros(self.real, np.int64)
        knows = np.array([ids[one] >= 0 for one in voting], bool).reshape(len(voting), self.real)
        count = knows.sum(0)
        forced = {self.tokens[token] for token, said in self.settings.tokens.items() if said.force}
        takes = ids[label] < 0
        takes[list(forced)] = True
        origin[~takes], row[~takes] = 0, ids[label][~takes]
        base = self.base if self.base in voting else None
        means: dict[int, tuple[tuple[int, int], ...]] = {}
        for index in np.flatnonzero(takes & (count > 0)).tolist():
            givers = [one for one, has in zip(voting, knows[:, index], strict=True) if has]
            if len(givers) > 1 and base in givers:
                givers = [base]
            if len(givers) == 1:
                origin[index], row[index] = number[givers[0]], ids[givers[0]][index]
            else:
                origin[index] = MEAN
                means[index] = tuple((number[one], int(ids[one][index])) for one in givers)
        self._tell(label, name, counts, ids, number, takes, (origin, row, means))
        self._spares(label, counts, number, (origin, row))
        padding = self.rows - self.real
        origin, row = np.pad(origin, (0, padding), constant_values=ZERO), np.pad(row, (0, padding))
        if not padding and counts[label] == self.rows and not origin.any() and np.array_equal(row, np.arange(self.rows)):
            return None, ()
        used = sorted(
            {*np.unique(origin[origin > 0]).tolist(), *(which for parts in means.values() for which, _ in parts if which)}
        )
        again = {0: 0, ZERO: ZERO, MEAN: MEAN} | {old: new for new, old in enumerate(used, 1)}
        origin = np.array([again[one] for one in origin.tolist()], np.int64)
        means = {index: tuple((again[which], at) for which, at in parts) for index, parts in means.items()}
        return RowMap(origin, row, means, self.real if padding else None), tuple(order[index] for index in used)

    def _tell(
        self,
        label: str,
        name: str,
        counts: Mapping[str, int],
        ids: Mapping[str, Int[np.ndarray, " rows"]],
        number: Mapping[str, int],
        takes: np.ndarray,
        into: tuple[np.ndarray, np.ndarray, dict[int, tuple[tuple[int, int], ...]]],
    ) -> None:
        """Put the rows that the recipe says a source for."""
        origin, row, means = into
        for token, said in self.settings.tokens.items():
            index = self.tokens[token]
            if not takes[index] or (said.model is None and not said.zero):
                continue
            means.pop(index, None)
            origin[index], row[index] = ZERO, 0
            if said.model is None:
                continue
            if said.model not in counts:
                raise AlignmentError(
                    f"{label}: the row of {token!r} in {name!r} comes from {said.model}, which has no such tensor. Name another model."
                )
            wanted = said.token if said.token is not None else token
            which = said.token_id if said.token_id is not None else self.known[said.model].get(wanted, -1)
            if not 0 <= which < counts[said.model]:
                raise AlignmentError(
                    f"{label}: the row of {token!r} in {name!r} is row {which} of {said.model}, whose tensor has {counts[said.model]}."
                )
            origin[index], row[index] = number[said.model], which

    def _spares(
        self, label: str, counts: Mapping[str, int], number: Mapping[str, int], into: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Put rows that no token has: a model's own where it is spare there too, else that of the tokenizer's owner."""
        origin, row = into
        taken = set(self.known[label].values())
        for index in self._spare.tolist():
            if index < counts[label] and index not in taken:
                origin[index], row[index] = 0, index
            elif self.owner in counts and index < counts[self.owner]:
                origin[index], row[index] = number[self.owner], index

    def config(self, config: Mapping[str, Any], label: str) -> dict[str, Any]:
        """A model's config, or its generation config, as it is right for the output: the vocabulary's size, and the ids of tokens.

        `label` is the model whose config it is.
        """
        size, ids = vocabulary_size(config), {index: token for token, index in self.known[label].items()}

        def moved(index: Any) -> Any:
            if isinstance(index, list):
                return [moved(one) for one in index]
            known = isinstance(index, int) and not isinstance(index, bool)
            return self.tokens.get(ids.get(index, ""), index) if known else index

        def changed(key: str, value: Any) -> Any:
            if key == "vocab_size" and value == size:
                return self.rows
            if key.endswith(("_token_id", "_token_ids")):
                return moved(value)
            return {inner: changed(inner, one) for inner, one in value.items()} if isinstance(value, Mapping) else value

        return {key: changed(key, value) for key, value in config.items()}


def vocabulary(models: Sequence[Speaker], base: str | None, settings: TokenizerSettings) -> Vocabulary:
    """The vocabulary of a merge of these models, which are in the recipe's order; `base` is the label of the base, if there is one.

    Raises:
        RecipeError: the settings name a model or a token that is not there.
        CheckpointError: a model has no tokenizer, or one that cannot be read.
        AlignmentError: a model has no token embedding.
    """
    by_label = {model.label: model for model in models}
    lead = base if base is not None else models[0].label
    _check_models(by_label, settings)
    notes: list[str] = []
    tokenizers: dict[str, Tokenizer] = {}
    for model in models:
        tokenizers[model.label], beyond = cut(read_tokenizer(model.label, model.folder), model.rows)
        if beyond:
            notes.append(
                f"{model.label}: {len(beyond)} tokens have ids beyond its {model.rows} embedding rows and are left out ({some(beyond)})."
            )
    owner = settings.source if settings.source not in (UNION, BASE) else lead
    others = (
        [tokenizers[model.label] for model in models if model.merged and model.label != owner] if settings.source == UNION else []
    )
    made, said = joined(tokenizers[owner], others, list(settings.tokens))
    known = {label: tokenizer.ids for label, tokenizer in tokenizers.items()}
    merged = tuple(model.label for model in models if model.merged)
    notes += said
    _check_tokens(settings, by_label, known, merged)
    template = settings.chat_template and chosen_template(
        settings.chat_template, [t for model in models if (t := tokenizers[model.label].template)]
    )
    real = max(by_label[owner].rows, 1 + max(made.ids.values(), default=-1))
    multiple = settings.pad_to_multiple_of or 1
    folders = [model.folder for model in models if model.folder is not None]
    nobody = [token for token in made.ids if token not in settings.tokens and not any(token in known[label] for label in merged)]
    if nobody:
        notes.append(
            f"{len(nobody)} tokens of {owner} are known to no model that is merged ({some(nobody)}): their rows are zeros."
        )
    return Vocabulary(
        tokens={token: made.ids[token] for token in made.in_order},
        rows=-(-real // multiple) * multiple,
        real=real,
        files=written(made, folders, template or None),
        notes=tuple(notes),
        settings=settings,
        known=known,
        merged=merged,
        owner=owner,
        base=base,
    )


def _check_models(by_label: Mapping[str, Speaker], settings: TokenizerSettings) -> None:
    """Raise where the settings name models that are not there."""
    named = [(f"token {token!r}", said.model) for token, said in settings.tokens.items() if said.model is not None]
    if settings.source not in (UNION, BASE):
        named.insert(0, ("source", settings.source))
    problems = [
        f"{where}: no model of the recipe is {label!r}.{nearest(label, by_label)} Models: {', '.join(by_label)}."
        for where, label in named
        if label not in by_label
    ]
    if problems:
        raise RecipeError(problems, "tokenizer")


def _check_tokens(
    settings: TokenizerSettings, by_label: Mapping[str, Speaker], known: Mapping[str, Mapping[str, int]], merged: Sequence[str]
) -> None:
    """Raise where a token's row is to come from a token that is not there."""
    problems: list[str] = []
    for token, said in settings.tokens.items():
        needed = said.force or not all(token in known[label] for label in merged)
        if said.model is None:
            if needed and not said.zero and not any(token in known[label] for label in merged):
                problems.append(f"token {token!r}: no model knows it. Say its `source`, such as `{{kind: zero}}`.")
        elif said.token_id is not None:
            if said.token_id >= by_label[said.model].rows:
                problems.append(
                    f"token {token!r}: token_id must be less than {by_label[said.model].rows}, the rows of {said.model}. Got {said.token_id}."
                )
        else:
            wanted = said.token if said.token is not None else token
            if wanted not in known[said.model] and (needed or said.token is not None):
                problems.append(f"token {token!r}: {said.model} has no token {wanted!r}.{nearest(wanted, known[said.model])}")
    if problems:
        raise RecipeError(problems, "tokenizer")


def templated(models: Sequence[Speaker], owner: str, chat_template: str) -> dict[str, bytes | None]:
    """The files that give an output a chat template where a recipe has no other tokenizer settings.

    `owner` is the model whose tokenizer the output takes over.

    Raises:
        RecipeError: it is no template.
        CheckpointError: the owner has no tokenizer.
    """
    having = [model for model in models if has_tokenizer(model.folder)]
    tokenizers = {
        model.label: read_tokenizer(model.label, model.folder) for model in models if model in having or model.label == owner
    }
    template = chosen_template(chat_template, [t for model in having if (t := tokenizers[model.label].template)])
    if template is None:
        return {}
    return with_template(tokenizers[owner].config, template, [model.folder for model in having if model.folder is not None])


def differing(models: Sequence[Speaker]) -> tuple[str, ...]:
    """Where the models' vocabularies differ from the first one's, a sentence each: for a warning where a recipe has no tokenizer settings.

    Models without a tokenizer say nothing.
    """
    having = [model for model in models if has_tokenizer(model.folder)]
    if len(having) < 2:
        return ()
    first, told = having[0], []
    document = _document(first)
    ids: Mapping[str, int] | None = None
    for model in having[1:]:
        if document is not None and _document(model) == document:
            continue
        if ids is None:
            ids = read_tokenizer(first.label, first.folder).ids
        theirs = read_tokenizer(model.label, model.folder).ids
        lacking = [token for token in ids if token not in theirs]
        more = [token for token in theirs if token not in ids]
        moved = [token for token, index in ids.items() if theirs.get(token, index) != index]
        parts = [
            f"{len(tokens)} tokens {what} ({some(tokens)})"
            for what, tokens in (("are missing", lacking), ("are new", more), ("have other ids", moved))
            if tokens
        ]
        if parts:
            told.append(
                f"{model.label}: its tokenizer differs from {first.label}'s: {', '.join(parts)}. Rows of embeddings are merged by their "
                "number all the same: set `tokenizer: {source: union}` to merge them by token."
            )
    return tuple(told)


def _document(model: Speaker) -> bytes | None:
    assert model.folder is not None
    path = model.folder / DOCUMENT
    return path.read_bytes() if exists(path) else None


def unequal(name: str, rows: Mapping[str, int]) -> str:
    """What an error says of a vocabulary's tensor that has other numbers of rows in several models, by label.

    Examples:
        >>> unequal("lm_head.weight", {"a": 32000, "b": 32002})
        "'lm_head.weight' has 32000 rows in a, 32002 in b: their vocabularies differ. Set `tokenizer: {source: union}`, ..."
    """
    counts = list(rows.items())
    shown = ", ".join(f"{count} {'rows ' if not at else ''}in {label}" for at, (label, count) in enumerate(counts))
    return (
        f"{name!r} has {shown}: their vocabularies differ. Set `tokenizer: {{source: union}}`, or `{{source: base}}` for the base's tokens "
        "alone, so that rows are merged by token."
    )
