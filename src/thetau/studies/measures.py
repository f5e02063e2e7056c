"""What the papers measure of several models at once, each in a session that holds them.

session = Session.open(["models/sst2", "models/mnli"], limits=Sample(limit=100).by_split(), exact=True)
tau_jp(session, Sample(limit=100)).pairs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from thetau.diagnostics.bounds import Bounds
from thetau.diagnostics.bounds import bounds as find_bounds
from thetau.diagnostics.cosines import Cosines
from thetau.diagnostics.cosines import cosines as find_cosines
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.disentanglement import disentanglement as find_disentanglement
from thetau.diagnostics.interference import Interference, interference
from thetau.diagnostics.kernel import KernelTest, kernel_test
from thetau.diagnostics.landscape import Landscape
from thetau.diagnostics.landscape import landscape as find_landscape
from thetau.diagnostics.layers import Layers
from thetau.diagnostics.layers import layers as find_layers
from thetau.errors import DataError, RecipeError
from thetau.evaluate.merging import at_scale
from thetau.evaluate.options import BASE, Sample
from thetau.evaluate.session import Session
from thetau.evaluate.tuned import one_space, open_tuned, read_vectors
from thetau.facade import merge
from thetau.models import load_encoder, read_weights
from thetau.pace import each
from thetau.parts import Method
from thetau.studies.options import DisentanglementGrid, LayerSample, LossBounds, Plane


def tau_jp(session: Session, options: Sample | None = None) -> Interference:
    """τJp of every pair of the session's models, beside cosine and the accuracy that addition keeps.

    Raises `DataError`: fewer than two models.
    """
    return interference(session.space, session.linear, session.vectors, split=(options or Sample()).split)


def disentanglement(session: Session, options: DisentanglementGrid | None = None) -> Disentanglement:
    """The disentanglement error of the session's two models over a grid of α in [−2, 2]. Raises `RecipeError`: not two."""
    require_two([model.task for model in session.models])
    (found,) = disentanglements(session, options)
    return found


def disentanglements(session: Session, options: DisentanglementGrid | None = None) -> tuple[Disentanglement, ...]:
    """The same of every pair of the session's models. Raises `RecipeError`: fewer than two."""
    given = options or DisentanglementGrid()
    require_several([model.task for model in session.models])
    return tuple(
        find_disentanglement(
            session.space,
            session.evaluator,
            pair,
            grid=[round(-2 + 4 * i / (given.points - 1), 12) for i in range(given.points)],
            distance=given.distance,
            symmetric=not given.one_way,
            split=given.sample.split,
            name="tangent" if session.tangent else "weights",
        )
        for pair in each("pair", list(combinations(session.vectors, 2)), " and ".join)
    )


def kernel(session: Session, options: Sample | None = None) -> KernelTest:
    """Each of the session's models against its own linearisation: accuracy and relative error."""
    return kernel_test(session.plain, session.linear, session.evaluator, list(session.vectors), split=(options or Sample()).split)


def layers(
    session: Session,
    options: LayerSample | None = None,
    *,
    merged: Mapping[str, str] = MappingProxyType({}),
    methods: Mapping[str, Method] = MappingProxyType({}),
) -> Layers:
    """What the session's models, merged models (name → path) and merges of the models by `methods` do at every layer.

    Raises `DataError`: models of the tangent space, no model; `RecipeError`: a name that is there twice, one model to merge.
    """
    given = options or LayerSample()
    if session.tangent:
        raise DataError("layers are looked at in models of the model's own space; these belong to the tangent space.")
    own = {task: session.plain.weights({task: 1.0}) for task in session.vectors}
    found = merges(session, merged, methods)
    return find_layers(session.evaluator, session.weights, own, found, split=given.sample.split, rows=given.rows)


def landscape(
    session: Session,
    options: Plane | None = None,
    *,
    merged: Mapping[str, str] = MappingProxyType({}),
    methods: Mapping[str, Method] = MappingProxyType({}),
) -> Landscape:
    """Loss and accuracy on the plane of the base and the session's two models, or of its three models, with merges marked.

    Raises `DataError`: neither two models nor three, merges of models of the tangent space; `RecipeError`: a name that is there twice.
    """
    given = options or Plane()
    if session.tangent and (merged or methods):
        raise DataError("merged models are marked in the model's own space; these belong to the tangent space.")
    return find_landscape(
        session.space,
        session.evaluator,
        session.vectors,
        grid=given.grid,
        steps=given.steps,
        merged=merges(session, merged, methods),
        base=session.weights,
        split=given.sample.split,
        name="tangent" if session.tangent else "weights",
    )


def merges(session: Session, merged: Mapping[str, str], methods: Mapping[str, Method]) -> dict[str, Mapping[str, Tensor]]:
    """The weights of merged models (name → path), and of merges of the session's models, by name.

    Raises `RecipeError`: a name that is there twice, one model to merge.
    """
    if twice := [name for name in methods if name in merged]:
        raise RecipeError([f"two merges are called {twice[0]!r}: name one of them otherwise, as NAME=PATH."], "options")
    if methods and len(session.models) < 2:
        raise RecipeError(["--method merges the models: give at least two."], "options")
    found: dict[str, Mapping[str, Tensor]] = {
        name: read_weights(path, base=session.encoder.folder) for name, path in merged.items()
    }
    vectors = session.expressions() if methods else {}
    for name, method in methods.items():
        vector = merge(list(vectors.values()), method, names=list(vectors)).state_dict()
        found[name] = at_scale(session.weights, vector, 1.0)
    return found


def named_merges(given: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH`, or a path under its last part. Raises `RecipeError`: a name that is there twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).name, text
        if name in found:
            raise RecipeError([f"two merges are called {name!r}: name one of them otherwise, as NAME=PATH."], "options")
        found[name] = path
    return found


def bounds(session: Session, options: LossBounds | None = None) -> Bounds:
    """Loss gaps of addition, negation and out-of-distribution use of the session's models, beside the bounds of theory.

    Raises:
        RecipeError: the models' vectors belong to the tangent space.
        DataError: fewer than two models.
    """
    given = options or LossBounds()
    if session.tangent:
        raise RecipeError(
            [
                "the bounds are about the model itself, whose Hessian at θ_i they take; these vectors belong to the tangent space. "
                "Give models of paradigm standard or attention."
            ],
            "models",
        )
    return find_bounds(
        session.plain,
        session.evaluator,
        session.vectors,
        split=given.split,
        scale=given.scale,
        smoothness=not given.no_smoothness,
        tolerance=given.tolerance,
        max_iterations=given.max_iterations,
    )


def cosines(groups: Mapping[str, Sequence[str | Path]], *, base: str | Path = BASE) -> Cosines:
    """Cosine similarity of the vectors of group → models, group by group; no data are read.

    Raises `DataError`: a model of another base, of two paradigms in one group, or of a task that is twice in a group.
    """
    encoder = load_encoder(str(base))
    weights = encoder.weights(exact=True)
    vectors: dict[str, Mapping[str, Mapping[str, Tensor]]] = {}
    for name, models in groups.items():
        tuned = [open_tuned(model) for model in models]
        one_space(tuned, encoder)
        vectors[name] = read_vectors(tuned, encoder, weights)
    return find_cosines(vectors)


def require_two(models: Sequence[object]) -> None:
    """Refuse other than two models. Raises `RecipeError`."""
    if len(models) != 2:
        raise RecipeError([f"the disentanglement error is of two models. Got {len(models)}."], "models")


def require_several(models: Sequence[object]) -> None:
    """Refuse fewer than two models. Raises `RecipeError`."""
    if len(models) < 2:
        raise RecipeError(
            [f"the disentanglement error is of two models, or of each two of several. Got {len(models)}."], "models"
        )


def require_plane(models: Sequence[object]) -> None:
    """Refuse other than two or three models. Raises `RecipeError`."""
    if len(models) not in (2, 3):
        raise RecipeError(
            [f"a landscape is the plane of the base and two models, or of three models. Got {len(models)}."], "models"
        )
