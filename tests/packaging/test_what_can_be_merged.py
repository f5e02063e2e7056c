"""Every test that the page on what can be merged names exists, with its parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from experiments.common import DOCS, ROOT

PAGE = DOCS / "what-can-be-merged.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([A-Z])` is\s+`(tests/[\w/]+\.py)`", TEXT))
NAMED = [
    (letter, name)
    for letter, names in re.findall(r"(?<![`\w])([A-Z]) ((?:`[^`]+`(?:, )?)+)", TEXT)
    for name in re.findall(r"`([^`]+)`", names)
]
HELPERS = ("encoders.py", "families.py", "mixtures.py", "tiny_adapters.py")  # where parameters of several files stand


def functions(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def words(file: Path) -> str:
    """Where a test's parameters may stand: its file, the helpers, the names of its data."""
    texts = [file.read_text(encoding="utf-8"), *((ROOT / "tests" / name).read_text(encoding="utf-8") for name in HELPERS)]
    return "\n".join([*texts, *(data.stem for data in sorted((file.parent / "data").glob("*")))])


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 100
    assert len(FILES) >= 12
    assert not re.findall(r"`(?:…\[|test_\w)", TEXT)  # each name has its letter, and a beginning


@pytest.mark.parametrize("letter", sorted({letter for letter, _ in NAMED}))
def test_every_letter_is_a_file(letter: str) -> None:
    assert (ROOT / FILES[letter]).is_file()


@pytest.mark.parametrize(("letter", "name"), NAMED, ids=[f"{letter} {name}" for letter, name in NAMED])
def test_a_named_test_exists(letter: str, name: str) -> None:
    file = ROOT / FILES[letter]
    match = re.fullmatch(r"([a-z0-9_]+)(…?)(?:\[(.+)\])?", name)
    assert match is not None, name
    start, open_, parameters = f"test_{match[1]}", match[2], match[3]
    found = [function for function in functions(file) if function == start or (open_ and function.startswith(start))]
    assert len(found) == 1, f"{PAGE.name} names {name!r} of {FILES[letter]}: {found}"
    known = words(file)
    for parameter in (parameters or "").split(", "):
        assert parameter.removesuffix(" …").removesuffix("…") in known, f"{name}: {FILES[letter]} has no case {parameter!r}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/.]+)`", TEXT))))
def test_a_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()
