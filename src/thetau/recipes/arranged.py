"""Our recipes whose layers or rows are moved about: the same plan as for mergekit's, with one method of ours for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from thetau.checkpoint import Source
from thetau.engine.executor import Engine
from thetau.engine.patchwork import Patchwork
from thetau.errors import RecipeError, nearest
from thetau.parts import Method
from thetau.recipes.mergekit.plan import Assembly
from thetau.recipes.mergekit.reference import Place, Reference
from thetau.recipes.mergekit.schema import Input, Module, Script, Slice, Where
from thetau.recipes.reading import Document
from thetau.recipes.schema import Recipe, SliceEntry


def arrange(
    recipe: Recipe, method: Method, base: Source | None, models: Mapping[str, Source], engine: Engine | None = None
) -> Patchwork:
    """The model that a recipe describes; `models` are open, by name.

    Raises:
        RecipeError: everything that headers and configs can tell is wrong.
    """
    references = {name: Reference(model=Place(path=name)) for name in models}
    under = Reference(model=Place(path=recipe.base)) if base is not None and recipe.base is not None else None
    paths = {entry.path: name for entry, name in zip(recipe.entries(), models, strict=True)}
    problems: list[str] = []

    def slices(entries: Sequence[SliceEntry], where: Where) -> tuple[Slice, ...]:
        found = []
        for index, entry in enumerate(entries):
            inputs = []
            for number, one in enumerate(entry.sources):
                name = one.model if one.model in references else paths.get(one.model)
                if name is None:
                    problems.append(
                        f"{'.'.join(map(str, where))}.{index}: no model is called {one.model!r}.{nearest(one.model, references)}"
                    )
                    continue
                inputs.append(Input(references[name], (*where, index, "sources", number), (one.layers[0], one.layers[1])))
            if under is not None:
                first, end = entry.base_layers or entry.sources[0].layers
                inputs.append(Input(under, (*where, index), (first, end)))
            found.append(Slice(tuple(inputs), (*where, index)))
        return tuple(found)

    modules: dict[str | None, Module] = {}
    for name, entries in recipe.modules.items():
        modules[name] = Module(("modules", name), slices=slices(entries, ("modules", name)))
    if not modules and recipe.slices:
        modules[None] = Module(("slices",), slices=slices(recipe.slices, ("slices",)))
    if not modules:
        modules[None] = Module((), models=tuple(Input(one, ("models",)) for one in references.values()))
    if problems:
        raise RecipeError(problems, "recipe")
    said = {"source": recipe.tokenizer} if isinstance(recipe.tokenizer, str) else recipe.tokenizer
    script = Script("", modules, Document({}, {}), base=under, tokenizer=said, chat_template=recipe.chat_template)
    opened = {references[name]: source for name, source in models.items()}
    labels = {reference: name for name, reference in references.items()}
    if under is not None and base is not None:
        opened[under], labels[under] = base, base.label
    assembly = Assembly(
        script,
        "recipe",
        {},
        None,
        recipe.seed,
        recipe.exclude,
        engine or Engine(),
        fixed=method,
        opened=opened,
        labels=labels,
        beside=under if recipe.config == "base" else _beside(recipe, references, paths),
    )
    return assembly.patchwork()


def _beside(recipe: Recipe, references: Mapping[str, Reference], paths: Mapping[str, str]) -> Reference | None:
    """The model whose config the recipe asks for; None for the first one.

    Raises:
        RecipeError: no model is called so.
    """
    if recipe.config in (None, "base"):
        return None
    words = {**paths, **{Path(path).name: name for path, name in paths.items()}, **{name: name for name in references}}
    name = words.get(recipe.config or "")
    if name is None:
        raise RecipeError(
            [f"config: must be `base` or a model. Got {recipe.config!r}.{nearest(recipe.config or '', words)}"], "recipe"
        )
    return references[name]
