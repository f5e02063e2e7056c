"""What a look at a share of the entries saves where exact quantiles are asked for: the processor's seconds of merges with and without it.

    python -m experiments.engine.look [--folder runs/bench] [--size 280m] [--runs 3]

The same merges in one process, in turn: as they are, and with looks switched off, so that every quantile takes its two rounds. Both must write
the same bytes. Seconds are those of all threads of the process, reading and writing among them, the least of the runs. Writes
experiments/engine/look.json.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import thetau
from experiments.common import EXPERIMENTS, machine, write_result
from experiments.engine.run import SHAPES, build, places
from thetau import methods
from thetau.engine import passes

OUT = EXPERIMENTS / "engine" / "look.json"
TASKS = 4
MERGES: Mapping[str, Any] = {
    "ties": methods.Ties(),
    "ties per tensor": methods.Ties(trim="tensor"),
    "breadcrumbs": methods.Breadcrumbs(),
    "topk": methods.TopK(),
}


@contextmanager
def without_looks() -> Iterator[None]:
    """Two rounds for every quantile."""
    kept = passes.LOOK, passes.TENSOR_LOOK
    passes.LOOK = passes.TENSOR_LOOK = 1 << 60
    try:
        yield
    finally:
        passes.LOOK, passes.TENSOR_LOOK = kept


def measured(method: Any, paths: list[Path], out: Path) -> tuple[float, str]:
    """Seconds of the processor, and a hash of what was written."""
    shutil.rmtree(out, ignore_errors=True)
    base, *tuned = map(thetau.open, paths[: TASKS + 1])
    begun = time.process_time()
    (base + thetau.merge([one - base for one in tuned], method)).save(out)
    seconds = time.process_time() - begun
    with (out / "model.safetensors").open("rb") as file:
        return seconds, hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--size", choices=SHAPES, default="280m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    build(given.folder, given.size)
    paths, out = places(given.folder, given.size), given.folder / "out"
    rows: dict[str, dict[str, float]] = {}
    for name, method in MERGES.items():
        looked, counted = [], []
        for _ in range(given.runs):
            looked.append(measured(method, paths, out))
            with without_looks():
                counted.append(measured(method, paths, out))
        assert len({told for _, told in looked + counted}) == 1, f"{name}: the bytes differ"
        with_look, without = min(looked)[0], min(counted)[0]
        rows[name] = {"seconds": with_look, "without_looks": without, "ratio": without / with_look}
        sys.stdout.write(f"{name}: {with_look:.2f} s, without looks {without:.2f} s\n")
    shutil.rmtree(out, ignore_errors=True)
    write_result(
        given.out,
        {
            "command": "python -m experiments.engine.look",
            "size": given.size,
            "models": TASKS,
            "runs": given.runs,
            "machine": machine(),
            "methods": rows,
        },
    )


if __name__ == "__main__":
    main()
