"""The pages of the methods in the navigation, as the pages are built: below their table, in alphabetical order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

PARENT, SECTION = "Merge", "Methods"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page a method."""
    assert config.nav is not None
    parent: list[Any] = next(entry[PARENT] for entry in config.nav if PARENT in entry)
    section: list[Any] = next(entry[SECTION] for entry in parent if SECTION in entry)
    section += [{path.stem: f"methods/{path.name}"} for path in sorted((Path(config.docs_dir) / "methods").glob("*.md"))]
    return config
