"""What lies beside the weights of two models, compared: configs entry by entry, tokenizers token by token, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from thetau.checkpoint import Source
from thetau.checkpoint.config import config_for
from thetau.errors import ThetauError
from thetau.recipes.mergekit.tokenizer import Tokenizer, has_tokenizer, read_tokenizer

SHOWN = 8  # tokens of a kind that are kept by name
LONGEST = 200  # characters of an entry that are kept


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of the configs that differs, as JSON; None where one of them lacks it."""

    key: str
    a: str | None
    b: str | None


@final
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a kind: how many, and the first of them."""

    count: int
    first: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Vocabularies:
    """Two tokenizers. `moved`: tokens with another id. `added_a`, `added_b`: added tokens that only one of them has."""

    size_a: int
    size_b: int
    only_a: Tokens
    only_b: Tokens
    moved: Tokens
    added_a: tuple[str, ...]
    added_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every token is there in both, with one id."""
        return not (self.only_a.count or self.only_b.count or self.moved.count)


@final
@dataclass(frozen=True, kw_only=True)
class Beside:
    """The side files of two models.

    - `config`: entries that differ. `tokenizer`: None where one of them has none.
    - `same_template`: None where neither has a chat template.
    - `problems`: files that could not be read.
    """

    config: tuple[Entry, ...]
    tokenizer: Vocabularies | None
    same_template: bool | None
    problems: tuple[str, ...] = ()


def compare_beside(a: Source, b: Source) -> tuple[Beside, dict[str, tuple[int, int]]]:
    """The side files of two models, and the ids of the tokens that both know, by token."""
    problems: list[str] = []
    config: tuple[Entry, ...] = ()
    try:
        config = _entries(config_for(a), config_for(b))
    except ThetauError as error:
        problems.append(str(error))
    ours, theirs = (_tokenizer(one, problems) for one in (a, b))
    tokens: Vocabularies | None = None
    common: dict[str, tuple[int, int]] = {}
    if ours is not None and theirs is not None:
        common = {token: (index, theirs.ids[token]) for token, index in ours.ids.items() if token in theirs.ids}
        tokens = Vocabularies(
            size_a=len(ours.ids),
            size_b=len(theirs.ids),
            only_a=_tokens([token for token in ours.ids if token not in theirs.ids]),
            only_b=_tokens([token for token in theirs.ids if token not in ours.ids]),
            moved=_tokens([token for token, (here, there) in common.items() if here != there]),
            added_a=tuple(sorted(set(ours.added) - set(theirs.added))),
            added_b=tuple(sorted(set(theirs.added) - set(ours.added))),
        )
    templates = [None if one is None else _template(one, problems) for one in (ours, theirs)]
    same = None if templates == [None, None] or tokens is None else templates[0] == templates[1]
    return Beside(config=config, tokenizer=tokens, same_template=same, problems=tuple(problems)), common


def _tokenizer(source: Source, problems: list[str]) -> Tokenizer | None:
    folder = _folder(source)
    if not has_tokenizer(folder):
        return None
    try:
        return read_tokenizer(source.label, folder)
    except ThetauError as error:
        problems.append(str(error))
        return None


def _folder(source: Source) -> Path | None:
    return source.folder


def _template(tokenizer: Tokenizer, problems: list[str]) -> str | None:
    try:
        return tokenizer.template
    except ThetauError as error:
        problems.append(str(error))
        return None


def _tokens(found: list[str]) -> Tokens:
    return Tokens(count=len(found), first=tuple(found[:SHOWN]))


def _entries(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Where one has no config at all, nothing differs."""
    if not a or not b:
        return ()
    mine, theirs = _flat(a), _flat(b)
    return tuple(
        Entry(key=key, a=_said(mine, key), b=_said(theirs, key))
        for key in sorted({*mine, *theirs})
        if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT)
    )


_ABSENT = object()


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _said(config: Mapping[str, Any], key: str) -> str | None:
    if key not in config:
        return None
    text = json.dumps(config[key], ensure_ascii=False)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
