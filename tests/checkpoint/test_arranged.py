"""Tensors under other names, rows in another order: read from where they lie, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import thetau
from thetau.checkpoint import open_source
from thetau.checkpoint.arranged import MEAN, ZERO, Arranged, Piece, RowMap
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.source import computed, leaves
from thetau.engine.patchwork import Patch, Patchwork
from thetau.errors import AlignmentError
from thetau.facade import Expression
from thetau.vectors import Combination


def stored(folder: Path, name: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(shape, generator=generator).to(dtype) for key, shape in {"e": (300, 6), "h": (300, 6), "n": (6,)}.items()
    }
    save_file(state, folder / f"{name}.safetensors")
    return open_source(str(folder / f"{name}.safetensors")), state


def test_a_piece_is_read_from_where_it_lies(tmp_path: Path) -> None:
    one, state = stored(tmp_path, "one", 1)
    arranged = Arranged({"x": Piece(one, "e"), "y": Piece(one, "n")}, label="moved")
    assert arranged.place("x") == one.place("e")
    assert torch.equal(arranged.read("x", 3, 9), state["e"][3:9])
    assert torch.equal(arranged.read("y"), state["n"])
    assert arranged.specs["x"].shape == (300, 6)
    assert leaves([arranged]) == [one]
    assert not computed([arranged])
    again = Arranged({"y": Piece(one, "n"), "x": Piece(one, "e")}, label="other")
    assert again.key == arranged.key
    assert Arranged({"x": Piece(one, "h"), "y": Piece(one, "n")}, label="moved").key != arranged.key
    vector = Combination(((1.0, arranged),)) - Combination(((1.0, again),))
    assert not vector.terms, "the same arrangement of the same weights cancels"


def test_rows_come_from_their_own_places_means_zeros_and_padding(tmp_path: Path) -> None:
    one, first = stored(tmp_path, "one", 1, torch.bfloat16)
    two, second = stored(tmp_path, "two", 2)
    generator = np.random.default_rng(0)
    origin = generator.integers(0, 2, 400)
    row = generator.integers(0, 300, 400)
    origin[[5, 9]] = ZERO
    origin[7] = MEAN
    rows = RowMap(np.append(origin, [ZERO] * 8), np.append(row, [0] * 8), {7: ((0, 3), (1, 250), (1, 4))}, padding=400)
    arranged = Arranged({"e": Piece(one, "e", rows, ((two, "h"),))}, label="mapped")
    want = torch.zeros(408, 6)
    for index in range(400):
        if origin[index] >= 0:
            want[index] = (first["e"] if origin[index] == 0 else second["h"])[row[index]].float()
    want[7] = torch.stack([first["e"][3].float(), second["h"][250], second["h"][4]]).mean(0)
    want[400:] = want[:400].double().mean(0).float()
    assert arranged.specs["e"].dtype is Dtype.F32
    got = arranged.read("e")
    assert torch.equal(got[:400], want[:400])
    torch.testing.assert_close(got[400:], want[400:])
    for low, high in ((0, 1), (6, 8), (123, 405), (401, 408), (408, 408)):
        assert torch.equal(arranged.read("e", low, high), got[low:high])
    assert arranged.place("e") is None
    plain = Arranged({"e": Piece(one, "e", RowMap(origin.clip(0, 0), row))}, label="permuted")
    assert plain.specs["e"].dtype is Dtype.BF16, "moved rows are not widened"
    assert torch.equal(plain.read("e"), first["e"][torch.from_numpy(row)])


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    one, _ = stored(tmp_path, "one", 1)
    with pytest.raises(AlignmentError, match=r"takes a row that 'e' of .* with 300 rows has not"):
        Arranged({"e": Piece(one, "e", RowMap(np.array([0]), np.array([300])))}, label="mapped")
    with pytest.raises(AlignmentError, match=r"takes rows of 'n' of .* which has shape \[6\]"):
        Arranged({"e": Piece(one, "e", RowMap(np.array([1]), np.array([0])), ((one, "n"),))}, label="mapped")


def test_a_patchwork_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Each tensor of its own part; saved, read again, subtracted from and merged with others."""
    one, first = stored(tmp_path, "one", 1)
    second = {name: tensor + 0.05 * torch.arange(6) for name, tensor in first.items()}
    save_file(second, tmp_path / "two.safetensors")
    two = open_source(str(tmp_path / "two.safetensors"))
    ground = Combination(((1.0, one),), reference=one)
    halves = ground + 0.5 * (Combination(((1.0, two),), reference=two) - ground)
    specs = {"h": one.specs["h"], "e": one.specs["e"], "n": one.specs["n"]}
    patches = [Patch(halves, ("e",)), Patch(ground, ("h",)), Patch(Combination(((1.0, two),), reference=two), ("n",))]
    model = Patchwork(patches, specs, label="made")
    want = {"e": first["e"] + 0.5 * (second["e"] - first["e"]), "h": first["h"], "n": second["n"]}
    opened = Expression(((1.0, model),), reference=model, name="made")
    for name, tensor in opened.state_dict().items():
        torch.testing.assert_close(tensor, want[name])
    assert list(opened.state_dict()) == ["h", "e", "n"], "in the order that it says"
    opened.save(tmp_path / "out.safetensors")
    assert torch.equal(thetau.open(tmp_path / "out.safetensors").state_dict()["h"], first["h"])
    vector = (opened - thetau.open(tmp_path / "one.safetensors")).state_dict()
    torch.testing.assert_close(vector["e"], 0.5 * (second["e"] - first["e"]))
    assert not vector["h"].any()
    base = thetau.open(tmp_path / "one.safetensors")
    merged = base + thetau.merge([opened - base, thetau.open(tmp_path / "two.safetensors") - base], thetau.methods.Average())
    torch.testing.assert_close(merged.state_dict()["n"], (second["n"] + second["n"]) / 2)
    assert {Path(leaf.label).stem for leaf in leaves([model])} == {"one", "two"}
    with pytest.raises(AlignmentError, match="each tensor must come from one part; 1 come from none"):
        Patchwork(patches[:2], specs, label="made")
