"""From the values of a trial to a model that answers: merges in memory, of vectors that were read once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from thetau.engine.executor import Engine
from thetau.errors import DataError, RecipeError
from thetau.evaluate.merging import held
from thetau.evaluate.options import Reading
from thetau.evaluate.session import Session
from thetau.evaluate.spaces import Reader, Space
from thetau.evaluate.tuned import Tuned, open_tuned
from thetau.facade import Expression, merge, recipe_vectors
from thetau.finetune.output import read_record
from thetau.methods import build
from thetau.models import weights_hash
from thetau.parts import Method
from thetau.recipes import Recipe
from thetau.recipes.loading import split_method
from thetau.vectors.identity import identities

MERGED = "merged"


@final
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A recipe whose models are in memory, and the session that measures what becomes of them.

    - `identities`: what the recipe calls its models, in its order. `tasks`: the task of each.
    - `base`: where names and layers come from. `vectors`: identity → the vector in memory.
    - `single`: the vectors' own space, by task.
    """

    recipe: Recipe
    session: Session
    method: Method
    identities: tuple[str, ...]
    tasks: tuple[str, ...]
    base: Expression
    vectors: Mapping[str, Expression]
    single: Space
    hashes: Mapping[str, str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the base's tensors."""
        return tuple(self.base.specs())


def open_mixture(recipe: Recipe, tasks: Sequence[str], reading: Reading, validation: int | None = None) -> Mixture:
    """Read the models of a recipe, and what they are measured on: their own tasks, and `tasks` besides, on at most so many validation examples.

    Raises:
        RecipeError: a recipe that no session can measure: without a base, with layers moved about, of a vector.
        DataError: a model whose task nobody names, of another base, in another space; a causal language model.
    """
    problems = []
    if recipe.base is None:
        problems.append("base is missing: tasks are measured by heads that are made from it.")
    if recipe.arranged:
        problems.append(
            "`slices`, `modules`, `tokenizer` and `chat_template` make another model than the base, which a search cannot measure."
        )
    if recipe.output != "model":
        problems.append(f"output must be `model`, which is what is measured. Got `{recipe.output}`.")
    if problems or recipe.base is None:
        raise RecipeError(problems, "recipe")
    base, lazy = recipe_vectors(recipe)
    names = identities(lazy, None)
    tuned = [_tuned(entry.path, name) for entry, name in zip(recipe.entries(), names, strict=True)]
    own = [one.task for one in tuned]
    session = Session.open(
        [one.given for one in tuned],
        base=recipe.base,
        tasks=list(dict.fromkeys([*own, *tasks])),
        limits={"validation": validation},
        reading=reading,
    )
    if session.encoder.kind == "causal":
        raise DataError(
            f"{session.base}: is a causal language model, whose answers are no features that a search could read a part of. "
            "Choose λ with `thetau tune`, other fields with `thetau sweep`."
        )
    read = {name: vector.state_dict() for name, vector in zip(names, lazy, strict=True)}
    method, fields = split_method(recipe.method)
    return Mixture(
        recipe=recipe,
        session=session,
        method=build(method, fields),
        identities=tuple(names),
        tasks=tuple(own),
        base=base,
        vectors={name: held(vector, base, name) for name, vector in read.items()},
        single=session.space_of({task: read[name] for task, name in zip(own, names, strict=True)}),
        hashes={name: weights_hash(vector) for name, vector in read.items()},
    )


def _tuned(path: str, name: str) -> Tuned:
    """A model by its record, or as of the task that the recipe calls it by."""
    recorded = Path(path).is_dir() and read_record(Path(path)) is not None
    return open_tuned(path if recorded else f"{name}={path}")


@final
class Mixer:
    """Makes the models of trials, one at a time. `say` is told each warning of the merges once."""

    def __init__(self, mixture: Mixture, engine: Engine, say: Callable[[str], None]) -> None:
        self._mixture, self._engine, self._say = mixture, engine, say
        self._last: tuple[Mapping[str, Any], Space] | None = None
        self._said: set[str] = set()

    def made(self, plain: Mapping[str, Any]) -> Reader:
        """What reads tasks from the merge of a method. Nothing is merged where the method is a plain sum, or only its λ has changed.

        Raises:
            RecipeError: the method cannot be built.
            ThetauError: the merge fails, or the model cannot be made of it.
        """
        name, fields = split_method(plain)
        method, mixture = build(name, fields), self._mixture
        alone = None if mixture.recipe.exclude else method.chain().combination(mixture.identities)
        if alone is not None:
            tasks = dict(zip(mixture.identities, mixture.tasks, strict=True))
            return mixture.single.loaded({tasks[identity]: value for identity, value in alone.items()})
        scale = fields.get("scale")
        at_one = isinstance(scale, int | float) and not isinstance(scale, bool) and not method.chain().models
        whole = {**plain, "scale": 1.0} if at_one else dict(plain)
        if self._last is None or self._last[0] != whole:
            self._last = None  # not two merged vectors at once
            self._last = whole, mixture.session.space_of({MERGED: self._merged(replace(method, scale=1.0) if at_one else method)})  # type: ignore[type-var]
        return self._last[1].loaded({MERGED: float(scale) if at_one else 1.0})  # type: ignore[arg-type]

    def _merged(self, method: Method) -> dict[str, Tensor]:
        mixture = self._mixture
        recipe = mixture.recipe
        mixture.session.evaluator.load_base()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            merged = merge(
                list(mixture.vectors.values()),
                method,
                names=mixture.identities,
                seed=recipe.seed,
                exclude=recipe.exclude,
                engine=self._engine,
                evidence=recipe.evidence,
            ).state_dict(engine=self._engine)
        for one in told:
            if str(one.message) not in self._said:
                self._said.add(str(one.message))
                self._say(f"warning: {one.message}")
        return merged
