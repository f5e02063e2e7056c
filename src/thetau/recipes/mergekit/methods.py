"""mergekit's methods by name: their parameters with its defaults, and what each is among ours with the values that hold at a tensor.

What mergekit calls a weight multiplies a task vector before a sign is elected, its density is counted in each tensor and rounded down, and
its rescaling keeps the sum of magnitudes: settings of our methods, so that a recipe means here what it means there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thetau.checkpoint import matches
from thetau.errors import RecipeError
from thetau.fields import declared
from thetau.methods import (
    ArceeFusion,
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    Karcher,
    Linear,
    ModelStock,
    Multislerp,
    Nearswap,
    Nuslerp,
    Passthrough,
    Ram,
    RamPlus,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
)
from thetau.parts import Method, PerPattern, PerTask, Varying

Values = Mapping[str, Any]
REQUIRED = object()
EVEN = 1e-6  # squares whose means add up to less count as equal in mergekit's `sce`


@dataclass(frozen=True)
class Parameter:
    """A parameter's type and default; `REQUIRED` where it has none."""

    kind: type
    default: Any = REQUIRED

    def read(self, key: str, value: Any, whose: str) -> Any:
        """A resolved value, or the default.

        Raises:
            RecipeError: it is missing, or of another type.
        """
        if value is None:
            if self.default is REQUIRED:
                raise RecipeError([f"`{key}` is missing{whose}: no level of the recipe gives it at this tensor."], key)
            return self.default
        if self.kind is bool and value in (0, 1):
            return bool(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (self.kind is int and value != int(value)) or self.kind is bool:
            raise RecipeError([f"`{key}`{whose} must be {_KINDS[self.kind]}. Got {value!r}."], key)
        return self.kind(value)


_KINDS: Mapping[type, str] = {float: "a number", int: "an integer", bool: "true or false"}
_WEIGHT = {"weight": Parameter(float)}
_TINY = 1e-8  # a sum of weights below this counts as 0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A method of mergekit's.

    - `base`: whether one of the models is the base (`required`), can be (`optional`), or counts as any other (None).
    - `fewest`, `most`: models besides the base.
    - `remark`: a sentence that the values at a tensor deserve, if any.
    - `build`: ours, from the shared values, those of each input, and the inputs' identities; `based` says whether there is a base.
    """

    build: Callable[[Values, Sequence[Values], Sequence[str], bool], Method]
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    per_input: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["required", "optional"] | None = None
    fewest: int = 1
    most: int | None = None
    remark: Callable[[Values, Sequence[Values]], str | None] = lambda shared, each: None

    def remarks(self, shared: Values, each: Sequence[Values]) -> list[str]:
        """What deserves to be said of the values that hold at a tensor, besides errors."""
        values = {key: parameter.read(key, shared.get(key), "") for key, parameter in self.shared.items()}
        inputs = [{key: parameter.read(key, given.get(key), "") for key, parameter in self.per_input.items()} for given in each]
        said = self.remark(values, inputs)
        return [said] if said else []

    def method(self, shared: Values, each: Sequence[Values], ids: Sequence[str], *, based: bool) -> Method | None:
        """Ours with the values that hold at a tensor; None where nothing stands beside the base, which then stays.

        Raises:
            RecipeError: a value is missing or wrong, or there are too many models, or too few.
        """
        if based and not ids and self.fewest <= 1:
            return None
        count = len(ids)
        if count < self.fewest or (self.most is not None and count > self.most):
            takes = (
                str(self.fewest)
                if self.most == self.fewest
                else f"at least {self.fewest}"
                if self.most is None
                else f"at most {self.most}"
            )
            beside = " besides the base" if self.base is not None else ""
            models = "model" if takes == "1" else "models"
            raise RecipeError([f"the method takes {takes} {models}{beside}. Got {count}: {', '.join(ids) or 'none'}."], "models")
        values = {key: parameter.read(key, shared.get(key), "") for key, parameter in self.shared.items()}
        inputs = [
            {key: parameter.read(key, given.get(key), f" for {name}") for key, parameter in self.per_input.items()}
            for name, given in zip(ids, each, strict=True)
        ]
        try:
            return self.build(values, inputs, ids, based)
        except ValueError as error:
            raise RecipeError([str(error)], "parameters") from error


def ours(method: Method) -> Spec:
    """A method of ours, the same at every tensor."""
    fewest, most = method.takes
    return Spec(
        build=lambda values, each, ids, based: narrowed(method, ids),
        base="required" if method.needs_base else None,
        fewest=fewest,
        most=most,
    )


def narrowed(method: Method, ids: Sequence[str], names: Sequence[str] | None = None) -> Method:
    """The method for some of the tasks and tensors: values by task and by pattern without those of others."""
    changed: dict[str, Any] = {}
    for name in declared(type(method)):
        value = method.__dict__[name]
        if isinstance(value, PerTask):
            changed[name] = PerTask({task: _fitting(number, names) for task, number in value.values.items() if task in ids})
        elif isinstance(value, PerPattern):
            changed[name] = _fitting(value, names)
        elif isinstance(value, Method):
            changed[name] = narrowed(value, ids, names)
    return replace(method, **changed) if changed else method  # type: ignore[type-var]


def joined(chosen: Mapping[str, Method]) -> Method | None:
    """One method for tensors with methods of one kind, by name: numbers that differ go by tensor; None where others do."""
    first = next(iter(chosen.values()))
    changed: dict[str, Any] = {}
    for key in declared(type(first)):
        values = {name: method.__dict__[key] for name, method in chosen.items()}
        one = values[next(iter(values))]
        if all(value == one for value in values.values()):
            continue
        tasks = list(dict.fromkeys(task for value in values.values() if isinstance(value, PerTask) for task in value.values))
        by_task: dict[str, dict[str, Any]] = {
            task: {name: value.values.get(task) if isinstance(value, PerTask) else value for name, value in values.items()}
            for task in tasks
        } or {"": values}
        if not all(type(number) in (int, float) for numbers in by_task.values() for number in numbers.values()):
            return None
        spread = {
            task: PerPattern({name: float(number) for name, number in numbers.items()}) for task, numbers in by_task.items()
        }
        changed[key] = PerTask(spread) if tasks else spread[""]
        if any(True for _ in declared(type(first))[key].rule.faults(changed[key])):
            return None  # a field that cannot vary by tensor
    return replace(first, **changed) if changed else first  # type: ignore[type-var]


def _fitting(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or not isinstance(value, PerPattern):
        return value
    known = frozenset(names)
    fits = {pattern: pattern in known or any(matches(one, [pattern]) for one in names) for pattern in value.values}
    return PerPattern({pattern: number for pattern, number in value.values.items() if fits[pattern]})


def patterns(method: Method) -> Iterator[tuple[str, list[str]]]:
    """Each field that varies by pattern, and its patterns."""
    for name in declared(type(method)):
        value = method.__dict__[name]
        for one in value.values.values() if isinstance(value, PerTask) else [value]:
            if isinstance(one, PerPattern):
                yield name, list(one.values)
        if isinstance(value, Method):
            yield from patterns(value)


def by_task(key: str, each: Sequence[Values], ids: Sequence[str], change: Callable[[float], float] = float) -> Varying:
    """One number where all inputs have the same, else one for each."""
    values = [change(given[key]) for given in each]
    return values[0] if len(set(values)) == 1 else PerTask(dict(zip(ids, values, strict=True)))


def _kept(each: Sequence[Values]) -> list[dict[str, Any]]:
    """Inputs whose density is 0 count nothing; densities of 1 and more keep everything."""
    return [
        {
            **given,
            "said": given["weight"],
            "weight": 0.0 if given["density"] <= 0 else given["weight"],
            "density": min(1.0, given["density"]) if given["density"] > 0 else 1.0,
        }
        for given in each
    ]


def _sums(values: Values, each: Sequence[Values], ids: Sequence[str]) -> dict[str, Any]:
    """`scale` and `total` of a weighted sum.

    Raises:
        ValueError: it is to be divided by weights that cancel.
    """
    _check_sum(values, each)
    scale = by_task("weight", each, ids, lambda weight: weight * (1.0 if values["normalize"] else values["lambda"]))
    if not values["normalize"]:
        return {"scale": scale, "total": None}
    kept, whole = sum(given["weight"] for given in each), sum(given["said"] for given in each)
    return {
        "scale": scale,
        "total": values["lambda"] * (kept / whole if kept != whole and whole else 1.0),
    }  # of density 0 still divides


def _elects(values: Values, each: Sequence[Values], ids: Sequence[str]) -> dict[str, Any]:
    """The fields of TIES's election and mean."""
    return {
        "weights": by_task("weight", each, ids),
        "normalise": values["normalize"],
        "cancelled": "positive",
        "scale": values["lambda"],
    }


def _rescale(values: Values) -> str:
    return "l1" if values["rescale"] else "none"


def _sparse(
    build: Callable[[Values, Sequence[Values], Sequence[str]], Method], *, normalise: bool, rescale: bool, **extra: Parameter
) -> Spec:
    """A method of the generalised task arithmetic: mask, weigh, perhaps elect, add."""
    shared = {
        "normalize": Parameter(bool, normalise),
        "rescale": Parameter(bool, rescale),
        "lambda": Parameter(float, 1.0),
        "int8_mask": Parameter(bool, False),
    }
    per_input = {**_WEIGHT, "density": Parameter(float, 1.0), **extra}
    return Spec(
        build=lambda values, each, ids, based: build(values, _kept(each), ids),
        shared=shared,
        per_input=per_input,
        base="required",
    )


def _drop(given: float) -> float:
    return 1.0 - given


def _ties(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    density = by_task("density", each, ids)
    return Ties(density=density, trim="tensor", count="floor", rescale=_rescale(values), **_elects(values, each, ids))  # type: ignore[arg-type]


def _dare_ties(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    drop = by_task("density", each, ids, _drop)
    return DareTies(drop=drop, density=1.0, trim="tensor", rescale=_rescale(values), **_elects(values, each, ids))  # type: ignore[arg-type]


def _dare_linear(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    return DareLinear(drop=by_task("density", each, ids, _drop), rescale=_rescale(values), **_sums(values, each, ids))  # type: ignore[arg-type]


def _breadcrumbs(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    band = {key: by_task(key, each, ids) for key in ("density", "gamma")}
    return Breadcrumbs(count="floor", rescale=_rescale(values), **band, **_sums(values, each, ids))  # type: ignore[arg-type]


def _breadcrumbs_ties(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    band = {key: by_task(key, each, ids) for key in ("density", "gamma")}
    return BreadcrumbsTies(count="floor", rescale=_rescale(values), **band, **_elects(values, each, ids))  # type: ignore[arg-type]


def _ranked(each: Sequence[Values], ids: Sequence[str]) -> dict[str, Any]:
    """`drop` and `epsilon`, which is the whole width of the probabilities here and half of it there.

    Raises:
        ValueError: probabilities would leave (0, 1).
    """
    each = [{**given, "epsilon": 0.0 if given["density"] >= 1 else given["epsilon"]} for given in each]
    for name, given in zip(ids, each, strict=True):
        density, epsilon = given["density"], given["epsilon"]
        if density < 1 and not (epsilon < density and density + epsilon < 1):
            raise ValueError(
                f"`density` - `epsilon` and `density` + `epsilon` must lie in (0, 1). Got {density:g} and {epsilon:g} for {name}."
            )
    return {"drop": by_task("density", each, ids, _drop), "epsilon": by_task("epsilon", each, ids, lambda given: 2 * given)}


def _della(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    return Della(rescale=_rescale(values), **_ranked(each, ids), **_elects(values, each, ids))  # type: ignore[arg-type]


def _della_linear(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    return DellaLinear(rescale=_rescale(values), **_ranked(each, ids), **_sums(values, each, ids))  # type: ignore[arg-type]


def _task_arithmetic(values: Values, each: Sequence[Values], ids: Sequence[str]) -> Method:
    return TaskArithmetic(**_sums(values, each, ids))


def _check_sum(values: Values, each: Sequence[Values], *, least: int = 1) -> None:
    """Raise where weights are to be divided by a sum of 0, of at least so many that are not 0 themselves."""
    weights = [given["weight"] for given in each]
    if values["normalize"] and abs(sum(weights)) < _TINY and sum(weight != 0 for weight in weights) >= least:
        raise ValueError(
            "the weights add up to 0, and `normalize` divides by their sum. Say `normalize: false`, or other weights."
        )


def _divided(values: Values, each: Sequence[Values]) -> str | None:
    """That weights which do not add up to 1 are divided by their sum: `linear` does so unless told otherwise."""
    total = sum(given["weight"] for given in each)
    if not values["normalize"] or abs(total - 1) < 1e-3:
        return None
    return f"the weights add up to {total:.4g} and are divided by it. Say `normalize: false` to add them as they are."


def _beyond(values: Values, each: Sequence[Values]) -> str | None:
    """That an arc is followed beyond its ends."""
    if "t" in values:
        t = values["t"]
    else:
        total = sum(given["weight"] for given in each)
        t = each[-1]["weight"] / total if abs(total) >= _TINY else 0.5
    return None if 0 <= t <= 1 else f"t = {t:.4g} lies outside [0, 1]: the result lies beyond the models, not between them."


def _linear(values: Values, each: Sequence[Values], ids: Sequence[str], based: bool) -> Method:
    _check_sum(values, each, least=0)
    return Linear(weights=by_task("weight", each, ids), normalise=values["normalize"])


def _nuslerp(values: Values, each: Sequence[Values], ids: Sequence[str], based: bool) -> Method:
    along: Literal["tensor", "rows", "columns"] = (
        "tensor" if values["nuslerp_flatten"] else "columns" if values["nuslerp_row_wise"] else "rows"
    )
    return Nuslerp(weights=by_task("weight", each, ids), of="vectors" if based else "models", along=along)


def _multislerp(values: Values, each: Sequence[Values], ids: Sequence[str], based: bool) -> Method:
    weights = by_task("weight", each, ids)
    return Multislerp(weights=weights, normalise=values["normalize_weights"], of="vectors" if based else "models")


def _sce(values: Values, each: Sequence[Values], ids: Sequence[str], based: bool) -> Method:
    share = values["select_topk"]
    return TaskArithmetic(scale=0.0) if share <= 0 else Sce(select_topk=min(1.0, share), even_below=EVEN)


_GAMMA = Parameter(float, 0.01)
_EPSILON = Parameter(float, 0.15)

SPECS: Mapping[str, Spec] = {
    "task_arithmetic": _sparse(_task_arithmetic, normalise=False, rescale=False),
    "ties": _sparse(_ties, normalise=True, rescale=False),
    "dare_ties": _sparse(_dare_ties, normalise=False, rescale=True),
    "dare_linear": _sparse(_dare_linear, normalise=False, rescale=True),
    "breadcrumbs": _sparse(_breadcrumbs, normalise=False, rescale=False, gamma=_GAMMA),
    "breadcrumbs_ties": _sparse(_breadcrumbs_ties, normalise=False, rescale=False, gamma=_GAMMA),
    "della": _sparse(_della, normalise=True, rescale=True, epsilon=_EPSILON),
    "della_linear": _sparse(_della_linear, normalise=False, rescale=True, epsilon=_EPSILON),
    "linear": Spec(build=_linear, shared={"normalize": Parameter(bool, True)}, per_input=_WEIGHT, remark=_divided),
    "slerp": Spec(
        build=lambda values, each, ids, based: Slerp(t=values["t"]),
        shared={"t": Parameter(float)},
        base="required",
        most=1,
        remark=_beyond,
    ),
    "nuslerp": Spec(
        build=_nuslerp,
        shared={"nuslerp_row_wise": Parameter(bool, False), "nuslerp_flatten": Parameter(bool, True)},
        per_input=_WEIGHT,
        base="optional",
        fewest=2,
        most=2,
        remark=_beyond,
    ),
    "multislerp": Spec(
        build=_multislerp,
        shared={"normalize_weights": Parameter(bool, True), "eps": Parameter(float, 1e-8)},
        per_input=_WEIGHT,
        base="optional",
    ),
    "karcher": Spec(
        build=lambda values, each, ids, based: Karcher(max_iter=values["max_iter"], tol=values["tol"]),
        shared={"max_iter": Parameter(int, 10), "tol": Parameter(float, 1e-5)},
    ),
    "sce": Spec(
        build=_sce,
        shared={"int8_mask": Parameter(bool, False), "select_topk": Parameter(float, 1.0)},
        base="required",
    ),
    "model_stock": Spec(
        build=lambda values, each, ids, based: ModelStock(clamp=False, filter_wise=values["filter_wise"]),
        shared={"filter_wise": Parameter(bool, False)},
        base="required",
        fewest=2,
    ),
    "nearswap": Spec(
        build=lambda values, each, ids, based: Nearswap(t=values["t"]),
        shared={"t": Parameter(float)},
        base="required",
        most=1,
    ),
    "arcee_fusion": Spec(build=lambda values, each, ids, based: ArceeFusion(), base="required", most=1),
    "ram": Spec(
        build=lambda values, each, ids, based: Ram(epsilon=values["epsilon"]),
        shared={"epsilon": Parameter(float, 1e-5)},
        base="required",
    ),
    "ramplus_tl": Spec(
        build=lambda values, each, ids, based: RamPlus(r=values["r"], alpha=values["alpha"], epsilon=values["epsilon"]),
        shared={"r": Parameter(float, 0.1), "alpha": Parameter(float, 0.2), "epsilon": Parameter(float, 1e-5)},
        base="required",
    ),
    "passthrough": Spec(
        build=lambda values, each, ids, based: Passthrough(scale=each[0]["scale"]),
        per_input={"scale": Parameter(float, 1.0)},
        most=1,
    ),
}
PARAMETERS: tuple[str, ...] = tuple(sorted({key for spec in SPECS.values() for key in (*spec.shared, *spec.per_input)}))
