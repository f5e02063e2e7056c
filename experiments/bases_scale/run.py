"""A bank of many vectors: build time against reading the files once, and peak memory.

    python -m experiments.bases_scale.run --folder runs/bases-scale [--vectors 72] [--parameters 100e6] [--memory 1.5GB]

Vectors are saved task vectors in float32, made once from a seed: families of eight that share a direction. The floor reads every file
once, with two threads, before and after the build, so that both meet the same disk; a figure is the mean of the two. The build is the
whole command, start-up, writing and syncing included. Memory is the operating system's peak of resident memory (VmHWM).
One vector is then inserted and one forgotten. The table goes to experiments/bases_scale/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.common import EXPERIMENTS, write_result

RESULTS = EXPERIMENTS / "bases_scale" / "results.json"
FAMILY = 8
WIDTH = 1024


def make(folder: Path, count: int, parameters: int) -> list[Path]:
    """The base and `count` vectors, those that are not there yet."""
    import torch
    from safetensors.torch import save_file

    rows = parameters // WIDTH // 12
    shapes = {f"layers.{layer}.mlp.weight": (rows, WIDTH) for layer in range(12)}
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.safetensors"
    if not base.exists():
        generator = torch.Generator().manual_seed(0)
        save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, base)
    from thetau import open as open_weights

    mark = {"thetau.kind": "task_vector", "thetau.base": open_weights(base).terms[0][1].fingerprint()}
    paths = []
    for number in range(count + 1):  # the last one is inserted later
        path = folder / f"v{number:03d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        tensors = {}
        for place, (name, shape) in enumerate(shapes.items()):
            shared = torch.Generator().manual_seed(1000 + 100 * (number // FAMILY if number < count else 0) + place)
            own = torch.Generator().manual_seed(100_000 + 100 * number + place)
            value = torch.randn(shape, generator=shared).mul_(0.005)
            tensors[name] = value.add_(torch.randn(shape, generator=own), alpha=0.01)
        save_file(tensors, path.with_suffix(".part"), metadata=mark)
        path.with_suffix(".part").replace(path)
        print(path.name, flush=True)
    return paths


def read_all(paths: list[Path]) -> float:
    """Seconds to read every byte once."""

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(1 << 22))
            while file.readinto(buffer):
                pass

    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, paths))
    return time.perf_counter() - begin


def command(*words: str) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of a thetau command."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "thetau", *words])
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        except OSError:
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"thetau {' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - begin, peak * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vectors", type=int, default=72)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--make", action="store_true", help="make the files and stop")
    given = parser.parse_args()
    paths = make(given.folder, given.vectors, int(given.parameters))
    if given.make:
        return
    vectors, extra = paths[:-1], paths[-1]
    bank = given.folder / "bank"
    shutil.rmtree(bank, ignore_errors=True)
    base = str(given.folder / "base.safetensors")
    memory = ["--max-memory", given.memory, "-q"]
    floors = [read_all(vectors)]
    build = command("basis", "build", "-b", base, *map(str, vectors), "-o", str(bank), *memory)
    floors.append(read_all(vectors))
    insert = command("basis", "insert", str(bank), str(extra), *memory)
    forget = command("basis", "forget", str(bank), vectors[1].stem, *memory)
    state = json.loads((bank / "bank.json").read_text())
    floor = sum(floors) / 2
    nbytes = sum(path.stat().st_size for path in vectors)
    found: dict[str, Any] = {
        "machine": f"{given.vectors} vectors of {int(given.parameters):,} parameters, {nbytes / 1e9:.1f} GB; reading them once took {floor:.1f} s",
        "vectors": given.vectors,
        "parameters": int(given.parameters),
        "bytes": nbytes,
        "cores": len(os.sched_getaffinity(0)),
        "max_memory": given.memory,
        "floor_seconds": floors,
        "bases": len(state["bases"]),
        "bank_bytes": sum(basis["nbytes"] for basis in state["bases"].values()),
        "operations": [
            {"operation": name, "seconds": seconds, "over_floor": seconds / floor, "peak_gb": peak}
            for name, (seconds, peak) in (("build", build), ("insert", insert), ("forget", forget))
        ],
        "log": [{key: step[key] for key in ("kind", "read", "written", "seconds")} for step in state["log"]],
    }
    write_result(given.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
