"""The API reference: a page a room with its public names, made as the pages are built; a name without a docstring stops the build.

A room's public names are its `__all__`, or else what its `__init__` imports as itself (`from … import Name as Name`); those of a module
are what it defines without an underscore.
"""

from __future__ import annotations

import ast
import inspect
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import thetau

MODULES = ("errors", "parts", "testing")  # the single files that users and authors of methods import from
SECTION = "Reference"  # of the navigation
COMMANDS = ("cli",)  # described by `--help` and docs/recipes.md


def rooms() -> list[str]:
    """The modules that have a page, the package itself first."""
    names = [
        child.name
        for child in iter_modules(thetau.__path__)
        if (child.ispkg and child.name not in COMMANDS) or child.name in MODULES
    ]
    return ["thetau", *(f"thetau.{name}" for name in sorted(names) if public(f"thetau.{name}"))]


def public(room: str) -> list[str]:
    """The public names of a room, in alphabetical order."""
    module = import_module(room)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            names = [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
            return sorted(name for name in names if not isinstance(getattr(module, name), ModuleType))
    if "__path__" in vars(module):
        imports = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
        return sorted(alias.name for alias in imports if alias.name == alias.asname and not alias.name.startswith("_"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return sorted(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_"))


def documented(thing: Any) -> bool:
    """Whether a docstring of its own class or function says what it is; the one that `dataclass` writes does not."""
    text = (thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing)) or ""  # a class's own, not its base's
    return bool(text.strip()) and not (inspect.isclass(thing) and text.startswith(f"{thing.__name__}("))


def bare() -> list[str]:
    """Public names, and public members of public classes, that have no docstring."""
    missing = []
    for room in rooms():
        module = import_module(room)
        if not (module.__doc__ or "").strip():
            missing.append(room)
        for name in public(room):
            thing = getattr(module, name)
            if not inspect.isclass(thing) and not callable(thing):
                continue  # a constant or an alias of types: the comment beside it says what it is
            if not documented(thing):
                missing.append(f"{room}.{name}")
            if inspect.isclass(thing):
                members = {
                    key: value
                    for key, value in vars(thing).items()
                    if not key.startswith("_")
                    and (inspect.isfunction(value) or isinstance(value, property | cached_property | classmethod | staticmethod))
                }
                missing += [f"{room}.{name}.{key}" for key in members if not inspect.getdoc(getattr(thing, key))]
    return missing


def page(room: str) -> str:
    """The page of a room."""
    module = import_module(room)
    lines = [f"# {room}", "", inspect.cleandoc(module.__doc__ or ""), ""]
    for name in public(room):
        lines += [f"::: {room}.{name}", ""]
    return "\n".join(lines)


def place(room: str) -> str:
    """Where a room's page lies."""
    return f"reference/{room.removeprefix('thetau.')}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages' place in the navigation, and the check of the docstrings."""
    missing = bare()
    if missing:
        raise PluginError(f"Public names without a docstring: {', '.join(missing)}. Say in a sentence what each is.")
    assert config.nav is not None
    section: list[Any] = next(entry[SECTION] for entry in config.nav if SECTION in entry)
    section.append({"Python": [{room: place(room)} for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages themselves."""
    for room in rooms():
        files.append(File.generated(config, place(room), content=page(room)))
    return files
