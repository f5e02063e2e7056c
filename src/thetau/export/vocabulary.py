"""A tokenizer as GGUF has it: tokens with their kinds, merges, special tokens, the chat template. Read from `tokenizer.json`.

llama.cpp cuts a text into words by rules of its own, which the file names (`tokenizer.ggml.pre`). The name is told from the tokenizer's
own pre-tokenizer, part by part; one that is not known is refused, since a text cut otherwise gives other tokens in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thetau.checkpoint.config import has_config, read_config
from thetau.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
KNOWN = ("bos", "eos", "unk", "sep", "pad", "mask", "eot", "eom")  # special tokens that the format has a place for
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
QUESTION, ANSWER = "Question 3461", "Answer 9174"  # a talk that the template is tried with


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer, ready to be written.

    - `model`: `gpt2` for byte-level BPE, `llama` for BPE on characters with bytes to fall back on.
    - `pre`: the rule by which a text is cut into words.
    - `tokens`, `kinds`, `scores`: by number; scores are empty for byte-level BPE.
    - `merges`: pairs, in the order of their rank; empty for `llama`, whose scores say the order.
    - `special`: kind of special token (`bos`, `eos`, `eot`, …) → number.
    - `flags`: what is put around every text, as `add_bos_token`.
    - `template`: the chat template, if the model has one.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    template: str | None
    notes: tuple[str, ...] = ()


def vocabulary_of(folder: Path | None, label: str, rows: int, *, pre: str | None = None) -> Vocabulary:
    """The tokenizer in a model's folder, for an embedding of so many rows.

    `label` is what messages call the model; `pre` names the rule by which texts are cut where it is not known.

    Raises:
        CheckpointError: there is no tokenizer that can be read, it does not fit the embedding, or it names no end token.
    """
    path = (folder or Path()) / "tokenizer.json"
    if folder is None or not path.is_file():
        raise CheckpointError(
            f"{label}: has no 'tokenizer.json' beside its weights, and a GGUF file without its tokenizer does not run. Write one with "
            "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`."
        )
    table = _table(path)
    model = table.get("model", {})
    if model.get("type") != "BPE":
        raise CheckpointError(f"{path}: is a tokenizer of the kind {model.get('type')!r}; only BPE can be written as GGUF.")
    names: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    added = {one["id"]: one for one in table.get("added_tokens", [])}
    names.update({number: one["content"] for number, one in added.items()})
    if max(names, default=-1) >= rows:
        raise CheckpointError(
            f"{path}: has a token {names[max(names)]!r} of number {max(names)}, but the embedding has {rows} rows. Give the model its own tokenizer."
        )
    bytewise = _is_bytewise(table)
    if not bytewise and not model.get("byte_fallback"):
        raise CheckpointError(f"{path}: is BPE neither on bytes nor with bytes to fall back on, which llama.cpp does not know.")
    rule = pre or (_rule(table, path) if bytewise else "default")
    unknown = model.get("unk_token")
    kinds = [_kind(names.get(i), added.get(i), unknown, bytewise) for i in range(rows)]
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(_visible(part) for part in pair) for pair in model.get("merges", [])]
    special, flags, template, notes = _special(folder, rows, tokens, kinds)
    if not bytewise:
        flags = {**flags, "add_space_prefix": _prefixes(table)}
    return Vocabulary(
        model="gpt2" if bytewise else "llama",
        pre=rule,
        tokens=tokens,
        kinds=kinds,
        scores=() if bytewise else _scores(tokens, kinds, merges),
        merges=merges if bytewise else (),
        special=special,
        flags=flags,
        template=template,
        notes=notes,
    )


def _table(path: Path) -> dict[str, Any]:
    table = read_config(path.parent, path.name)
    if not isinstance(table.get("model"), dict) or "vocab" not in table["model"]:
        raise CheckpointError(f"{path}: is no tokenizer that the `tokenizers` library wrote. Copy or download it again.")
    return table


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a sequence; the part itself, if it is none."""
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders")
    return list(inner) if inner else [part]


def _is_bytewise(table: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for key in ("pre_tokenizer", "decoder") for part in _parts(table.get(key)))


def _rule(table: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    parts = _parts(table.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    own = bool(parts) and kinds[-1] == "ByteLevel" and parts[-1].get("use_regex", True)
    pattern = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    name = None
    if kinds == ["ByteLevel"] and own:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and own and parts[0].get("individual_digits"):
        name = "smollm"
    elif not own and parts and parts[0].get("behavior") == "Isolated" and not parts[0].get("invert"):
        name = SPLITS.get(str(pattern))
    if name is None:
        raise CheckpointError(
            f"{path}: cuts texts into words by a rule that is not known here ({json.dumps(parts, ensure_ascii=False)[:200]}). If you know what "
            "llama.cpp calls it (`tokenizer.ggml.pre`), say so with `--pre NAME`."
        )
    return name


def _kind(token: str | None, added: Mapping[str, Any] | None, unknown: str | None, bytewise: bool) -> int:
    if token is None:
        return UNUSED
    if not bytewise and token == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if not bytewise and BYTE_PIECE.fullmatch(token) else NORMAL


def _visible(part: str) -> str:
    """Half of a merge; a space within it is written as byte-level BPE writes one."""
    return part.replace(" ", chr(ord(" ") + 256))


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> list[float]:
    """Scores by which merging the best pair first is merging by rank: −rank of the pair that makes a token."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    last = float(len(merges))
    return [-float(ranks.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)]


def _prefixes(table: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    before = _parts(table.get("normalizer"))
    cutting = _parts(table.get("pre_tokenizer"))
    return any(part["type"] == "Prepend" for part in before) or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in cutting
    )


def _special(
    folder: Path, rows: int, tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[dict[str, int], dict[str, bool], str | None, tuple[str, ...]]:
    """Special tokens, what is put around texts, and the chat template, with the tokens at which an answer ends."""
    import gguf

    if has_config(folder, "tokenizer_config.json"):
        read_config(folder, "tokenizer_config.json")  # the package would fail without naming the file
    found = gguf.SpecialVocab(folder, load_merges=False, n_vocab=rows)
    special = {kind: number for kind, number in found.special_token_ids.items() if kind in KNOWN}
    flags = {f"add_{kind}_token": on for kind, on in found.add_special_token.items() if kind in ("bos", "eos", "sep")}
    template = found.chat_template
    if isinstance(template, list):  # several, by name
        template = next((str(one["template"]) for one in template if one.get("name") == "default"), None)
    ends = _said_ends(folder)
    if "eos" not in special and ends:
        special["eos"] = ends[0]
    if "eos" not in special:
        raise CheckpointError(
            f"{folder}: names no end token, so that what the model says would never stop. Set 'eos_token' in tokenizer_config.json, or 'eos_token_id' in "
            "generation_config.json."
        )
    notes: list[str] = []
    turn, said = _turn_end(str(template), special, tokens, kinds) if template else (None, None)
    if said:
        notes.append(said)
    known = {special.get(kind) for kind in ("eos", "eot", "eom")}
    others = [end for end in ([turn] if turn is not None else []) + ends if end < rows and end not in known]
    free = [kind for kind in ("eot", "eom") if kind not in special]
    special.update(zip(free, dict.fromkeys(others), strict=False))
    return special, flags, str(template) if template else None, tuple(notes)


def _said_ends(folder: Path) -> list[int]:
    """The end tokens of generation_config.json."""
    file = "generation_config.json"
    said = read_config(folder, file).get("eos_token_id") if has_config(folder, file) else None
    ends = said if isinstance(said, list) else [said]
    return [end for end in ends if type(end) is int]


def _turn_end(
    template: str, special: Mapping[str, int], tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[int | None, str | None]:
    """The token that the template puts after an answer, and what a user should know where there is none."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None, "the chat template goes along unread, since jinja2 is not installed: check that answers end."

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "1 January 2026")
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    names = {f"{kind}_token": tokens[number] for kind, number in special.items()}
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = environment.from_string(template).render(messages=talk, add_generation_prompt=False, tools=None, **names)
    except Exception as error:  # templates fail in as many ways as there are
        return None, f"the chat template goes along, but fails on a plain talk ({error})."
    _, _, rest = text.rpartition(ANSWER)
    marks = {
        token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (CONTROL, USER_DEFINED)
    }
    after = [token for token in marks if rest.lstrip().startswith(token)]
    if ANSWER not in text or not after:
        return None, "the chat template puts no token after an answer, so only the end token ends one."
    return marks[max(after, key=len)], None
