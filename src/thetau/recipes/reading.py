"""YAML as recipes have it: safe, each key once, no aliases, and 1e-5 is a number; and where in the text each value stands."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
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


Path = tuple[str | int, ...]
_PLACE = re.compile(r"(?:unknown key '([\w.]+)'|([A-Za-z_][\w.]*)(?=[:\s]))")
MOST_VALUES = 100_000  # of a document, aliases written out


@dataclass(frozen=True)
class Document:
    """One document of a text, and the line and column, from 1, at which each of its keys and entries stands."""

    content: Any
    marks: Mapping[Path, tuple[int, int]]

    def at(self, path: Path) -> str:
        """`line 3, column 5` of a place, or of the nearest one above it that is there."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                return "line {}, column {}".format(*self.marks[path[:length]])
        return ".".join(map(str, path)) or "recipe"

    def placed(self, problem: str) -> str:
        """A problem that begins with a key's place (`models.0.path: …`, `unknown key 'method.x'`), after its line and column.

        Examples:
            >>> document = parse_documents("models:\\n  - pth: a\\n")[0]
            >>> document.placed("unknown key 'models.0.pth'.")
            "line 2, column 5: unknown key 'models.0.pth'."
        """
        found = _PLACE.match(problem)
        if found is None or problem.startswith("line "):
            return problem
        path: Path = tuple(int(word) if word.isdigit() else word for word in (found[1] or found[2]).split("."))
        while path and path not in self.marks:
            path = path[:-1]
        return f"{self.at(path)}: {problem}" if path else problem


def parse_documents(text: str) -> list[Document]:
    """All documents of a text, `---` between them; aliases are written out.

    Raises:
        yaml.YAMLError: it is not YAML, a key stands twice, or aliases make it larger than any recipe.
    """
    loader = _AliasLoader(text)
    try:
        found = []
        while loader.check_node():
            node = loader.get_node()
            marks = dict(_marks(node)) if node is not None else {}
            found.append(Document(loader.construct_document(node), marks))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:  # of PyYAML's constructors
        raise yaml.YAMLError(f"a value cannot be what it says it is: {str(error)[:200]}") from error
    else:
        return [one for one in found if one.content is not None]
    finally:
        loader.dispose()


def _marks(root: yaml.Node) -> Iterator[tuple[Path, tuple[int, int]]]:
    waiting: list[tuple[Path, yaml.Node, yaml.Node]] = [((), root, root)]
    count = 0
    while waiting:
        path, said, node = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"a recipe has at most {MOST_VALUES} values; aliases make more of it")
        yield path, (said.start_mark.line + 1, said.start_mark.column + 1)
        if isinstance(node, yaml.MappingNode):
            waiting += [((*path, str(key.value)), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [((*path, index), value, value) for index, value in enumerate(node.value)]


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (no bombs), and with every key at most once."""

    aliases = False

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if not self.aliases and self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (`*name`) are not allowed in a recipe; write the value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice{node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _AliasLoader(_Loader):
    """With aliases, for recipes that were written for others."""

    aliases = True


# YAML 1.1, which PyYAML reads, takes 1e-5 and 1.5e3 for text; YAML 1.2 and JSON take them for numbers.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
