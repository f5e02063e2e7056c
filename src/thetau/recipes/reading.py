"""YAML as recipes have it: safe, each key once, no aliases, and 1e-5 is a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        yaml.YAMLError: it is not YAML, a key stands twice, or it holds aliases.

    Examples:
        >>> parse_yaml("{method: ties, scale: 1e-1}")
        {'method': 'ties', 'scale': 0.1}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:  # of PyYAML's constructors
        raise yaml.YAMLError(f"a value cannot be what it says it is: {str(error)[:200]}") from error


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (no bombs), and with every key at most once."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (`*name`) are not allowed in a recipe; write the value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice{node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-5 and 1.5e3 for text; YAML 1.2 and JSON take them for numbers.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
