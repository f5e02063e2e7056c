"""A suite: a backbone, its tasks, how they are fine-tuned, merged and measured; one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from thetau.errors import RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """One row of the table: `method` with `fields`, named `name`; its λ is the best of `scales` on validation, or 1 when there
    are none. Several widen until the best is inside, a single one is given. With `each` the row is of what the method makes for each
    task (EMR, TALL, Twin), or of its vector after the method's transforms, on that task, and there is no λ. With `wemoe`, the fields of
    its config, MLPs are mixed by input over the merge, and there is no λ either.
    """

    name: str
    method: str
    fields: Mapping[str, Any]
    scales: tuple[float, ...] = ()
    each: bool = False
    wemoe: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if len(set(self.scales)) != len(self.scales):
            raise ValueError(f"method {self.name!r}: `scales` must be different numbers. Got {list(self.scales)}.")


@dataclass(frozen=True, kw_only=True)
class ParadigmChoice:
    """One row of a comparison of paradigms.

    - `fields`: of the fine-tuning config, over the suite's own. `grid`: a field → values, of which one is chosen on the first task.
      `like`: name of a row whose chosen values are taken.
    - `start`: name of the row whose vectors are trained further. `trace`: steps after which their sum is measured.
    - `negate`, `leave_out`: measure negation, and each task with the others' vectors. `elsewhere`: add in the other space too.
    """

    name: str
    fields: Mapping[str, Any]
    grid: Mapping[str, tuple[float, ...]]
    like: str | None = None
    start: str | None = None
    trace: tuple[int, ...] = ()
    negate: bool = True
    leave_out: bool = False
    elsewhere: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is evaluated: examples of each task's validation and test split, and of both of the control task's (a task that has fewer
    gives all), tokens of each example, pixels a side of an image (None for the model's own).
    """

    validation: int = 500
    test: int = 500
    control: int = 1000
    max_length: int = 64
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test", "control", "max_length", "image_size"):
            value = getattr(self, name)
            if value is None and name == "image_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`evaluation.{name}` must be an integer of at least 1. Got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """`finetune` holds fields of the fine-tuning config, and `finetune_of` those in which a task differs.

    `control` is the task that negation must keep. Named among `tasks` it is learnt and added like the others, and only not negated itself. The grids of
    paradigms are chosen from on `tune_on`, the first task by default. `features`: unit, or raw as in the papers' code, where the head normalises.
    `joint`: a row of one model that is trained on all tasks, with as many steps as they have together.
    """

    name: str
    description: str
    backbone: str
    tasks: tuple[str, ...]
    finetune: Mapping[str, Any]
    finetune_of: Mapping[str, Mapping[str, Any]]
    limits: Limits
    methods: tuple[MethodChoice, ...]
    control: str | None = None
    paradigms: tuple[ParadigmChoice, ...] = ()
    tune_on: str | None = None
    features: str = "unit"
    joint: bool = False

    def selected_paradigms(self, names: Sequence[str]) -> tuple[ParadigmChoice, ...]:
        """The rows of these names. Raises `RecipeError` listing the unknown ones."""
        known = [choice.name for choice in self.paradigms]
        unknown = [
            f"no paradigm {name!r}. Known: {', '.join(known)}.{nearest(name, known)}" for name in names if name not in known
        ]
        if unknown:
            raise RecipeError(unknown, where=f"suite {self.name}")
        return tuple(choice for choice in self.paradigms if choice.name in names)

    def with_paradigms(self, names: Sequence[str]) -> Suite:
        """The suite with a row, of its own settings, for each of `names` that is a paradigm of fine-tuning and no row yet."""
        known = {choice.name for choice in self.paradigms}
        added = tuple(
            ParadigmChoice(name=name, fields={"paradigm": name}, grid={})
            for name in names
            if name not in known and _is_paradigm(name)
        )
        return replace(self, paradigms=(*self.paradigms, *added))

    def selected_or_named(self, names: Sequence[str]) -> tuple[MethodChoice, ...]:
        """The rows of these names; a method that the suite has no row of, with its defaults. Raises `RecipeError`."""
        own = {choice.name for choice in self.methods} | {choice.method for choice in self.methods}
        found: list[MethodChoice] = []
        for name in names:
            found += self.selected([name]) if name in own else [MethodChoice(name=name, method=name, fields={})]
        return tuple(found)

    def selected(self, names: Sequence[str]) -> tuple[MethodChoice, ...]:
        """The methods whose row's name or method's name is in `names`. Raises `RecipeError` listing the unknown ones."""
        known = {choice.name for choice in self.methods} | {choice.method for choice in self.methods}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise RecipeError(
                [
                    f"no method {name!r}. Known: {', '.join(c.name for c in self.methods)}.{nearest(name, known)}"
                    for name in unknown
                ],
                where=f"suite {self.name}",
            )
        return tuple(choice for choice in self.methods if choice.name in names or choice.method in names)


def shipped_suites() -> dict[str, Path]:
    """The suites that come with thetau, by name."""
    folder = Path(str(files("thetau.tasks").joinpath("suites")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_suite(name: str | Path) -> Suite:
    """A suite by its name, or by the path of its YAML file. Raises `RecipeError` with every problem of the file."""
    import yaml

    shipped = shipped_suites()
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        known = f"Known: {', '.join(shipped)}.{nearest(str(name), shipped)}"
        raise RecipeError([f"no suite {str(name)!r}, and no such file. {known}"], where="suite")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError([f"cannot be read as YAML: {' '.join(str(error).split())}"], where=str(path)) from error
    return parse_suite(content, path.stem, str(path))


def _is_paradigm(name: str) -> bool:
    """Whether it is written as paradigms are: words joined by `+`; `FinetuneConfig` says which are known."""
    return bool(name) and all(part.isidentifier() for part in name.split("+"))


_KEYS = {
    "description": str,
    "backbone": str,
    "tasks": list,
    "finetune": dict,
    "finetune_of": dict,
    "evaluation": dict,
    "methods": list,
    "control": str,
    "paradigms": list,
    "tune_on": str,
    "features": str,
    "joint": bool,
}
_NEEDED = ("backbone", "tasks")


def parse_suite(content: Any, name: str, where: str) -> Suite:
    """A suite from the content of its file; `where` names it in errors."""
    problems: list[str] = []
    if not isinstance(content, dict):
        raise RecipeError([f"must be a mapping. Got {type(content).__name__}."], where=where)
    for key, kind in _KEYS.items():
        if key in _NEEDED and not content.get(key):
            problems.append(f"`{key}` is needed and must not be empty.")
        elif key in content and not isinstance(content[key], kind):
            problems.append(f"`{key}` must be a {kind.__name__}. Got {content[key]!r}.")
    blocking = bool(problems)
    _check_keys(content, list(_KEYS), "", problems)
    if blocking:
        raise RecipeError(problems, where=where)
    tasks = content["tasks"]
    if not all(isinstance(task, str) for task in tasks) or len(set(map(str, tasks))) != len(tasks):
        problems.append(f"`tasks` must be different names. Got {tasks!r}.")
    other = content.get("finetune_of", {})
    problems += [
        f"`finetune_of` names {task!r}, which is not in `tasks`.{nearest(str(task), tasks)}"
        for task in other
        if task not in tasks
    ]
    evaluation = content.get("evaluation", {})
    _check_keys(evaluation, list(Limits.__dataclass_fields__), "evaluation", problems)
    limits = Limits()
    try:
        limits = Limits(**{key: value for key, value in evaluation.items() if key in Limits.__dataclass_fields__})
    except ValueError as error:
        problems.append(str(error))
    methods = [
        choice for number, row in enumerate(content.get("methods", [])) if (choice := _method(row, number, problems)) is not None
    ]
    if len({choice.name for choice in methods}) != len(methods):
        problems.append("`methods` must have different names; give two forms of one method a `name` each.")
    paradigms = [_paradigm(row, number, problems) for number, row in enumerate(content.get("paradigms", []))]
    names = [choice.name for choice in paradigms if choice is not None]
    problems += [
        f"`paradigms` must have different names. {name!r} is there twice." for name in sorted(set(names)) if names.count(name) > 1
    ]
    problems += [
        f"paradigm {choice.name!r}: `{key}` must be another row. Got {other!r}.{nearest(other, names)}"
        for choice in paradigms
        if choice is not None
        for key, other in (("start", choice.start), ("like", choice.like))
        if other is not None and (other not in names or other == choice.name)
    ]
    if content.get("features", "unit") not in ("unit", "raw"):
        problems.append(f"`features` must be unit or raw. Got {content['features']!r}.")
    if "tune_on" in content and content["tune_on"] not in tasks:
        problems.append(f"`tune_on` must be one of `tasks`. Got {content['tune_on']!r}.{nearest(str(content['tune_on']), tasks)}")
    if content.get("control") in tasks and len(tasks) < 2:
        problems.append(f"`control` must not be the only task. Got {content['control']!r}.")
    if not methods and not paradigms and not problems:
        problems.append("`methods` or `paradigms` is needed and must not be empty.")
    if problems:
        raise RecipeError(problems, where=where)
    return Suite(
        name=name,
        description=content.get("description", ""),
        backbone=content["backbone"],
        tasks=tuple(tasks),
        finetune=content.get("finetune", {}),
        finetune_of=other,
        limits=limits,
        methods=tuple(methods),
        control=content.get("control"),
        paradigms=tuple(choice for choice in paradigms if choice is not None),
        tune_on=content.get("tune_on"),
        features=content.get("features", "unit"),
        joint=content.get("joint", False),
    )


def _paradigm(row: Any, number: int, problems: list[str]) -> ParadigmChoice | None:
    where = f"paradigms[{number}]"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        problems.append(f"`{where}` must be a mapping with a `name`. Got {row!r}.")
        return None
    _check_keys(row, list(ParadigmChoice.__dataclass_fields__), where, problems)
    fields, grid, trace = row.get("fields", {}), row.get("grid", {}), row.get("trace", [])
    if not isinstance(fields, dict) or not isinstance(grid, dict) or not isinstance(trace, list):
        problems.append(f"`{where}`: `fields` and `grid` must be mappings, `trace` a list of steps. Got {row!r}.")
        return None
    if not all(
        isinstance(values, list) and values and all(isinstance(v, int | float) for v in values) for values in grid.values()
    ):
        problems.append(f"`{where}.grid` must map a field to a list of numbers. Got {grid!r}.")
        return None
    flags = {
        name: bool(row.get(name, default)) for name, default in (("negate", True), ("leave_out", False), ("elsewhere", False))
    }
    return ParadigmChoice(
        name=row["name"],
        fields=fields,
        grid={field: tuple(map(float, values)) for field, values in grid.items()},
        start=row.get("start"),
        like=row.get("like"),
        trace=tuple(trace),
        **flags,
    )


def _method(row: Any, number: int, problems: list[str]) -> MethodChoice | None:
    where = f"methods[{number}]"
    if not isinstance(row, dict) or not isinstance(row.get("method"), str):
        problems.append(f"`{where}` must be a mapping with a `method`. Got {row!r}.")
        return None
    _check_keys(row, ["name", "method", "fields", "scales", "each", "wemoe"], where, problems)
    fields, scales = row.get("fields", {}), row.get("scales", [])
    if not isinstance(fields, dict):
        problems.append(f"`{where}.fields` must be a mapping. Got {fields!r}.")
        return None
    if not isinstance(scales, list) or not all(
        isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales
    ):
        problems.append(f"`{where}.scales` must be a list of numbers. Got {scales!r}.")
        return None
    if not isinstance(row.get("each", False), bool) or (row.get("each") and scales):
        problems.append(f"`{where}.each` must be true or false, and true only without `scales`. Got {row.get('each')!r}.")
        return None
    if "wemoe" in row and (not isinstance(row["wemoe"], dict) or row.get("each") or scales):
        problems.append(
            f"`{where}.wemoe` must be a mapping, of fields of the mixture's config, and stand without `scales` and `each`. Got {row['wemoe']!r}."
        )
        return None
    if "scale" in fields:
        problems.append(f"`{where}.fields.scale` is chosen on validation; write the values to try under `scales`.")
        return None
    try:
        return MethodChoice(
            name=str(row.get("name", row["method"])),
            method=row["method"],
            fields=fields,
            scales=tuple(map(float, scales)),
            each=row.get("each", False),
            wemoe=row.get("wemoe"),
        )
    except ValueError as error:
        problems.append(str(error))
        return None


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str, problems: list[str]) -> None:
    prefix = f"{where}." if where else ""
    problems += [f"unknown key `{prefix}{key}`.{nearest(str(key), known)}" for key in given if key not in known]
