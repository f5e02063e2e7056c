"""Makes data/masks.safetensors: what the public codes of the mask methods give on small seeded vectors. Run once by hand.

    python -m venv env && env/bin/pip install torch==2.13.0 fusion-bench==0.2.33
    env/bin/python tests/parity/make_masks.py CHECKOUTS tests/parity/data/masks.safetensors

CHECKOUTS holds these repositories at these commits, of which single functions are run: `tall_masks` (nik-dim, d10af8b), `pcb-merging`
(duguodong7, 5897888), `Twin-Merging` (LZY-the-boys, f481c60), `magmax` (danielm1405, 4f49f18). FusionBench is the package. Nothing of
them is kept but the numbers; `versions` in the metadata says which they were.
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {"layer.weight": (30, 20), "other.weight": (12, 12), "layer.bias": (20,), "scale": ()}
TASKS = ("a", "b", "c")
COMMITS = {"tall_masks": "d10af8b", "pcb-merging": "5897888", "Twin-Merging": "f481c60", "magmax": "4f49f18"}


def functions(path: Path, *names: str, **given: Any) -> dict[str, Any]:
    """Some functions of a script, without running the script."""
    kept = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and (not names or node.name in names)
    ]
    space: dict[str, Any] = {"torch": torch, **given}
    exec(compile(ast.Module(body=kept, type_ignores=[]), str(path), "exec"), space)
    return space


def inputs() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base, and task vectors that share a part; some entries are zero, as differences of half-precision models are."""
    generator = torch.Generator().manual_seed(16)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    shared = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    vectors = {}
    for task in TASKS:
        own = {name: 0.02 * (0.5 * shared[name] + torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
        vectors[task] = {name: tensor * (torch.rand(tensor.shape, generator=generator) < 0.9) for name, tensor in own.items()}
    return base, vectors


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in SHAPES])


def main(checkouts: Path, out: Path) -> None:
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.magmax.magmax import _magmax_select
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    from safetensors.torch import save_file

    base, vectors = inputs()
    stack = torch.stack([flat(vectors[task]) for task in TASKS])
    kept: dict[str, Tensor] = {"base": flat(base), "vectors": stack}

    for name, tensor in _magmax_select([vectors[task] for task in TASKS]).items():
        kept[f"magmax/{name}"] = tensor.contiguous()

    utils = functions(checkouts / "tall_masks/src/utils/utils.py", "topk_values_mask", Any=Any, Dict=dict, List=list, Tuple=tuple)
    ties = functions(checkouts / "tall_masks/src/utils/ties_utils.py", topk_values_mask=utils["topk_values_mask"])
    merged = {"task_arithmetic": stack.sum(0), "ties": ties["ties_merging"](stack, reset_thresh=20, merge_func="dis-sum")}
    for kind, vector in merged.items():
        masks = generate_task_masks(stack, flat(base) + stack, flat(base), tv=vector, tall_mask_lambda=0.4)
        kept[f"tall/{kind}/merged"], kept[f"tall/{kind}/masks"] = vector, masks
        kept[f"consensus/{kind}"] = vector * (masks.float().sum(0) >= 2)

    unified, masks, rescalers = emr_merge([vectors[task] for task in TASKS])
    kept["emr/unified"], kept["emr/rescalers"] = flat(unified), rescalers
    kept["emr/masks"] = torch.stack([flat({name: masks[name][task] for name in SHAPES}) for task in range(len(TASKS))])

    pcb = checkouts / "pcb-merging"
    raw = functions(pcb / "pcb-merging.py", "normalize", "clamp", "act", "PCB_merge")
    kept["pcb/raw"] = raw["PCB_merge"](stack, pcb_ratio=0.05)[0]
    products = functions(pcb / "vision_source_code/pcb_ES.py", "normalize", "clamp", "PCB")
    clipped, weights = products["PCB"](stack, 0.05)
    kept["pcb/products"] = (clipped * weights).sum(0) / weights.sum(0).clamp(min=1e-12)

    sparsify = functions(checkouts / "Twin-Merging/discriminative/sparsify.py")
    shared = {name: 0.29 * sum(vectors[task][name] for task in TASKS) for name in SHAPES}
    for keep in ("svd", "magnitude"):
        for task in TASKS:
            exclusive = {
                name: sparsify[keep]((vectors[task][name] - shared[name]), 0.25)
                if vectors[task][name].ndim
                else vectors[task][name] - shared[name]
                for name in SHAPES
            }
            kept[f"twin/{keep}/{task}"] = flat(exclusive)

    versions = {"fusion-bench": version("fusion-bench"), "torch": torch.__version__, **COMMITS}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, out, metadata={"versions": json.dumps(versions)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
