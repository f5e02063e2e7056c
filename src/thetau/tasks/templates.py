"""Sentences that a text is put in for a language model to complete; data, not code.

As LM-BFF (Gao et al., ACL 2021, <https://arxiv.org/abs/2012.15723>) without its demonstrations.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from thetau.errors import DataError, nearest

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
