"""`--max-memory` against the operating system's own peak, on a model that is larger than the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.common import EXPERIMENTS, write_result

BUDGET = 512_000_000
ELEMENTS = {
    "embed.weight": (150_000, 1024),
    **{f"layers.{i}.mlp.weight": (4096, 2048) for i in range(14)},
    "norm.weight": (1024,),
}
PEAKS: list[dict[str, object]] = []
RUN = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
print(status, usage.ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Three models of 542 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(1 << 20, generator=generator).to(torch.bfloat16) * 0.02
    for number, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        tensors = {}
        for tensor, shape in ELEMENTS.items():
            rows = chunk.repeat(-(-shape[0] * (shape[1] if len(shape) > 1 else 1) // len(chunk)))[: torch.Size(shape).numel()]
            tensors[tensor] = (rows * (1 + 0.01 * number)).reshape(shape)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    size = (folder / "base" / "model.safetensors").stat().st_size
    assert size > BUDGET
    yield [folder / name for name in ("base", "a", "b")]
    if "THETAU_MEMORY" in os.environ:  # `make memory`
        model = f"three models of {size / 1e6:.0f} MB"
        result = {"command": "make memory", "machine": {"inputs": model}, "runs": PEAKS}
        write_result(EXPERIMENTS / "memory" / "results.json", result)


METHODS: dict[str, list[str]] = {
    "task_arithmetic": [],
    "ties": [],
    "breadcrumbs": [],
    "della": [],
    "awd": ["--set", "tensors=all"],
    "dare_ties": [],
    "model_stock": [],
}


@pytest.mark.parametrize(("method", "kernels"), [*((method, "1") for method in METHODS), ("task_arithmetic", "0"), ("ties", "0")])
def test_the_peak_stays_below_the_budget(inputs: list[Path], tmp_path: Path, method: str, kernels: str) -> None:
    base, *models = inputs
    command = ["-m", "thetau", "merge", "--method", method, *METHODS[method], "--base", str(base), "-o", str(tmp_path / "out")]
    command += [option for model in models for option in ("--model", str(model))]
    command += ["--max-memory", "512MB", "--quiet"]
    environment = {**os.environ, "THETAU_KERNELS": kernels}
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, *command], capture_output=True, text=True, env=environment, check=True
    )
    status, peak = map(int, done.stdout.split()[-2:])
    assert status == 0, done.stderr
    assert peak < BUDGET, f"{peak / 1e6:.0f} MB"
    PEAKS.append({"method": method, "compiled": kernels == "1", "peak_rss_mb": round(peak / 1e6), "budget_mb": BUDGET // 10**6})


def test_a_method_that_cannot_says_how_much_before_it_starts(inputs: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thetau", "merge", "--method", "wudi", "--set", "tensors=all", "--max-memory", "512MB"]
    command += ["--base", str(inputs[0]), "--model", str(inputs[1]), "--model", str(inputs[2]), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs" in done.stderr and "GB for the tensor 'embed.weight'; the memory budget is" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_budget_below_the_libraries_own(inputs: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thetau", "merge", "--method", "average", "--max-memory", "50MB", "--base", str(inputs[0])]
    done = subprocess.run(
        [*command, "--model", str(inputs[1]), "-o", str(tmp_path / "o")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "thetau itself takes" in done.stderr
