"""Draw the pages that come from the code and from result files: docs/methods.md and docs/figures.md.

    python tools/make_docs.py

Fails where a public name of thetau, or a field of a method, has no explanation.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import thetau
from thetau.methods import registry

ROOT = Path(__file__).resolve().parent.parent


def methods_page() -> str:
    """Every method with its module's text, fields and paper."""
    lines = ["# Methods", "", "Drawn from the registry by `tools/make_docs.py`; `thetau methods NAME` prints the same.", ""]
    for name in registry.names():
        cls = registry.get(name)
        if registry.package_of(cls) is not None:  # another package's, which happens to be installed here
            continue
        module = inspect.getmodule(cls)
        lines += [f"## {name}", "", f"`thetau.methods.{cls.__name__}` · {registry.paper(name)}", ""]
        lines += [inspect.cleandoc(module.__doc__ or "") if module else "", "", "| field | range | default | meaning |", "|---|---|---|---|"]
        for field in registry.describe(name):
            if not field.meaning:
                raise SystemExit(f"{name}.{field.name} has no meaning, neither in the docstring of {cls.__name__} nor on the field.")
            cells = (f"`{field.name}`", field.range, f"`{field.default}`", field.meaning.replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def check_public_names() -> None:
    """Every public name and every public member of it must be documented."""
    bare = []
    for name in thetau.__all__:
        thing = getattr(thetau, name)
        if isinstance(thing, str):
            continue
        members = {name: thing}
        if inspect.isclass(thing):
            members |= {
                f"{name}.{key}": value for key, value in vars(thing).items() if not key.startswith("_") and callable(value)
            }
        bare += [key for key, value in members.items() if not inspect.getdoc(value)]
    if bare:
        raise SystemExit(f"public names without a docstring: {', '.join(bare)}")


def figures_page() -> str:
    """The benchmarks' result files as tables."""
    lines = [
        "# Figures",
        "",
        "Each table is drawn from a file under `benchmarks/results/`; the command above it writes that file.",
        "",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        if path.stem in ("paradigms", "bases-text", "bases-vision", "bilateral"):  # have pages of their own
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        command = "make demo readme" if path.stem == "demo" else _command(path.stem, result)
        lines += [f"## {path.stem}", "", f"`{command}`", ""]
        if "machine" in result:
            about = result["machine"]
            lines += [about if isinstance(about, str) else ", ".join(f"{key} {value}" for key, value in about.items()), ""]
        for title, rows in _tables(result):
            lines += [f"**{title}**", "", *_markdown(rows), ""]
    return "\n".join(lines)


def _command(stem: str, result: dict[str, Any]) -> str:
    found = str(result.get("command", f"benchmarks/{stem}.py"))
    if stem.startswith("engine-"):
        found = "make bench"
    if stem == "bases-scale":
        found = "make bases-scale"
    return found if found.startswith("make ") else f"python {found}"


def _tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    found = []
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            found.append((key, value))
        elif isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            found.append((key, [{"": name, **row} for name, row in value.items()]))
    return found


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict)))
    head = [" | ".join(["", *columns, ""]).strip(), "|" + "---|" * len(columns)]
    return [head[0], head[1], *("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Check, then write both pages."""
    check_public_names()
    (ROOT / "docs" / "methods.md").write_text(methods_page() + "\n", encoding="utf-8")
    (ROOT / "docs" / "figures.md").write_text(figures_page() + "\n", encoding="utf-8")
    sys.stdout.write("docs/methods.md, docs/figures.md\n")


if __name__ == "__main__":
    main()
