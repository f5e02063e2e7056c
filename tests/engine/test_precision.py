"""Computed in float32 and rounded once: no further from the exact result than its own rounding, to 5 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thetau
from fixtures import write_model
from thetau import methods
from thetau.methods import Awd, DareTies, Ties
from thetau.testing import Case, evidence_for

SHAPES = {"a.mlp.weight": (300, 200), "b.mlp.weight": (128, 512), "norm.weight": (700,)}
TASKS = ("x", "y", "z", "w")
ELEMENTWISE: list[Any] = [
    *(
        method
        for name in methods.names()
        if (method := methods.get(name)()).chain().access == "block" and name not in ("awd", "dare_ties")
    ),
    DareTies(drop=0.5),  # rescaled by 2: where three entries cancel exactly, they do so in both precisions
    Ties(trim="tensor"),
    Awd(tensors="all"),
    Awd(then=Ties(), tensors="all"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ELEMENTWISE, ids=repr)
def test_rounded_once(tmp_path: Path, method: Any, dtype: torch.dtype) -> None:
    """The reference is the same merge of the same stored numbers in float64; random masks are the same too."""
    tasks = TASKS[: Case(method=method).fits(len(TASKS))]
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for number, name in enumerate(("base", *tasks)):
        stored[name] = {}
        for index, (tensor, shape) in enumerate(SHAPES.items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.05
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 * number + index))
            stored[name][tensor] = (value + (0.004 * noise if number else 0)).to(dtype)
        write_model(tmp_path / name, stored[name])

    evidence = evidence_for(method, stored["base"], tasks)

    def merged(opened: dict[str, thetau.Expression]) -> thetau.Expression:
        return opened["base"] + thetau.merge(
            [opened[task] - opened["base"] for task in tasks], method, names=tasks, seed=1, evidence=evidence
        )

    merged({name: thetau.open(tmp_path / name) for name in stored}).save(tmp_path / "out")
    wide = {name: {tensor: value.double() for tensor, value in state.items()} for name, state in stored.items()}
    exact = merged({name: thetau.open(state, name=name) for name, state in wide.items()}).state_dict()
    written = thetau.open(tmp_path / "out").terms[0][1]
    ours = least = 0.0
    for tensor in SHAPES:
        assert exact[tensor].dtype == torch.float64
        ours += float((written.read(tensor).double() - exact[tensor]).square().sum())
        least += float((exact[tensor].to(dtype).double() - exact[tensor]).square().sum())
    assert ours**0.5 <= 1.05 * least**0.5
