"""Tied tensors: one tensor of a model under several names, of which a checkpoint stores one or more copies.

What ties is said by the config (`tie_word_embeddings`), by the model's class where transformers is installed, or by shared storage. Equal
values say nothing: two experts may be equal. Where a config says tied and two stored copies differ, the copies are believed, as
transformers 5 does (4.57 dropped one of them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from thetau._lazy import torch
from thetau.checkpoint.arranged import Arranged, Piece
from thetau.checkpoint.config import has_config, read_config
from thetau.checkpoint.names import Library, library_of, names_of, unwrapped
from thetau.checkpoint.source import Source

COMPARE_ROWS = 4096
_AGREED: WeakKeyDictionary[Source, dict[tuple[str, str], bool]] = WeakKeyDictionary()  # large tensors are not compared twice
KEY = "tie_word_embeddings"
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|lm_head\.decoder|embed_out|vocab_projector|cls\.predictions\.decoder|generator_lm_head|output_embeddings)\.weight$"
)
_INPUT = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings|tokens_embed|word_embedding|token_embedding)\.weight$"
)
_ENDS = re.compile(r"(?:^|\.)(?:encoder|decoder)\.embed_tokens\.weight$")  # of an encoder and a decoder that share theirs
_BIAS = re.compile(r"((?:^|\.)(?:cls\.predictions|lm_head))\.decoder\.bias$")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech", re.IGNORECASE)
_LAST = 2  # a head's rank
_SPEAKING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass
class Ties:
    """The ties of one checkpoint. `heir` says what is tied where it does not say itself: a model that was saved without its config has
    those of its base."""

    source: Source
    heir: Ties | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Of the checkpoint's folder; empty where there is none."""
        folder = self.source.folder
        return read_config(folder) if folder is not None and has_config(folder) else {}

    @cached_property
    def _library(self) -> Library | None:
        return library_of(self.source.folder)

    @cached_property
    def said(self) -> bool | None:
        """Whether the word embeddings are tied, as the config says, or else the model's class; None where nobody says it."""
        for table in (self.config, *(self.config.get(key) for key in ("text_config", "llm_config", "decoder"))):
            if isinstance(table, Mapping) and isinstance(table.get(KEY), bool):
                return bool(table[KEY])
        if any(_rank(name) == _LAST or _rank(kept) == _LAST for name, kept in self.source.twins.items()):
            return True
        if self.config and self._library is not None:
            return any(_HEAD.search(name) for name in self._library.tied)
        return None

    @property
    def words(self) -> bool | None:
        """The same, or what it inherits."""
        if self.said is None and self.heir is not None and not self.config:
            return self.heir.words
        return self.said

    def ranked(self, name: str) -> bool:
        """Whether a name is one of a word embedding's or a head's, which may be tied."""
        return _rank(name) is not None

    def keeper(self, name: str) -> str | None:
        """The stored tensor that a name takes its values from; None where it is tied to none, or is the one that others take theirs from.

        The name itself may be stored or not.
        """
        stored = self.source.specs
        shared = self.source.twins.get(name)
        if shared is not None:
            return shared
        if _BIAS.search(name) is not None:
            own = name.replace(".decoder.bias", ".bias")
            return own if own in stored and (name not in stored or self.words) else None
        rank = _rank(name)
        if rank is None:
            return self._by_class(name)
        paired = bool(self.config.get("is_encoder_decoder")) or any(one.endswith("shared.weight") for one in (name, *stored))
        for one in self._words:
            other = _rank(one)
            assert other is not None
            if one == name or (name in stored and (stored[one].shape != stored[name].shape or (other, one) >= (rank, name))):
                continue
            if (paired and rank < _LAST and other < _LAST) or (_LAST in (rank, other) and self.words):
                return one
        return self._by_class(name)

    @cached_property
    def _words(self) -> list[str]:
        """The stored word embeddings and heads, those first that the others take their values from."""
        found = [
            (rank, name)
            for name, spec in self.source.specs.items()
            if len(spec.shape) == 2 and not _OTHER_TOWER.search(name) and (rank := _rank(name)) is not None
        ]
        return [name for _, name in sorted(found)]

    def _by_class(self, name: str) -> str | None:
        """What transformers says of another name than those that are known here; it is asked only where it is loaded already."""
        if "_library" not in self.__dict__ or self._library is None:
            return None
        kept = self._library.tied.get(self._library.live(name))
        return names_of(self.source).find(kept) if kept is not None else None

    def copies(self) -> dict[str, str]:
        """The stored names that are copies of another stored one → that one. Nothing is read."""
        found = {
            name: keeper
            for name in self.source.specs
            if (keeper := self.keeper(name)) is not None and keeper in self.source.specs
        }
        return {name: keeper for name, keeper in found.items() if keeper not in found and name != keeper}

    def agree(self, name: str, keeper: str) -> bool:
        """Whether two stored copies hold the same; what is computed does not, or it would hold one."""
        a, b = self.source.specs[name], self.source.specs[keeper]
        if self.source.children() or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if name in self.source.twins:
            return True
        known = _AGREED.setdefault(self.source, {})
        if (name, keeper) not in known:
            known[name, keeper] = self._compare(name, keeper)
        return known[name, keeper]

    def _compare(self, name: str, keeper: str) -> bool:
        a = self.source.specs[name]
        steps = [(start, min(start + COMPARE_ROWS, a.rows)) for start in range(0, a.rows, COMPARE_ROWS)]
        return all(
            self.source.raw(name, *step) == self.source.raw(keeper, *step)
            or torch.equal(self.source.read(name, *step), self.source.read(keeper, *step))  # −0 is 0
            for step in steps
        )

    def head(self) -> tuple[str, str] | None:
        """The name that the head of this model has, which it does not store since it is tied, and the stored tensor; None where it has none."""
        if not self.words:
            return None
        library = self._library
        if library is not None:
            for name, kept in library.tied.items():
                keeper = names_of(self.source).find(kept)
                if _HEAD.search(name) and keeper is not None and keeper != name and name not in self.source.specs:
                    return name, keeper
            return None
        speaks = any(str(one).endswith(_SPEAKING) for one in self.config.get("architectures") or [])
        keeper = self.keeper("lm_head.weight")
        return ("lm_head.weight", keeper) if speaks and keeper is not None and "lm_head.weight" not in self.source.specs else None


def _rank(name: str) -> int | None:
    """A word embedding's place among those that may be one tensor: 0 the model's, 1 an encoder's or a decoder's, 2 a head; None for others."""
    return 1 if _ENDS.search(name) else 0 if _INPUT.search(name) else _LAST if _HEAD.search(name) else None


def tied_to(base: Source, name: str) -> str | None:
    """The tensor that a model stores for a name that it does not store, since the two are tied: the embedding for a head; None where there is none.

    Names are those of the checkpoint, save for words of wrappers and old libraries.
    """
    return Ties(base).keeper(unwrapped(name))


def spread(base: Source) -> Source:
    """A model with its tied head under the head's own name too, so that what changes the head alone finds it; itself where it has none."""
    head = Ties(base).head()
    if head is None:
        return base
    pieces = {name: Piece(base, name) for name in base.specs} | {head[0]: Piece(base, head[1])}
    return Arranged(pieces, label=base.label, folder=base.folder, metadata=base.metadata)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that the head is a tensor of its own, in each table that says otherwise."""
    changed: dict[str, Any] = {
        key: untied(value)
        if key in ("text_config", "llm_config", "decoder") and isinstance(value, Mapping) and KEY in value
        else value
        for key, value in config.items()
    }
    return {**changed, KEY: False}
