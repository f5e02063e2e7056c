"""The pages need no network: one that would fetch a script, a style, a font or a picture from elsewhere stops the build."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

FETCHED = re.compile(r"""<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'\s>]+""")


def fetched(html: str) -> list[str]:
    """The elements of a page that make a browser fetch from another host; links for readers to follow are none."""
    return FETCHED.findall(html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The page as it is, unless it fetches."""
    if found := fetched(output):
        raise PluginError(
            f"{page.file.src_uri}: fetches from another host: {found[0]}. Put the file under docs/ and name it there."
        )
    return output
