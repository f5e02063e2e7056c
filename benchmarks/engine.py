"""The engine against the floor: whole merges of Llama-shaped checkpoints, as ratios to reading all inputs and writing the output.

    python benchmarks/engine.py --folder /tmp/bench [--size 280m|1.1b|tiny] [--runs 3] [--methods ties,average]

Checkpoints are made once from a seed. Every figure is the median over alternated runs with a warm page cache; our timer covers the
whole command, start-up, checks and fsync included. The result goes to benchmarks/results/engine-SIZE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {  # hidden, intermediate, layers, vocabulary
    "tiny": (256, 704, 4, 8000),
    "280m": (1024, 2816, 17, 32000),
    "1.1b": (2048, 5632, 22, 32000),
}
MODELS = 5
METHODS: dict[str, list[str]] = {
    "average": ["--method", "average"],
    "task_arithmetic": ["--method", "task_arithmetic", "--set", "scale=0.3"],
    "ties per tensor": ["--method", "ties", "--set", "trim=tensor"],
    "ties": ["--method", "ties"],
    "dare_linear": ["--method", "dare_linear", "--set", "drop=0.5"],
    "dare_ties": ["--method", "dare_ties", "--set", "drop=0.5", "--set", "density=1"],
    "topk": ["--method", "topk"],
    "awd": ["--method", "awd", "--set", "tensors=all"],
}


def build(folder: Path, size: str) -> list[Path]:
    """A base and five fine-tuned models in bfloat16, from a seed."""
    hidden, inner, layers, vocabulary = SHAPES[size]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    paths = [folder / size / name for name in ("base", *(f"m{index}" for index in range(MODELS)))]
    for number, path in enumerate(paths):
        if (path / "model.safetensors").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for index, (name, shape) in enumerate(sorted(shapes.items())):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.02
            if number:
                noise = torch.Generator().manual_seed(1000 * number + index)
                base += torch.randn(shape, generator=noise) * 0.001
            tensors[name] = base.to(torch.bfloat16)
        save_file(tensors, path / "building.tmp", metadata={"format": "pt"})
        (path / "building.tmp").rename(path / "model.safetensors")
        (path / "config.json").write_text("{}")
    return paths


def floor(paths: list[Path], out: Path) -> float:
    """Seconds to read every input and write and sync an output of the base's size."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    buffer = bytearray(1 << 22)
    view = memoryview(buffer)
    begin = time.perf_counter()
    with open(out / "model.safetensors", "wb", buffering=0) as target:
        for number, path in enumerate(paths):
            with open(path / "model.safetensors", "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if number == 0:
                        target.write(view[:count])
        os.fsync(target.fileno())
    return time.perf_counter() - begin


def run(arguments: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak resident GB (anonymous and file pages) of a command."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)}\n{process.stderr.read().decode() if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--size", choices=SHAPES, default="280m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    paths = build(options.folder, options.size)
    chosen = [name.strip() for name in options.methods.split(",")]
    out = options.folder / "out"
    models = [argument for path in paths[1:] for argument in ("--model", str(path))]
    thetau = [sys.executable, "-m", "thetau", "merge", "--quiet", "--base", str(paths[0]), *models, "-o", str(out)]
    floors: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    memory: dict[str, float] = dict.fromkeys(chosen, 0.0)
    floor(paths, out)  # warms the page cache
    for _ in range(options.runs):
        floors.append(floor(paths, out))
        for name in chosen:
            took, peak = run([*thetau, *METHODS[name]], out)
            seconds[name].append(took)
            memory[name] = max(memory[name], peak)
    start = statistics.median(run([sys.executable, "-c", "import torch, thetau.facade"], out)[0] for _ in range(3))
    least = statistics.median(floors)
    shutil.rmtree(out, ignore_errors=True)
    rows = {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(times) / least,
            "ratio_without_start": (statistics.median(times) - start) / least,
            "peak_rss_gb": memory[name],
        }
        for name, times in seconds.items()
    }
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    result = {
        "size": options.size,
        "models": MODELS,
        "runs": options.runs,
        "floor_seconds": least,
        "start_seconds": start,
        "machine": machine,
        "methods": rows,
    }
    print(f"floor {least:.2f} s, start-up {start:.2f} s")
    for name, row in rows.items():
        print(
            f"{name:18} {row['seconds']:7.2f} s  {row['ratio']:5.2f} x floor  ({row['ratio_without_start']:5.2f} without start-up)  {row['peak_rss_gb']:.2f} GB"
        )
    target = Path(__file__).parent / "results" / f"engine-{options.size}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
