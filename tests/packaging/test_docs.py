"""What the pages and the docstrings say is true: examples run, and no public name goes without a word."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import thetau
from docs import reference
from experiments.common import DOCS, ROOT
from fixtures import random_weights, shifted, write_model

SOURCES = ROOT / "src"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = {  # pages whose examples need more than models, and the test that runs them
    "bases": "tests/bases/test_bases_arithmetic.py",
    "causal": "tests/finetune/test_causal_finetune.py",
    "finetuning": "tests/diagnostics/test_diagnose.py",
    "write-a-method": "tests/methods/test_write_a_method.py",
}
NAMES = ("a", "b", "sst2", "mnli")  # the fine-tuned models of the pages' examples
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def beginning(page: Path) -> str:
    """A page's text down to its second section."""
    return "\n## ".join(page.read_text(encoding="utf-8").split("\n## ")[:2])


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_begins_with_a_command_or_a_picture_of_its_results(page: Path) -> None:
    text = beginning(page)
    shown = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    command = any(
        re.search(r"^\s*(\$ )?(thetau|make|python|pip|lint-imports|>>>|import|from) ?", one, flags=re.MULTILINE) for one in shown
    )
    assert command or "![" in text, "a reader first sees what can be done, and what comes of it"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the models that examples open: `base`, and those that were fine-tuned from it."""
    base = random_weights(0)
    write_model(tmp_path / "base", base)
    for seed, name in enumerate(NAMES):
        write_model(tmp_path / name, shifted(base, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: Path) -> list[str]:
    """The page's Python, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Module, name and docstring of all that has an example. Read from the source: the tests' type checker wraps the functions."""
    for path in sorted((SOURCES / "thetau").rglob("*.py")):
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>>" in (text := ast.get_docstring(node) or ""):
                yield module, "" if isinstance(node, ast.Module) else node.name, text


def run_examples(text: str, name: str, names: dict[str, object]) -> None:
    """Run a text's `>>>` lines and compare what they print."""
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.append).failed
    assert not failed, "".join(said)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem not in ELSEWHERE], ids=lambda page: page.stem
)
def test_the_pages_python_runs(folder: Path, page: Path) -> None:
    (folder / "page.py").write_text("\n".join(blocks(page)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")], ids=lambda page: page.stem
)
def test_the_pages_examples_are_true(folder: Path, page: Path) -> None:
    run_examples(page.read_text(encoding="utf-8"), page.name, {})


@pytest.mark.parametrize(("module", "name", "text"), list(docstrings()), ids=[".".join(found[:2]) for found in docstrings()])
def test_docstrings_are_true(folder: Path, module: str, name: str, text: str) -> None:
    run_examples(text, f"{module}.{name}", dict(vars(import_module(module))))


def test_an_untrue_example_is_noticed() -> None:
    with pytest.raises(AssertionError, match="Expected:"):
        run_examples(">>> 1 + 1\n3\n", "sum", {})


def test_every_public_name_says_what_it_is() -> None:
    assert reference.bare() == []


def test_a_bare_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thetau.methods.Ties, "__doc__", None)
    monkeypatch.setattr(thetau.Engine.reach, "__doc__", None)  # a method that no base says anything of
    found = reference.bare()
    assert "thetau.methods.Ties" in found
    assert {name.rsplit(".", 1)[1] for name in found} == {"Ties", "reach"}
    with pytest.raises(reference.PluginError, match=re.escape("thetau.methods.Ties")):
        reference.on_config(object())


def test_the_reference_has_every_public_name() -> None:
    rooms = reference.rooms()
    assert {"thetau", "thetau.bases", "thetau.methods", "thetau.errors", "thetau.tasks", "thetau.transforms"} <= set(rooms)
    top = reference.page("thetau")
    for name in thetau.__all__:
        if name != "__version__":
            assert f"::: thetau.{name}\n" in top or f"thetau.{name}" in rooms
    assert "::: thetau.methods.Ties\n" in reference.page("thetau.methods")
    assert reference.place("thetau.methods") == "reference/methods.md"
