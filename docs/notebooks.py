"""The notebooks of docs/tutorials as pages: words as they are, code with what it printed, pictures; the notebook beside them.

A notebook is JSON, so nothing is needed to read it. A picture's description stands in its cell's metadata, as `alt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FOLDER = "tutorials"


def page(path: Path) -> str:
    """A notebook's page."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = [_cell(path, cell) for cell in notebook["cells"]]
    parts.append(
        f"[This page as a notebook]({path.name}). The tests run it; `make tutorials` runs it anew and keeps what it prints."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(path: Path, cell: dict[str, Any]) -> str:
    text = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return text
    first, _, rest = text.partition("\n")
    code = _fence(rest, "bash") if first == "%%bash" else _fence(text, "python")
    return "\n\n".join([code, *(_output(path, cell, output) for output in cell["outputs"])])


def _output(path: Path, cell: dict[str, Any], output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _fence("".join(output["text"]).rstrip(), "text")
    data = output.get("data", {})
    if "image/png" in data:
        alt = cell["metadata"].get("alt")
        if not alt:
            raise PluginError(f"{path}: a cell draws a picture and has no `alt` in its metadata. Say what the picture shows.")
        return f"![{alt}](data:image/png;base64,{''.join(data['image/png']).strip().replace(chr(10), '')})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/plain" in data:
        return _fence("".join(data["text/plain"]), "text")
    raise PluginError(
        f"{path}: holds an output of kind {output['output_type']!r} that no page can show. Run it anew: make tutorials."
    )


def _fence(text: str, language: str) -> str:
    return f"````{language}\n{text}\n````"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page a notebook."""
    for path in sorted((Path(config.docs_dir) / FOLDER).glob("*.ipynb")):
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=page(path)))
    return files
