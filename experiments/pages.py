"""Draw the pages that come from the code and from result files: docs/figures.md, the methods', and those of the experiments.

    python -m experiments.pages

Fails where a field of a method has no explanation, or a method does not say when to use it. Pages that need a run first are drawn by that:
docs/large.md by `make plans`, the README's table by `make readme`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from experiments.adapters import page as adapters
from experiments.bases import page as bases
from experiments.big_checkpoints import page as big_checkpoints
from experiments.bilateral import page as bilateral
from experiments.catalogue import page as catalogue
from experiments.common import DOCS, EXPERIMENTS
from experiments.data_methods import page as data_methods
from experiments.doctor import page as doctor
from experiments.everyday import page as everyday
from experiments.llm import page as llm
from experiments.mergekit import page as mergekit
from experiments.paradigms import page as paradigms
from experiments.sketches import page as sketches

TABLES = {  # what stands on the page of figures, and the command that writes its file
    "awd": "python -m experiments.awd.run",
    "bases_scale": "make bases-scale",
    "demo": "make demo readme",
    "engine": "make bench",
    "fuzz": "make fuzz",
    "kills": "make kills",
    "linearised_step": "python -m experiments.linearised_step.run",
    "memory": "make memory",
    "peers": "make peers",
    "similarity": "make similarity DATA=…",
    "wudi": "python -m experiments.wudi.run",
}


def figures_page() -> str:
    """The result files as tables."""
    lines = [
        "# Figures",
        "",
        "```",
        "make bench kills memory fuzz peers   # or the command above a table: each writes its own file again",
        "make docs                            # draws this page",
        "```",
        "",
        "Each table is drawn from a result file under `experiments/`; the command above it writes that file.",
        "",
    ]
    for name, command in TABLES.items():
        for path in sorted((EXPERIMENTS / name).glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            title = name if path.stem == "results" else f"{name}, {path.stem}"
            lines += [f"## {title}", "", f"`{result.get('command', command)}`", ""]
            if "machine" in result:
                about = result["machine"]
                lines += [about if isinstance(about, str) else ", ".join(f"{key} {value}" for key, value in about.items()), ""]
            for heading, rows in _tables(result):
                lines += [f"**{heading}**", "", *_markdown(rows), ""]
    return "\n".join(lines)


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
    """Write every page."""
    (DOCS / "figures.md").write_text(figures_page() + "\n", encoding="utf-8")
    sys.stdout.write("docs/figures.md\n")
    for experiment in (
        adapters,
        bases,
        big_checkpoints,
        bilateral,
        catalogue,
        data_methods,
        doctor,
        everyday,
        llm,
        mergekit,
        paradigms,
        sketches,
    ):
        experiment.main()


if __name__ == "__main__":
    main()
