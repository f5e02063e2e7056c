"""The notebooks of docs/tutorials, run from a clean folder; what they print is kept in them: `python -m experiments.tutorials.run`.

Names of notebooks may follow. What goes to stderr (progress, loading) is left out of what is kept.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from experiments.common import DOCS, ROOT

FOLDER = DOCS / "tutorials"
SECONDS = 300  # of a cell
WIDTH = 112  # columns of a table that a command prints
BOLD, PLACE = re.compile(r"\x1b\[[\d;]*m"), re.compile(r"/\S*/site-packages/")


def notebooks() -> list[Path]:
    """All of them."""
    return sorted(FOLDER.glob("*.ipynb"))


def environment(folder: Path) -> dict[str, str]:
    """Of the kernel and of the commands that its cells run: this Python and this source, tables of one width, nothing written at home."""
    found = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(found),
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(folder / ".matplotlib")),
    }


def execute(path: Path, folder: Path) -> NotebookNode:
    """A notebook, run in `folder`. Raises `CellExecutionError` where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment(folder))
    return notebook


def printed(notebook: NotebookNode) -> str:
    """What its cells printed."""
    return "".join(
        output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )


def kept(notebook: NotebookNode) -> NotebookNode:
    """The same without what differs from run to run and says nothing: times of cells, what went to stderr, other forms of a result."""
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = list(_outputs(cell.outputs))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def _outputs(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    if said:  # one text a cell, without bold type and without this machine's folders
        yield nbformat.v4.new_output("stream", name="stdout", text=PLACE.sub("…/", BOLD.sub("", said)).rstrip() + "\n")
    for output in outputs:
        if "data" in output:
            form = "image/png" if "image/png" in output.data else "text/plain"
            yield nbformat.v4.new_output("display_data", data={form: output.data[form]})


def main(names: list[str]) -> None:
    """Run those that are named, or all, and write them back."""
    for path in notebooks():
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = kept(execute(path, Path(folder)))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
