"""A causal language model on a task: the likelihood of choices, the perplexity of texts, exact match after generation.

An example that does not fit the model's context is not cut: it counts as wrong, and is counted. So are generations that nothing ended, and answers that
cannot be extracted, some of which are kept to be shown. The interval of a perplexity is a bootstrap over texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np

from thetau.errors import DataError
from thetau.evaluate.accuracy import wilson
from thetau.evaluate.answers import Answers
from thetau.evaluate.measures import Loss
from thetau.models import Encoder
from thetau.models.causal import CausalModel, Pair, Said, Side, end_tokens, generate, likelihoods
from thetau.tasks.causal.answers import before_stop, extracted, normalised
from thetau.tasks.causal.encode import CausalInputs
from thetau.tasks.causal.form import Form
from thetau.tasks.metrics import RESAMPLES

TOKENS, ROWS = 1024, 32  # of a batch
SHOWN = 3
_LETTERS = 80


def examine(encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None]) -> Answers:
    """Measure what `encoder` runs with; `done` is called with the number of tokens."""
    match inputs.form.kind:
        case "choices":
            return _choices(encoder, inputs, done)
        case "generation":
            return _generation(encoder, inputs, done)
    return _perplexity(encoder, inputs, done)


def piece_likelihoods(
    encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None] = lambda tokens: None, *, side: Side = "right"
) -> list[list[float]]:
    """The log-likelihood in nats of each piece of each example; the batches are padded on the `side`."""
    listed = [(example, pair) for example, pieces in enumerate(inputs.pieces) for pair in pieces]
    found = _scored(encoder, [pair for _, pair in listed], inputs, side, done)
    made: list[list[float]] = [[] for _ in inputs.pieces]
    for (example, _), one in zip(listed, found, strict=True):
        made[example].append(one)
    return made


def causal_loss(encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None]) -> Loss:
    """What training lowers: the mean over the examples of the mean over an answer's tokens."""
    check_loss(inputs)
    pairs = list(inputs.taught)
    told = _scored(encoder, pairs, inputs, "right", done)
    return Loss(value=-sum(one / len(answer) for one, (_, answer) in zip(told, pairs, strict=True)) / len(pairs), n=len(pairs))


def check_loss(inputs: CausalInputs) -> None:
    """Raise `DataError` where training would cut an answer."""
    if inputs.truncated:
        raise DataError(
            f"{inputs.truncated} examples are longer than `max_length`, so their loss is not defined. Raise it, as {inputs.max_length} now."
        )


def _choices(encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None]) -> Answers:
    correct = 0
    for told, units, right in zip(piece_likelihoods(encoder, inputs, done), inputs.units, inputs.labels, strict=True):
        scores = [value / unit for value, unit in zip(told, units, strict=True)] if told else []
        correct += bool(scores) and scores.index(max(scores)) == right
    return _counted("accuracy", correct, len(inputs), too_long=sum(inputs.too_long))


def _perplexity(encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None]) -> Answers:
    told = np.array([-sum(pieces) for pieces in piece_likelihoods(encoder, inputs, done)])
    units = np.array([units[0] for units in inputs.units], dtype=np.float64)
    drawn = np.random.default_rng(0).multinomial(len(told), np.full(len(told), 1 / len(told)), size=RESAMPLES).astype(np.float64)
    low, high = np.percentile(_exp(drawn @ told / (drawn @ units)), [2.5, 97.5])
    name = f"{inputs.form.unit} perplexity"
    value = float(_exp(told.sum() / units.sum()))
    return Answers(name=name, value=value, n=len(told), low=float(low), high=float(high), too_long=sum(inputs.too_long))


def _exp(nats: np.ndarray | np.floating) -> np.ndarray:
    """The exponential, of at most what a float holds."""
    return np.exp(np.minimum(nats, math.log(np.finfo(np.float64).max)))


def _generation(encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None]) -> Answers:
    form, correct, unread = inputs.form, 0, []
    said = generations(encoder, inputs, done)
    for one, question in zip(said, inputs.questions, strict=True):
        if one is None:
            continue
        text, _ = one
        answer = extracted(text, form.extract)
        if answer is None:
            unread.append(text)
        else:
            correct += _plain(answer, form) == reference(question.answer, form)
    return _counted(
        "exact match",
        correct,
        len(inputs),
        too_long=sum(one is None for one in said),
        unfinished=sum(one is not None and not one[1] for one in said),
        unread=len(unread),
        shown=tuple(text[:_LETTERS] for text in unread[:SHOWN]),
    )


def generations(
    encoder: Encoder, inputs: CausalInputs, done: Callable[[int], None] = lambda tokens: None
) -> list[tuple[str, bool] | None]:
    """What is said to each prompt, up to a stop string, and whether it came to an end; None where the prompt does not fit the context."""
    form, tokenizer, ends = inputs.form, encoder.tokenizer, end_tokens(encoder)
    prompts = inputs.prompts
    fitting = [number for number, long in enumerate(inputs.too_long) if not long]

    def text_of(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stopped(tokens: list[int]) -> bool:
        return bool(form.stop) and any(stop in text_of(tokens) for stop in form.stop)

    found: list[tuple[str, bool] | None] = [None] * len(prompts)
    model = cast("CausalModel", encoder.module)
    rows = 1 if model.recurrent else ROWS
    for batch in _batches([len(prompts[number]) + form.max_new_tokens for number in fitting], rows):
        chosen = [fitting[number] for number in batch]
        said: list[Said] = generate(
            model,
            [prompts[number] for number in chosen],
            pad=inputs.pad,
            most=form.max_new_tokens,
            context=inputs.context,
            ends=ends,
            stopped=stopped,
        )
        for number, one in zip(chosen, said, strict=True):
            found[number] = before_stop(text_of(one.tokens), form.stop), one.finished
        done(sum(inputs.lengths[number] for number in chosen))
    done(sum(length for length, long in zip(inputs.lengths, inputs.too_long, strict=True) if long))
    return found


def reference(answer: str, form: Form) -> str:
    """The right answer as what is said is compared with it: extracted in the same way where it can be."""
    found = extracted(answer, form.extract)
    return _plain(answer if found is None else found, form)


def _plain(answer: str, form: Form) -> str:
    return normalised(answer, form.normalise)


def _counted(
    name: str, correct: int, n: int, *, too_long: int = 0, unfinished: int = 0, unread: int = 0, shown: tuple[str, ...] = ()
) -> Answers:
    low, high = wilson(correct, n)
    return Answers(
        name=name,
        value=correct / n,
        n=n,
        low=low,
        high=high,
        correct=correct,
        too_long=too_long,
        unfinished=unfinished,
        unread=unread,
        shown=shown,
    )


def _scored(
    encoder: Encoder, pairs: Sequence[Pair], inputs: CausalInputs, side: Side, done: Callable[[int], None]
) -> list[float]:
    """The log-likelihood of each answer; `done` is told the inputs' tokens by the share that each batch is of all that is read."""
    found = [0.0] * len(pairs)
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    total, read, told = sum(inputs.lengths), 0, 0
    encoder.module.eval()
    for batch in _batches(lengths, ROWS):
        values = likelihoods(cast("CausalModel", encoder.module), [pairs[number] for number in batch], inputs.pad, side)
        for number, one in zip(batch, values.tolist(), strict=True):
            found[number] = one
        read += sum(lengths[number] for number in batch)
        done(total * read // sum(lengths) - told)
        told = total * read // sum(lengths)
    done(total - told)
    return found


def _batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Numbers in batches of similar length, of at most so many rows, the longest first, so that what does not fit the memory shows at once."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if batch and (len(batch) >= rows or (len(batch) + 1) * lengths[batch[0]] > TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
