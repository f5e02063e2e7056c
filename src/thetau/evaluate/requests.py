"""What a model of lm-evaluation-harness answered, request by request, so that it is asked once and a run that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from thetau.checkpoint.disk import append_lines, check_file, failed
from thetau.evaluate.cache import Cache
from thetau.pace import counted, doing

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
PART = 128  # requests that are asked, and kept, at once


def keep_answers(model: Any, file: Path | None) -> None:
    """Have a model of the harness look into `file` (a line of JSON a request) before it runs, and write there what it had to run; None keeps nothing. What is
    sampled is never kept. The harness' own cache is a database of pickles.
    """
    known = {} if file is None else _read(file)
    for kind in KINDS:
        setattr(model, kind, partial(_answer, getattr(model, kind), kind, known, file))


def _answer(
    ask: Callable[..., list[Any]], kind: str, known: dict[str, Any], file: Path | None, requests: Sequence[Any], **_: object
) -> list[Any]:
    """The answers in the requests' order."""
    keys = [_key(kind, one.args) for one in requests]
    found = [known.get(key) for key in keys]
    lacking = [place for place, one in enumerate(found) if one is None]
    lacking.sort(
        key=lambda place: -len(str(requests[place].args[0]))
    )  # alike in length, and what does not fit the memory shows at once
    with doing(f"{kind.replace('_', ' ')} for the harness"), counted(len(lacking), "requests") as advance:
        for start in range(0, len(lacking), PART):
            places = lacking[start : start + PART]
            for place, told in zip(places, ask([requests[place] for place in places], disable_tqdm=True), strict=True):
                found[place] = told
            if file is not None:
                lines = {keys[place]: found[place] for place in places if not _sampled(kind, requests[place].args)}
                append_lines(file, "".join(json.dumps([key, told]) + "\n" for key, told in lines.items()).encode())
                known |= lines
            advance(len(places))
    return [tuple(one) if isinstance(one, list) else one for one in found]


def _key(kind: str, args: Sequence[Any]) -> str:
    return Cache.key([kind, *args])


def _sampled(kind: str, args: Sequence[Any]) -> bool:
    return kind == "generate_until" and bool(args[1].get("do_sample"))


def _read(file: Path) -> dict[str, Any]:
    """Key → answer, of the lines that are whole."""
    check_file(file)
    try:
        lines = file.read_bytes().splitlines() if file.exists() else []
    except OSError as error:
        raise failed(file, error) from error
    known = {}
    for line in lines:
        try:
            key, told = json.loads(line)
        except (ValueError, TypeError):  # a process died at it: asked again
            continue
        known[key] = told
    return known
