"""Our spectral methods against what public functions gave for the same matrices, once, by `make_spectral.py`: FusionBench's and the authors'."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from synthetic import merged_vector, relative
from thetau.methods import Cart, DcMerge, IsoC, IsoCts, Star, Svc, TaskArithmetic, TsvM
from tiny import one_thread as one_thread

DATA = Path(__file__).parent / "data" / "spectral.safetensors"
NAME = "layers.0.mlp.fc1.weight"
CASES: list[tuple[str, str, Any]] = [
    (shape, output, method)
    for shape, tasks in (("tall", 4), ("wide", 3))
    for output, method in (
        ("star", Star()),
        ("cart", Cart(rank=0.08, residual=0.5)),
        ("tsv_m", TsvM(rank="full")),
        ("iso_c", IsoC()),
        ("iso_cts", IsoCts()),
        ("svc-sum", Svc(then=TaskArithmetic(scale=0.3), alpha=0.1)),
        ("svc-sum-authors", Svc(then=TaskArithmetic(scale=0.3), alpha=0.1)),
        ("svc-third", Svc(then=TaskArithmetic(scale=0.3), alpha=1 / tasks)),
        ("svc-third-authors", Svc(then=TaskArithmetic(scale=0.3))),
        ("svc-tsv", Svc(then=TsvM(rank="full"), alpha=1.0)),
        ("svc-tsv-authors", Svc(then=TsvM(rank="full"), alpha=1.0)),
    )
]
CASES += [
    ("square", "dc_merge", DcMerge(keep=4 / 16)),  # 0.1 % of 64² entries, where ours keeps 16
    ("lora", "dc_merge-avg", DcMerge(rank=16, smoothing="average", keep=2 / 16)),
    ("lora", "dc_merge-linear", DcMerge(rank=16, smoothing="linear", keep=2 / 16)),
]


@cache
def data() -> dict[str, Tensor]:
    with safe_open(DATA, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping


def ours(method: Any, stack: Tensor) -> Tensor:
    """The merged matrix, through the engine."""
    tuned = {f"t{index}": {NAME: vector} for index, vector in enumerate(stack)}
    merged: Tensor = merged_vector({NAME: torch.zeros_like(stack[0])}, tuned, method)[NAME]
    return merged


@pytest.mark.parametrize(("shape", "output", "method"), CASES, ids=[f"{shape}-{output}" for shape, output, _ in CASES])
def test_public_functions_give_the_same(shape: str, output: str, method: Any) -> None:
    assert relative(ours(method, data()[f"{shape}/in"]), data()[f"{shape}/{output}"]) < 1e-4


def test_every_output_is_compared() -> None:
    compared = {f"{shape}/{output}" for shape, output, _ in CASES} | {f"{shape}/in" for shape, _, _ in CASES}
    assert set(data()) == compared


def test_the_file_says_where_it_comes_from() -> None:
    with safe_open(DATA, "pt") as file:
        said = file.metadata()
    assert said["fusion-bench"] == "0.2.33"
    assert all(
        len(said[name]) == 40 for name in ("IBM/STAR", "lyymuwu/SVC", "Tobeginwith/DC-Merge", "apanariello4/core-space-merging")
    )
