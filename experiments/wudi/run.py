"""WUDI's solver against the authors' way: 300 Adam steps through autograd, the same threads, shape by shape.

    python -m experiments.wudi.run [--quick]

Runs alternate; figures are medians. The autograd loop, whose steps all cost the same, is timed on 30 of the 300 and scaled; ours runs them
all. The relative difference is that after those 30 steps (tests/parity/test_parity_wudi.py asserts it after 300). Memory is the peak resident size of a
process of its own, which streams K vectors one by one.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.common import EXPERIMENTS, write_result
from thetau.methods.wudi_solvers import Interference

SHAPES = ((768, 768), (3072, 768), (768, 3072))  # d_out, d_in
RMS = 2.4e-4
THREADS = 2
STEPS = 300
SAMPLE = 30  # autograd steps that are timed
TARGETS = {(768, 768): 10.0, (3072, 768): 30.0, (768, 3072): 1.8}


def vector(shape: tuple[int, int], task: int) -> Tensor:
    """A task vector at the scale of the paper's, from a seed."""
    return RMS * torch.randn(shape, generator=torch.Generator().manual_seed(task))


def site(shape: tuple[int, int], tasks: int):
    from thetau.checkpoint import Kind
    from thetau.parts import Site

    names = tuple(f"t{task}" for task in range(tasks))
    return Site(name="w", shape=shape, kind=Kind.MLP, layer=0, tasks=names, row_elements=shape[1])


def ours(shape: tuple[int, int], vectors: Callable[[int], Tensor], tasks: int, solver: str, steps: int = STEPS) -> Tensor:
    """The library's reduction, fed task by task."""
    reduction = Interference(solver=solver, steps=steps)
    total = reduction.init(*shape, tasks)
    for task in range(tasks):
        total = reduction.add(total, vectors(task), site(shape, 1))
    return reduction.result(total, site(shape, tasks))


def autograd(vectors: list[Tensor], steps: int = STEPS) -> Tensor:
    """Eq. 21, as Algorithm 1 runs it."""
    stack = torch.stack(vectors)
    squares = stack.square().sum((1, 2))
    tau = stack.sum(0).requires_grad_()
    rms = float(stack.double().square().mean().sqrt())
    optimiser = torch.optim.Adam([tau], lr=1e-5 * rms / RMS, eps=1e-8 * rms / RMS)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (((tau - stack) @ stack.transpose(1, 2)).square().sum((1, 2)) / squares).sum()
        loss.backward()
        optimiser.step()
    return tau.detach()


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and the result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def memory(shape: tuple[int, int], tasks: int, steps: int) -> float:
    """Peak resident MB of a fresh process that merges K vectors made one by one."""
    arguments = [sys.executable, "-m", "experiments.wudi.run", "--peak", *map(str, (*shape, tasks, steps))]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])


def compare(shape: tuple[int, int], tasks: int, runs: int, steps: int) -> dict[str, float | str | int]:
    """One row of the table."""
    vectors = [vector(shape, task) for task in range(tasks)]
    seconds: dict[str, list[float]] = {"autograd": [], "adam": [], "closed_form": [], "gradient_flow": []}
    for _ in range(runs):
        took, reference = timed(lambda: autograd(vectors, SAMPLE))
        seconds["autograd"].append(took * steps / SAMPLE)
        for solver in ("adam", "closed_form", "gradient_flow"):
            took, _ = timed(lambda solver=solver: ours(shape, vectors.__getitem__, tasks, solver, steps))
            seconds[solver].append(took)
    after = ours(shape, vectors.__getitem__, tasks, "adam", SAMPLE)
    error = float((after - reference).norm() / reference.norm())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "shape": f"{shape[0]}x{shape[1]}",
        "tasks": tasks,
        "autograd_seconds": median["autograd"],
        "adam_seconds": median["adam"],
        "ratio": median["autograd"] / median["adam"],
        "target": TARGETS[shape],
        "closed_form_ratio": median["autograd"] / median["closed_form"],
        "gradient_flow_ratio": median["autograd"] / median["gradient_flow"],
        "autograd_steps_timed": SAMPLE,
        "relative_difference": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 steps, one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peak", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peak:
        d_out, d_in, tasks, steps = options.peak
        ours((d_out, d_in), lambda task: vector((d_out, d_in), task), tasks, "adam", steps)
        status = Path("/proc/self/status").read_text()  # unlike ru_maxrss, not inherited from the process that started this one
        print(next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM")))
        return
    steps, runs = (30, 1) if options.quick else (STEPS, options.runs)
    rows = []
    for shape in SHAPES:
        row = compare(shape, 8, runs, steps)
        for tasks in (4, 16):
            row[f"peak_mb_{tasks}_tasks"] = memory(shape, tasks, 3)
        rows.append(row)
        print(row, flush=True)
    machine = {"threads": THREADS, "processor": platform.machine(), "torch": torch.__version__}
    result = {"command": "python -m experiments.wudi.run", "steps": steps, "runs": runs, "machine": machine, "adam": rows}
    if not options.quick:
        write_result(EXPERIMENTS / "wudi" / "results.json", result)


if __name__ == "__main__":
    main()
