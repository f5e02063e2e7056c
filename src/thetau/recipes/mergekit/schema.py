"""What a recipe in mergekit's format may say, and every problem of its form, with line and column.

mergekit reads a key that it does not know as if it were not there; here that is an error, which names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thetau.errors import RecipeError, nearest
from thetau.recipes.mergekit.reference import Reference, parse
from thetau.recipes.reading import Document
from thetau.recipes.schema import FLOAT_NAMES

Where = tuple[str | int, ...]
Scalar = bool | int | float | str
Settings = Mapping[str, "Setting"]

_TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_OURS = ("method", "base")  # of thetau's own recipes
_ONLY_THEIRS = ("merge_method", "base_model", "slices", "modules", "parameters", "tokenizer_source", "out_dtype")


@dataclass(frozen=True)
class Choice:
    """A value, or a list of them that is spread over the layers, for the tensors whose name fits the filter."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None
    where: Where


@dataclass(frozen=True)
class Setting:
    """A parameter as the recipe gives it: the first choice whose filter fits counts."""

    choices: tuple[Choice, ...]
    where: Where


@dataclass(frozen=True)
class Input:
    """A model that takes part; `layers` is its range where slices are cut, end excluded."""

    model: Reference
    where: Where
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A run of the output's layers, and what it is made of."""

    sources: tuple[Input, ...]
    where: Where
    base: Reference | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A tower of the model: whole models side by side, or slices."""

    where: Where
    slices: tuple[Slice, ...] = ()
    models: tuple[Input, ...] = ()
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """One document: a merge. `modules` has the one key None where the recipe names no modules."""

    method: str
    modules: Mapping[str | None, Module]
    document: Document
    base: Reference | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    name: str | None = None

    def references(self) -> list[Reference]:
        """Every model that is named, the base first, then in the recipe's order."""
        found: dict[Reference, None] = {}
        if self.base is not None:
            found[self.base] = None
        for module in self.modules.values():
            for one in module.models:
                found[one.model] = None
            for piece in module.slices:
                for one in piece.sources:
                    found[one.model] = None
                if piece.base is not None:
                    found[piece.base] = None
        return list(found)

    def place(self, reference: Reference) -> Where:
        """Where the document names a model first."""
        if reference == self.base:
            return ("base_model",)
        for module in self.modules.values():
            for one in (*module.models, *(one for piece in module.slices for one in piece.sources)):
                if one.model == reference:
                    return (*one.where, "model")
            for piece in module.slices:
                if piece.base == reference:
                    return (*piece.where, "base_model")
        return ()


def is_mergekit(content: Any) -> bool:
    """Whether a document is a recipe of mergekit's, not of ours."""
    if not isinstance(content, Mapping) or any(key in content for key in _OURS):
        return False
    return any(key in content for key in _ONLY_THEIRS)


class Reader:
    """Reads one document, and collects what is wrong with it."""

    def __init__(self, document: Document, folder: Path | None) -> None:
        self.document, self.folder = document, folder
        self.problems: list[str] = []

    def wrong(self, where: Where, problem: str) -> None:
        """Note a problem, with its place in the text."""
        self.problems.append(f"{self.document.at(where)}: {problem}")

    def script(self) -> Script:
        """The merge that the document describes.

        Raises:
            RecipeError: with all that is wrong.
        """
        content = self.document.content
        self._keys(content, _TOP, ())
        forms = [key for key in ("models", "slices", "modules") if content.get(key)]
        if len(forms) != 1:
            self.wrong((), f"exactly one of `models`, `slices` and `modules` must be there. Got {', '.join(forms) or 'none'}.")
        method = content.get("merge_method")
        if not isinstance(method, str):
            self.wrong(("merge_method",), "`merge_method` must be given, such as `merge_method: ties`.")
        modules: dict[str | None, Module] = {}
        if content.get("modules"):
            for name, given in self._mapping(content["modules"], ("modules",)).items():
                modules[str(name)] = self._module(given, ("modules", str(name)), ("slices", "models", "parameters"))
        else:
            bare = {key: content[key] for key in ("slices", "models") if content.get(key)}
            modules[None] = self._module(bare, (), ("slices", "models"))
        source = content.get("tokenizer_source")
        if source is not None and content.get("tokenizer") is not None:
            self.wrong(("tokenizer",), "`tokenizer` and `tokenizer_source` say the same: leave one of them out.")
        script = Script(
            method=method if isinstance(method, str) else "",
            modules=modules,
            document=self.document,
            base=self._reference(content.get("base_model"), ("base_model",)) if content.get("base_model") is not None else None,
            parameters=self._settings(content.get("parameters"), ("parameters",)),
            dtype=self._dtype(content.get("dtype"), ("dtype",)),
            out_dtype=self._dtype(content.get("out_dtype"), ("out_dtype",)),
            tokenizer=content.get("tokenizer") if source is None else {"source": source},
            chat_template=self._text(content.get("chat_template"), ("chat_template",)),
            name=self._text(content.get("name"), ("name",)),
        )
        if self.problems:
            raise RecipeError(self.problems, "mergekit recipe")
        return script

    def _module(self, given: Any, where: Where, known: Sequence[str]) -> Module:
        given = self._mapping(given, where)
        self._keys(given, known, where)
        if bool(given.get("slices")) == bool(given.get("models")) and where:
            self.wrong(where, "a module has either `slices` or `models`.")
        return Module(
            where=where,
            slices=tuple(
                self._slice(one, (*where, "slices", i)) for i, one in self._list(given.get("slices"), (*where, "slices"))
            ),
            models=tuple(
                self._input(one, (*where, "models", i), ("model", "parameters"))
                for i, one in self._list(given.get("models"), (*where, "models"))
            ),
            parameters=self._settings(given.get("parameters"), (*where, "parameters")),
        )

    def _slice(self, given: Any, where: Where) -> Slice:
        given = self._mapping(given, where)
        self._keys(given, ("sources", "base_model", "residual_weight", "parameters"), where)
        if given.get("residual_weight") is not None:
            self.wrong(
                (*where, "residual_weight"), "`residual_weight` does nothing in mergekit either; scale `o_proj` and `down_proj`."
            )
        sources = tuple(
            self._input(one, (*where, "sources", i), ("model", "layer_range", "parameters"))
            for i, one in self._list(given.get("sources"), (*where, "sources"))
        )
        if not sources:
            self.wrong(where, "a slice needs `sources`, each with `model` and `layer_range`.")
        lengths = {one.layers[1] - one.layers[0] for one in sources if one.layers is not None}
        if len(lengths) > 1:
            said = ", ".join(f"{one.model} {list(one.layers)}" for one in sources if one.layers is not None)
            self.wrong((*where, "sources"), f"the sources of a slice must have equally many layers. Got {said}.")
        base = given.get("base_model")
        return Slice(
            sources=sources,
            where=where,
            base=self._reference(base, (*where, "base_model")) if base is not None else None,
            parameters=self._settings(given.get("parameters"), (*where, "parameters")),
        )

    def _input(self, given: Any, where: Where, known: Sequence[str]) -> Input:
        given = {"model": given} if isinstance(given, str) else self._mapping(given, where)
        self._keys(given, known, where)
        if "model" not in given:
            self.wrong(where, "`model` is missing: a path, a hub id, or `model+adapter`.")
        layers = given.get("layer_range")
        if "layer_range" in known:
            pair = isinstance(layers, list) and len(layers) == 2 and all(type(one) is int for one in layers)
            if not pair or not 0 <= layers[0] < layers[1]:
                self.wrong(
                    (*where, "layer_range"),
                    f"`layer_range` is `[first, end]`, end excluded, with at least one layer. Got {layers!r}.",
                )
                layers = None
        return Input(
            model=self._reference(given.get("model", "?"), (*where, "model")),
            where=where,
            layers=(layers[0], layers[1]) if layers else None,
            parameters=self._settings(given.get("parameters"), (*where, "parameters")),
        )

    def _settings(self, given: Any, where: Where) -> dict[str, Setting]:
        if given is None:
            return {}
        return {
            str(name): Setting(tuple(self._choices(value, (*where, str(name)))), (*where, str(name)))
            for name, value in self._mapping(given, where).items()
            if value is not None
        }

    def _choices(self, value: Any, where: Where) -> Iterator[Choice]:
        if isinstance(value, Mapping):
            yield self._conditional(value, where)
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for index, one in enumerate(value):
                if isinstance(one, Mapping):
                    yield self._conditional(one, (*where, index))
                else:
                    self.wrong((*where, index), f"either all entries are `{{filter, value}}`, or none is. Got {one!r}.")
        else:
            yield Choice(self._value(value, where), None, where)

    def _conditional(self, given: Mapping[Any, Any], where: Where) -> Choice:
        self._keys(given, ("value", "filter"), where)
        if "value" not in given:
            self.wrong(where, "`value` is missing.")
        chosen = given.get("filter")
        if chosen is not None and not isinstance(chosen, str):
            self.wrong((*where, "filter"), f"a filter is a text. Got {chosen!r}.")
        return Choice(self._value(given.get("value", 0), (*where, "value")), chosen if chosen != "*" else None, where)

    def _value(self, value: Any, where: Where) -> Scalar | tuple[Scalar, ...]:
        if isinstance(value, list):
            if not value:
                self.wrong(where, "a gradient needs at least one value. Got an empty list.")
            if not all(isinstance(one, Scalar) for one in value):
                self.wrong(where, f"a gradient is a list of plain values. Got {value!r}.")
            numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in value]
            if any(numbers) and not all(numbers):
                self.wrong(where, f"a gradient has numbers, or none. Got {value!r}.")
            return tuple(value)
        if not isinstance(value, Scalar):
            self.wrong(where, f"a parameter is a number, a text, true or false, or a list of them. Got {value!r}.")
            return 0
        return value

    def _reference(self, value: Any, where: Where) -> Reference:
        try:
            return parse(value, ".".join(map(str, where)), self.folder)
        except RecipeError as error:
            for problem in error.problems:
                self.wrong(where, problem)
            return parse("unreadable")

    def _dtype(self, value: Any, where: Where) -> str | None:
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name is not None and name not in FLOAT_NAMES:
            self.wrong(where, f"unknown dtype {value!r}.{nearest(str(value), FLOAT_NAMES)} Known: {', '.join(FLOAT_NAMES)}.")
            return None
        return name

    def _text(self, value: Any, where: Where) -> str | None:
        if value is not None and not isinstance(value, str):
            self.wrong(where, f"must be a text. Got {value!r}.")
            return None
        return value

    def _mapping(self, value: Any, where: Where) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            self.wrong(where, f"must be a mapping. Got {value!r}.")
            return {}
        return value

    def _list(self, value: Any, where: Where) -> Iterator[tuple[int, Any]]:
        if value is None:
            return
        if not isinstance(value, list):
            self.wrong(where, f"must be a list. Got {value!r}.")
            return
        yield from enumerate(value)

    def _keys(self, given: Mapping[Any, Any], known: Sequence[str], where: Where) -> None:
        for key in given:
            if key not in known:
                self.wrong((*where, str(key)), f"unknown key {key!r}.{nearest(str(key), known)} Known here: {', '.join(known)}.")


def read_scripts(documents: Sequence[Document], where: str, folder: Path | None) -> list[Script]:
    """The merges of a file, those that others build on first.

    Raises:
        RecipeError: with every problem of every document, by line and column.
    """
    problems: list[str] = []
    scripts = []
    for document in documents:
        try:
            scripts.append(Reader(document, folder).script())
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems, where)
    return _ordered(scripts, where)


def _ordered(scripts: Sequence[Script], where: str) -> list[Script]:
    """Those that others name first; the one that nothing builds on last."""
    named = {script.name: script for script in scripts if script.name is not None}
    if len(named) != len([script for script in scripts if script.name is not None]):
        raise RecipeError(["two documents have the same `name`."], where)
    done: list[Script] = []
    under_way: list[Script] = []

    def visit(script: Script) -> None:
        if any(script is one for one in done):
            return
        if any(script is one for one in under_way):
            raise RecipeError([f"the documents build on one another in a circle: {script.name}."], where)
        under_way.append(script)
        for reference in script.references():
            if reference.model.path in named:
                visit(named[reference.model.path])
        under_way.pop()
        done.append(script)

    for script in scripts:
        visit(script)
    used = {reference.model.path for script in scripts for reference in script.references()}
    last = [script for script in done if script.name is None or script.name not in used]
    if len(last) > 1:
        labels = ", ".join(script.name or "the one without a name" for script in last)
        raise RecipeError([f"several documents are results on which nothing builds ({labels}); a recipe makes one model."], where)
    return [*(script for script in done if script is not last[0]), last[0]]
