"""Methods of other packages: found, refused, recorded, run again; and the example package, installed and used as a user would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import thetau
from thetau import methods
from thetau.errors import RecipeError
from thetau.methods import registry
from thetau.methods.reductions import Scale, Sum
from thetau.parts import Chain, Method, StreamReduction, WholeReduction
from thetau.testing import check_method

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "thetau-median"
CODE = """
from dataclasses import dataclass
from thetau.methods import register
from thetau.methods.reductions import Sum
from thetau.parts import Chain, Method

@register("{name}", paper="nobody, https://example.org")
@dataclass(frozen=True, kw_only=True)
class {cls}(Method):
    "A sum."
    def chain(self) -> Chain:
        return Chain(reduction=Sum())
"""
Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Put packages on the path, as an installer would, with one entry point each."""
    monkeypatch.syspath_prepend(tmp_path)
    before, papers = dict(registry._METHODS), dict(registry._PAPERS)

    def put(package: str, code: str, name: str, cls: str = "Extra", version: str = "1.0") -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[thetau.methods]\n{name} = {module}:{cls}\n", encoding="utf-8")
        registry.plugins.cache_clear()

    yield put
    for module in [path.stem for path in tmp_path.glob("*.py")]:
        sys.modules.pop(module, None)
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._PAPERS.clear()
    registry._PAPERS.update(papers)
    registry.plugins.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    registry.plugins.cache_clear()


def test_a_plugin_is_imported_when_it_is_asked_for(offer: Offer) -> None:
    offer("extra-one", CODE.format(name="extra", cls="Extra"), "extra")
    assert "extra" in methods.names()
    assert "extra_one" not in sys.modules
    built = methods.build("extra", {})
    assert type(built).__module__ == "extra_one"
    assert methods.plain(built) == {"name": "extra", "package": "extra-one 1.0"}
    assert methods.build("extra", {"package": "extra-one 1.0"}) == built
    nested = methods.plain(methods.Awd(then=built))
    assert nested["then"] == {"name": "extra", "package": "extra-one 1.0"}
    assert "package" not in nested


def test_another_version_or_no_package_is_said(offer: Offer) -> None:
    offer("extra-one", CODE.format(name="extra", cls="Extra"), "extra", version="2.0")
    with pytest.raises(RecipeError, match=r"'extra' was of extra-one 1\.0; here it is of extra-one 2\.0\. Install that version"):
        methods.build("extra", {"package": "extra-one 1.0"})
    with pytest.raises(RecipeError, match=r"'gone' is of gone-pkg 1\.0, which is not installed here"):
        methods.build("gone", {"package": "gone-pkg 1.0"})


def test_a_plugin_that_fails_is_named_only_when_it_is_asked_for(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer("broken-pkg", CODE.format(name="broken", cls="Extra") + "\nimport nothing_like_it\n", "broken")
    assert methods.get("ties") is methods.Ties
    for _ in range(2):
        with pytest.raises(
            RecipeError,
            match=r"'broken' of the package broken-pkg 1\.0 cannot be imported: ModuleNotFoundError: No module named 'nothing_like",
        ):
            methods.get("broken")
    listed = {row["name"]: row for row in json.loads(command(capsys, "methods", "--json"))}
    assert "cannot be imported" in listed["broken"]["problem"]
    assert listed["ties"]["problem"] is None
    assert set(listed) == set(methods.names())


def test_a_plugin_must_register_what_it_offers(offer: Offer) -> None:
    offer("other-name", CODE.format(name="something", cls="Extra"), "extra")
    with pytest.raises(RecipeError, match=r"other-name 1\.0 offers 'extra' as other_name:Extra, which is no method of that name"):
        methods.get("extra")


def test_a_name_that_two_have_is_refused(offer: Offer) -> None:
    offer("mine-ties", CODE.format(name="ties", cls="Extra"), "ties")
    with pytest.raises(
        RecipeError,
        match=r"two methods are called 'ties': thetau\.methods\.ties:Ties of thetau.* and mine_ties:Extra of mine-ties 1\.0",
    ):
        methods.get("ties")
    offer("extra-one", CODE.format(name="extra", cls="Extra"), "extra")
    offer("extra-two", CODE.format(name="extra", cls="Extra"), "extra")
    with pytest.raises(
        RecipeError, match=r"two methods are called 'extra': .*extra-one 1\.0.*extra-two 1\.0|extra-two 1\.0.*extra-one"
    ):
        methods.get("extra")


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """A sum of one's own."""

    weights: Any = None

    def chain(self) -> Chain:
        """The sum."""
        return Chain(reduction=Sum())


def test_register_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(
        ValueError, match=r"two methods are called 'ties': thetau\.methods\.ties:Ties of thetau.* and .*test_plugins:Mine of"
    ):
        methods.register("ties", paper="x")(Mine)
    assert methods.get("ties") is methods.Ties

    class Bare(Method):
        def chain(self) -> Chain:
            return Chain(reduction=Sum())

    with pytest.raises(TypeError, match=r"`register\('x'\)` takes a dataclass below `thetau.parts.Method`"):
        methods.register("x", paper="x")(Bare)

    @dataclass(frozen=True, kw_only=True)
    class Named(Mine):
        package: str = ""

    with pytest.raises(TypeError, match="`Named`: a field may not be called `package`"):
        methods.register("named", paper="x")(Named)


def test_what_json_cannot_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    base = thetau.open({"w": torch.zeros(2)}, name="base")
    model = thetau.open({"w": torch.ones(2)}, name="a")
    for value, kind in (
        (torch.ones(2), "torch.Tensor"),
        (tmp_path, "pathlib"),
        ({1: 2}, "dict"),
        ([1.0], "list"),
        (1j, "complex"),
    ):
        with pytest.raises(
            RecipeError, match=rf"`Mine\(weights=\.\.\.\)` holds a value of type `{kind}.*`, which no recipe can hold"
        ):
            thetau.merge([model - base], Mine(weights=value))
    held = thetau.merge([model - base], Mine(weights=({"a": (1, None)}, "x", True)))
    assert held.state_dict()["w"].tolist() == [1.0, 1.0]


def test_check_method_says_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="the field `weights` says no range") as caught:
        check_method(Mine(), only=["declaration", "shapes"])
    assert "1 of 2 checks failed" in str(caught.value)
    with pytest.raises(AssertionError, match=r"shapes: is exempt \(why\) and passes"):
        check_method(Mine(), only=["shapes"], exempt={"shapes": "why"})
    with pytest.raises(ValueError, match=r"knows no check 'shape'"):
        check_method(Mine(), only=["shape"])
    with pytest.raises(AssertionError, match=r"(?s)shapes: Type.*Chain.*reduction"):  # here the tests' type checker speaks first
        check_method(Wrong(), only=["shapes"])


@dataclass(frozen=True, kw_only=True)
class Wrong(Method):
    """Not even a reduction."""

    def chain(self) -> Chain:
        """A chain that cannot be."""
        return Chain(reduction=methods.Ties())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"transforms": (Sum(),)}, "`Chain(transforms=...)` takes a `thetau.parts.Transform`. Got Sum(scale=1.0, "),
        ({"post": (Sum(),)}, "`Chain(post=...)` takes a `thetau.parts.PostStage`. Got Sum(scale=1.0, "),
        ({"reduction": Scale()}, "`Chain(reduction=...)` takes a `thetau.parts.Reduction`. Got Scale(scale=1.0)."),
        ({"emit": Scale()}, "`Chain(emit=...)` takes a `thetau.parts.Emit`. Got Scale(scale=1.0)."),
    ],
)
def test_wrong_parts_are_refused_when_the_chain_is_built(parts: dict[str, Any], message: str) -> None:
    """The chain's own check: the tests' type checker, which users do not have, would speak before it."""
    chain = copy(Chain(reduction=Sum()))
    for name, value in parts.items():
        object.__setattr__(chain, name, value)
    with pytest.raises(TypeError, match=re.escape(message)):
        chain.__post_init__()


@pytest.mark.parametrize("kind", [StreamReduction, WholeReduction])
def test_a_part_without_its_cost_cannot_be_made(kind: type) -> None:
    costless = type("Costless", (kind,), {name: lambda self, *given: None for name in ("init", "add", "result", "reduce")})
    with pytest.raises(TypeError, match=r"abstract.*cost"):
        costless()


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    from thetau.cli import main

    capsys.readouterr()
    try:
        main(list(arguments))
    except SystemExit as end:
        assert not end.code  # noqa: PT017
    return capsys.readouterr().out


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(command(capsys, "methods", "della", "--json"))
    assert told["name"] == "della"
    drop = told["fields"][0]
    assert drop == {
        "name": "drop",
        "range": "a number, a tuple, `PerTask` or `PerPattern`, each in [0, 1)",
        "default": 0.7,
        "required": False,
        "meaning": "p, the mean probability, by task and by pattern of names too; with 0 nothing is dropped, whatever ε.",
    }
    assert "in [0, 1)" in command(capsys, "methods", "della")
    awd = json.loads(command(capsys, "methods", "awd", "--json"))
    assert awd["fields"][0]["default"] == {"name": "task_arithmetic", "scale": 0.3, "total": None}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, installed into a folder."""
    source = tmp_path_factory.mktemp("source") / "thetau-median"
    shutil.copytree(EXAMPLE, source)  # a build leaves its own files beside the sources
    target = tmp_path_factory.mktemp("target")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return target


def outside(installed: Path | None, folder: Path, *arguments: str, good: bool = True) -> str:
    """Python in a process of its own, with the package on its path or without."""
    path = os.pathsep.join([*([str(installed)] if installed else []), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_example_from_installation_to_verification(installed: Path, tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 2.0), ("c", 50.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3, 2), value)}, tmp_path / name / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text("base: base\nmodels: [a, b, c]\nmethod: median\n", encoding="utf-8")
    listed = {row["name"]: row for row in json.loads(outside(installed, tmp_path, "-m", "thetau", "methods", "--json"))}
    assert listed["median"]["package"] == "thetau-median 0.1.0"
    assert listed["ties"]["package"] is None
    assert "thetau-median" in outside(installed, tmp_path, "-m", "thetau", "methods")
    assert "a finite number or `PerPattern`" in outside(installed, tmp_path, "-m", "thetau", "methods", "median")
    outside(installed, tmp_path, "-m", "thetau", "merge", "recipe.yaml", "-o", "merged")
    merged: Any = thetau.open(tmp_path / "merged")
    assert torch.equal(merged.state_dict()["w"], torch.full((3, 2), 2.0))
    record = json.loads((tmp_path / "merged" / "thetau.json").read_text(encoding="utf-8"))
    assert record["recipe"]["method"] == {"name": "median", "package": "thetau-median 0.1.0", "scale": 1.0}
    assert "good against thetau.json, a new run" in outside(installed, tmp_path, "-m", "thetau", "verify", "merged", "--again")
    lost = outside(None, tmp_path, "-m", "thetau", "verify", "merged", "--again", good=False)
    assert "'median' is of thetau-median 0.1.0, which is not installed here" in " ".join(lost.split())
    assert "unknown method 'median'" in outside(None, tmp_path, "-m", "thetau", "merge", "recipe.yaml", "-o", "other", good=False)


def test_the_example_passes_its_own_tests(installed: Path) -> None:
    outside(installed, EXAMPLE, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
