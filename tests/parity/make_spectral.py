"""What the authors' and FusionBench's public functions make of small seeded matrices: `data/spectral.safetensors`, for `test_parity_public.py`.

Run by hand, in an environment of its own, beside clones of the repositories below:

    pip install torch==2.13.0 fusion-bench==0.2.33
    python tests/parity/make_spectral.py CLONES    # CLONES/IBM/STAR, CLONES/lyymuwu/SVC, …

Inputs, outputs and where they come from are all in the file; none of their code is kept.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

COMMITS = {
    "IBM/STAR": "e6bfcf70e6f9133141881dc427f81d3f50e463bc",
    "Tobeginwith/DC-Merge": "3c443e4d023be34d6868aefb69a4be545871bfbf",
    "apanariello4/core-space-merging": "85176fab749578b0b54a027ea89495846e79757d",
    "lyymuwu/SVC": "6ad2b314b7ae94a4b831e22ca88e4a2ee42098fa",
}
SHAPES = {"tall": (4, 32, 24), "wide": (3, 24, 30)}
RMS = 1e-2


def matrices(tasks: int, d_out: int, d_in: int, *, rank: int, seed: int) -> Tensor:
    """Task vectors of a falling spectrum with a part in common, `[task, d_out, d_in]`."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
        return (left * torch.arange(1, rank + 1).float() ** -0.5) @ right

    shared = one() if rank == min(d_out, d_in) else torch.zeros(d_out, d_in)
    found = torch.stack([one() + 0.4 * shared for _ in range(tasks)])
    return RMS * found / found.square().mean().sqrt()


def functions(clones: Path, repository: str, path: str, *names: str) -> dict[str, Callable[..., Any]]:
    """Functions of a file of a repository, without what the file imports; methods too."""
    where = ["git", "-C", str(clones / repository), "show", f"{COMMITS[repository]}:{path}"]
    tree = ast.parse(subprocess.run(where, capture_output=True, text=True, check=True).stdout)
    wanted: list[ast.stmt] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    room: dict[str, Any] = {"torch": torch, "math": math, "tqdm": lambda given, **_: given, "OrderedDict": dict}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), path, "exec"), room)
    return {name: room[name] for name in names}


def main(clones: Path) -> None:
    """Everything, into one file."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration_accelerated
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    (star,) = functions(clones, "IBM/STAR", "merger/STAR.py", "star").values()
    (cart,) = functions(clones, "apanariello4/core-space-merging", "task_merger.py", "get_cart_delta_w").values()
    (coefficients,) = functions(clones, "lyymuwu/SVC", "merge_func.py", "coef_cal_multi_ranks").values()
    full = functions(
        clones, "Tobeginwith/DC-Merge", "vision_fft_merge/src/utils/DC_utils.py", "dc_merge", "keep_topk_percent", "ties_small"
    )
    lora = functions(
        clones,
        "Tobeginwith/DC-Merge",
        "vision_lora_merge/merging_functions.py",
        *("dc_merge", "keep_topk_percent", "ties_small", "generate_linear_distribution"),
    )
    out: dict[str, Tensor] = {}
    for seed, (name, (tasks, d_out, d_in)) in enumerate(SHAPES.items()):
        stack = matrices(tasks, d_out, d_in, rank=min(d_out, d_in), seed=seed)
        zero = torch.zeros(d_out, d_in)
        vectors = [{"w": vector} for vector in stack]
        tsv = TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")["w"]
        out |= {
            f"{name}/in": stack,
            f"{name}/star": torch.stack([star(vector, 40) for vector in stack]).mean(0),
            f"{name}/cart": cart(None, list(stack), pruning_rank=0.08, scaling_coeffs=0.5),
            f"{name}/tsv_m": tsv,
            f"{name}/iso_c": iso_c(vectors, accelerator="cpu")["w"],
            f"{name}/iso_cts": iso_cts(vectors, 0.8, accelerator="cpu")["w"],
        }
        for about, merged, alpha in (
            ("sum", 0.3 * stack.sum(0), 0.1),
            ("third", 0.3 * stack.sum(0), 1 / tasks),
            ("tsv", tsv, 1.0),
        ):
            out[f"{name}/svc-{about}"] = subspace_consistency_spectral_calibration_accelerated(
                zero, list(stack), merged, alpha=alpha, accelerator=torch.device("cpu")
            )
            u, s, vt = torch.linalg.svd(merged, full_matrices=False)
            _, counted = coefficients(stack, merged, u, s, vt.T, len(s), alpha=alpha)
            out[f"{name}/svc-{about}-authors"] = (u * (s / counted)) @ vt
    square, adapters = matrices(4, 64, 64, rank=64, seed=7), matrices(3, 56, 64, rank=16, seed=8)
    config = SimpleNamespace(DATASETS=range(len(square)), device="cpu")
    out["square/in"], out["lora/in"] = square, adapters
    out["square/dc_merge"] = full["dc_merge"]([SimpleNamespace(vector={"w": vector}) for vector in square], config)["w"]
    for smoothing in ("avg", "linear"):
        out[f"lora/dc_merge-{smoothing}"] = lora["dc_merge"]({"w": list(adapters)}, smoothing_strategy=smoothing)["w"]
    about = {package: version(package) for package in ("fusion-bench", "torch")} | COMMITS
    save_file(
        {key: value.float().contiguous() for key, value in out.items()},
        Path(__file__).parent / "data" / "spectral.safetensors",
        about,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
