"""The shapes that thetau's annotations give, checked in every test: jaxtyping with beartype, an int where a float is asked as in PEP 484.

Only functions and dataclasses that say a shape are checked; mypy has the rest. What is made inside another function stays as it is:
it would be compiled again each time that one runs. What a module imports of torch and jaxtyping for its annotations alone is imported here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

shaped = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))


def install(package: str) -> None:
    """Check what is imported of a package from now on."""
    if package in sys.modules:
        raise RuntimeError(f"{package} is imported already, so its shapes would go unchecked.")
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """From the source each time: a file of byte code would serve runs that are not checked."""
        tree = ast.parse(self.get_data(self.path), self.path)
        tree.body = [line for node in tree.body for line in (node, *_annotated(node))]
        _Decorator(_words(tree)).visit(tree)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Decorator(ast.NodeVisitor):
    """Puts `shaped` nearest to each function, and outermost on each dataclass, whose annotations have one of some words."""

    def __init__(self, words: set[str]):
        self._words = words

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        said = node.args
        places = (*said.posonlyargs, *said.args, *said.kwonlyargs, said.vararg, said.kwarg)
        if any(_mentions(place, self._words) for place in (*(p.annotation for p in places if p), node.returns)):
            node.decorator_list.append(_decorator(node))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        fields = [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]
        if node.decorator_list and any(_mentions(field, self._words) for field in fields):
            node.decorator_list.insert(0, _decorator(node))
        self.generic_visit(node)


def _annotated(node: ast.stmt) -> list[ast.stmt]:
    """What a block for the type checker says of tensors and shapes."""
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        return []
    return [
        line
        for line in node.body
        if isinstance(line, ast.Assign) or (isinstance(line, ast.ImportFrom) and line.module in ("jaxtyping", "torch"))
    ]


def _words(tree: ast.Module) -> set[str]:
    """What a module calls the shapes of jaxtyping, and what it calls types made of them."""
    words = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for name in node.names
    }
    for line in tree.body:
        if isinstance(line, ast.Assign) and _mentions(line.value, words):
            words |= {target.id for target in line.targets if isinstance(target, ast.Name)}
    return words


def _mentions(node: ast.AST | None, words: set[str]) -> bool:
    return node is not None and any(isinstance(part, ast.Name) and part.id in words for part in ast.walk(node))


def _decorator(node: Any) -> ast.expr:
    return ast.copy_location(ast.parse(f"__import__({__name__!r}).shaped", mode="eval").body, node)
