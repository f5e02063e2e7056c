"""The tutorials run, from a clean folder, and their pages show what they printed; the pages fetch nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from docs import notebooks, offline
from experiments.tutorials import run as tutorials


def run(name: str, folder: Path) -> str:
    """What a tutorial prints."""
    return tutorials.printed(tutorials.execute(tutorials.FOLDER / f"{name}.ipynb", folder))


def accuracies(text: str, row: str) -> list[float]:
    """The two accuracies in the row of a model."""
    (line,) = re.findall(rf"^{row} +clinc_domain.*$", text, flags=re.MULTILINE)
    return [float(value) for value in re.findall(r"([\d.]+) %", line)]


def test_practitioner(tmp_path: Path) -> None:
    text = run("practitioner", tmp_path)
    base, both = accuracies(text, "the base"), accuracies(text, "both")
    assert all(after > before for before, after in zip(base, both, strict=True)), text
    assert (tmp_path / "both" / "model.safetensors").is_file()
    assert (tmp_path / "both-lora" / "adapter_config.json").is_file()


def test_researcher(tmp_path: Path) -> None:
    text = run("researcher", tmp_path)
    (mean,) = re.findall(r"^agreement .*mean ([\d.]+) ", text, flags=re.MULTILINE)
    (untouched,) = re.findall(r"^the base itself: mean ([\d.]+)$", text, flags=re.MULTILINE)
    assert float(mean) > float(untouched), text
    assert len(re.findall(r" λ .* normalised ", text)) == 5
    assert "common tests passed" in text


def test_platform(tmp_path: Path) -> None:
    text = run("platform", tmp_path)
    assert re.search(r"^5 tasks in [23] bases", text, flags=re.MULTILINE), text  # never more than the budget
    (error,) = re.findall(r"farthest basis from the mean of its members: ([\d.e+-]+) ", text)
    assert float(error) < 1e-4  # float32: a mean with one vector subtracted again
    assert "problems found in the files: []" in text


def test_every_tutorial_is_run_here() -> None:
    assert {f"test_{path.stem}" for path in tutorials.notebooks()} <= set(globals())


@pytest.mark.parametrize("path", tutorials.notebooks(), ids=lambda path: path.stem)
def test_what_is_kept_is_a_good_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    page = notebooks.page(path)
    assert page.startswith("# ")
    assert "data:image/png;base64," in page
    assert all(line in page for line in tutorials.printed(notebook).splitlines())
    assert "site-packages" not in page


def notebook(folder: Path, **cell: object) -> Path:
    """A notebook of one cell of code."""
    path = folder / "one.ipynb"
    path.write_text(
        json.dumps({"cells": [{"cell_type": "code", "metadata": {}, "source": ["1 + 1"], "outputs": [], **cell}]}), "utf-8"
    )
    return path


def test_a_cell_is_code_and_what_it_gave(tmp_path: Path) -> None:
    given = notebook(tmp_path, outputs=[{"output_type": "execute_result", "data": {"text/plain": ["2"]}}])
    assert notebooks.page(given).startswith("````python\n1 + 1\n````\n\n````text\n2\n````")


def test_a_command_is_shown_as_one(tmp_path: Path) -> None:
    assert notebooks.page(notebook(tmp_path, source=["%%bash\n", "thetau methods"])).startswith("````bash\nthetau methods\n````")


def test_a_picture_without_words_is_refused(tmp_path: Path) -> None:
    picture = {"output_type": "display_data", "data": {"image/png": "aGk="}}
    with pytest.raises(notebooks.PluginError, match=r"one\.ipynb: .* no `alt`"):
        notebooks.page(notebook(tmp_path, outputs=[picture]))
    with_words = notebook(tmp_path, outputs=[picture], metadata={"alt": "bars"})
    assert "![bars](data:image/png;base64,aGk=)" in notebooks.page(with_words)


def test_an_error_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(notebooks.PluginError, match="'error'"):
        notebooks.page(notebook(tmp_path, outputs=[{"output_type": "error", "ename": "ValueError"}]))


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="preconnect" href="https://fonts.example.org" crossorigin>',
        "<img alt='x' src='//example.org/a.png'>",
    ],
)
def test_what_is_fetched_is_noticed(html: str) -> None:
    assert offline.fetched(html)


@pytest.mark.parametrize(
    "html", ['<a href="https://example.org">a link</a>', '<script src="assets/a.js"></script>', '<img src="data:x">']
)
def test_what_stays_at_home_is_not(html: str) -> None:
    assert not offline.fetched(html)
