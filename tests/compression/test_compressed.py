"""Compressed task vectors: what is written comes back, at the error that is told, and damaged files are refused by name."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import folder as folder
from commands import run
from fixtures import leftovers, random_weights, shifted, write_model
from synthetic import State, checked, models, relative, vectors_of
from thetau.checkpoint.compressed import CompressedSource, block_rows
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.checkpoint.writer import Slots, Writer
from thetau.compression import Form, LowRank, Precision, Sparse, compress
from thetau.compression.encode import truncated
from thetau.engine.merge import Merge
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError
from thetau.methods import PerPattern, Ties
from thetau.statistics.quantile import kept_count

SHAPES = {
    "layers.0.mlp.fc1.weight": (37, 19),  # no row fills whole bytes
    "layers.0.mlp.fc1.bias": (37,),
    "conv.weight": (4, 3, 2, 2),
    "wide.weight": (20, 64),
    "thin.weight": (64, 2),
    "logit_scale": (),
    "empty": (0, 16),
    "mask:values:odd name": (5, 8),
}
FORMS: list[Form] = [
    Sparse(density=0.2),
    Sparse(density=0.2, scope="tensor", dtype="bfloat16"),
    Sparse(density=None, dtype="float16"),
    LowRank(rank=3),
    LowRank(rank=PerPattern({"layers*": 2, "*": 5}), dtype="bfloat16"),
    Precision(dtype="bfloat16"),
    Precision(dtype="float16"),
    Precision(dtype="int8"),
]
EXACT = [form for form in FORMS if isinstance(form, Sparse) and form.density is not None]


def vector(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Any, Any, State]:
    """A base, a task vector over it, and its values."""
    base, tuned = models(shapes, ("task",), seed=seed)
    opened, (tau,) = vectors_of(base, tuned)
    return opened, tau, tau.state_dict()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:  # the library reads them too
        found: dict[str, str] = file.metadata()
    return found


# Round trips


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_file_is_an_ordinary_task_vector_at_the_error_told(tmp_path: Path, form: Form) -> None:
    base, tau, values = vector()
    report = compress(tau, tmp_path / "tau.safetensors", form)
    opened = thetau.open(tmp_path / "tau.safetensors")
    assert opened.is_vector
    assert {name: spec.shape for name, spec in opened.specs().items()} == SHAPES
    back = opened.state_dict()
    error = math.sqrt(sum(float((back[n] - values[n]).double().square().sum()) for n in values))
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in values.values()))
    assert report.error == pytest.approx(error / norm, rel=1e-6)
    errors = {name: relative(back[name], values[name]) for name in values if values[name].numel()}
    assert report.worst_error == pytest.approx(max(errors.values()), rel=1e-6)
    assert errors[report.worst] == pytest.approx(report.worst_error, rel=1e-6)
    assert report.nbytes == (tmp_path / "tau.safetensors").stat().st_size
    assert (report.elements, report.dense_bytes) == (sum(v.numel() for v in values.values()), 4 * report.elements)
    assert metadata(report.path)["thetau.kind"] == "task_vector"
    applied = (base + 2 * opened).state_dict()
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(applied[name], tensor + 2 * back[name])
    assert report.to_json()["path"] == str(report.path)
    json.dumps(report.to_json())


def test_it_merges_as_its_values_do(tmp_path: Path) -> None:
    base, tuned = models(SHAPES, ("a", "b"))
    opened, vectors = vectors_of(base, tuned)
    for name, one in zip("ab", vectors, strict=True):
        compress(one, tmp_path / f"{name}.safetensors", Sparse(density=0.3))
    stored = [thetau.open(tmp_path / f"{name}.safetensors", name=name) for name in "ab"]
    plain = [thetau.open(one.state_dict(), name=name) - thetau.open(zeros(one)) for name, one in zip("ab", stored, strict=True)]
    got = thetau.merge(stored, Ties(density=0.2)).state_dict()
    want = thetau.merge(plain, Ties(density=0.2)).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert stored[0].cosine(stored[0]) == pytest.approx(1)
    assert opened.is_model


def zeros(one: Any) -> State:
    return {name: torch.zeros(spec.shape) for name, spec in one.specs().items()}


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_no_setting_changes_a_byte(tmp_path: Path, form: Form) -> None:
    """Windows of one block, whose bits end inside a byte, and several workers."""
    shapes = {"a.weight": (130, 601), "b.bias": (70_001,), "c.weight": (3, 70_000)}
    _, tau, _ = vector(shapes=shapes)
    for number, engine in enumerate([thetau.Engine(workers=1), thetau.Engine(workers=2, window=1)]):
        compress(tau, tmp_path / f"{number}.safetensors", form, engine=engine)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


@settings(max_examples=10)
@given(form=st.sampled_from(FORMS), data=st.data())
def test_rows_are_those_of_the_whole(tmp_path_factory: pytest.TempPathFactory, form: Form, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.sampled_from([(7,), (9, 5), (3, 2, 3), (70_001,), (5, 40_001), (1, 1), (130, 601)]), "shape"))
    _, tau, _ = vector(shapes={"w": shape})
    path = tmp_path_factory.mktemp("rows") / "tau.safetensors"
    compress(tau, path, form)
    source = thetau.open(path).terms[0][1]
    whole = source.read("w")
    for _ in range(3):
        start = data.draw(st.integers(0, shape[0]), "start")
        stop = data.draw(st.integers(start, shape[0]), "stop")
        assert torch.equal(source.read("w", start, stop), whole[start:stop])
    with pytest.raises(IndexError, match="do not lie inside 'w'"):
        source.read("w", 0, shape[0] + 1)


def test_reading_from_several_threads_and_after_a_journey(tmp_path: Path) -> None:
    _, tau, _ = vector(shapes={"w": (200, 1000)})
    compress(tau, tmp_path / "tau.safetensors", Sparse(density=0.3))
    source = pickle.loads(pickle.dumps(thetau.open(tmp_path / "tau.safetensors").terms[0][1]))
    whole = source.read("w")
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda low: source.read("w", low, low + 10), range(0, 200, 10)))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("form", [Sparse(density=0.1), LowRank(rank=4), Precision(dtype="int8")], ids=repr)
def test_few_rows_read_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    """Rows in the middle of a tensor: nothing before them is scanned."""
    _, tau, _ = vector(shapes={"w": (4000, 500)})
    compress(tau, tmp_path / "tau.safetensors", form)
    source = thetau.open(tmp_path / "tau.safetensors").terms[0][1]
    read, counted = SafetensorsFile.read_bytes, []

    def counting(self: SafetensorsFile, offset: int, count: int, what: str) -> Tensor:
        counted.append(count)
        return read(self, offset, count, what)

    monkeypatch.setattr(SafetensorsFile, "read_bytes", counting)
    source.read("w", 2000, 2010)
    block = block_rows(500) * 500
    most = {Sparse: 2 * (block // 8 + 4 * block // 5) + 8 * 40, LowRank: 4 * 4 * (500 + 2 * 131), Precision: 10 * 504}[type(form)]
    assert 0 < sum(counted) <= most < 4000 * 500 / 8


def test_two_openings_cancel_and_a_fingerprint_is_the_files(tmp_path: Path) -> None:
    _, tau, _ = vector()
    compress(tau, tmp_path / "tau.safetensors", Sparse(density=0.3))
    one, other = (thetau.open(tmp_path / "tau.safetensors") for _ in range(2))
    assert not (one - other).terms
    assert one.terms[0][1].fingerprint() == other.terms[0][1].fingerprint()


# Sparse


@pytest.mark.parametrize("form", EXACT, ids=repr)
def test_exactly_the_largest_are_kept(tmp_path: Path, form: Sparse) -> None:
    _, tau, values = vector()
    report = compress(tau, tmp_path / "tau.safetensors", form)
    assert form.density is not None
    back = thetau.open(report.path).state_dict()
    whole = [values] if form.scope == "vector" else [{name: value} for name, value in values.items() if value.numel()]
    for part in whole:
        flat = torch.cat([value.reshape(-1) for value in part.values()])
        kept = torch.cat([back[name].reshape(-1) for name in part])
        count = kept_count(form.density, len(flat))
        assert int((kept != 0).sum()) == count
        assert set(kept.nonzero().flatten().tolist()) == set(flat.abs().topk(count).indices.tolist())
        torch.testing.assert_close(kept[kept != 0], flat[kept != 0].to(form.values.torch).float(), rtol=0, atol=0)
    assert report.kept == sum(int((one != 0).sum()) for one in back.values())
    assert float(metadata(report.path)["thetau.density"]) == report.density


def test_every_nonzero_is_kept_to_the_bit(tmp_path: Path) -> None:
    base, tuned = models(SHAPES, ("task",))
    tuned["task"]["wide.weight"][::3] = base["wide.weight"][::3]
    _, (tau,) = vectors_of(base, tuned)
    report = compress(tau, tmp_path / "tau.safetensors", Sparse(density=None))
    values, back = tau.state_dict(), thetau.open(report.path).state_dict()
    assert all(torch.equal(back[name], values[name]) for name in values)
    assert report.error == 0
    assert report.kept == sum(int(value.count_nonzero()) for value in values.values())
    assert report.kept < report.elements


def test_a_sparse_file_is_small(tmp_path: Path) -> None:
    """A bit an entry, four bytes a value, eight a block of 65,536 entries, and the header."""
    shapes = {"w": (1000, 300)}
    _, tau, _ = vector(shapes=shapes)
    report = compress(tau, tmp_path / "tau.safetensors", Sparse(density=0.05))
    blocks = -(-1000 // block_rows(300))
    payload = 1000 * 300 // 8 + 4 * kept_count(0.05, 300_000) + 8 * (blocks + 1)
    assert payload < report.nbytes < payload + 2000
    assert report.nbytes < 0.085 * report.dense_bytes


def test_a_value_that_rounds_to_zero_is_not_stored(tmp_path: Path) -> None:
    tau = thetau.open({"w": torch.tensor([1e-9, 1.0])}) - thetau.open({"w": torch.zeros(2)})
    report = compress(tau, tmp_path / "tau.safetensors", Sparse(density=None, dtype="float16"))
    assert report.kept == 1
    assert torch.equal(thetau.open(report.path).state_dict()["w"], torch.tensor([0.0, 1.0]))


# Low rank


@settings(max_examples=12)
@given(rows=st.integers(2, 60), columns=st.integers(2, 60), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_error_is_that_of_the_truncated_singular_values(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    tau = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, v = truncated(tau, rank)
    assert u.shape == (rows, rank)
    assert v.shape == (rank, columns)
    lost = torch.linalg.svdvals(tau.double())[rank:].square().sum().sqrt()
    assert float((tau - u @ v).double().norm()) == pytest.approx(float(lost), rel=1e-4, abs=1e-4)


def test_a_matrix_of_low_rank_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, 3, generator=generator) @ torch.randn(3, 70, generator=generator)
    tensors = {"w": exact, "zero": torch.zeros(40, 40), "bias": torch.randn(9, generator=generator), "thin": torch.ones(4, 2)}
    tau = thetau.open(tensors) - thetau.open({name: torch.zeros_like(one) for name, one in tensors.items()})
    report = compress(tau, tmp_path / "tau.safetensors", LowRank(rank=3))
    source = thetau.open(report.path).terms[0][1]
    assert isinstance(source, CompressedSource)
    assert source.by_kind() == {"low_rank": ["w", "zero"], "dense": ["bias", "thin"]}, "vectors, and where nothing is saved"
    assert relative(source.read("w"), exact) < 1e-5
    assert not source.read("zero").any()
    assert torch.equal(source.read("bias"), tensors["bias"])
    assert report.error < 1e-5


def test_a_rank_by_pattern_must_fit_every_matrix(tmp_path: Path) -> None:
    _, tau, _ = vector()
    with pytest.raises(RecipeError, match=r"no pattern fits 'wide.weight'; end with `\"\*\": rank`"):
        compress(tau, tmp_path / "tau.safetensors", LowRank(rank=PerPattern({"layers*": 2, "conv*": 1})))
    assert not leftovers(tmp_path)


# Precision


def test_int8_is_within_half_a_step_of_each_row(tmp_path: Path) -> None:
    _, tau, values = vector()
    report = compress(tau, tmp_path / "tau.safetensors", Precision(dtype="int8"))
    back = thetau.open(report.path).state_dict()
    for name, value in values.items():
        if not value.numel():
            continue
        wide = value.ndim > 1 and value[0].numel() >= 16
        rows = value.reshape(len(value), -1) if wide else value.reshape(1, -1)
        step = rows.abs().amax(1, keepdim=True) / 127
        off = (back[name].reshape(rows.shape) - rows).abs()
        assert bool((off <= step / 2 * 1.0001).all()), name
    assert report.nbytes < 0.6 * report.dense_bytes


def test_a_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    value = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    value[2] = 0
    tau = thetau.open({"w": value}) - thetau.open({"w": torch.zeros(4, 32)})
    report = compress(tau, tmp_path / "tau.safetensors", Precision(dtype="int8"))
    assert not thetau.open(report.path).state_dict()["w"][2].any()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tau = thetau.open({"w": torch.full((3, 3), 1e5)}) - thetau.open({"w": torch.zeros(3, 3)})
    for form in (Precision(dtype="float16"), Sparse(density=None, dtype="float16")):
        with pytest.raises(OutputError, match=r"'w': 1e\+05 does not fit float16. Choose bfloat16 or float32"):
            compress(tau, tmp_path / "tau.safetensors", form)
    assert not leftovers(tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Sparse, {"density": 0.0}, "`Sparse(density=...)` must be in (0, 1], or None for all that is not zero. Got 0.0."),
        (Sparse, {"density": True}, "Got True."),
        (Sparse, {"scope": "row"}, "`Sparse(scope=...)` must be one of vector, tensor. Got 'row'."),
        (Sparse, {"dtype": "int8"}, "`Sparse(dtype=...)` must be one of float32, bfloat16, float16. Got 'int8'."),
        (LowRank, {"rank": 0}, "`LowRank(rank=...)` must be an integer of at least 1. Got 0."),
        (LowRank, {"rank": PerPattern({"*": 1.5})}, "Got 1.5."),
        (Precision, {"dtype": "int4"}, "`Precision(dtype=...)` must be one of bfloat16, float16, int8. Got 'int4'."),
    ],
)
def test_forms_check_their_fields(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(cls, values)


def test_models_other_names_and_taken_paths_are_refused(tmp_path: Path) -> None:
    base, tau, _ = vector()
    with pytest.raises(AlignmentError, match="Compressing needs task vectors"):
        compress(base, tmp_path / "x.safetensors", Sparse())
    with pytest.raises(OutputError, match=r"is one file, whose name ends in .safetensors"):
        compress(tau, tmp_path / "x", Sparse())
    compress(tau, tmp_path / "x.safetensors", Sparse())
    with pytest.raises(OutputError, match="exists"):
        compress(tau, tmp_path / "x.safetensors", Sparse())


def test_the_base_is_remembered(tmp_path: Path) -> None:
    weights = random_weights(0)
    base, other = write_model(tmp_path / "base", weights), write_model(tmp_path / "other", random_weights(7))
    tuned = write_model(tmp_path / "tuned", shifted(weights, 1))
    tau = thetau.open(tuned) - thetau.open(base)
    compress(tau, tmp_path / "tau.safetensors", Sparse(density=0.5))
    report = compress(thetau.open(tmp_path / "tau.safetensors"), tmp_path / "again.safetensors", Precision())
    assert metadata(report.path)["thetau.base"] == metadata(tmp_path / "tau.safetensors")["thetau.base"]
    opened = thetau.open(other)
    with pytest.warns(thetau.ThetauWarning, match="was taken from another base"):
        (opened + thetau.open(report.path)).state_dict()


# Damage


def tampered(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors, said = load_file(path), metadata(path)
    change(tensors, said)
    out = path.with_name("bad.safetensors")
    save_file(tensors, out, metadata=said)
    return out


def table(said: dict[str, str], **entries: Any) -> None:
    said["thetau.tensors"] = json.dumps(json.loads(said["thetau.tensors"]) | entries)


def bit(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["mask:w"][3] ^= 1


def beyond(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["mask:w"][-1] |= 128


def falling(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["offsets:w"][1] = -5


def endless(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["offsets:w"][-1] += 1


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "a flipped bit": (bit, r"tensor 'w': rows 0:37 have \d+ bits in the mask and \d+ values; they must be as many"),
    "bits beyond the end": (beyond, r"tensor 'w': its mask has bits beyond its 703 entries"),
    "falling offsets": (falling, r"tensor 'w': its offsets must rise from 0 to the \d+ values"),
    "offsets beyond": (endless, r"tensor 'w': its offsets must rise from 0"),
    "a short mask": (
        lambda t, m: t.update({"mask:w": t["mask:w"][:-1].clone()}),
        r"tensor 'w': its part 'mask' must be torch.uint8 \[88\] for shape \[37, 19\], not torch.uint8 \[87\]",
    ),
    "values of text": (lambda t, m: t.update({"values:w": t["values:w"].double()}), "its part 'values' must be torch.float32"),
    "values in rows": (lambda t, m: t.update({"values:w": t["values:w"][None]}), "its part 'values' must be torch.float32"),
    "more values than entries": (
        lambda t, m: t.update({"values:w": torch.zeros(900)}),
        "tensor 'w': has 900 values for 703 entries",
    ),
    "no offsets": (lambda t, m: t.pop("offsets:w"), "tensor 'w': is stored as sparse, but its part 'offsets' is missing"),
    "a stranger": (lambda t, m: t.update({"values:v": torch.zeros(2)}), "'values:v' belongs to no tensor of `thetau.tensors`"),
    "a newer format": (lambda t, m: m.update({"thetau.format": "2"}), "is of format 2 .* reads up to 1. Update thetau."),
    "no format": (lambda t, m: m.pop("thetau.format"), "must be a task_vector of form sparse, low_rank, quantised and format 1"),
    "a long format": (lambda t, m: m.update({"thetau.format": "9" * 5000}), "must be a task_vector of form"),
    "an unknown form": (lambda t, m: m.update({"thetau.form": "zip"}), "Got 'task_vector', 'zip', '1'"),
    "a model": (lambda t, m: m.update({"thetau.kind": "model"}), "Got 'model', 'sparse', '1'"),
    "no table": (lambda t, m: m.pop("thetau.tensors"), "`thetau.tensors` in the metadata is no JSON table"),
    "a deep table": (lambda t, m: m.update({"thetau.tensors": "[" * 100_000}), "is no JSON table"),
    "an empty table": (lambda t, m: m.update({"thetau.tensors": "{}"}), "must name at least one tensor"),
    "a list": (lambda t, m: m.update({"thetau.tensors": "[1]"}), "must name at least one tensor"),
    "an entry of text": (lambda t, m: table(m, w="x"), "tensor 'w': `thetau.tensors` must give its kind"),
    "an unknown kind": (lambda t, m: table(m, w={"kind": "pickle", "shape": [37, 19]}), "must give its kind"),
    "no shape": (lambda t, m: table(m, w={"kind": "sparse"}), "must give its kind"),
    "a negative shape": (lambda t, m: table(m, w={"kind": "sparse", "shape": [-37, -19]}), "must give its kind"),
    "an absurd shape": (lambda t, m: table(m, w={"kind": "sparse", "shape": [1 << 40, 1 << 40]}), "must give its kind"),
    "a true shape": (lambda t, m: table(m, w={"kind": "sparse", "shape": [True, 19]}), "must give its kind"),
    "another shape": (lambda t, m: table(m, w={"kind": "sparse", "shape": [37, 29]}), r"for shape \[37, 29\]"),
    "another kind": (lambda t, m: table(m, w={"kind": "low_rank", "shape": [37, 19]}), "its part 'u' is missing"),
    "a tensor too many": (lambda t, m: table(m, z={"kind": "dense", "shape": [2]}), "tensor 'z': is stored as dense"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_file_and_tensor(tmp_path: Path, what: str) -> None:
    _, tau, _ = vector(shapes={"w": (37, 19)})
    compress(tau, tmp_path / "good.safetensors", Sparse(density=0.3))
    change, message = DAMAGE[what]
    bad = tampered(tmp_path / "good.safetensors", lambda t, m: (change(t, m), None)[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        thetau.open(bad).terms[0][1].read("w")
    assert str(bad) in str(caught.value)
    assert "Copy the file again, or write it again with `thetau vector compress`" in str(caught.value) or "Update" in str(
        caught.value
    )


@pytest.mark.parametrize("form", [LowRank(rank=2), Precision(dtype="int8")], ids=repr)
def test_damage_of_the_other_forms(tmp_path: Path, form: Form) -> None:
    _, tau, _ = vector(shapes={"w": (37, 19)})
    compress(tau, tmp_path / "good.safetensors", form)
    which = "u" if isinstance(form, LowRank) else "scale"
    bad = tampered(tmp_path / "good.safetensors", lambda t, m: t.update({f"{which}:w": t[f"{which}:w"][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"tensor 'w': its part '{which}' must be"):
        thetau.open(bad)


def test_a_product_of_rank_zero_is_refused(tmp_path: Path) -> None:
    """It would be a huge tensor in no bytes."""
    said = {"thetau.kind": "task_vector", "thetau.form": "low_rank", "thetau.format": "1"}
    said["thetau.tensors"] = json.dumps({"w": {"kind": "low_rank", "shape": [1 << 29, 1 << 29]}})
    parts = {"u:w": torch.zeros(1 << 29, 0), "v:w": torch.zeros(0, 1 << 29)}
    save_file(parts, tmp_path / "bomb.safetensors", metadata=said)
    with pytest.raises(CheckpointError, match="tensor 'w': is a product of rank 0"):
        thetau.open(tmp_path / "bomb.safetensors")


def test_values_that_are_no_numbers_are_refused_when_used(tmp_path: Path) -> None:
    base, tau, _ = vector(shapes={"w": (37, 19)})
    compress(tau, tmp_path / "good.safetensors", Sparse(density=0.3))
    bad = tampered(tmp_path / "good.safetensors", lambda t, m: t["values:w"].__setitem__(0, torch.nan))
    with pytest.raises(CheckpointError, match="tensor 'w' holds 1 NaN and 0 infinite values of 703"):
        (base + thetau.open(bad)).save(tmp_path / "out")


@settings(max_examples=20)
@given(data=st.data())
def test_a_flipped_byte_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever byte is damaged: a vector of the right shape, or an error of ours."""
    _, tau, _ = vector(shapes={"w": (37, 19), "b": (5,)})
    path = tmp_path_factory.mktemp("flip") / "tau.safetensors"
    compress(tau, path, data.draw(st.sampled_from(FORMS[:4] + FORMS[7:])))
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        for name, spec in (opened := thetau.open(path)).specs().items():
            assert opened.terms[0][1].read(name).shape == spec.shape
    except (CheckpointError, OutputError):
        pass


# Whole or not there


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tau, _ = vector()
    monkeypatch.setattr(Slots, "seal", lambda *_: (_ for _ in ()).throw(OutputError("the disk is full")))
    with pytest.raises(OutputError, match="the disk is full"):
        compress(tau, tmp_path / "tau.safetensors", Sparse())
    assert not leftovers(tmp_path)


def test_a_vector_that_changes_between_the_passes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": torch.randn(20, 20)}
    base = thetau.open({"w": torch.zeros(20, 20)})
    tau = thetau.open(weights) - base
    weights["w"][0] = 0  # after its key was made; the count pass sees this …

    def late(*arguments: Any, **options: Any) -> Any:
        weights["w"][0] = 1  # … and the last pass more entries than there is room for
        return Writer(*arguments, **options)

    monkeypatch.setattr("thetau.compression.write.Writer", late)
    with pytest.raises(CheckpointError, match=r"tensor 'w' changed while it was read\. Nothing was written"):
        compress(tau, tmp_path / "tau.safetensors", Sparse(density=None))
    assert not leftovers(tmp_path)


KILLED = """
import os, signal, sys, torch, thetau
from thetau.checkpoint.writer import Slots
write, calls = Slots.write, []
def dying(self, *arguments):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
Slots.write = dying
tau = thetau.open({f"t{i}": torch.ones(8, 8) for i in range(4)}) - thetau.open({f"t{i}": torch.zeros(8, 8) for i in range(4)})
thetau.compress(tau, sys.argv[1], thetau.Sparse(density=None))
"""


def test_a_killed_run_leaves_no_file_and_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "tau.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert leftovers(tmp_path), "it was killed while it wrote"
    _, tau, _ = vector()
    compress(tau, out, Sparse())
    assert leftovers(tmp_path) == ["tau.safetensors"]


def test_merged_vectors_compress_too(tmp_path: Path) -> None:
    base, tuned = models(SHAPES, ("a", "b"))
    _, vectors = vectors_of(base, tuned)
    merged = thetau.merge(vectors, Ties())
    report = compress(merged, tmp_path / "tau.safetensors", Precision())
    assert isinstance(merged.terms[0][1], Merge)
    assert report.error < 0.003


# The command line


def test_compress_info_and_apply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(
        capsys, "vector", "compress", "-b", "base", "-m", "a", "--density", "0.05", "-o", "t.safetensors", "--json", "t.json"
    )
    assert code == 0, text
    told = json.loads(Path("t.json").read_text())
    assert "sparse, density 0.05 of the vector, float32: " in text
    assert f"relative error ‖τ − τ̂‖ / ‖τ‖ = {told['error']:.4g}; worst {told['worst_error']:.4g} in {told['worst']}" in text
    assert told["nbytes"] == Path("t.safetensors").stat().st_size
    code, text = run(capsys, "vector", "info", "t.safetensors")
    assert code == 0
    assert "form sparse, format 1: " in text
    assert "stored sparse: 15 tensors" in text or "stored sparse: 16 tensors" in text
    assert 'compression: {"density":0.05,"scope":"vector","dtype":"float32"}' in text
    assert run(capsys, "vector", "apply", "-b", "base", "-v", "t.safetensors", "-q", "-o", "back")[0] == 0
    back, base, tau = (
        load_file("back/model.safetensors"),
        load_file("base/model.safetensors"),
        thetau.open("t.safetensors").state_dict(),
    )
    for name, value in tau.items():
        assert torch.equal(back[name], base[name] + value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rank", "2"], "low rank, 2, float32: "),
        (["--rank", "2", "--dtype", "bfloat16"], "low rank, 2, bfloat16: "),
        (["--dtype", "int8"], "int8: "),
    ],
)
def test_the_other_forms(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert run(capsys, "vector", "extract", "-b", "base", "-m", "a", "-q", "-o", "dense.safetensors")[0] == 0
    code, text = run(capsys, "vector", "compress", "-v", "dense.safetensors", *arguments, "-o", "t.safetensors")
    assert code == 0, text
    assert told in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either `--model` (with `--base`) or `--vector`."),
        (["-m", "a"], "`--model` needs `--base`, the model that it was fine-tuned from."),
        (["-b", "base", "-m", "a"], "say how: `--density 0.05`, `--rank 16` or `--dtype bfloat16` (float16, int8)."),
        (
            ["-b", "base", "-m", "a", "--rank", "2", "--density", "0.1"],
            "give `--density` or `--rank`, not both: one form a file.",
        ),
        (["-b", "base", "-m", "a", "--density", "2"], "`Sparse(density=...)` must be in (0, 1]"),
        (["-b", "base", "-m", "a", "--dtype", "int4"], "must be one of bfloat16, float16, int8. Got 'int4'."),
    ],
)
def test_wrong_options_are_named(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, text = run(capsys, "vector", "compress", *arguments, "-o", "t.safetensors")
    assert code != 0
    assert message in text
    assert not Path("t.safetensors").exists()


def test_no_rows_of_every_form(tmp_path: Path) -> None:
    """A read of nothing is an empty tensor of the right shape, whatever the form."""
    base, tuned = models({"w": (20, 64)}, ["a"])
    _, vectors = vectors_of(base, tuned)
    for number, form in enumerate(FORMS):
        if isinstance(form, LowRank) and not isinstance(form.rank, int):
            form = LowRank(rank=2)
        compress(vectors[0], tmp_path / f"{number}.safetensors", form)
        source = thetau.open(tmp_path / f"{number}.safetensors").terms[0][1]
        assert source.read("w", 3, 3).shape == (0, 64)


def test_a_tensor_of_very_many_empty_rows_costs_nothing(tmp_path: Path) -> None:
    """A header of a few bytes may claim 2⁵⁹ rows without an entry: nothing walks over them."""
    path = tmp_path / "rows.safetensors"
    header = {
        "__metadata__": {"thetau.kind": "task_vector"},
        "a": {"dtype": "F32", "shape": [2**59, 0], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0\0\x80?")
    state = thetau.open(path).state_dict()
    assert state["a"].shape == (2**59, 0)
    assert state["b"].tolist() == [1.0]
