"""Whole commands on the checkpoints of experiments/engine: time and memory of the same recipe in both programs, beside the floor.

The floor reads every input and writes and syncs an output of the base's size. The programs alternate; a figure is the median of the runs,
after one that warms the page cache. A third run of ours has `--max-memory 512MB`. Beside the time stand the processors' seconds, which
other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import EXPERIMENTS, floor, machine, timed, write_result
from experiments.engine.run import SHAPES, places

BUDGET = 0.512  # GB, of `--max-memory 512MB`
TARGET_TIMES, TARGET_MEMORY = 3.0, 0.25


def recipes(paths: Sequence[Path], layers: int) -> dict[str, tuple[str, list[Path]]]:
    """Recipes by name, each with the files that it reads."""
    base, models = paths[0], list(paths[1:])
    two, some = models[:2], "\n".join(f"  - model: {path}" for path in models)
    pair = "\n".join(f"  - model: {path}" for path in two)
    weighed = "\n".join(
        f"  - model: {path}\n    parameters: {{weight: {weight}}}" for path, weight in zip(two, (0.3, 0.7), strict=True)
    )
    third = layers // 3
    parts = [(two[0], 0, 2 * third), (two[1], third, layers)]
    slices = "\n".join(
        f"  - sources:\n      - model: {path}\n        layer_range: [{first}, {end}]" for path, first, end in parts
    )
    said = {
        "slerp": (f"merge_method: slerp\nbase_model: {two[0]}\nmodels:\n{pair}\nparameters:\n  t: [0.2, 0.8]\n", two),
        "nuslerp": (f"merge_method: nuslerp\nmodels:\n{weighed}\n", two),
        "sce": (f"merge_method: sce\nbase_model: {base}\nmodels:\n{some}\nparameters:\n  select_topk: 0.1\n", [base, *models]),
        "karcher": (f"merge_method: karcher\nmodels:\n{some}\n", models),
        "slices": (f"merge_method: passthrough\nslices:\n{slices}\n", two),
        "ties": (
            f"merge_method: ties\nbase_model: {base}\nmodels:\n{some}\nparameters:\n  weight: 0.3\n  density: 0.2\n",
            [base, *models],
        ),
        "linear": (f"merge_method: linear\nmodels:\n{some}\nparameters:\n  weight: 0.2\n", models),
    }
    return {name: (f"{text}dtype: bfloat16\n", files) for name, (text, files) in said.items()}


def measure(options: argparse.Namespace) -> None:
    """Run everything and write experiments/mergekit/SIZE.json after every recipe."""
    place, size = options.folder.resolve(), options.timing
    words = ["--build", "--folder", str(place), "--size", size]
    subprocess.run([sys.executable, "-m", "experiments.engine.run", *words], check=True)
    paths, out = places(place, size), place / "out"
    chosen = recipes(paths, SHAPES[size][2])
    names = [name.strip() for name in options.recipes.split(",")] if options.recipes else list(chosen)
    runs: dict[str, dict[str, list[tuple[float, ...]]]] = {name: {"ours": [], "bounded": [], "mergekit": []} for name in names}
    floors: dict[str, list[float]] = {name: [] for name in names}
    loads: list[float] = []
    start = statistics.median(timed([sys.executable, "-c", "import torch, thetau.facade"], out)[0] for _ in range(3))
    floor(paths, out)  # warms the page cache
    for _ in range(options.runs):
        for name in names:
            text, files = chosen[name]
            file = place / f"{name}.yml"
            file.write_text(text, encoding="utf-8")
            ours = [sys.executable, "-m", "thetau", "merge", str(file), "-o", str(out), "--quiet"]
            theirs = [
                options.mergekit,
                "-m",
                "mergekit.scripts.run_yaml",
                str(file),
                str(out),
                "--quiet",
                "--no-write-model-card",
            ]
            loads.append(os.getloadavg()[0])
            floors[name].append(floor(files, out))
            runs[name]["ours"].append(timed(ours, out))
            runs[name]["mergekit"].append(timed(theirs, out))
            runs[name]["bounded"].append(timed([*ours, "--max-memory", "512MB"], out))
            write(size, floors, start, {key: found for key, found in runs.items() if found["bounded"]}, loads)
    shutil.rmtree(out, ignore_errors=True)


def write(size: str, floors: dict[str, list[float]], start: float, runs: dict[str, Any], loads: Sequence[float]) -> None:
    """The table so far, to the screen and to its file."""
    rows = {}
    for name, found in runs.items():
        middle = {who: [statistics.median(values) for values in zip(*figures, strict=True)] for who, figures in found.items()}
        (seconds, anonymous, _, processors), (theirs, their_memory, _, theirs_processors) = middle["ours"], middle["mergekit"]
        least = statistics.median(floors[name])
        rows[name] = {
            "seconds": seconds,
            "floor_seconds": least,
            "ratio": seconds / least,
            "ratio_without_start": (seconds - start) / least,
            "anonymous_gb": anonymous,
            "mergekit_seconds": theirs,
            "mergekit_anonymous_gb": their_memory,
            "times_faster": theirs / seconds,
            "share_of_memory": anonymous / their_memory,
            "processor_seconds": processors,
            "mergekit_processor_seconds": theirs_processors,
            "times_less_work": theirs_processors / processors,
            "bounded_seconds": middle["bounded"][0],
            "bounded_anonymous_gb": max(figure[1] for figure in found["bounded"]),
        }
        print(
            f"{name:10} {seconds:6.2f} s {seconds / least:5.2f} x floor, {anonymous:.2f} GB; mergekit {theirs:6.2f} s "
            f"{their_memory:.2f} GB: {theirs / seconds:.1f} x faster ({theirs_processors / processors:.1f} x less work), "
            f"{anonymous / their_memory:.2f} of its memory; "
            f"within 512 MB: {middle['bounded'][0]:.2f} s, {rows[name]['bounded_anonymous_gb']:.2f} GB",
            flush=True,
        )
    result = {
        "command": f"python -m experiments.mergekit.run --mergekit PYTHON --timing {size}",
        "size": size,
        "runs": len(next(iter(runs.values()))["ours"]),
        "start_seconds": start,
        "load_when_measured": {"least": min(loads), "median": statistics.median(loads), "most": max(loads)},
        "machine": machine(),
        "methods": rows,
    }
    write_result(EXPERIMENTS / "mergekit" / f"{size}.json", result)
