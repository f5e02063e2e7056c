"""The engine against the floor and against mergekit: whole merges of Llama-shaped checkpoints.

    python -m experiments.engine.run --folder runs/bench [--size 280m|1.1b|tiny] [--runs 3] [--methods ties,average] [--mergekit PYTHON]

The floor reads every input and writes and syncs an output of the base's size. Checkpoints are made once from a seed. Runs of all
contestants alternate, with a warm page cache; a figure is the median, and our time is that of the whole command: start-up, checks and
fsync included. `--mergekit` names a Python that has mergekit installed; it runs each method `--mergekit-runs` times. Memory is the
largest anonymous resident memory seen while sampling every 10 ms, and the operating system's own peak, mapped files included.
The table goes to experiments/engine/SIZE.json after every round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.common import EXPERIMENTS, floor, machine, timed, write_result

SHAPES = {  # hidden, intermediate, layers, vocabulary
    "tiny": (256, 704, 4, 8000),
    "280m": (1024, 2816, 17, 32000),
    "slice": (1024, 2816, 2, 3765),  # 2 of the 17 blocks of 280m, and as large a part of its vocabulary
    "1.1b": (2048, 5632, 22, 32000),
}
MODELS = 5
RANK = 192  # of the differences with a falling spectrum
METHODS: dict[str, tuple[list[str], dict[str, Any] | None]] = {  # ours; mergekit's
    "average": (["average"], {"merge_method": "linear", "weight": 0.2}),
    "task_arithmetic": (["task_arithmetic", "scale=0.3"], {"merge_method": "task_arithmetic", "weight": 0.3}),
    "dare_linear": (["dare_linear", "drop=0.5"], {"merge_method": "dare_linear", "weight": 0.3, "density": 0.5}),
    "dare_ties": (["dare_ties", "drop=0.5", "density=1"], {"merge_method": "dare_ties", "weight": 1.0, "density": 0.5}),
    "ties per tensor": (["ties", "trim=tensor"], {"merge_method": "ties", "weight": 1.0, "density": 0.2}),
    "ties": (["ties"], None),
    "topk": (["topk"], None),
    "breadcrumbs": (["breadcrumbs"], {"merge_method": "breadcrumbs", "weight": 0.3, "density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": (
        ["breadcrumbs_ties"],
        {"merge_method": "breadcrumbs_ties", "weight": 1.0, "density": 0.9, "gamma": 0.01},
    ),
    "della": (["della"], {"merge_method": "della", "weight": 1.0, "density": 0.3, "epsilon": 0.1}),
    "della_linear": (["della_linear"], {"merge_method": "della_linear", "weight": 0.3, "density": 0.3, "epsilon": 0.1}),
    "model_stock": (["model_stock"], {"merge_method": "model_stock"}),
    "awd": (["awd", "tensors=all"], None),
}
LIGHT = ("average", "task_arithmetic", "dare_linear")  # one pass of the compiled loop, which runs without torch
HEADS = {"slice": 16, "tiny": 4, "280m": 16, "1.1b": 32}


def build(folder: Path, size: str, *, falling: bool = False) -> None:
    """A base and five fine-tuned models in bfloat16, from a seed.

    Their differences are independent numbers. With `falling` they are as fine-tuning's: squared singular values fall as 1/i down to the
    `RANK`-th, which leaves 45 % of the energy after 16 and 30 % after 32, as the demo's models have it.
    """
    import torch
    from safetensors.torch import save_file

    def difference(shape: tuple[int, ...], seed: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        if not falling or len(shape) < 2:
            return torch.randn(shape, generator=noise)
        decay = torch.arange(1, RANK + 1) ** -0.5
        left, right = torch.randn(shape[0], RANK, generator=noise), torch.randn(RANK, shape[1], generator=noise)
        return (left * (decay / decay.norm())) @ right

    hidden, inner, layers, vocabulary = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS[size],
        "num_key_value_heads": HEADS[size],
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for number, path in enumerate(places(folder, f"{size}-falling" if falling else size)):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if (path / "model.safetensors").exists():
            continue
        tensors = {}
        for index, (name, shape) in enumerate(sorted(shapes(size).items())):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.02
            if number:
                base += difference(shape, 1000 * number + index) * 0.001
            tensors[name] = base.to(torch.bfloat16)
        save_file(tensors, path / "building.tmp", metadata={"format": "pt"})
        (path / "building.tmp").rename(path / "model.safetensors")


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of that size."""
    hidden, inner, layers, vocabulary = SHAPES[size]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{at}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found


def places(folder: Path, size: str) -> list[Path]:
    return [folder / size / name for name in ("base", *(f"m{index}" for index in range(MODELS)))]


def mergekit_config(given: dict[str, Any], paths: list[Path], file: Path) -> None:
    """The same merge as mergekit writes it."""
    parameters = {key: value for key, value in given.items() if key != "merge_method"}
    lines = [f"merge_method: {given['merge_method']}", "dtype: bfloat16"]
    if given["merge_method"] != "linear":
        lines.append(f"base_model: {paths[0]}")
    lines.append("models:")
    for path in paths[1:]:
        lines.append(f"  - model: {path}")
        if parameters:
            lines.append("    parameters:")
            lines += [f"      {key}: {value}" for key, value in parameters.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--size", choices=SHAPES, default="280m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    parser.add_argument("--mergekit-runs", type=int, default=1)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.folder, options.size)
        return
    building = [
        sys.executable,
        "-m",
        "experiments.engine.run",
        "--build",
        "--folder",
        str(options.folder),
        "--size",
        options.size,
    ]
    subprocess.run(building, check=True)
    paths = places(options.folder, options.size)
    chosen = [name.strip() for name in options.methods.split(",")]
    out, config = options.folder / "out", options.folder / "mergekit.yaml"
    models = [argument for path in paths[1:] for argument in ("--model", str(path))]
    thetau = [sys.executable, "-m", "thetau", "merge", "--quiet", "--base", str(paths[0]), *models, "-o", str(out)]
    floors: list[float] = []
    ours: dict[str, list[tuple[float, ...]]] = {name: [] for name in chosen}
    theirs: dict[str, list[tuple[float, ...]]] = {name: [] for name in chosen}
    floor(paths, out)  # warms the page cache
    for number in range(options.runs):
        for name in chosen:
            floors.append(floor(paths, out))
            method, other = METHODS[name]
            fields = [argument for field in method[1:] for argument in ("--set", field)]
            ours[name].append(timed([*thetau, "--method", method[0], *fields], out))
            if options.mergekit and other is not None and number < options.mergekit_runs:
                mergekit_config(other, paths, config)
                command = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer"]
                theirs[name].append(timed(command, out))
        starts = [
            statistics.median(timed([sys.executable, "-c", f"import {needed}, thetau.facade"], out)[0] for _ in range(3))
            for needed in ("torch", "numpy")
        ]
        write(options, floors, starts, ours, theirs)
    shutil.rmtree(out, ignore_errors=True)


def write(
    options: argparse.Namespace, floors: list[float], starts: list[float], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """The table so far, to the screen and to its file."""
    least = statistics.median(floors)
    rows: dict[str, dict[str, float]] = {}
    for name, runs in ours.items():
        seconds, anonymous, peak, _ = (statistics.median(values) for values in zip(*runs, strict=True))
        start = starts[name in LIGHT]
        row = {
            "seconds": seconds,
            "start_seconds": start,
            "ratio": seconds / least,
            "ratio_without_start": (seconds - start) / least,
            "anonymous_gb": anonymous,
            "peak_rss_gb": peak,
        }
        if theirs[name]:
            seconds, anonymous, peak, _ = (statistics.median(values) for values in zip(*theirs[name], strict=True))
            row |= {
                "mergekit_seconds": seconds,
                "mergekit_anonymous_gb": anonymous,
                "mergekit_peak_rss_gb": peak,
                "times_faster": seconds / row["seconds"],
            }
        rows[name] = row
    result = {
        "size": options.size,
        "models": MODELS,
        "runs": len(next(iter(ours.values()))),
        "floor_seconds": least,
        "start_seconds": starts[0],
        "machine": machine(),
        "methods": rows,
    }
    print(f"floor {least:.2f} s, start-up {starts[0]:.2f} s, without torch {starts[1]:.2f} s")
    for name, row in rows.items():
        line = (
            f"{name:18} {row['seconds']:7.2f} s {row['ratio']:5.2f} x floor ({row['ratio_without_start']:5.2f} without start-up)"
        )
        line += f" {row['anonymous_gb']:.2f} GB"
        if "times_faster" in row:
            line += (
                f"   mergekit {row['mergekit_seconds']:7.2f} s {row['mergekit_anonymous_gb']:.2f} GB: {row['times_faster']:.1f} x"
            )
        print(line, flush=True)
    write_result(EXPERIMENTS / "engine" / f"{options.size}.json", result)


if __name__ == "__main__":
    main()
