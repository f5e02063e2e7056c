"""The matrix solvers on another device: the same merges as on the processor, up to the rounding of products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import write_model
from matrices import task_vectors
from synthetic import relative
from thetau.methods import Bilateral, Cart, DcMerge, IsoC, IsoCts, Star, Svc, TsvM, Wudi

NAME = "model.layers.0.self_attn.q_proj.weight"
METHODS = [
    Bilateral(),
    Bilateral(rank="full"),
    Cart(),
    DcMerge(),
    IsoC(),
    IsoCts(),
    Star(),
    Svc(then=TsvM()),
    TsvM(),
    TsvM(rank="full"),
    Wudi(solver="closed_form", ridge=1e-3),
    Wudi(solver="gradient_flow"),
]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card here")


def merged(folder: Path, method: Any, device: str, *, tf32: bool = False) -> Tensor:
    """The merged vector of three models of one matrix that is large enough to be sketched."""
    names = ["base", "a", "b", "c"]
    if not (folder / "base").exists():
        vectors = task_vectors(3, 320, 272)
        base = torch.randn(320, 272, generator=torch.Generator().manual_seed(1)) * 0.05
        for name, vector in zip(names, [torch.zeros_like(base), *vectors], strict=True):
            write_model(folder / name, {NAME: base + vector})
    start, *models = (thetau.open(folder / name) for name in names)
    engine = thetau.Engine(workers=1, device=device, tf32=tf32)
    return thetau.merge([model - start for model in models], method, engine=engine).state_dict()[NAME]


@cuda
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_graphics_card_merges_as_the_processor_does(tmp_path: Path, method: Any) -> None:
    """Where a spectrum is cut between two values that lie close, rounding may choose the other one: 1 % is room for a few of them."""
    assert relative(merged(tmp_path, method, "cuda"), merged(tmp_path, method, "cpu")) < 1e-2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_processor_named_has_the_bits_of_the_processor_left_unnamed(tmp_path: Path, method: Any) -> None:
    """With its name a method goes the way that a graphics card's name sends it."""
    if torch.cuda.is_available():
        pytest.skip("`auto` is the graphics card here")
    assert torch.equal(merged(tmp_path, method, "cpu"), merged(tmp_path, method, "auto"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r'`Engine\(device="cuda"\)`: no such device here\. Leave it out to run on the processor\.'
    ):
        thetau.Engine(device="cuda")


def test_a_word_that_is_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r'must be "auto", "cpu" or a device such as "cuda:0"\. Got "?\'?abacus'):
        thetau.Engine(device="abacus")


@pytest.mark.parametrize("tf32", [False, True])
def test_products_are_rounded_only_while_a_merge_that_may_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    seen, before = [], torch.get_float32_matmul_precision()
    reduce = TsvM().chain().reduction

    def seeing(self: Any, *given: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return add(self, *given)

    add = type(reduce).add  # type: ignore[union-attr]
    monkeypatch.setattr(type(reduce), "add", seeing)
    got = merged(tmp_path, TsvM(), "cpu", tf32=tf32)
    assert set(seen) == {"high" if tf32 else before}
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(got, merged(tmp_path, TsvM(), "cpu")), "the processor's products are whole"


@cuda
@pytest.mark.parametrize("method", [Bilateral(), TsvM(rank="full")], ids=str)
def test_rounded_products_stay_near(tmp_path: Path, method: Any) -> None:
    assert relative(merged(tmp_path, method, "cuda", tf32=True), merged(tmp_path, method, "cpu")) < 5e-2
