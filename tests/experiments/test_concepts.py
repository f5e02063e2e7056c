"""The pictures of the concepts are those that the script draws."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.common import DOCS, IMAGES
from experiments.concepts.run import PICTURES, draw


def words(path: Path) -> set[str]:
    """The words of an SVG picture."""
    return {"".join(text.itertext()).strip() for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_one_in_the_docs(name: str, tmp_path: Path) -> None:
    made = draw(name, tmp_path)
    assert words(made) == words(IMAGES / made.name)
    assert f"images/{made.name}" in (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert made.read_bytes() == draw(name, tmp_path).read_bytes()
