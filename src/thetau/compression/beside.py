"""What a method makes for single tasks, kept beside the merged model: in its folder `tasks`, where `thetau evaluate` finds it.

Of methods with masks (EMR, TALL) it is one file over the base, with the vector that the tasks share and a bit an entry for each. Of others (Twin)
it is a file a task, with what its vector is more than the merged one: a product of two thin matrices where the method says a rank and this gives
it back, else the entries that are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thetau.checkpoint import Source, open_store
from thetau.compression.forms import Form, LowRank, Sparse
from thetau.compression.tasks import compress_tasks, open_task
from thetau.compression.write import compress
from thetau.engine.executor import Engine
from thetau.errors import CheckpointError, RecipeError
from thetau.facade import Expression, merge, outputs, recipe_vectors
from thetau.facade import open as open_weights
from thetau.fields import PerPattern
from thetau.methods import build, name_of
from thetau.methods.masks import Masked
from thetau.parts import Emit, Method
from thetau.recipes import Recipe
from thetau.recipes.loading import split_method
from thetau.vectors.identity import identities

FOLDER = "tasks"  # inside a merged model's
MASKS = "masks.safetensors"
EXACT = 1e-3  # relative error of a product that gives a task's part back


def check_parts(recipe: Recipe) -> tuple[Method, Emit]:
    """The method of a recipe, and what it makes for single tasks. Raises `RecipeError`: nothing, or not beside a model."""
    name, fields = split_method(recipe.method)
    method = build(name, fields)
    emit = method.chain().emit
    problems = []
    if emit is None:
        problems.append(f"`{name_of(method)}` makes nothing for single tasks. `emr`, `tall_masks` and `twin` do.")
    if recipe.arranged or recipe.output != "model":
        problems.append(
            "what single tasks have stands beside a model of the base's own layers: leave `slices`, `tokenizer` and `output: vector` out."
        )
    if problems or emit is None:
        raise RecipeError(problems, "--tasks")
    return method, emit


def keep_parts(recipe: Recipe, merged: str | Path, *, engine: Engine | None = None) -> dict[str, Path]:
    """Write what a recipe's method makes for single tasks into the folder of the model that the recipe was merged into; task → file.

    Raises:
        RecipeError: the method makes nothing for single tasks.
        CheckpointError: an input cannot be read.
        OutputError: the files are there, or cannot be written.
    """
    method, emit = check_parts(recipe)
    folder = Path(merged) / FOLDER
    base, vectors = recipe_vectors(recipe)
    tasks = identities(vectors, None)
    folder.mkdir(exist_ok=True)
    match emit:
        case Masked():
            compress_tasks(vectors, folder / MASKS, method, names=tasks, exclude=recipe.exclude, engine=engine)
            return dict.fromkeys(tasks, folder / MASKS)
    given: dict[str, Any] = {"names": tasks, "seed": recipe.seed, "exclude": recipe.exclude, "engine": engine}
    given["evidence"] = recipe.evidence
    shared, made = merge(vectors, method, **given), outputs(vectors, method, **given)
    model = open_weights(merged)
    files = {task: folder / f"{task}.safetensors" for task in tasks}
    for task, path in files.items():
        more: dict[str, Any] = {"engine": engine, "exclude": recipe.exclude}
        vector = Expression((made[task] - shared).terms, reference=model.reference, name=task)  # over the merged model
        form = _form(emit, base)
        if form is None or compress(vector, path, form, **more).error > EXACT:
            path.unlink(missing_ok=True)  # matrices that the method takes apart may lie in one tensor
            compress(vector, path, Sparse(density=None), **more)
    return files


def _form(emit: Emit, base: Expression) -> Form | None:
    """Products of the ranks that the method says; None where it says none."""
    ranks = {name: emit.rank(spec.shape) for name, spec in base.specs().items() if len(spec.shape) >= 2}
    known = {name: float(rank) for name, rank in ranks.items() if rank is not None}
    return LowRank(rank=PerPattern({**known, "*": 1.0})) if known else None


def parts_beside(merged: Path, base: Expression) -> Mapping[str, Expression]:
    """The models of the tasks for which a merged model's folder keeps something; task → model, lazily.

    Raises:
        CheckpointError: a file is damaged, or of another model than the one beside it.
    """
    folder = merged / FOLDER
    if not folder.is_dir():
        return {}
    found: dict[str, Expression] = {}
    if (folder / MASKS).is_file():
        store = open_store(folder / MASKS)
        _check(store.stored, base)
        found |= {task: base + open_task(folder / MASKS, task) for task in store.tasks}
    model = open_weights(merged)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != MASKS:
            vector = open_weights(path)
            _check(vector.sources()[0], model)
            found[path.name.removesuffix(".safetensors")] = model + vector
    return found


def _check(part: Source, model: Expression) -> None:
    """Nothing where a file says that it was made over a model. Raises `CheckpointError`."""
    (_, source), *_ = model.terms
    if part.metadata.get("thetau.base") != source.fingerprint():
        raise CheckpointError(
            f"{part.label}: was not made over {model.label} as it is now. Merge again with `--tasks`, or remove the file."
        )
