"""AWD from the Gram matrix against the authors' way: 1,000 autograd steps in full dimension.

    python -m experiments.awd.run [--quick]

Ours is everything: reading the vectors for the Gram matrix, the optimisation in K numbers, and subtracting δ from every vector.
The steps in full dimension are timed on a part of the 1,000 and scaled; `measured_steps` says on how many.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

import thetau
from experiments.common import EXPERIMENTS, write_result
from thetau.transforms.awd_gram import objective, solve

TASKS = 8
THREADS = 2
ALPHA = 1e-3
TARGET = 50.0


def checkpoints(parameters: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and its fine-tuned models: linear weights with a shared direction, from a seed."""
    side = 1024
    names = [f"layers.{i}.mlp.fc.weight" for i in range(max(1, parameters // side**2))]
    base = {name: 0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    shared = {
        name: 1e-4 * torch.randn(side, side, generator=torch.Generator().manual_seed(900 + i)) for i, name in enumerate(names)
    }
    models = []
    for task in range(TASKS):
        seeds = (torch.Generator().manual_seed(10_000 * (task + 1) + i) for i in range(len(names)))
        models.append(
            {n: base[n] + shared[n] + 2e-4 * torch.randn(side, side, generator=g) for n, g in zip(names, seeds, strict=True)}
        )
    return base, models


def full_dimension(stack: Tensor, steps: int) -> tuple[float, Tensor]:
    """Seconds of `steps` steps on Eq. 14 with δ of full dimension, and δ."""
    delta = torch.zeros_like(stack[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=1e-6)
    k = len(stack)
    begin = time.perf_counter()
    for _ in range(steps):
        optimiser.zero_grad()
        rows = torch.nn.functional.normalize(stack - delta, dim=1)
        cosine = (rows @ rows.T).abs()
        loss = (cosine.sum() - cosine.diagonal().sum()) / (k * (k - 1)) + ALPHA * (delta.square().sum() + 1e-30).sqrt()
        loss.backward()
        optimiser.step()
    return time.perf_counter() - begin, delta.detach()


def ours(base: dict[str, Tensor], models: list[dict[str, Tensor]]) -> tuple[float, list[dict[str, Tensor]]]:
    """Seconds of the library from opened models to all disentangled vectors, and these."""
    begin = time.perf_counter()
    start = thetau.open(base)
    vectors = [thetau.open(model) - start for model in models]
    parts = thetau.transform(vectors, thetau.methods.Awd(alpha=ALPHA), names=[f"t{i}" for i in range(TASKS)])
    out = [part.state_dict() for part in parts]
    return time.perf_counter() - begin, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one million parameters, one run")
    parser.add_argument("--parameters", type=int, default=20_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps in full dimension that are timed; scaled to 1,000")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    base, models = checkpoints(1_000_000 if options.quick else options.parameters)
    stack = torch.stack([torch.cat([(model[name] - base[name]).reshape(-1) for name in sorted(base)]) for model in models])
    gram = stack.double() @ stack.double().T
    mine, theirs = [], []
    for _ in range(1 if options.quick else options.runs):
        mine.append(ours(base, models)[0])
        took, delta = full_dimension(stack, options.steps)
        theirs.append(took * 1000 / options.steps)
    found = solve(gram, ALPHA)
    left = (stack - delta).double()
    norm = left.norm(dim=1)
    cosine = ((left @ left.T) / (norm[:, None] * norm)).abs()
    theirs_loss = float((cosine.sum() - cosine.diagonal().sum()) / (TASKS * (TASKS - 1)) + ALPHA * delta.double().norm())
    row = {
        "tasks": TASKS,
        "parameters": stack.shape[1],
        "ours_seconds": statistics.median(mine),
        "full_dimension_seconds_1000_steps": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "target": TARGET,
        "measured_steps": options.steps,
        "loss_at_zero": float(objective(gram, torch.zeros(TASKS, dtype=torch.float64), ALPHA)),
        "loss_ours": found.loss,
        "loss_full_dimension_after_measured_steps": theirs_loss,
    }
    print(row)
    machine = {"threads": THREADS, "processor": platform.machine(), "torch": torch.__version__}
    if not options.quick:
        result = {"command": "python -m experiments.awd.run", "machine": machine, "awd": [row]}
        write_result(EXPERIMENTS / "awd" / "results.json", result)


if __name__ == "__main__":
    main()
