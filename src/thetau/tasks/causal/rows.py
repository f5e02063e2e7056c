"""Rows of any columns, and what a form makes of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from thetau.errors import DataError, nearest
from thetau.tasks.causal.form import SLOT, Form
from thetau.tasks.rows import drawn


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one split, in file order, whatever their columns; `where` names the file, and `lines` each row's line in it."""

    rows: tuple[Mapping[str, Any], ...]
    lines: tuple[int, ...]
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in the order given."""
        return Rows(rows=tuple(self.rows[i] for i in indices), lines=tuple(self.lines[i] for i in indices), where=self.where)

    def limited(self, limit: int | None) -> Rows:
        """At most `limit` rows, drawn without regard to their order in the file and always the same ones."""
        return self if limit is None or limit >= len(self) else self.take(drawn(len(self), limit))


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """One row as its form has it: what is given, the answers that there may be, and the number of the right one.

    `before`: what was said before the prompt in a talk, role and content.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int
    before: tuple[tuple[str, str], ...] = ()

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.answers[self.right]


def questions(form: Form, rows: Rows) -> list[Question]:
    """Each row as its form has it; of a talk one for each turn of the assistant. Raises `DataError` naming the file and the line."""
    if form.turns is not None:
        told = zip(rows.rows, rows.lines, strict=True)
        return [one for row, line in told for one in _talk(form.turns, row, f"{rows.where}: line {line}")]
    return [_question(form, row, f"{rows.where}: line {line}") for row, line in zip(rows.rows, rows.lines, strict=True)]


def _question(form: Form, row: Mapping[str, Any], where: str) -> Question:
    if form.kind == "perplexity":
        return Question(prompt="", answers=(_text(filled(form.text, row, where), form.text, where),), right=0)
    prompt = filled(form.prompt, row, where)
    if form.kind == "generation":
        return Question(prompt=prompt, answers=(_text(filled(form.answer, row, where), form.answer, where),), right=0)
    listed = _column(form.choices, row, where) if isinstance(form.choices, str) else [filled(c, row, where) for c in form.choices]
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(one, str) and one for one in listed):
        raise DataError(f"{where}: `{form.choices}` must be a list of at least two texts. Got {listed!r}; correct the row.")
    return Question(
        prompt=prompt, answers=tuple(listed), right=_right(_column(form.label, row, where), listed, form.label, where)
    )


def _talk(column: str, row: Mapping[str, Any], where: str) -> list[Question]:
    turns = _column(column, row, where)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and _said(turn) for turn in turns):
        raise DataError(
            f"{where}: `{column}` must be a list of turns with a `role` and a `content` that is not blank. Got {str(turns)[:80]!r}."
        )
    said = [(str(turn["role"]), str(turn["content"])) for turn in turns]
    made = []
    for number, (role, content) in enumerate(said):
        if role != "assistant":
            continue
        if number == 0 or said[number - 1][0] != "user":
            raise DataError(
                f"{where}: `{column}`: turn {number + 1} is the assistant's and must follow one of the user's. Correct the row."
            )
        made.append(Question(prompt=said[number - 1][1], answers=(content,), right=0, before=tuple(said[: number - 1])))
    if not made:
        raise DataError(f"{where}: `{column}` has no turn of the assistant's, whose answers are what is asked. Drop the row.")
    return made


def _said(turn: Mapping[str, Any]) -> bool:
    return all(isinstance(turn.get(key), str) and turn[key].strip() for key in ("role", "content"))


def _right(given: Any, listed: list[str], column: str, where: str) -> int:
    if isinstance(given, str) and listed.count(given) == 1:
        return listed.index(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(listed):
        return given
    raise DataError(
        f"{where}: `{column}` must be the number of the right choice, in 0..{len(listed) - 1}, or its text. Got {given!r}; correct the row."
    )


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template with the columns of a row in its braces. Raises `DataError` for a column that is not there, or is no text or number."""

    def value(name: str) -> str:
        found = _column(name, row, where)
        if not isinstance(found, str | int | float) or isinstance(found, bool):
            raise DataError(f"{where}: `{name}` must be a text or a number for the template {template!r}. Got {found!r}.")
        return str(found)

    parts = SLOT.split(template)
    return "".join(value(part) if number % 2 else part for number, part in enumerate(parts))


def _column(name: str, row: Mapping[str, Any], where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: has no column {name!r}. It has {', '.join(row) or 'none'}.{nearest(name, row)}")
    return row[name]


def _text(text: str, template: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: {template!r} gives a blank text. Correct the row or drop it.")
    return text
