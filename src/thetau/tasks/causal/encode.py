"""Questions as token ids: what a causal model is measured by, and what it is taught.

What follows a prompt is the tokens of both together, less those of the prompt, so that a tokenizer which joins letters across the border is asked about what
a text would have there. Nothing is cut when a model is measured: an example that does not fit the context is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, final

from jaxtyping import Int
from torch import Tensor

from thetau.errors import DataError
from thetau.models.causal import Pair, answer_tokens, pair_columns
from thetau.models.language import IGNORED
from thetau.tasks.causal.form import Form
from thetau.tasks.causal.rows import Question
from thetau.tasks.prompted import digest


@final
@dataclass(frozen=True, kw_only=True)
class CausalInputs:
    """A split as a causal model reads it.

    - `prompts`: the tokens of each prompt by itself, after which something is generated.
    - `pieces`: of each example what is scored: its choices, or the windows of its text; none where something is generated, or nothing fits.
    - `taught`: of each example the prompt and the right answer with the token that ends it, which is what training reads, up to `max_length` tokens.
    - `units`: what a choice's log-likelihood is divided by, or how many units a text has. `too_long`: examples that do not fit the context.
    """

    form: Form
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[Pair, ...], ...]
    taught: tuple[Pair, ...]
    units: tuple[tuple[int, ...], ...]
    too_long: tuple[bool, ...]
    pad: int
    context: int
    max_length: int

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def labels(self) -> tuple[int, ...]:
        """The number of each example's right answer."""
        return tuple(question.right for question in self.questions)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each example with its right answer."""
        return tuple(len(prompt) + len(answer) for prompt, answer in self.taught)

    @cached_property
    def hash(self) -> str:
        """A digest of all that a model sees, and of how it is judged."""
        asked = [[one.prompt, one.answers, one.right, one.before] for one in self.questions]
        return digest(
            [asdict(self.form), asked, self.prompts, self.pieces, self.taught, self.units, self.context, self.max_length]
        )

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the prompts' tokens alone."""
        return digest([self.pieces, self.prompts])

    @cached_property
    def truncated(self) -> int:
        """Examples whose answers training cuts. Raises `DataError` where a prompt alone leaves no room for one."""
        for question, (prompt, _) in zip(self.questions, self.taught, strict=True):
            if len(prompt) >= self.max_length:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens leaves nothing of `max_length` for its answer: {question.prompt[:60]!r}. Got {self.max_length}; "
                    "raise it (--max-length), as far as the model's context goes."
                )
        return sum(length > self.max_length for length in self.lengths)

    def some(self, rows: Sequence[int]) -> CausalInputs:
        """Some of the examples, in that order."""
        listed = ("questions", "prompts", "pieces", "taught", "units", "too_long")
        chosen: dict[str, Any] = {name: tuple(getattr(self, name)[row] for row in rows) for name in listed}
        return replace(self, **chosen)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments for some examples with their right answers."""
        return pair_columns(self._learnt(indices), self.pad)

    def targets(self, indices: Sequence[int]) -> Int[Tensor, "example answer_token"]:
        """The tokens of the right answers, filled with −100."""
        return answer_tokens(self._learnt(indices), IGNORED)

    def _learnt(self, indices: Sequence[int]) -> list[Pair]:
        chosen = [self.taught[index] for index in indices]
        return [(prompt, answer[: self.max_length - len(prompt)]) for prompt, answer in chosen]


def encode_questions(
    tokenizer: Any, form: Form, asked: Sequence[Question], shots: Sequence[Question], *, context: int, max_length: int, pad: int
) -> CausalInputs:
    """Questions with their solved examples as token ids.

    Raises `DataError`: a chat template is asked for and there is none, or it cannot take these turns; a choice without tokens.
    """
    writer = _Writer(tokenizer, form, shots)
    prompts: list[tuple[int, ...]] = []
    pieces: list[tuple[Pair, ...]] = []
    taught: list[Pair] = []
    units: list[tuple[int, ...]] = []
    too_long: list[bool] = []
    for question in asked:
        own: tuple[Pair, ...] = ()
        if form.kind == "perplexity":
            own = windows(writer.start or _first(tokenizer), writer.text(question.answer), context)
            units.append((_units(form.unit, question.answer, own),))
            prompts.append(own[0][0])
            taught.append((own[0][0], (*(token for _, answer in own for token in answer), *writer.end)))
            too_long.append(len(own) > 1)
        else:
            prompt = writer.prompt(question)
            prompts.append(writer.tokens(prompt) or _first(tokenizer))
            taught.append(writer.solved(question, prompt))
            if form.kind == "choices":
                own = tuple(writer.pair(prompt, answer) for answer in question.answers)
                units.append(tuple(_length(form, answer, pair) for answer, pair in zip(question.answers, own, strict=True)))
                fits = all(len(before) + len(after) <= context for before, after in own)
            else:
                units.append((1,))
                fits = len(prompts[-1]) < context
            too_long.append(not fits)
            own = own if fits else ()
        pieces.append(own)
    return CausalInputs(
        form=form,
        questions=tuple(asked),
        prompts=tuple(prompts),
        pieces=tuple(pieces),
        taught=tuple(taught),
        units=tuple(units),
        too_long=tuple(too_long),
        pad=pad,
        context=context,
        max_length=max_length,
    )


def windows(start: Sequence[int], tokens: Sequence[int], context: int) -> tuple[Pair, ...]:
    """A text in pieces that fit the context, so that each token is scored once, after the token before it at least.

    Examples:
        >>> windows((1,), (5, 6, 7, 8), 3)
        (((1,), (5, 6)), ((6,), (7, 8)))
    """
    first = max(1, context - len(start))
    made: list[Pair] = [(tuple(start), tuple(tokens[:first]))]
    size = max(1, context - 1)
    made += [((tokens[at - 1],), tuple(tokens[at : at + size])) for at in range(first, len(tokens), size)]
    return tuple(made)


@final
class _Writer:
    """Prompts and answers as tokens, by a form."""

    def __init__(self, tokenizer: Any, form: Form, shots: Sequence[Question]) -> None:
        self._tokenizer, self._form, self._shots = tokenizer, form, tuple(shots)
        first = tokenizer("")["input_ids"][:1]
        self.start = tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
        self.end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        if form.chat and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "asks for the chat template (`chat: true`), and the model's tokenizer has none. Put chat_template.jinja beside it, "
                "or write the turns into `prompt` with `chat: false`."
            )

    def plain(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, without special ones."""
        return tuple(map(int, self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    def text(self, text: str) -> tuple[int, ...]:
        """The same, at least one."""
        if not (tokens := self.plain(text)):
            raise DataError(f"the text {text[:60]!r} gives no token. Drop the row.")
        return tokens

    def prompt(self, question: Question) -> str:
        """All that stands before the answer."""
        form = self._form
        if form.chat:
            return self._chat(self._turns(question), generate=True)
        solved = [f"{shot.prompt}{form.joint}{shot.answer}{form.separator}" for shot in self._shots]
        return "".join([*solved, question.prompt])

    def pair(self, prompt: str, answer: str) -> Pair:
        """A prompt's tokens, and those of an answer after it."""
        return self._cut(prompt, prompt + (answer if self._form.chat else self._form.joint + answer))

    def solved(self, question: Question, prompt: str) -> Pair:
        """A prompt with its right answer and the token that ends it."""
        before, after = self.pair(prompt, question.answer)
        if self._form.chat:
            whole = self._chat([*self._turns(question), {"role": "assistant", "content": question.answer}], generate=False)
            if whole.startswith(prompt) and len(whole) > len(prompt):
                return self._cut(prompt, whole.rstrip())
        return before, (*after, *self.end)

    def _cut(self, prompt: str, whole: str) -> Pair:
        before, tokens = self.tokens(prompt), self.tokens(whole)
        common = next((i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), min(len(before), len(tokens)))
        start = tokens[:common]
        if not start:
            start, common = _first(self._tokenizer), 0
        if len(tokens) == common:
            raise DataError(f"the answer {whole[len(prompt) :]!r} gives no token of its own after its prompt. Give it a text.")
        return start, tokens[common:]

    def tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a whole text, from its first one on."""
        return (() if self._form.chat else self.start) + self.plain(text)

    def _turns(self, question: Question) -> list[Mapping[str, str]]:
        own = (
            []
            if self._form.system is None or (question.before[:1] and question.before[0][0] == "system")
            else [("system", self._form.system)]
        )
        shots = [turn for shot in self._shots for turn in (("user", shot.prompt), ("assistant", shot.answer))]
        turns = [*own, *shots, *question.before, ("user", question.prompt)]
        return [{"role": role, "content": content} for role, content in turns]

    def _chat(self, turns: Sequence[Mapping[str, str]], *, generate: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate))
        except Exception as error:  # a template of anybody's
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the model's chat template cannot take these turns ({reason}). Leave `system` out, or set `chat: false`."
            ) from error


def _first(tokenizer: Any) -> tuple[int, ...]:
    """What a first token is scored after: the token that begins a text, else the one that ends one."""
    known = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None]
    if not known:
        raise DataError(
            "the tokenizer has no token that begins or ends a text, after which a first token could be scored. Give the task a prompt."
        )
    return (int(known[0]),)


def _length(form: Form, answer: str, pair: Pair) -> int:
    sizes = {"none": 1, "tokens": len(pair[1]), "characters": len(answer), "bytes": len(answer.encode())}
    return max(1, sizes[form.length])


def _units(unit: str, text: str, pieces: Sequence[Pair]) -> int:
    sizes = {"token": sum(len(answer) for _, answer in pieces), "word": len(text.split()), "byte": len(text.encode())}
    return max(1, sizes[unit])
