"""Matrix methods beside TIES: whole merges of Llama-shaped checkpoints, what they took before their sketches, and what the plan says.

    python -m experiments.sketches.run [--folder runs/bench] [--size 280m] [--noise] [--runs 1] [--before SRC] [--device cuda] [--only LABEL …]

K = `TASKS` models in bfloat16 whose differences have a falling spectrum, as those of the demo's fine-tuned models (`--noise`: independent numbers,
which no sketch can shorten but by what they have in common). Every contestant is a whole command, start-up, checks and fsync included;
TIES runs before each of them, and a figure is the median of the ratios to the TIES beside it, of time by the clock and of the
processors' time, which other work on the machine disturbs less. `--before` names the `src` folder of another revision, whose program runs the same
merge. `--device cuda` has the matrix solvers on a graphics card, TIES beside them on the processor as ever, and writes SIZE-cuda.json.
Operations are those of the plan (`--dry-run`). Checkpoints are made once from a seed. `slice` is two of the blocks of `280m`,
for those that would take long. Rows go to experiments/sketches/SIZE.json (SIZE-noise.json) as they are made.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.common import floor, machine, timed, write_result
from experiments.engine.run import SHAPES, build, places

HERE = Path(__file__).parent
TASKS = 4
ROWS: dict[str, tuple[str, ...]] = {
    "task_arithmetic": ("task_arithmetic", "scale=0.3"),
    "wudi gradient flow": ("wudi", "solver=gradient_flow"),
    "wudi closed form": ("wudi", "solver=closed_form"),
    "tsv_m, full": ("tsv_m", "rank=full"),
    "iso_cts": ("iso_cts",),
    "bilateral": ("bilateral",),
    "tsv_m": ("tsv_m",),
    "iso_c": ("iso_c",),
    "dc_merge": ("dc_merge",),
    "star": ("star",),
    "svc": ("svc",),
}


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--size", choices=SHAPES, default="280m")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        build(given.folder, given.size, falling=not given.noise)
        return
    again = [sys.executable, "-m", "experiments.sketches.run", "--build", "--folder", str(given.folder), "--size", given.size]
    subprocess.run([*again, *(["--noise"] if given.noise else [])], check=True)  # this process stays small
    paths = places(given.folder, given.size if given.noise else f"{given.size}-falling")[: TASKS + 1]
    out = given.folder / "out"
    file = HERE / f"{given.size}{'-noise' if given.noise else ''}{'-cuda' if given.device == 'cuda' else ''}.json"
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    floor(paths, out)  # warms the page cache
    for label in given.only:
        command = [*merge(paths, out, ROWS[label]), "--device", given.device]
        row = {**kept.get(label, {}), **beside(merge(paths, out, ("ties",)), command, out, given.runs)}
        row["operations"] = operations([*command, "--dry-run"])
        if given.before:
            older = beside(merge(paths, out, ("ties",)), command, out, 1, given.before)
            row |= {f"before_{key}": older[key] for key in ("seconds", "processor_seconds", "times_ties_processor")}
            row["times_faster"] = older["processor_seconds"] / row["processor_seconds"]
        row["floor_seconds"] = floor(paths, out)
        kept[label] = row
        print(label, {key: round(value, 2) for key, value in row.items() if isinstance(value, float)}, flush=True)
        write_result(
            file,
            {
                "command": "make sketches",
                "size": given.size,
                "tasks": TASKS,
                "device": given.device,
                "machine": machine(),
                "rows": kept,
            },
        )
    shutil.rmtree(out, ignore_errors=True)


def merge(paths: list[Path], out: Path, method: tuple[str, ...]) -> list[str]:
    """The command of a merge."""
    models = [argument for path in paths[1:] for argument in ("--model", str(path))]
    fields = [argument for field in method[1:] for argument in ("--set", field)]
    return [
        sys.executable,
        "-m",
        "thetau",
        "merge",
        "--quiet",
        "--base",
        str(paths[0]),
        *models,
        "-o",
        str(out),
        "--method",
        method[0],
        *fields,
    ]


def beside(ties: list[str], command: list[str], out: Path, runs: int, source: Path | None = None) -> dict[str, float]:
    """Medians of a command's seconds, by the clock and of the processors, and of their ratios to TIES just before."""
    pairs = []
    for _ in range(runs):
        first = timed(ties, out)
        pairs.append((first, timed(command if source is None else ["env", f"PYTHONPATH={source}", *command], out)))
    middle = statistics.median
    return {
        "seconds": middle(own[0] for _, own in pairs),
        "processor_seconds": middle(own[3] for _, own in pairs),
        "ties_seconds": middle(first[0] for first, _ in pairs),
        "ties_processor_seconds": middle(first[3] for first, _ in pairs),
        "times_ties": middle(own[0] / first[0] for first, own in pairs),
        "times_ties_processor": middle(own[3] / first[3] for first, own in pairs),
        "anonymous_gb": middle(own[1] for _, own in pairs),
    }


def operations(command: list[str]) -> float:
    """What the plan counts."""
    said = subprocess.run([word for word in command if word != "--quiet"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"matrix solvers: (\S+) operations", said)
    return float(found[1]) if found else 0.0


if __name__ == "__main__":
    main()
