"""Methods by name: fields, meanings, building from plain values and back, and what is said about wrong ones."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Annotated, Any

import pytest

import thetau
from synthetic import checked
from thetau import methods
from thetau.errors import RecipeError
from thetau.fields import AtLeast, Varies, Varying, Within, rule_of
from thetau.methods import (
    Awd,
    Bilateral,
    DareLinear,
    DareTies,
    LocalizeStitch,
    PerPattern,
    PerTask,
    TaskArithmetic,
    Ties,
    TopK,
    Wudi,
)
from thetau.parts import BlockReduction, Chain, Method, StreamReduction, WholeReduction

NAMES = [
    "average",
    "awd",
    "bilateral",
    "iso_c",
    "iso_cts",
    "tsv_m",
    "dare_linear",
    "dare_ties",
    "localize_stitch",
    "task_arithmetic",
    "ties",
    "topk",
    "wudi",
]


def test_the_methods_are_there() -> None:
    assert set(NAMES) <= set(methods.names())
    assert methods.names() == sorted(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_every_field_has_a_meaning_and_a_default(name: str) -> None:
    described = methods.describe(name)
    cls: Any = methods.get(name)
    assert [field.name for field in described] == [field.name for field in fields(cls)]
    assert described or name == "arcee_fusion", "a method without fields"  # that one has none to set
    for field in described:
        assert len(field.meaning) > 8, f"{name}.{field.name} has no meaning"
        assert field.default == getattr(cls(), field.name)
        assert field.range
        assert not field.required


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_a_frozen_keyword_only_dataclass_with_a_paper(name: str) -> None:
    cls: Any = methods.get(name)
    assert is_dataclass(cls)
    method = cls()
    with pytest.raises(FrozenInstanceError):
        method.scale = 2.0
    with pytest.raises(TypeError):
        cls(0.5)
    assert re.search(r"https://\S+$", methods.paper(name))
    assert methods.name_of(method) == name
    assert isinstance(method, Method)
    assert "$" in cls.__doc__  # its formula
    assert isinstance(cls.__module__, str)
    assert hash(method) == hash(cls())


ACCESS = {
    **dict.fromkeys(("wudi", "bilateral", "tsv_m", "iso_c", "iso_cts", "star", "cart", "dc_merge"), "stream"),
    **dict.fromkeys(("actmat", "ace", "swudi", "swudi_a", "optmerge", "regmean", "kfac", "esm"), "stream"),
    **dict.fromkeys(("svc", "twin", "doge_ta"), "whole"),
}


@pytest.mark.parametrize("name", methods.names())
def test_a_chain_ends_in_a_reduction(name: str) -> None:
    chain = methods.get(name)().chain()
    assert isinstance(chain, Chain)
    assert isinstance(chain.reduction, BlockReduction | StreamReduction | WholeReduction)
    assert chain.access == ACCESS.get(name, "block")


VARIANTS: list[Any] = [
    TaskArithmetic(scale=PerTask({"a": 0.1, "b": 0.2})),
    TaskArithmetic(scale=PerPattern({"*.bias": 0.1, "*": 0.2})),
    TaskArithmetic(scale=(0.1, 0.2)),
    Ties(density=0.5, trim="tensor", cancelled="majority", scale=PerPattern({"*": 2.0})),
    DareTies(drop=0.0, density=1.0),
    Wudi(tensors=("a.*", "b.*"), elsewhere="sum", solver="closed_form", ridge=0.0),
    Wudi(tensors="all", split_fused=True, lr_absolute=True),
    Bilateral(rank=0.25, solver="flow", tensors="matrices"),
    Bilateral(rank=8, balance="loss", start="mean"),
    Awd(then=Ties(density=0.1), scope="tensor"),
    LocalizeStitch(sharing="twice", clusters=PerTask({"a": 0.0, "b": 1.0}), rounding="half_even", trim="tensor"),
    LocalizeStitch(sharing="mask", clusters=(0.0, 1.0)),
    Awd(then=Awd(then=Wudi(solver="gradient_flow")), tensors=("x",)),
    methods.Svc(then=methods.Larv(then=Ties(), gate="tanh", tiers=(0.5, 2.0)), alpha=0.5),
]


@pytest.mark.parametrize("method", [*(methods.get(name)() for name in methods.names()), *VARIANTS], ids=repr)
def test_plain_values_build_the_same_method(method: Any) -> None:
    plain = methods.plain(method)
    again = {key: value for key, value in plain.items() if key != "name"}
    assert methods.build(plain["name"], again) == method
    assert_plain(plain)


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for inner in value.values():
            assert_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            assert_plain(inner)
    else:
        assert value is None or type(value) in (str, int, float, bool)


def test_build_reads_what_a_recipe_gives() -> None:
    assert methods.build("task_arithmetic", {"scale": [0.1, 0.2]}) == TaskArithmetic(scale=(0.1, 0.2))
    assert methods.build("task_arithmetic", {"scale": {"per_task": {"a": 1}}}) == TaskArithmetic(scale=PerTask({"a": 1.0}))
    assert methods.build("ties", {"scale": 1}) == Ties(scale=1.0)
    assert methods.build("awd", {"then": "ties"}) == Awd(then=Ties())
    assert methods.build("awd", {"then": {"name": "wudi", "solver": "closed_form"}}) == Awd(then=Wudi(solver="closed_form"))


@pytest.mark.parametrize(
    ("name", "values", "problems"),
    [
        (
            "ties",
            {"densty": 0.1},
            [
                "ties: unknown field 'densty'. Did you mean 'density'? Fields: cancelled, count, density, normalise, rescale, scale, trim, weights."
            ],
        ),
        (
            "wudi",
            {"solvr": "adam", "stepz": 3},
            ["unknown field 'solvr'. Did you mean 'solver'?", "unknown field 'stepz'. Did you mean 'steps'?"],
        ),
        ("ties", {"density": 1.5}, ["`Ties(density=...)` must be in (0, 1]. Got 1.5."]),
        (
            "ties",
            {"scale": {"per_tsk": {}}},
            ["ties.scale: a mapping must be `per_task: {task: value}` or `per_pattern: {pattern: value}`."],
        ),
        ("task_arithmetic", {"scale": {"per_task": {"a": "x"}}}, ["task_arithmetic.scale: must be a number. Got 'x'."]),
        ("task_arithmetic", {"scale": {"per_task": {}}}, ["`PerTask` needs a value for at least one task."]),
        ("awd", {"then": 3}, ["awd.then: must be a method's name, or a mapping with `name` and its fields. Got 3."]),
        ("awd", {"then": "tise"}, ["awd.then: unknown method 'tise'. Did you mean 'ties'?"]),
        (
            "awd",
            {"then": {"name": "wudi", "elsewhere": "mean"}},
            ["`Awd(then=...)` must leave `elsewhere` to awd, whose own count for both. Got elsewhere='mean' in `then`."],
        ),
        (
            "awd",
            {"then": {"name": "wudi", "tensors": "all"}},
            ["`Awd(then=...)` must leave `tensors` to awd, whose own count for both. Got tensors='all' in `then`."],
        ),
        (
            "awd",
            {"then": {"name": "wudi", "tensors": ["a*"], "elsewhere": "sum"}},
            [
                "`Awd(then=...)` must leave `tensors` and `elsewhere` to awd, whose own count for both. "
                "Got tensors=('a*',) and elsewhere='sum' in `then`."
            ],
        ),
        ("awd", {"then": {"name": "ties", "density": 7}}, ["awd.then: `Ties(density=...)` must be in (0, 1]. Got 7."]),
    ],
)
def test_wrong_values_are_named(name: str, values: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        methods.build(name, values)
    assert len(caught.value.problems) == len(problems)
    for got, want in zip(caught.value.problems, problems, strict=True):
        assert want in got


def test_unknown_methods_are_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown method 'tise'. Did you mean 'ties'\? See `thetau methods`."):
        methods.get("tise")
    with pytest.raises(RecipeError):
        methods.describe("nothing like it")


RULES: list[tuple[Any, dict[str, Any], str]] = [
    (
        TaskArithmetic,
        {"scale": float("nan")},
        "`TaskArithmetic(scale=...)` must be a finite number, a tuple, `PerTask` or `PerPattern`. Got nan.",
    ),
    (
        TaskArithmetic,
        {"scale": ()},
        "`TaskArithmetic(scale=...)` must be a finite number, a tuple, `PerTask` or `PerPattern`. Got ().",
    ),
    (TaskArithmetic, {"scale": (1.0, float("inf"))}, "Got inf."),
    (TaskArithmetic, {"scale": PerTask({"a": float("nan")})}, "Got nan."),
    (Ties, {"scale": PerTask({"a": 1.0})}, "`Ties(scale=...)` must be a finite number or `PerPattern`. Got PerTask"),
    (Ties, {"scale": (1.0, 2.0)}, "`Ties(scale=...)` must be a finite number or `PerPattern`. Got (1.0, 2.0)."),
    (Ties, {"density": 0.0}, "`Ties(density=...)` must be in (0, 1]. Got 0.0."),
    (Ties, {"density": "0.2"}, "`Ties(density=...)` must be in (0, 1]. Got '0.2'."),
    (Ties, {"density": True}, "`Ties(density=...)` must be in (0, 1]. Got True."),
    (Ties, {"density": 1.0001}, "must be in (0, 1]. Got 1.0001."),
    (Ties, {"trim": "row"}, "`Ties(trim=...)` must be one of vector, tensor. Got 'row'."),
    (Ties, {"cancelled": "no"}, "`Ties(cancelled=...)` must be one of zero, majority, positive. Got 'no'."),
    (LocalizeStitch, {"density": 0.0}, "`LocalizeStitch(density=...)` must be in (0, 1]. Got 0.0."),
    (LocalizeStitch, {"sharing": "thrice"}, "`LocalizeStitch(sharing=...)` must be one of none, mask, twice. Got 'thrice'."),
    (LocalizeStitch, {"rounding": "up"}, "`LocalizeStitch(rounding=...)` must be one of half_up, half_even. Got 'up'."),
    (
        LocalizeStitch,
        {"clusters": ()},
        "`LocalizeStitch(clusters=...)` must be a whole number for each task (`PerTask`, or a tuple), or None. Got ().",
    ),
    (LocalizeStitch, {"clusters": (0.5, 1.0)}, "or None. Got 0.5."),
    (LocalizeStitch, {"clusters": 3}, "or None. Got 3."),
    (TopK, {"density": -0.1}, "`TopK(density=...)` must be in (0, 1]. Got -0.1."),
    (DareLinear, {"drop": 1.0}, "`DareLinear(drop=...)` must be in [0, 1). Got 1.0."),
    (DareTies, {"drop": -0.1}, "`DareTies(drop=...)` must be in [0, 1). Got -0.1."),
    (Wudi, {"solver": "sgd"}, "`Wudi(solver=...)` must be one of adam, closed_form, gradient_flow. Got 'sgd'."),
    (Wudi, {"steps": -1}, "`Wudi(steps=...)` must be an integer of at least 0. Got -1."),
    (Wudi, {"lr": 0.0}, "`Wudi(lr=...)` must be a positive number. Got 0.0."),
    (Wudi, {"ridge": -1.0}, "`Wudi(ridge=...)` must be a number of at least 0. Got -1.0."),
    (Wudi, {"omega": 0.0, "solver": "closed_form"}, "`Wudi(omega=...)` must be a positive number, or None for `ridge`. Got 0.0."),
    (
        Wudi,
        {"omega": 1e-5, "ridge": 0.0, "solver": "closed_form"},
        "`Wudi(omega=...)` is ω itself, and `ridge` is ω as a share of the spectrum: give one of them. Got omega=1e-05 and ridge=0.0.",
    ),
    (Wudi, {"omega": 1e-5}, "`Wudi(omega=...)` belongs to `solver='closed_form'`. Got solver='adam'."),
    (Wudi, {"time": float("inf")}, "`Wudi(time=...)` must be a number of at least 0. Got inf."),
    (Wudi, {"rows": 0.0}, "`Wudi(rows=...)` must be in (0, 1]. Got 0.0."),
    (Wudi, {"tensors": ()}, '`Wudi(tensors=...)` must be "all", "linear" or patterns of names. Got ().'),
    (Wudi, {"elsewhere": "zero"}, "`Wudi(elsewhere=...)` must be one of base, mean, sum. Got 'zero'."),
    (Wudi, {"reference": "other"}, "`Wudi(reference=...)` must be one of own, random. Got 'other'."),
    (Awd, {"alpha": -1e-3}, "`Awd(alpha=...)` must be a number of at least 0. Got -0.001."),
    (Awd, {"scope": "layer"}, "`Awd(scope=...)` must be one of vector, tensor, row. Got 'layer'."),
    (Awd, {"solver": "sgd"}, "`Awd(solver=...)` must be one of gram, adam. Got 'sgd'."),
    (Awd, {"then": "ties"}, "`Awd(then=...)` must be a method. Got 'ties'."),
    (Awd, {"steps": 0}, "`Awd(steps=...)` must be an integer of at least 1. Got 0."),
]


@pytest.mark.parametrize(("cls", "values", "message"), RULES, ids=lambda value: repr(value) if isinstance(value, dict) else None)
def test_fields_are_checked(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(cls, values)


@pytest.mark.parametrize("field", ["lr_absolute", "balance", "split_fused"])
def test_flags_are_flags(field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`Wudi({field}=...)` must be true or false. Got 1.")):
        checked(Wudi, {field: 1})


def test_methods_are_reached_from_the_top() -> None:
    assert thetau.methods.Wudi is Wudi
    assert set(dir(thetau)) >= {"methods", "merge", "open", "transform", "gram"}


def test_della_is_built_with_both_of_its_fields() -> None:
    """The rule between two fields is asked once all are known."""
    assert methods.build("della", {"drop": 0.95, "epsilon": 0.05}) == methods.Della(drop=0.95, epsilon=0.05)
    with pytest.raises(
        RecipeError,
        match=r"`Della\(epsilon=\.\.\.\)` must leave drop ± epsilon/2 inside \[0, 1\): at most 0\.1 with drop = 0\.95",
    ):
        methods.build("della", {"drop": 0.95})


def test_a_value_by_task_may_vary_by_pattern() -> None:
    given = {"per_task": {"a": {"per_pattern": {"layers.0.*": 0.1, "*": 0.2}}, "b": 0.3}}
    method = methods.build("task_arithmetic", {"scale": given})
    assert method == TaskArithmetic(scale=PerTask({"a": PerPattern({"layers.0.*": 0.1, "*": 0.2}), "b": 0.3}))
    assert methods.plain(method) == {"name": "task_arithmetic", "scale": given, "total": None}
    with pytest.raises(RecipeError, match=r"must be a number\. Got 'x'"):
        methods.build("task_arithmetic", {"scale": {"per_task": {"a": {"per_pattern": {"*": "x"}}}}})
    with pytest.raises(ValueError, match=r"Got nan\."):
        checked(TaskArithmetic, {"scale": PerTask({"a": PerPattern({"*": float("nan")})})})


@pytest.mark.parametrize(
    ("hint", "rule", "good", "bad"),
    [
        (Annotated[float, Within("(0, 1]")], "in (0, 1]", [1, 0.5], [0, 1.1, True, "1", None]),
        (Annotated[float, Within("[0, inf)")], "a number of at least 0", [0, 7.5], [-1e-9, float("inf")]),
        (Annotated[float, Within("(2, inf)")], "a number above 2", [2.1], [2]),
        (Annotated[float, Within("[0, 1]", none="to round")] | None, "in [0, 1], or None to round", [None, 0, 1], [2]),
        (Annotated[int, AtLeast(1)], "an integer of at least 1", [1], [0, 1.0, True]),
        (
            Annotated[Varying, Varies(task=True), Within("[0, 1]")],
            "a number, a tuple or `PerTask`, each in [0, 1]",
            [(0, 1)],
            [(0, 2)],
        ),
        (
            Annotated[Varying, Varies(pattern=True)],
            "a finite number or `PerPattern`",
            [PerPattern({"*": 1})],
            [PerTask({"a": 1})],
        ),
        (int, "an integer", [3], [True, 3.0]),
        (float, "a finite number", [3, 3.5], [float("nan"), "3"]),
        (str | None, "a text, or None", ["x", None], [3]),
        (dict[str, float], "a mapping", [{}], [()]),
        (Any, "", [object()], []),
    ],
)
def test_a_type_says_its_rule(hint: Any, rule: str, good: list[Any], bad: list[Any]) -> None:
    found = rule_of(hint)
    assert found.text == rule
    for value in good:
        assert not list(found.faults(value)), value
    for value in bad:
        assert list(found.faults(value)), value


@pytest.mark.parametrize("interval", ["0, 1", "(1, 0]", "(0; 1)", ""])
def test_an_interval_is_written_as_one(interval: str) -> None:
    with pytest.raises(ValueError, match=r"`Within\(\.\.\.\)` must be an interval"):
        Within(interval)
