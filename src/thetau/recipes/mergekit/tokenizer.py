"""One model's tokenizer as its files say it: read, cut to the rows that its model has, joined with others, written.

Works on the document `tokenizer.json` itself, so that BPE, WordPiece, Unigram and WordLevel are treated alike and no library of models is
loaded. Only a folder that has nothing but older files (`vocab.txt`, `tokenizer.model`) is read through transformers, which converts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from thetau.checkpoint.safetensors import exists, read_text
from thetau.errors import CheckpointError

DOCUMENT, CONFIG, SPECIAL, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
# What older tokenizers are kept in: what the document says, a second time, so that it is stale beside a new one.
OLDER = (
    ADDED,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "bpe.codes",
)
FILES = (DOCUMENT, CONFIG, SPECIAL, *OLDER, TEMPLATE, OLD_TEMPLATE)
_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
_SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_RARE = 10.0  # how much less likely than all others a Unigram piece is that its own tokenizer gives no likelihood
_SHOWN = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A tokenizer's files, parsed, and its vocabulary.

    - `document`: `tokenizer.json`.
    - `config`: `tokenizer_config.json`, empty where there is none.
    - `special`: `special_tokens_map.json`, None where there is none.
    - `added`: the tokens that are found in the text before the model splits it: content → their settings, with `id`.
    - `changed`: whether the files in the folder no longer say this.
    """

    label: str
    folder: Path
    document: Mapping[str, Any]
    config: Mapping[str, Any]
    special: Mapping[str, Any] | None
    added: Mapping[str, Mapping[str, Any]]
    changed: bool = False

    @property
    def kind(self) -> str:
        """The algorithm: BPE, WordPiece, Unigram or WordLevel."""
        return str(self.document["model"]["type"])

    @cached_property
    def pieces(self) -> Mapping[str, int]:
        """The model's own vocabulary: token → id, which added tokens may or may not be part of."""
        return pieces_of(self.document["model"])

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token's id."""
        return {**self.pieces, **{token: int(entry["id"]) for token, entry in self.added.items()}}

    @cached_property
    def in_order(self) -> Sequence[str]:
        """Every token, by its id."""
        return sorted(self.ids, key=lambda token: (self.ids[token], token))

    @cached_property
    def template(self) -> str | None:
        """The chat template, the default one of several; None where the model has none."""
        path = self.folder / TEMPLATE
        if exists(path):
            return read_text(path)
        said = self.config.get("chat_template")
        if isinstance(said, list):
            said = next((one.get("template") for one in said if isinstance(one, Mapping) and one.get("name") == "default"), None)
        return said if isinstance(said, str) else None


def pieces_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of the `model` part of a document."""
    vocabulary = model["vocab"]
    return {token: index for index, (token, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return folder is not None and any(exists(folder / name) for name in (DOCUMENT, *OLDER))


def read_tokenizer(label: str, folder: Path | None) -> Tokenizer:
    """The tokenizer in a model's folder, with the tokens that its config adds to the document.

    Raises:
        CheckpointError: there is none, a file is damaged, or what is there cannot be read as a fast tokenizer.
    """
    if folder is None or not has_tokenizer(folder):
        raise CheckpointError(
            f"{label}: has no tokenizer: {DOCUMENT} is missing in {folder or 'a model without a folder'}. Tokenizer settings need that "
            "of every model: put the files there, or leave the settings out where all models share one vocabulary."
        )
    document = _read(folder / DOCUMENT) if exists(folder / DOCUMENT) else _converted(label, folder)
    model = document.get("model")
    if not isinstance(model, dict) or "vocab" not in model or not isinstance(document.get("added_tokens", []), list):
        raise CheckpointError(f"{folder / DOCUMENT}: must hold a `model` with its `vocab`. Copy or download it again.")
    model.setdefault("type", _guessed(model))  # documents of 2020 leave it out
    if model["type"] not in _KINDS:
        raise CheckpointError(f"{folder / DOCUMENT}: its model must be one of {', '.join(_KINDS)}. Got {model['type']!r}.")
    config = _read(folder / CONFIG) if exists(folder / CONFIG) else {}
    special = _read(folder / SPECIAL) if exists(folder / SPECIAL) else None
    added = {entry["content"]: entry for entry in document.get("added_tokens", [])}
    found = Tokenizer(label=label, folder=folder, document=document, config=config, special=special, added=added)
    return _with(found, _told(found, _read(folder / ADDED) if exists(folder / ADDED) else {}))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a table. Got {type(content).__name__}.")
    return content


def _converted(label: str, folder: Path) -> dict[str, Any]:
    """The document of a tokenizer that only older files describe."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
    except Exception as error:  # a tokenizer that cannot be read fails in many ways
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{label}: has no {DOCUMENT}, and its older files in {folder} could not be read ({reason}). Save it once as a fast tokenizer."
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{label}: {type(tokenizer).__name__} in {folder} is no fast tokenizer, and only those can be joined. Save it as {DOCUMENT}."
        )
    document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return document


def _guessed(model: Mapping[str, Any]) -> str:
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _told(tokenizer: Tokenizer, older: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that the other files add when the tokenizer is loaded, in the order in which they are added."""
    decoder = tokenizer.config.get("added_tokens_decoder")
    told: list[dict[str, Any]] = []
    if isinstance(decoder, Mapping):
        told += [_entry(said) for _, said in sorted(decoder.items(), key=lambda item: int(item[0]))]
    else:
        told += [_entry(token) for token, _ in sorted(older.items(), key=lambda item: int(item[1]))]
    for table in (tokenizer.config, tokenizer.special or {}):
        told += [{**_entry(said), "special": True} for said in _special(table)]
    return told


def _special(table: Mapping[str, Any]) -> list[Any]:
    found = [table[key] for key in _NAMED if table.get(key)]
    for key in _LISTED:
        said = table.get(key) or []
        found += list(said.values()) if isinstance(said, Mapping) else list(said)
    return found


def _entry(said: Any) -> dict[str, Any]:
    """An added token's settings, from its text or from what a config says of it."""
    given = dict(said) if isinstance(said, Mapping) else {"content": str(said)}
    special = bool(given.get("special", False))
    rest = {key: bool(given.get(key, False)) for key in _SETTINGS}
    return {"content": str(given.get("content", "")), **rest, "normalized": bool(given.get("normalized", not special))}


def _with(tokenizer: Tokenizer, told: Sequence[Mapping[str, Any]]) -> Tokenizer:
    """The tokenizer with further added tokens, as loading it would number them."""
    added, ids = dict(tokenizer.added), dict(tokenizer.ids)
    for entry in told:
        token = entry["content"]
        if token and token not in ids:
            ids[token] = _free(len(tokenizer.pieces), added)
            added[token] = {**entry, "id": ids[token]}
    return replace(tokenizer, added=added) if len(added) > len(tokenizer.added) else tokenizer


def _free(pieces: int, added: Mapping[str, Mapping[str, Any]]) -> int:
    """The id that the tokenizers library gives to the next token that is added."""
    highest = max((int(entry["id"]) for entry in added.values()), default=-1)
    return highest + 1 if highest >= pieces else pieces


def cut(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer without the tokens that a model with so many embedding rows has none for, and those tokens.

    Raises:
        CheckpointError: one of them is put around every text.
    """
    beyond = tuple(token for token in tokenizer.in_order if tokenizer.ids[token] >= rows)
    if not beyond:
        return tokenizer, ()
    document, gone = deepcopy(dict(tokenizer.document)), set(beyond)
    around = [token for token in beyond if token in _around(document.get("post_processor"))]
    if around:
        raise CheckpointError(
            f"{tokenizer.label}: its tokenizer puts {around[0]!r} (id {tokenizer.ids[around[0]]}) around texts, and its model has only "
            f"{rows} embedding rows. The tokenizer in {tokenizer.folder} is not that of these weights."
        )
    model = document["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {token: index for token, index in model["vocab"].items() if index < rows}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if not gone & {*_pair(merge), _joined(_pair(merge), prefix)}]
    document["added_tokens"] = [entry for entry in document.get("added_tokens", []) if entry["content"] not in gone]
    return replace(
        tokenizer,
        document=document,
        config=_without(tokenizer.config, gone, rows),
        special=_without(tokenizer.special, gone, rows) if tokenizer.special is not None else None,
        added={token: entry for token, entry in tokenizer.added.items() if token not in gone},
        changed=True,
    ), beyond


def _around(processor: Any) -> set[str]:
    """The tokens that a post-processor adds."""
    if isinstance(processor, list):
        return set().union(*map(_around, processor))
    if not isinstance(processor, Mapping):
        return set()
    special, fixed = processor.get("special_tokens"), [processor.get("sep"), processor.get("cls")]
    named = set(special) if isinstance(special, Mapping) else set()
    return named.union((said[0] for said in fixed if isinstance(said, list)), _around(processor.get("processors")))


def _without(table: Mapping[str, Any], gone: set[str], rows: int) -> dict[str, Any]:
    """A config that names none of these tokens: loading it would add them again."""

    def names(said: Any) -> bool:
        return (said.get("content") if isinstance(said, Mapping) else said) in gone

    kept = {key: said for key, said in table.items() if key not in _NAMED or not names(said)}
    for key in _LISTED:
        said = kept.get(key)
        if isinstance(said, Mapping):
            kept[key] = {name: one for name, one in said.items() if not names(one)}
        elif isinstance(said, list):
            kept[key] = [one for one in said if not names(one)]
    decoder = kept.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        kept["added_tokens_decoder"] = {index: said for index, said in decoder.items() if int(index) < rows and not names(said)}
    return kept


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _joined(pair: tuple[str, str], prefix: str) -> str:
    return pair[0] + pair[1].removeprefix(prefix)


def joined(base: Tokenizer, others: Sequence[Tokenizer], extra: Sequence[str]) -> tuple[Tokenizer, tuple[str, ...]]:
    """The base's tokenizer with the tokens of others, and what should be said about it.

    The base's ids stay. Ordinary tokens follow in the order of the models and of their ids, then added tokens, then `extra`. Ordinary
    tokens become ordinary ones, with the merges or the likelihoods by which their own tokenizer makes them; mergekit adds them as tokens
    that are looked for in the raw text, which tears words apart. Of an added token with several settings the first stands.
    """
    notes: list[str] = []
    added = {token: dict(entry) for token, entry in base.added.items()}
    added_anywhere = set(added).union(*(other.added for other in others))
    ids = dict(base.ids)
    following = max(ids.values(), default=-1) + 1
    ordinary: dict[str, Tokenizer] = {}
    for other in others:
        for token in other.in_order:
            if token not in ids and token not in added_anywhere:
                ids[token], ordinary[token] = following, other
                following += 1
    conflicts: list[str] = []
    for entries in (*(other.added for other in others), {token: _entry(token) for token in extra if token not in ids}):
        for token in sorted(entries, key=lambda name: int(entries[name].get("id", 0))):
            said = {**_entry(entries[token])}
            if token in added:
                if any(said[key] != _entry(added[token])[key] for key in _SETTINGS) and token not in conflicts:
                    conflicts.append(token)
                continue
            if token not in ids:
                ids[token] = following
                following += 1
            added[token] = {"id": ids[token], **said}
    if conflicts:
        notes.append(
            f"{len(conflicts)} tokens are added with other settings by several models ({some(conflicts)}): the first model's stand."
        )
    foreign = [token for token, other in ordinary.items() if other.kind != base.kind]
    if foreign:
        notes.append(
            f"{len(foreign)} tokens come from a tokenizer of another kind than {base.label}'s {base.kind} ({some(foreign)}): they have "
            "an id and a row, but texts are split as that kind does."
        )
    if not ordinary and added == base.added:
        return base, tuple(notes)
    document = deepcopy(dict(base.document))
    document["added_tokens"] = sorted(
        ({"id": entry["id"], **_entry(entry)} for entry in added.values()), key=lambda entry: int(entry["id"])
    )
    _place(document, ids, added, ordinary)
    config = dict(base.config)
    if isinstance(config.get("added_tokens_decoder"), Mapping):
        decoder = {int(index): said for index, said in config["added_tokens_decoder"].items()}
        decoder |= {int(entry["id"]): _entry(entry) for token, entry in added.items() if int(entry["id"]) not in decoder}
        config["added_tokens_decoder"] = {str(index): decoder[index] for index in sorted(decoder)}
    return replace(base, document=document, config=config, added=added, changed=True), tuple(notes)


def _place(document: dict[str, Any], ids: Mapping[str, int], added: Mapping[str, Any], ordinary: Mapping[str, Tokenizer]) -> None:
    """Put new ordinary tokens into the model of a document, and with them added ones, which would else be numbered anew on loading."""
    model = document["model"]
    known = pieces_of(model)
    if not ordinary and _numbered(known, document["added_tokens"]):
        return
    new = sorted([*ordinary, *(token for token in added if token not in known)], key=ids.__getitem__)
    if not isinstance(model["vocab"], list):
        model["vocab"] = {**model["vocab"], **{token: ids[token] for token in new}}
        if "merges" in model:
            _merge(model, ordinary)
        return
    rare = min((float(score) for _, score in model["vocab"]), default=0.0) - _RARE
    scores: dict[str, float] = {}
    for other in {tokenizer.label: tokenizer for tokenizer in ordinary.values()}.values():
        if other.kind == "Unigram":
            scores |= {token: float(score) for token, score in other.document["model"]["vocab"] if ordinary.get(token) is other}
    model["vocab"] = [*model["vocab"], *([token, scores.get(token, rare)] for token in new)]


def _numbered(known: Mapping[str, int], entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether loading gives added tokens the ids that they have: it numbers those that the model does not know, one by one."""
    seen: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        if known.get(entry["content"], _free(len(known), seen)) != entry["id"]:
            return False
        seen[entry["content"]] = entry
    return True


def _merge(model: dict[str, Any], ordinary: Mapping[str, Tokenizer]) -> None:
    """Append the merges that make the new tokens, behind the base's, so that those come first."""
    pairs = [_pair(merge) for merge in model["merges"]]
    known, vocabulary = set(pairs), model["vocab"]
    for other in {tokenizer.label: tokenizer for tokenizer in ordinary.values()}.values():
        theirs = other.document["model"]
        if other.kind != "BPE" or theirs.get("continuing_subword_prefix") != model.get("continuing_subword_prefix"):
            continue
        prefix = theirs.get("continuing_subword_prefix") or ""
        for pair in map(_pair, theirs["merges"]):
            if pair not in known and _joined(pair, prefix) in ordinary and pair[0] in vocabulary and pair[1] in vocabulary:
                known.add(pair)
                pairs.append(pair)
    plain = all(isinstance(merge, str) for merge in model["merges"]) and not any(" " in part for pair in pairs for part in pair)
    model["merges"] = [" ".join(pair) for pair in pairs] if plain and model["merges"] else [list(pair) for pair in pairs]


def written(tokenizer: Tokenizer, folders: Sequence[Path], template: str | None = None) -> dict[str, bytes | None]:
    """A tokenizer's files for an output, by name; None for one that an output must not take over from any of these folders.

    Files that still say the truth go over to the byte.
    """
    files: dict[str, bytes | None] = {}
    for name in (*FILES, *_further(folders)):
        here = tokenizer.folder / name
        if exists(here):
            files[name] = here.read_bytes()
        elif any(exists(folder / name) for folder in folders):
            files[name] = None
    config = dict(tokenizer.config)
    if tokenizer.changed:
        files |= {name: None for name in files if name in OLDER or name.endswith(".tiktoken")}
        files[DOCUMENT] = _dumped(tokenizer.document)
        files |= {CONFIG: _dumped(config)} if config else {}
        files |= {SPECIAL: _dumped(tokenizer.special)} if tokenizer.special is not None else {}
    if template is not None:
        files |= with_template(config, template, folders)
    return files


def with_template(config: Mapping[str, Any], template: str, folders: Sequence[Path]) -> dict[str, bytes | None]:
    """The files that say a chat template: its own, and the tokenizer's config, where older readers look for it."""
    others = [name for folder in folders for name in _templates(folder)]
    files: dict[str, bytes | None] = {name: None for name in others if name != TEMPLATE}
    files[TEMPLATE] = template.encode()
    files[CONFIG] = _dumped({**config, "chat_template": template})
    return files


def _further(folders: Sequence[Path]) -> list[str]:
    """Files of tokenizers under names of their own: a tiktoken vocabulary, the code that reads it."""
    found = {path.name for folder in folders for pattern in ("*.tiktoken", "tokenization_*.py") for path in folder.glob(pattern)}
    return sorted(found - set(FILES))


def _templates(folder: Path) -> list[str]:
    further = sorted(path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*.jinja"))
    return [name for name in (TEMPLATE, OLD_TEMPLATE) if exists(folder / name)] + further


def _dumped(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def some(tokens: Sequence[str]) -> str:
    """The first few of some tokens, as messages name them."""
    more = len(tokens) - _SHOWN
    return ", ".join(map(repr, tokens[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
