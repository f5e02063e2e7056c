"""What sketches cost in accuracy: the demo's models merged with few directions, with as many as the spectrum asks for, and with all.

    make demo                               # the fine-tuned models, in runs/demo
    python -m experiments.sketches.accuracy [--run runs/demo] [--only LABEL …]

Every row is a merge of the demo's six models at its defaults but for the fields that its label says, measured as experiments.catalogue
does. Rows are kept in RUN/sketches as they are made; what is there is not made again, but for those of `--only`. Writes
experiments/sketches/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import thetau
from experiments.catalogue.run import LIMITS, Catalogue
from experiments.common import write_result
from thetau.evaluate.means import average, normalised
from thetau.evaluate.merging import at_scale
from thetau.methods import registry

OUT = Path(__file__).parent / "accuracy.json"
FLOW = {"solver": "gradient_flow"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "wudi gradient flow, full": ("wudi", {**FLOW, "directions": "full"}),
    "wudi gradient flow, auto": ("wudi", {**FLOW, "directions": "auto"}),
    "bilateral, full": ("bilateral", {"rank": "full"}),
    "bilateral, auto": ("bilateral", {"rank": "auto"}),
    **{
        f"wudi gradient flow, {count}, {tail}": ("wudi", {**FLOW, "directions": count, "tail": tail})
        for count in (16, 8)
        for tail in ("flat", "drop")
    },
    "wudi gradient flow, auto, drop": ("wudi", {**FLOW, "directions": "auto", "tail": "drop"}),
    "bilateral, auto, drop": ("bilateral", {"rank": "auto", "tail": "drop"}),
    "tsv_m, full": ("tsv_m", {"rank": "full"}),
    "tsv_m, auto": ("tsv_m", {"rank": "auto"}),
    "tsv_m, 16": ("tsv_m", {"rank": 16}),
    "tsv_m, 32": ("tsv_m", {"rank": 32}),
    "iso_c": ("iso_c", {}),
    "dc_merge, full": ("dc_merge", {"rank": "full"}),
    "dc_merge, auto": ("dc_merge", {"rank": "auto"}),
    "wudi closed form, full": ("wudi", {"solver": "closed_form", "directions": "full"}),
    "wudi closed form, auto": ("wudi", {"solver": "closed_form", "directions": "auto"}),
}


def measured(run: Catalogue, name: str, fields: dict[str, Any], label: str) -> dict[str, Any]:
    """One row."""
    base = thetau.open(run.suite.backbone)
    vectors = [(thetau.open(folder) - base).named(task) for task, folder in run.models.items()]
    begun = time.process_time()
    vector = thetau.merge(vectors, registry.build(name, fields), engine=thetau.Engine(workers=1)).state_dict()
    seconds = time.process_time() - begun
    measures = run.evaluator.evaluate(at_scale(run.base, vector, 1.0), "test", origin=label)
    return {
        "seconds": round(seconds, 2),
        "average": round(100 * average(measures), 2),
        "normalised": round(100 * normalised(measures, run.individual["test"]), 2),
        **{task: round(100 * measures[task].value, 2) for task in sorted(measures)},
    }


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    folder = given.run / "sketches"
    folder.mkdir(parents=True, exist_ok=True)
    run: Catalogue | None = None
    rows = {}
    for label, (name, fields) in ROWS.items():
        file = folder / f"{label.replace(' ', '_')}.json"
        if given.only and label not in given.only and not file.is_file():
            continue
        if label in given.only or not file.is_file():
            run = run or Catalogue(given.run)
            write_result(file, measured(run, name, fields, label))
        rows[label] = json.loads(file.read_text(encoding="utf-8"))
        print(f"{label}: {rows[label]['normalised']:.2f} in {rows[label]['seconds']:.1f} s", flush=True)
    write_result(OUT, {"command": "make sketches", "test": LIMITS["test"], "rows": rows})


if __name__ == "__main__":
    main()
