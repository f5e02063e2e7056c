"""The tensor names that mergekit's architecture definitions list, as a table of facts for `tests/recipes/test_mergekit_names.py`.

Run it in an environment that has mergekit, which is not one of ours: `python experiments/mergekit_names/run.py`. It writes
`tests/recipes/data/mergekit_names.json`: for each definition the architectures' names and, for each of its modules, the names of tensors
before, inside and after the layers, those that count tokens, and the config's entry for the number of layers.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "tests" / "recipes" / "data" / "mergekit_names.json"
INDEX = "${layer_index}"


def module(prefix: str, given: dict[str, Any]) -> dict[str, Any]:
    """One module's names, each with the module's prefix."""
    lists = {
        "before": given["pre_weights"],
        "layers": given["layer_templates"]["weights"],
        "after": given["post_weights"],
    }
    said: dict[str, Any] = {
        place: sorted(prefix + weight["name"].replace(INDEX, "#") for weight in weights) for place, weights in lists.items()
    }
    said["tokens"] = sorted(
        prefix + weight["name"].replace(INDEX, "#")
        for weights in lists.values()
        for weight in weights
        if weight.get("vocabulary_axis") is not None
    )
    said["depth"] = given.get("num_layers_config_key")
    return said


def definition(given: dict[str, Any]) -> dict[str, Any]:
    """The modules of one definition; one that has none is the module `default`."""
    modules = given["modules"] if given.get("kind") == "modular" else {"default": {"architecture": given}}
    return {
        "architectures": given["architectures"],
        "modules": {
            name: module(inner.get("weight_prefix") or "", inner["architecture"]) for name, inner in sorted(modules.items())
        },
    }


def main() -> None:
    """Write the table."""
    folder = files("mergekit._data.architectures")
    found = {
        file.name.removesuffix(".json"): definition(json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".json")
    }
    table = {"mergekit": version("mergekit"), "definitions": found}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
