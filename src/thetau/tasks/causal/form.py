"""What a task of a causal language model asks, as its description says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final, get_args

from thetau.errors import nearest
from thetau.options import Option, option_of
from thetau.tasks.causal.answers import NAMED, Normal

CausalKind = Literal["choices", "generation", "perplexity"]
CAUSAL: tuple[str, ...] = get_args(CausalKind)
Length = Literal["none", "tokens", "characters", "bytes"]
Unit = Literal["token", "word", "byte"]
SLOT = re.compile(r"\{(\w+)\}")
_KEYS: Mapping[CausalKind, tuple[str, ...]] = {
    "choices": ("prompt", "choices", "label", "length"),
    "generation": ("prompt", "answer", "turns", "stop", "max_new_tokens", "extract", "normalise"),
    "perplexity": ("text", "unit"),
}
_TEXTS = ("prompt", "answer", "text", "separator", "joint", "label")
_ASKED = ("system", "chat", "shots", "shots_from", "separator", "joint")  # of prompts with an answer


@final
@dataclass(frozen=True, kw_only=True)
class Form:
    """How the rows of a task are put to a model and judged. Templates name the rows' columns in braces: `Q: {question}`.

    - `prompt`: what the model is given. `system`: said before it, in chats.
    - `chat`: by the model's chat template. `shots`: solved examples before it, the first ones of `shots_from`, with `separator` between.
    - `joint`: between a prompt and its answer, in plain text.
    - `choices`: the templates of the answers to choose from, or the column that lists them; `label`: the column that has the right one's number,
      or the text itself. `length`: what a log-likelihood is divided by.
    - `turns`: the column that lists the turns of a talk, `{role, content}` each, in the place of `prompt` and `answer`: each turn of the assistant is a
      question, after what was said before it.
    - `answer`: the template of the right answer. `stop`: strings that end what is generated, of at most `max_new_tokens` tokens.
    - `extract`: `last_number`, `gsm8k`, or a regular expression; `normalise`: what is put aside before answers are compared, beside spaces.
    - `text`: the template of what a perplexity is of. `unit`: of what it is the mean.
    """

    kind: CausalKind
    prompt: str = ""
    system: str | None = None
    chat: bool = False
    shots: Annotated[int, Option("Solved examples before each.", least=0)] = 0
    shots_from: Literal["train", "validation"] = "train"
    separator: str = "\n\n"
    joint: str = " "
    choices: tuple[str, ...] | str = ()
    label: str = "label"
    length: Length = "none"
    answer: str = "{answer}"
    turns: str | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, Option("At most so many tokens are generated.", least=1)] = 64
    extract: str | None = None
    normalise: tuple[Normal, ...] = ()
    text: str = "{text}"
    unit: Unit = "token"

    @property
    def metric(self) -> Literal["accuracy", "exact_match", "perplexity"]:
        """What is measured."""
        names: Mapping[CausalKind, Literal["accuracy", "exact_match", "perplexity"]]
        names = {"choices": "accuracy", "generation": "exact_match", "perplexity": "perplexity"}
        return names[self.kind]


def read_form(meta: Mapping[str, Any], others: tuple[str, ...], problems: list[str]) -> Form | None:
    """The form in a task's description, whose other keys are `others`; what is wrong goes to `problems`."""
    kind: CausalKind = meta["kind"]
    known = (*_KEYS[kind], *(() if kind == "perplexity" else _ASKED))
    begun = len(problems)
    problems += [
        f"unknown key {key!r} for kind {kind}.{nearest(str(key), (*known, *others))}"
        for key in meta
        if key not in (*known, *others)
    ]
    given: dict[str, Any] = {key: meta[key] for key in known if key in meta}
    for keys, kinds, rule in ((_TEXTS, str, "a text"), (("system", "extract", "turns"), str | None, "a text, or null")):
        problems += [
            f"`{key}` must be {rule}. Got {given[key]!r}." for key in keys if key in given and not isinstance(given[key], kinds)
        ]
    if given.get("turns") is not None:
        if given.get("chat") is not True:
            problems.append("`turns` are those of a chat: set `chat` to true.")
        problems += [
            f"`{key}` has no place beside `turns`: leave one of them out."
            for key in ("prompt", "answer", "shots")
            if key in given and given[key] != 0
        ]
    elif kind != "perplexity" and "prompt" not in given:
        problems.append('`prompt` is needed: a template of the rows\' columns, such as "Question: {question}\\nAnswer:".')
    if kind == "choices":
        _check_choices(given, problems)
    _check_list(given, "stop", None, problems)
    _check_list(given, "normalise", get_args(Normal), problems)
    for key, allowed in (("length", get_args(Length)), ("unit", get_args(Unit)), ("shots_from", ("train", "validation"))):
        if key in given and given[key] not in allowed:
            problems.append(f"`{key}` must be one of {', '.join(allowed)}. Got {given[key]!r}.")
    if not isinstance(given.get("chat", False), bool):
        problems.append(f"`chat` must be true or false. Got {given['chat']!r}.")
    if given.get("system") is not None and given.get("chat") is not True:
        problems.append("`system` is said in chats: set `chat` to true, or write it into `prompt`.")
    for key in ("shots", "max_new_tokens"):
        least = _least(key)
        value = given.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"`{key}` must be an integer of at least {least}. Got {value!r}.")
    if isinstance(how := given.get("extract"), str) and how not in NAMED:
        try:
            re.compile(how)
        except re.error as error:
            problems.append(f"`extract` must be {', '.join(NAMED)} or a regular expression. Got {how!r} ({error}).")
    return Form(kind=kind, **given) if len(problems) == begun else None


def _check_choices(given: dict[str, Any], problems: list[str]) -> None:
    choices = given.get("choices")
    if isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) for one in choices):
        given["choices"] = tuple(choices)
        if len(set(choices)) != len(choices):
            problems.append(f"`choices` must be different. Got {choices!r}.")
    elif not isinstance(choices, str) or not choices:
        problems.append(f"`choices` must be a list of at least two answers, or the column that lists them. Got {choices!r}.")


def _check_list(given: dict[str, Any], key: str, allowed: tuple[str, ...] | None, problems: list[str]) -> None:
    if key not in given:
        return
    value = given[key]
    if not isinstance(value, list) or not all(isinstance(one, str) and one and one in (allowed or (one,)) for one in value):
        of = f"of {', '.join(allowed)}" if allowed else "of texts that are not empty"
        problems.append(f"`{key}` must be a list {of}. Got {value!r}.")
    else:
        given[key] = tuple(value)


def _least(name: str) -> int:
    from typing import get_type_hints

    option = option_of(get_type_hints(Form, include_extras=True)[name])[1]
    assert option is not None and option.least is not None
    return int(option.least)
