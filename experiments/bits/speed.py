"""Elementwise merges by an older revision and by this one, in pairs, on the same files in the same run.

    python -m experiments.bits.speed [--old REVISION] [--size 280m] [--pairs 3]

Whole commands, the old and the new one in turn; writes experiments/bits/speed.json with every figure, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from experiments.bits.run import OLD
from experiments.common import EXPERIMENTS, ROOT
from experiments.engine.run import build, places

METHODS = {"task_arithmetic": [], "ties": [], "dare_ties": [], "awd": ["--set", "tensors=all"]}


def seconds(source: Path, base: Path, models: list[Path], method: str, fields: list[str], out: Path) -> float:
    """A whole command, start-up included."""
    command = [
        sys.executable,
        "-m",
        "thetau",
        "merge",
        "--method",
        method,
        *fields,
        "--base",
        str(base),
        "-o",
        str(out),
        "--quiet",
    ]
    for model in models:
        command += ["--model", str(model)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "PYTHONPATH": str(source / "src")
    }
    begin = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=out.parent)
    took = time.perf_counter() - begin
    shutil.rmtree(out)
    return took


def main() -> None:
    """Build, run in pairs, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default=OLD)
    parser.add_argument("--size", default="280m")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    folder = Path(os.environ.get("THETAU_BENCH", ROOT / "runs" / "bench"))
    build(folder, options.size)
    base, *models = places(folder, options.size)
    rows = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        before = Path(temporary) / "old"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(before), options.old], check=True)
        try:
            subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=before, check=True, capture_output=True
            )
            for method, fields in METHODS.items():
                took: dict[str, list[float]] = {"before": [], "after": []}
                for pair in range(options.pairs):
                    order = [("before", before), ("after", ROOT)]
                    for label, source in order if pair % 2 == 0 else order[::-1]:
                        took[label].append(seconds(source, base, models, method, fields, Path(temporary) / "out"))
                ratio = median(took["after"]) / median(took["before"])
                rows[method] = {**took, "ratio": ratio}
                print(
                    f"{method:16} {median(took['before']):6.2f} s before, {median(took['after']):6.2f} s now, ratio {ratio:.2f}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=False)
    content = {"old": options.old, "size": options.size, "models": len(models), "cores": os.cpu_count(), "methods": rows}
    (EXPERIMENTS / "bits" / "speed.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
