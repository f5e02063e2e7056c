"""One optimiser step of each paradigm on the same batch, as ratios to the standard step; time and peak memory.

all-MiniLM-L6-v2, AdamW included. Rounds alternate between the paradigms, the median counts. Peak memory is measured in a process of
its own for each: what the steps add to the process with the model loaded. `plain` is the linear step by torch's own
reverse-over-forward. The standard step is timed without dropout, which the linear form cannot have; with dropout beside it.

    python -m experiments.linearised_step.run
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from experiments.common import EXPERIMENTS, write_result
from thetau.finetune.views import LinearView, ModelView, View
from thetau.models import load_encoder
from thetau.models.dual import math_attention
from thetau.models.parts import chosen_names

KINDS = ("standard", "with dropout", "attention", "linear", "attention+linear", "taujp cyclic, batch/8", "plain")
TARGETS = {"linear": 1.8, "taujp cyclic, batch/8": 2.2, "attention": 1.0}
MEMORY_TARGET = 1.3


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def make_step(kind: str, batch: int, length: int, module: nn.Module | None = None) -> Callable[[], None]:
    """A function that does one step."""
    module = module or load_encoder("all-MiniLM-L6-v2").module
    columns, other = inputs(batch, length), inputs(max(1, batch // 8), length)
    head, labels = (
        nn.functional.normalize(torch.randn(10, 384, generator=torch.Generator().manual_seed(1))),
        torch.arange(batch) % 10,
    )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    names = chosen_names(shapes, "attention" if "attention" in kind else "all")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in set(names))
    if kind == "plain":
        return plain_step(module, columns, head, labels)
    view: View = LinearView(module, names) if "linear" in kind or "taujp" in kind else ModelView(module, names)
    if kind != "with dropout":
        module.eval()
    optimiser = torch.optim.AdamW(list(view.trained.values()), lr=1e-5, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(nn.functional.cross_entropy(20 * view.features(columns) @ head.T, labels))
        if "taujp" in kind:
            torch.autograd.backward(0.1 * view.change(other).square().sum(-1).mean())
        view.collect()
        nn.utils.clip_grad_norm_(view.trained.values(), 1.0)
        view.decay(1e-7)
        optimiser.step()

    return step


def plain_step(module: nn.Module, columns: dict[str, Tensor], head: Tensor, labels: Tensor) -> Callable[[], None]:
    start = {name: p.detach() for name, p in module.named_parameters()}
    tau = {name: torch.zeros_like(p, requires_grad=True) for name, p in start.items()}
    optimiser = torch.optim.AdamW(list(tau.values()), lr=1e-5, fused=True)
    module.eval()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with math_attention():
            first, change = jvp(lambda given: functional_call(module, given, (), columns), (start,), (tau,))
        torch.autograd.backward(nn.functional.cross_entropy(20 * (first + change) @ head.T, labels))
        nn.utils.clip_grad_norm_(tau.values(), 1.0)
        optimiser.step()

    return step


def memory_of(kind: str, batch: int, length: int) -> None:
    """Print the megabytes that three steps take at their peak, the model included (Linux: the peak is reset once it is loaded)."""
    module = load_encoder("all-MiniLM-L6-v2").module
    own = sum(p.numel() * p.element_size() for p in module.parameters())
    step = make_step(kind, batch, length, module)
    loaded = resident("VmRSS") - own
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(3):
        step()
    print((resident("VmHWM") - loaded) / 1e6)


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of")
    parser.add_argument("--out", type=Path, default=EXPERIMENTS / "linearised_step" / "results.json")
    given = parser.parse_args()
    if given.memory_of:
        memory_of(given.memory_of, given.batch, given.length)
        return
    steps = {kind: make_step(kind, given.batch, given.length) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in steps.values():
        step()
    for _ in range(given.rounds):
        for kind, step in steps.items():
            begin = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - begin)
    rows: dict[str, Any] = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "experiments.linearised_step.run", "--memory-of", kind]
        command += ["--batch", str(given.batch), "--length", str(given.length)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ratios = [mine / base for mine, base in zip(times[kind], times["standard"], strict=True)]
        rows[kind] = {"seconds": statistics.median(times[kind]), "time_ratio": statistics.median(ratios), "megabytes": peak}
    for kind, row in rows.items():
        row["memory_ratio"] = row["megabytes"] / rows["standard"]["megabytes"]
        row["target"] = TARGETS.get(kind)
        print(
            f"{kind:24s} {row['seconds']:.3f} s  ×{row['time_ratio']:.2f} time  ×{row['memory_ratio']:.2f} memory  target {row['target'] or ''}"
        )
    facts = {"model": "all-MiniLM-L6-v2", "batch": given.batch, "length": given.length, "rounds": given.rounds}
    facts |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    write_result(given.out, facts | {"memory_target": MEMORY_TARGET, "rows": rows})


if __name__ == "__main__":
    main()
