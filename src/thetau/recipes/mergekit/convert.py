"""A recipe in mergekit's format as one of ours, which gives the same model.

Gradients and filters become patterns of tensor names, mergekit's settings of a method our fields, weights values by task; slices, modules
and tokenizer keep their form, which ours has too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thetau.engine.executor import Engine
from thetau.errors import RecipeError
from thetau.methods import build, plain
from thetau.recipes.mergekit.members import Slot
from thetau.recipes.mergekit.modules import Cut
from thetau.recipes.mergekit.plan import Assembly
from thetau.recipes.mergekit.recipe import MergekitRecipe
from thetau.recipes.mergekit.reference import Reference
from thetau.recipes.mergekit.schema import Slice

Numbers = Mapping[str, float]


def convert(recipe: MergekitRecipe) -> dict[str, Any]:
    """The content of our recipe.

    Raises:
        RecipeError: the recipe cannot be run, or says something that ours cannot say; the message names it.
    """
    if recipe.mixture:
        raise RecipeError(
            ["it makes a mixture of experts, which ours cannot say. `thetau merge` runs it as it is."], recipe.where
        )
    if len(recipe.scripts) != 1:
        raise RecipeError(
            [
                f"it holds {len(recipe.scripts)} documents that build on one another; ours is one. Convert each, and save what they share."
            ],
            recipe.where,
        )
    script = recipe.scripts[0]
    assembly = Assembly(script, recipe.where, {}, recipe.folder, recipe.seed, recipe.exclude, Engine())
    cuts, slots = assembly.settled()
    content: dict[str, Any] = {}
    if script.base is not None:
        content["base"] = str(script.base)
    based = any(slot.base is not None for slot in slots)
    used = list(dict.fromkeys(model.label for slot in slots if slot.method is not None for _, model, _ in slot.inputs))
    content["models"] = [_entry(reference, model.label) for reference, model in assembly.models.items() if model.label in used]
    content["method"] = _method(slots, [name for cut in cuts for name in cut.tower.tensors], recipe.where)
    own = [piece for module in script.modules.values() for piece in module.slices if piece.base not in (None, script.base)]
    if own:
        raise RecipeError([f"a slice has a base of its own, {own[0].base}; ours has one for all."], recipe.where)
    sliced = {name: module for name, module in script.modules.items() if module.slices}
    if None in sliced:
        content["slices"] = [_slice(piece, assembly, based) for piece in sliced[None].slices]
    elif list(script.modules) != [None]:
        content["modules"] = {
            name: [_slice(piece, assembly, based) for piece in _cut(cuts, module).slices]
            for name, module in script.modules.items()
        }
    beside = {"tokenizer": script.tokenizer, "chat_template": script.chat_template, "dtype": recipe.dtype}
    content |= {key: value for key, value in beside.items() if value is not None}
    if recipe.exclude:
        content["exclude"] = list(recipe.exclude)
    if recipe.seed:
        content["seed"] = recipe.seed
    return content


def _entry(reference: Reference, label: str) -> str | dict[str, str]:
    if reference.lora is not None:
        return {"path": str(reference.lora), "over": str(reference.model), "name": label}
    path = str(reference)
    return path if Path(path).name == label else {"path": path, "name": label}


def _cut(cuts: Sequence[Cut], module: object) -> Cut:
    return next(cut for cut in cuts if cut.module is module)


def _slice(piece: Slice, assembly: Assembly, based: bool) -> dict[str, Any]:
    sources = [
        {"model": assembly.models[one.model].label, "layers": list(one.layers or (0, 0))}
        for one in piece.sources
        if not (based and assembly.base is not None and one.model == assembly.script.base)
    ]
    under = [one.layers for one in piece.sources if one.model == assembly.script.base and one.layers is not None]
    return {"sources": sources, **({"base_layers": list(under[0])} if based and under else {})}


def _method(slots: Sequence[Slot], names: Sequence[str], where: str) -> dict[str, Any]:
    """One method for all tensors, its fields by task and by pattern."""
    said = {slot.name: plain(slot.method) for slot in slots if slot.method is not None}
    if not said:
        raise RecipeError(["nothing is merged: every tensor is the base's."], where)
    kinds = {one["name"] for one in said.values()}
    if len(kinds) > 1:
        raise RecipeError(
            [f"its tensors are merged by several methods of ours ({', '.join(sorted(kinds))}); a recipe of ours has one."], where
        )
    method: dict[str, Any] = {"name": kinds.pop()}
    for key in next(iter(said.values())):
        if key != "name":
            method[key] = _field(key, {name: one[key] for name, one in said.items()}, where)
    plain_ones = {key: value for key, value in method.items() if key != "name" and not isinstance(value, Mapping)}
    for key, value in method.items():
        if isinstance(value, Mapping):
            try:
                build(method["name"], {**plain_ones, key: value})
            except RecipeError as error:
                problem = f"`{key}` differs between tensors, and `{method['name']}` of ours has one for all."
                raise RecipeError([problem], where) from error
    return method


def _field(key: str, values: Mapping[str, Any], where: str) -> Any:
    first = next(iter(values.values()))
    if all(value == first for value in values.values()):
        return first
    tasks = list(dict.fromkeys(task for value in values.values() if isinstance(value, Mapping) for task in value["per_task"]))
    numbers = [
        one for value in values.values() for one in (value["per_task"].values() if isinstance(value, Mapping) else [value])
    ]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        raise RecipeError([f"`{key}` differs between tensors, and ours cannot vary it so. Got {first!r} and others."], where)
    if not tasks:
        return _patterns(values)
    by_task = {
        task: _patterns(
            {name: value["per_task"].get(task, 0.0) if isinstance(value, Mapping) else value for name, value in values.items()}
        )
        for task in tasks
    }
    return {"per_task": by_task}


def _patterns(values: Numbers) -> Any:
    """A number, or numbers by pattern, the first one that fits counting."""
    common, _ = Counter(values.values()).most_common(1)[0]
    if len(set(values.values())) == 1:
        return common
    found: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        words = name.split(".")
        number = next((index for index, word in enumerate(words) if word.isdigit()), None)
        if number is None:
            if value != common:
                found[name] = value
            continue
        layers.setdefault(".".join(words[: number + 1]), {})[".".join(words[number + 1 :])] = value
    for layer, inside in layers.items():
        usual, _ = Counter(inside.values()).most_common(1)[0]
        for part, value in _parts(inside, usual).items():
            found[f"{layer}.{part}"] = value
        if usual != common:
            found[f"{layer}.*"] = usual
    return {"per_pattern": {**found, "*": common}}


def _parts(inside: Numbers, usual: float) -> dict[str, float]:
    """The tensors of a layer that differ from most, by their first word where all below it agree."""
    groups: dict[str, set[float]] = {}
    for rest, value in inside.items():
        groups.setdefault(rest.split(".")[0], set()).add(value)
    found: dict[str, float] = {}
    for rest, value in inside.items():
        head = rest.split(".")[0]
        if len(groups[head]) == 1 and value != usual and "." in rest:
            found[f"{head}.*"] = value
        elif value != usual:
            found[rest] = value
        elif len(groups[head]) > 1:
            continue
    return found
