"""Command-line options from dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.options import Option, check_ranges


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group within a group."""

    how: Annotated[Literal["this", "that"], Option("How.")] = "this"
    fields: Annotated[Mapping[str, Any], Option("A field.", flags=("--set",))] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Every kind of field."""

    name: Annotated[str, Option("The name.", flags=("--name", "-n"))]
    inner: Inner = field(default_factory=Inner)
    times: Annotated[int, Option("How often.", least=1, most=9)] = 2
    grid: Annotated[tuple[float, ...] | None, Option("Numbers.", commas=True)] = None
    words: Annotated[tuple[str, ...] | None, Option("Words.", commas=True)] = None
    many: Annotated[tuple[int, ...], Option("May be repeated.")] = ()
    k: Annotated[int | Literal["auto"], Option("A number or auto.", flags=("-k",))] = "auto"
    models: Annotated[Mapping[str, Path], Option("NAME=PATH.", flags=("--model",))] = field(default_factory=dict)
    loud: Annotated[bool, Option("Say more.", flags=("--loud",))] = False

    def __post_init__(self) -> None:
        check_ranges(self)


def given(*words: str) -> tuple[Path, Outer, bool]:
    """What a verb gets from these words."""
    found: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_options
    def verb(
        where: Annotated[Path, typer.Argument()],
        options: Outer,
        also: Annotated[bool, typer.Option("--also")] = False,
        seen: Annotated[tuple[str, ...], Option("An option of the verb itself.")] = (),
    ) -> None:
        """A verb."""
        found.extend([where, options, also, seen])

    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, RecipeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    where, options, also, seen = found
    assert seen == (("x", "y") if "--seen" in words else ())
    return where, options, also


def test_a_dataclass_is_given_field_by_field() -> None:
    assert given("here", "-n", "x") == (Path("here"), Outer(name="x"), False)
    words = "here --name x --times 3 --grid=-0.5,1 --words a,b --many 1 --many 2 -k 4 --loud --also --how that --set d=0.1 --set e.f=true"
    assert given(*words.split(), "--model", "a=b/c", "--seen", "x", "--seen", "y") == (
        Path("here"),
        Outer(
            name="x",
            inner=Inner(how="that", fields={"d": 0.1, "e": {"f": True}}),
            times=3,
            grid=(-0.5, 1.0),
            words=("a", "b"),
            many=(1, 2),
            k=4,
            models={"a": Path("b/c")},
            loud=True,
        ),
        True,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--grid 1,x", r"--grid must be numbers with commas between them\. Got '1,x'"),
        ("--grid nan", "--grid must be finite"),
        ("-k two", r"-k: 1 problem\n  - must be a number or auto\. Got 'two'"),
        ("--how other", r"`options\(how=\.\.\.\)` must be one of this, that\. Got 'other'"),
        ("--model a", r"must be NAME=PATH\. Got 'a'"),
        ("--set a", "is not of the form field=value"),
    ],
)
def test_words_that_are_refused(words: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        given("here", "-n", "x", *words.split())


def test_a_range_holds_on_the_command_line_and_in_python() -> None:
    with pytest.raises(AssertionError, match="--times"):
        given("here", "-n", "x", "--times", "10")
    with pytest.raises(RecipeError, match=r"Outer: 1 problem\n  - `times` must be at most 9\. Got 10"):
        Outer(name="x", times=10)
    with pytest.raises(RecipeError, match=r"`times` must be at least 1\. Got nan"):
        Outer(name="x", times=float("nan"))  # type: ignore[arg-type]


def test_options_that_cannot_be_are_refused() -> None:
    def twice(a: Outer, times: int = 1) -> None:
        """The name is there already."""

    with pytest.raises(TypeError, match="twice: the option 'times' is declared twice"):
        with_options(twice)

    @dataclass(frozen=True)
    class Bare:
        size: int = 1

    def bare(a: Bare) -> None:
        """No help."""

    bare.__annotations__["a"] = Bare
    with pytest.raises(TypeError, match=r"Bare\.size: has no `Option`"):
        with_options(bare)
