"""Reading a recipe, with every problem reported together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from thetau.checkpoint.remote import is_url
from thetau.checkpoint.safetensors import exists
from thetau.errors import RecipeError, nearest
from thetau.recipes.mergekit.recipe import KEY, MergekitRecipe, holds_mergekit, read_documents, read_record
from thetau.recipes.reading import parse_documents, parse_yaml
from thetau.recipes.schema import ModelEntry, Recipe

LIMIT = 1_000_000  # bytes; a recipe is a page, not a data set


def load(path: Path) -> Recipe | MergekitRecipe:
    """Read and validate a YAML file, ours or mergekit's. Relative paths in it start at its folder.

    Raises:
        RecipeError: it cannot be read, or says something wrong; all problems together.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise RecipeError([f"a recipe has at most {LIMIT} bytes. Got {path.stat().st_size}."], str(path))
        text = path.read_text(encoding="utf-8")
        documents = parse_documents(text)
        if holds_mergekit(documents):
            return read_documents(documents, str(path), path.parent)
        content = parse_yaml(text)
        document = documents[0] if documents else None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"cannot be read: {error}."], str(path)) from error
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).replace("<unicode string>", path.name).split())
        raise RecipeError([f"not valid YAML: {said}"], str(path)) from error
    try:
        return from_mapping(content, str(path), path.parent)
    except RecipeError as error:
        if document is None:
            raise
        raise RecipeError([document.placed(problem) for problem in error.problems], str(path)) from error


def read_mapping(content: Any, where: str = "recipe") -> Recipe | MergekitRecipe:
    """A recipe's content as an output records it, ours or mergekit's.

    Raises:
        RecipeError: all that is wrong with it.
    """
    return read_record(content, where) if isinstance(content, Mapping) and KEY in content else from_mapping(content, where)


def from_mapping(content: Any, where: str = "recipe", folder: Path | None = None) -> Recipe:
    """Validate a recipe's content.

    Raises:
        RecipeError: all that is wrong with it.

    Examples:
        >>> from_mapping({"base": "base", "models": ["a", "b"], "method": "ties"}).shard_size
        '5GB'
        >>> from_mapping({"base": "base", "models": ["a"], "methd": "ties"})
        Traceback (most recent call last):
        ...
        thetau.errors.RecipeError: recipe: ...
    """
    from thetau.methods.registry import build

    if not isinstance(content, Mapping):
        raise RecipeError([f"must be a mapping with base, models and method. Got {type(content).__name__}."], where)
    if isinstance(content.get("recipe"), Mapping) and "thetau" in content:  # the thetau.json of an output: run it again
        content = content["recipe"]
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(dict(content))
    except ValidationError as error:
        problems += _problems(error)
    else:
        names = [entry.name for entry in recipe.entries() if entry.name]
        problems += [f"models: the name {name!r} stands twice." for name in sorted(set(names)) if names.count(name) > 1]
        problems += _arrangement(recipe)
    method, based = content.get("method"), True
    if isinstance(method, str | Mapping):
        try:
            name, fields = split_method(method)
            based = build(name, fields).needs_base
        except RecipeError as error:
            problems += [f"method: {problem}" for problem in error.problems]
    if based and content.get("base") is None:
        problems.insert(0, "base is missing: the method needs the model that the others were fine-tuned from.")
    if recipe is not None and folder is not None:
        recipe = _resolved(recipe, folder)
    if problems or recipe is None:
        raise RecipeError(problems, where)
    return recipe


def split_method(method: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and its fields.

    Raises:
        RecipeError: there is no name.
    """
    if isinstance(method, str):
        return method, {}
    name = method.get("name")
    if not isinstance(name, str):
        raise RecipeError(["needs a `name`, such as `name: wudi`. See `thetau methods`."], "method")
    return name, {key: value for key, value in method.items() if key != "name"}


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    def at(path: str) -> str:
        if is_url(path):
            return path
        inside = folder / path
        return str(inside) if not Path(path).is_absolute() and exists(inside) else path

    models: list[str | ModelEntry] = [
        at(model)
        if isinstance(model, str)
        else ModelEntry(path=at(model.path), name=model.name, over=model.over and at(model.over))
        for model in recipe.models
    ]
    evidence = {kind: {task: at(path) for task, path in given.items()} for kind, given in recipe.evidence.items()}
    return recipe.model_copy(update={"base": recipe.base and at(recipe.base), "models": models, "evidence": evidence})


def _arrangement(recipe: Recipe) -> list[str]:
    """What cannot go with slices and tokenizers, and slices that say nothing that can be."""
    found = []
    if recipe.slices and recipe.modules:
        found.append("slices: a recipe has `slices` or `modules`, not both.")
    if recipe.arranged and recipe.output == "vector":
        found.append("output: a model whose layers or rows are moved has no task vector over its base. Take `output: model`.")
    if recipe.arranged and recipe.evidence:
        found.append(
            "evidence: does not go with `slices`, `modules` or `tokenizer`. Merge first, and move layers in a second recipe."
        )
    for where, entries in {"slices": recipe.slices, **{f"modules.{name}": one for name, one in recipe.modules.items()}}.items():
        for index, entry in enumerate(entries):
            ranges = [one.layers for one in entry.sources] + ([entry.base_layers] if entry.base_layers else [])
            bad = [one for one in ranges if not 0 <= one[0] < one[1]]
            found += [
                f"{where}.{index}: layers are [first, end], end excluded, with at least one layer. Got {one}." for one in bad
            ]
            if not bad and len({end - first for first, end in ranges}) > 1:
                found.append(f"{where}.{index}: its sources must have equally many layers. Got {ranges}.")
    return found


def _problems(error: ValidationError) -> list[str]:
    found: dict[str, str] = {}
    for item in error.errors():
        place = [str(part) for part in item["loc"] if part not in ("str", "ModelEntry", "int", "dict[str,any]")]
        where = ".".join(place)
        if item["type"] == "string_type" and isinstance(item["input"], Mapping):
            continue  # the other form of a model, of which the same entry is told
        if item["type"] == "extra_forbidden":
            known = ModelEntry.model_fields if len(place) > 1 else Recipe.model_fields
            found[where] = f"unknown key {where!r}.{nearest(place[-1], known)} Known: {', '.join(known)}."
        elif item["type"] == "missing":
            found[where] = f"{where} is missing."
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.setdefault(where, f"{where}: {message}. Got {item['input']!r}.")
    return list(found.values())
