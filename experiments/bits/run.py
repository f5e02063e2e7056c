"""The same bits as an older revision: every method on the same models, by both, and what differs.

    python -m experiments.bits.run [--old REVISION]

Checks the old revision out beside this one, builds its compiled loop, merges small models of real names and mixed dtypes with both, and
compares the checksums in the outputs' `thetau.json`: equal for elementwise methods, within 1e-6 of the largest change for matrix methods.
Writes experiments/bits/results.json; ends with 1 where something else was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
OLD = "1f3e9ff"  # the last revision of 0.1
TASKS = ("ape", "bee", "cat")
LIMIT = 1e-6  # of a matrix method, relative to the largest entry of its merged vector at a tensor

ELEMENTWISE: dict[str, list[str]] = {
    "average": [],
    "task_arithmetic": [],
    "ties": [],
    "ties by tensor": ["method=ties", "trim=tensor", "cancelled=majority"],
    "dare_linear": [],
    "dare_ties": [],
    "della": [],
    "della_linear": [],
    "breadcrumbs": [],
    "breadcrumbs_ties": [],
    "topk": [],
    "model_stock": [],
    "localize_stitch": [],
    "localize_stitch shared": ["method=localize_stitch", "sharing=mask", "clusters=PLACE"],
    "awd": [],
    "awd of ties": ["method=awd", "then=ties"],
    "awd by tensor": ["method=awd", "scope=tensor"],
    "awd by row": ["method=awd", "scope=row"],
}
MATRIX: dict[str, list[str]] = {
    "wudi": ["method=wudi", "steps=50"],
    "wudi closed form": ["method=wudi", "solver=closed_form"],
    "wudi gradient flow": ["method=wudi", "solver=gradient_flow"],
    "wudi split": ["method=wudi", "solver=gradient_flow", "split_fused=true", "elsewhere=mean"],
    "bilateral": [],
    "bilateral both": ["method=bilateral", "sides=both", "rank=8"],
    "tsv_m": [],
    "iso_c": [],
    "iso_cts": [],
    "awd before wudi": ["method=awd", "then=wudi", "then.solver=gradient_flow"],
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (500, 64), "norm.weight": (64,), "logit_scale": ()}
    for layer in range(2):
        at = f"layers.{layer}"
        found |= {f"{at}.self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
        found |= {
            f"{at}.mlp.up_proj.weight": (256, 64),
            f"{at}.mlp.down_proj.weight": (64, 256),
            f"{at}.attn.in_proj_weight": (192, 64),
        }
        found |= {f"{at}.mlp.up_proj.bias": (256,), f"{at}.norm.weight": (64,)}
    return found


def make(folder: Path) -> None:
    """A base and its fine-tuned models; one in bfloat16, one in float16."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes().items()}
    dtypes = {"base": torch.float32, "ape": torch.float32, "bee": torch.bfloat16, "cat": torch.float16}
    for name, dtype in dtypes.items():
        moved = base if name == "base" else {k: v + 2e-3 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        (folder / name).mkdir(parents=True)
        save_file({k: v.to(dtype).contiguous() for k, v in moved.items()}, folder / name / "model.safetensors")


def merge(source: Path, models: Path, out: Path, label: str, fields: list[str], env: dict[str, str]) -> dict[str, Any]:
    given = dict(field.split("=", 1) for field in fields)
    name = given.pop("method", label)
    method: dict[str, Any] = {"name": name}
    for key, text in given.items():
        value: Any = {"per_task": {"ape": 0, "bee": 0, "cat": 1}} if text == "PLACE" else _plain(text)
        if key.startswith("then."):
            method["then"] = {**({"name": method["then"]} if isinstance(method["then"], str) else method["then"]), key[5:]: value}
        else:
            method[key] = value
    recipe = {"base": str(models / "base"), "models": [str(models / task) for task in TASKS], "method": method, "seed": 3}
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "thetau", "merge", str(file), "-o", str(out), "--dtype", "float32", "--quiet"]
    done = subprocess.run(command, env={**env, "PYTHONPATH": str(source / "src")}, capture_output=True, text=True, cwd=out.parent)
    if done.returncode:
        raise SystemExit(f"{label} in {source}: {done.stderr[-800:]}")
    return dict(json.loads((out / "thetau.json").read_text(encoding="utf-8"))["tensors"])


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def distance(old: Path, new: Path, base: Path) -> float:
    """Largest difference, relative to the largest entry of the merged vector at that tensor."""
    a, b, start = (load_file(path / "model.safetensors") for path in (old, new, base))
    sizes = {name: max(float((a[name] - start[name]).abs().max()), 1e-12) for name in a}
    return max(float((a[name] - b[name]).abs().max()) / sizes[name] for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default=OLD)
    old_name = parser.parse_args().old
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        before = place / "old"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(before), old_name], check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=before, check=True, capture_output=True)
            make(place / "models")
            for label, fields in (ELEMENTWISE | MATRIX).items():
                outs = [place / f"{side}-{label.replace(' ', '_')}" for side in ("before", "after")]
                sums = [
                    merge(source, place / "models", out, label, fields, env)
                    for source, out in zip((before, ROOT), outs, strict=True)
                ]
                same = (
                    all(sums[0][name]["crc32"] == sums[1].get(name, {}).get("crc32") for name in sums[0])
                    and sums[0].keys() == sums[1].keys()
                )
                away = 0.0 if same else distance(*outs, place / "models" / "base")
                good = same if label in ELEMENTWISE else away <= LIMIT
                rows[label] = {"same_bits": same, "distance": away, "good": good}
                print(
                    f"{label:24} {'the same bits' if same else f'{away:.2e} away'}{'' if good else '   <-- not as it should be'}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=False)
    content = {"old": old_name, "torch": torch.__version__, "methods": rows}
    (ROOT / "experiments" / "bits" / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["good"] for row in rows.values()) else 1)


if __name__ == "__main__":
    main()
