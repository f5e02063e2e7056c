"""How long commands take that have next to nothing to do: start-up, headers, and merges of a few numbers.

    python -m experiments.engine.start [--folder runs/start] [--runs 9]

The commands run in turn, each in a process of its own, with bytecode and files in the system's cache; a figure is the median. The checkpoints of
7B parameters are headers with a hole where the data would be, those of the small merges have 0.1 million. Processor seconds are those of all threads of
the command, which a busy machine changes less than seconds; ratios are of these, to `python -c pass` and `python -c "import torch"` in the same run.
Writes experiments/engine/start.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from experiments.common import EXPERIMENTS, machine, timed, write_result
from experiments.plans.page import MODELS, checkpoint, hollow

OUT = EXPERIMENTS / "engine" / "start.json"
NAMES = ("base", "m1", "m2")
SMALL = {f"layers.{layer}.{part}.weight": (96, 96) for layer in range(6) for part in ("attention", "mlp")}


def commands(folder: Path) -> dict[str, list[str]]:
    """By what they are called on the page."""
    large, small = ([str(folder / size / name) for name in NAMES] for size in ("7b", "small"))
    thetau, written = [sys.executable, "-m", "thetau"], str(folder / "out")

    def merge(models: list[str], method: str, *rest: str) -> list[str]:
        given = ("--base", models[0], "--model", models[1], "--model", models[2])
        return [*thetau, "merge", "--quiet", *given, "--method", method, *rest]

    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "thetau --version": [*thetau, "--version"],
        "thetau methods": [*thetau, "methods"],
        "thetau inspect --roles, 7B": [*thetau, "inspect", large[0], "--roles"],
        "thetau merge --dry-run, task_arithmetic, 7B": merge(large, "task_arithmetic", "--dry-run"),
        "thetau merge --dry-run, ties, 7B": merge(large, "ties", "--dry-run"),
        "thetau merge, task_arithmetic, small": merge(small, "task_arithmetic", "-o", written),
        "thetau verify, small": [*thetau, "verify", str(folder / "kept")],
        "thetau merge, ties, small": merge(small, "ties", "-o", written),
        "thetau merge, tsv_m, small": merge(small, "tsv_m", "-o", written),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/start"))
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in NAMES:
        checkpoint(folder / "7b" / name, MODELS["7B"])
        hollow(folder / "small" / name, SMALL)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    listed = commands(folder)
    timed([*listed["thetau merge, task_arithmetic, small"][:-1], str(folder / "kept")], folder / "kept")
    for command in listed.values():  # so that bytecode is there
        timed(command, folder / "out")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in listed}
    for _ in range(options.runs):
        for name, command in listed.items():
            seconds, _, _, processor = timed(command, folder / "out")
            found[name].append((seconds, processor))
    shutil.rmtree(folder)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    least, torch = (medians[name][1] for name in list(listed)[:2])
    rows = {
        name: {
            "seconds": seconds,
            "processor_seconds": processor,
            "times_pass": processor / max(least, 1e-3),
            "times_import_torch": processor / torch,
        }
        for name, (seconds, processor) in medians.items()
    }
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:46} {row['seconds']:5.2f} s {row['processor_seconds']:5.2f} s {row['times_import_torch']:5.2f}\n"
        )
    write_result(
        OUT, {"command": "python -m experiments.engine.start", "machine": machine(), "runs": options.runs, "commands": rows}
    )


if __name__ == "__main__":
    main()
