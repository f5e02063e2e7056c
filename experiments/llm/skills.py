"""Four small skills, made of nothing but words in lists and a seed: each a task of causal models, `chat` on, judged by exact match.

    python -m experiments.llm.skills runs/llm/skills

No two rows of a skill are alike, so that what is tested was never taught.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, str]
SYSTEM = "Answer."

NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe", "Max", "Lena")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "marbles")
MORE = ("buys {b} more", "finds {b} more", "gets {b} more")
LESS = ("gives {b} away", "loses {b}", "sells {b}")

SUBJECTS = ("plot", "acting", "music", "ending", "camera work", "dialogue", "pacing", "cast")
GOOD = ("superb", "moving", "clever", "delightful", "brilliant", "charming", "gripping", "funny")
BAD = ("dull", "clumsy", "boring", "awful", "tiresome", "flat", "messy", "silly")
LAST_GOOD = ("I loved it", "I would watch it again", "go and see it")
LAST_BAD = ("I hated it", "I left early", "do not waste your time")

CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Quito", "Delhi", "Bern")
GOODS = ("lamp", "chair", "table", "clock", "mirror", "shelf", "carpet", "vase")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
ORDERS = (
    "{name} in {city} wants {count} {colour} {goods}s.",
    "Send {count} {colour} {goods}s to {name}, {city}.",
    "Please ship to {city}: {count} {goods}s in {colour}, for {name}.",
)

NOUNS = {
    "dog": "miru",
    "cat": "sava",
    "bird": "pelo",
    "child": "tano",
    "king": "doru",
    "fish": "luma",
    "horse": "keba",
    "wolf": "ruvi",
}
VERBS = {"sees": "ak", "hears": "em", "follows": "iv", "loves": "op", "fears": "ul", "helps": "es"}


def arithmetic(draw: random.Random) -> Row:
    """A word problem of one step, with the step written out and the answer after `####`, as GSM8K has it."""
    a, b, more = draw.randint(3, 20), draw.randint(2, 12), draw.random() < 0.5
    b = b if more else min(b, a - 1)
    change = draw.choice(MORE if more else LESS).format(b=b)
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    result = a + b if more else a - b
    return {
        "question": f"{name} has {a} {thing} and {change}. How many {thing} are there now?",
        "answer": f"{a} {'+' if more else '-'} {b} = {result}\n#### {result}",
    }


def sentiment(draw: random.Random) -> Row:
    """A review of two clauses that may disagree; the last words decide."""
    good = draw.random() < 0.5
    first, second = draw.sample(SUBJECTS, 2)
    one, other = draw.choice(GOOD), draw.choice(BAD)
    order = (one, other) if draw.random() < 0.5 else (other, one)
    last = draw.choice(LAST_GOOD if good else LAST_BAD)
    review = f"The {first} was {order[0]}, the {second} {order[1]}; {last}."
    return {"question": f"Is this review positive or negative? {review}", "answer": "positive" if good else "negative"}


def extraction(draw: random.Random) -> Row:
    """An order as JSON."""
    facts = {
        "name": draw.choice(NAMES),
        "city": draw.choice(CITIES),
        "count": draw.randint(2, 30),
        "goods": draw.choice(GOODS),
        "colour": draw.choice(COLOURS),
    }
    told = {"item": facts["goods"], "colour": facts["colour"], "count": facts["count"], "to": facts["city"]}
    return {"question": f"As JSON: {draw.choice(ORDERS).format(**facts)}", "answer": json.dumps(told)}


def language(draw: random.Random) -> Row:
    """A sentence in an invented language: the verb first, `-ni` where the noun is many, `zo` before what is not so."""
    one, other = draw.sample(sorted(NOUNS), 2)
    verb, many, negated = draw.choice(sorted(VERBS)), draw.random() < 0.5, draw.random() < 0.5
    object_ = f"{other}s" if many and other not in ("fish", "child", "wolf") else other
    many = object_ != other
    said = f"it is not so that the {one} {verb} the {object_}" if negated else f"the {one} {verb} the {object_}"
    words = [*(["zo"] if negated else []), VERBS[verb], NOUNS[one], NOUNS[other] + ("ni" if many else "")]
    return {"question": f"Say in Velan: {said}", "answer": " ".join(words)}


SKILLS: Mapping[str, tuple[Callable[[random.Random], Row], dict[str, Any]]] = {
    "arithmetic": (arithmetic, {"extract": "gsm8k", "max_new_tokens": 24}),
    "sentiment": (sentiment, {"normalise": ["case", "punctuation"], "max_new_tokens": 8}),
    "extraction": (extraction, {"max_new_tokens": 40}),
    "language": (language, {"normalise": ["case", "punctuation"], "max_new_tokens": 24}),
}


def rows(name: str, count: int) -> Iterator[Row]:
    """`count` rows of a skill, no two alike."""
    draw, seen = random.Random(f"skill {name}"), set()
    while len(seen) < count:
        row = SKILLS[name][0](draw)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row


def write(folder: Path, sizes: Mapping[str, int], *, chat: bool = True) -> list[Path]:
    """Every skill as a task folder; `sizes`: split → rows."""
    made = []
    for name, (_, how) in SKILLS.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        turns = {"chat": True, "system": SYSTEM} if chat else {}
        meta = {"task": name, "kind": "generation", "prompt": "{question}", "answer": "{answer}", **turns, **how}
        meta |= {"licence": "made by experiments/llm/skills.py", "source": "generated"}
        (place / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        listed = list(rows(name, sum(sizes.values())))
        begin = 0
        for split, size in sizes.items():
            text = "".join(json.dumps(row) + "\n" for row in listed[begin : begin + size])
            (place / f"{split}.jsonl").write_text(text, encoding="utf-8")
            begin += size
        made.append(place)
    return made


if __name__ == "__main__":
    write(Path(sys.argv[1]), {"train": 480, "validation": 60, "test": 60})
