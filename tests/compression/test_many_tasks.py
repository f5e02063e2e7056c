"""Several tasks in one file: what is read back has the bits of the method's outputs, damage is refused, live modules switch exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import thetau
from commands import folder as folder
from commands import run
from fixtures import leftovers
from synthetic import State, models, relative, vectors_of
from thetau.compression import compress_tasks, open_task, open_tasks, switch
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError
from thetau.methods import Emr, PerTask, TallMasks, TaskArithmetic
from thetau.testing import LARGE, same
from tiny import one_thread as one_thread

SHAPES = {
    "layers.0.mlp.fc1.weight": (37, 19),  # no row fills whole bytes
    "layers.0.mlp.fc1.bias": (37,),
    "conv.weight": (4, 3, 2, 2),
    "logit_scale": (),
    "empty": (0, 16),
    "mask0:values:odd name": (5, 8),
}
TASKS = ("zebra", "ape", "Cat")
METHODS = [
    TallMasks(),
    TallMasks(selectivity=PerTask({"zebra": 0.2, "ape": 0.4, "Cat": 0.6})),
    TallMasks(vector="ties"),
    Emr(),
    Emr(rescale="sums", scale=0.7),
    Emr(rescale="none"),
]


def vectors(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0, **options: Any) -> tuple[Any, list[Any]]:
    base, tuned = models(shapes, TASKS, seed=seed, **options)
    return vectors_of(base, tuned)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_every_task_comes_back_to_the_bit(tmp_path: Path, method: Any, shapes: Any) -> None:
    _, taus = vectors(shapes)
    report = compress_tasks(taus, tmp_path / "all.safetensors", method)
    wanted = {name: one.state_dict() for name, one in thetau.outputs(taus, method).items()}
    opened = open_tasks(tmp_path / "all.safetensors")
    assert sorted(opened) == sorted(TASKS)
    for task in TASKS:
        got = opened[task].state_dict()
        same(got, {name: tensor for name, tensor in wanted[task].items() if tensor.numel()}, task)
        same(thetau.open(f"{tmp_path / 'all.safetensors'}#{task}").state_dict(), got, "by its address")
        tau: State = taus[TASKS.index(task)].state_dict()
        whole, mine = (torch.cat([state[name].reshape(-1) for name in got]) for state in (tau, got))
        assert report.error[task] == pytest.approx(relative(mine, whole), rel=1e-6)
        set_ = sum(int((got[name] != 0).sum()) for name in got)
        assert round(report.density[task] * len(whole)) >= set_


def test_it_is_told_what_it_takes(tmp_path: Path) -> None:
    _, taus = vectors(LARGE)
    report = compress_tasks(taus, tmp_path / "all.safetensors", Emr())
    elements = sum(torch.Size(shape).numel() for shape in LARGE.values())
    assert report.dense_bytes == 3 * 4 * elements
    assert report.nbytes == (tmp_path / "all.safetensors").stat().st_size
    row = report.storage.row("emr")
    bits = sum(-(-torch.Size(shape).numel() // 8) for shape in LARGE.values())
    assert (row.masks, row.values, row.nbytes) == (3, 4 * elements, 4 * elements + 3 * bits)
    assert row.nbytes < report.nbytes < row.nbytes + 4000
    assert json.loads(json.dumps(report.to_json()))["rescalers"] == dict(report.rescalers)


@pytest.mark.parametrize("method", [TallMasks(vector="ties"), Emr()], ids=repr)
def test_no_setting_changes_a_byte(tmp_path: Path, method: Any) -> None:
    _, taus = vectors(LARGE)
    compress_tasks(taus, tmp_path / "1.safetensors", method, engine=Engine(workers=1))
    compress_tasks(taus, tmp_path / "2.safetensors", method, engine=Engine(workers=2, window=1))
    compress_tasks(taus[::-1], tmp_path / "3.safetensors", method)
    first = (tmp_path / "1.safetensors").read_bytes()
    assert first == (tmp_path / "2.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    _, taus = vectors()
    compress_tasks(taus, tmp_path / "all.safetensors", Emr())
    ((_, source),) = open_task(tmp_path / "all.safetensors", "ape").terms
    whole = source.read("layers.0.mlp.fc1.weight")
    for start, stop in [(0, 1), (1, 2), (3, 20), (36, 37), (5, 5)]:
        assert torch.equal(source.read("layers.0.mlp.fc1.weight", start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shared_values_in_fewer_bits_at_the_error_told(tmp_path: Path, dtype: Any) -> None:
    _, taus = vectors()
    whole = compress_tasks(taus, tmp_path / "32.safetensors", TallMasks())
    half = compress_tasks(taus, tmp_path / "16.safetensors", TallMasks(), dtype=dtype)
    assert half.storage.row("tall_masks").values == whole.storage.row("tall_masks").values / 2
    got, tau = open_task(half.path, "Cat").state_dict(), taus[2].state_dict()
    one, other = (torch.cat([state[name].reshape(-1) for name in got]) for state in (got, tau))
    assert half.error["Cat"] == pytest.approx(relative(one, other), rel=1e-6)


def test_a_task_out_of_a_file_is_a_vector_like_any_other(tmp_path: Path) -> None:
    base, taus = vectors()
    compress_tasks(taus, tmp_path / "all.safetensors", Emr())
    opened = open_tasks(tmp_path / "all.safetensors")
    wanted = thetau.outputs(taus, Emr())
    merged = thetau.merge([opened[task] for task in TASKS], TaskArithmetic())
    again = thetau.merge([wanted[task] for task in TASKS], TaskArithmetic(), names=TASKS)
    same((base + merged).state_dict(), (base + again).state_dict(), "merged out of the file")
    assert not (opened["ape"] - open_task(tmp_path / "all.safetensors", "ape")).terms
    assert opened["ape"].terms[0][1].fingerprint() != opened["Cat"].terms[0][1].fingerprint()
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata()["thetau.base"] == base.terms[0][1].fingerprint()
        assert "emr" in file.metadata()["thetau.recipe"]


# What is refused.


def test_a_file_of_several_must_be_told_which(tmp_path: Path) -> None:
    _, taus = vectors()
    path = tmp_path / "all.safetensors"
    compress_tasks(taus, path, Emr())
    with pytest.raises(
        CheckpointError, match=r"holds the vectors of 3 tasks\. Name one of them: .*all\.safetensors#Cat\. Tasks: Cat, ape, zebra"
    ):
        thetau.open(path)
    with pytest.raises(CheckpointError, match=r"has no task 'aep'\. Did you mean 'ape'\? Its tasks: Cat, ape, zebra"):
        thetau.open(f"{path}#aep")
    with pytest.raises(CheckpointError, match="no such file"):
        open_task(tmp_path / "other.safetensors", "ape")
    taus[0].save(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="is no file of several task vectors"):
        open_tasks(tmp_path / "one.safetensors")


def test_other_methods_names_and_taken_paths(tmp_path: Path) -> None:
    base, taus = vectors()
    path = tmp_path / "all.safetensors"
    with pytest.raises(RecipeError, match=r"`task_arithmetic` keeps no mask for each task\. Give `tall_masks` or `emr`"):
        compress_tasks(taus, path, TaskArithmetic())
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        compress_tasks(taus, tmp_path / "all", Emr())
    with pytest.raises(AlignmentError, match="needs task vectors"):
        compress_tasks([base], path, Emr())
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        compress_tasks(taus, path, Emr())
    assert path.read_bytes() == b"mine"


def test_values_that_are_no_numbers_leave_nothing(tmp_path: Path) -> None:
    base, tuned = models(SHAPES, TASKS)
    tuned["ape"]["conv.weight"][0, 0, 0, 0] = float("nan")
    _, taus = vectors_of(base, tuned)
    for method in (TallMasks(), Emr()):
        with pytest.raises(CheckpointError, match=r"conv\.weight"):
            compress_tasks(taus, tmp_path / "all.safetensors", method)
    assert not leftovers(tmp_path)


def rewrite(path: Path, change: Any) -> None:
    """Another file with some tensors or metadata changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def drop(tensors: Any, metadata: Any) -> None:
    del tensors["mask1:conv.weight"]


def shorten(tensors: Any, metadata: Any) -> None:
    tensors["mask1:conv.weight"] = tensors["mask1:conv.weight"][:-1].clone()


def widen(tensors: Any, metadata: Any) -> None:
    tensors["values:conv.weight"] = tensors["values:conv.weight"].double()


def reshape(tensors: Any, metadata: Any) -> None:
    tensors["values:conv.weight"] = tensors["values:conv.weight"].reshape(4, 12)


def add(tensors: Any, metadata: Any) -> None:
    tensors["mask3:conv.weight"] = tensors["mask2:conv.weight"].clone()


def rename(key: str, value: str) -> Any:
    def change(tensors: Any, metadata: Any) -> None:
        metadata[key] = value

    return change


DAMAGE: dict[str, tuple[Any, str]] = {
    "a mask is missing": (drop, r"'conv\.weight': its part 'mask1' is missing"),
    "a mask is short": (shorten, r"its part 'mask1' must be torch\.uint8 \[6\]"),
    "values of another dtype": (widen, r"its part 'values' must be torch\.float32 \[4, 3, 2, 2\]"),
    "values of another shape": (reshape, r"its part 'values' must be torch\.float32 \[4, 3, 2, 2\]"),
    "a mask too many": (add, r"'mask3:conv\.weight' belongs to no tensor"),
    "no tasks": (rename("thetau.tasks", "{}"), "must name at least one task"),
    "no table": (rename("thetau.tasks", "["), "no JSON table"),
    "a rescaler that is no number": (rename("thetau.tasks", '{"a": "x", "b": 1, "c": 1}'), "each task's rescaler"),
    "a rescaler without end": (rename("thetau.tasks", '{"a": Infinity, "b": 1, "c": 1}'), "each task's rescaler"),
    "one task fewer": (rename("thetau.tasks", '{"a": 1.0, "b": 1.0}'), r"'mask2:.*' belongs to no tensor"),
    "a newer format": (rename("thetau.format", "2"), "Update thetau"),
    "no kind": (rename("thetau.kind", "model"), "must be a task_vector of form masked"),
    "tensors of another kind": (
        rename("thetau.tensors", '{"conv.weight": {"kind": "sparse", "shape": [1]}}'),
        "must give its kind",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_file_and_tensor(tmp_path: Path, what: str) -> None:
    change, message = DAMAGE[what]
    _, taus = vectors()
    path = tmp_path / "all.safetensors"
    compress_tasks(taus, path, Emr())
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_task(path, "ape")
    assert str(path) in str(caught.value)


def test_bits_beyond_the_entries_are_refused_when_read(tmp_path: Path) -> None:
    _, taus = vectors()
    path = tmp_path / "all.safetensors"
    compress_tasks(taus, path, Emr())

    def change(tensors: Any, metadata: Any) -> None:
        tensors["mask1:layers.0.mlp.fc1.weight"][-1] |= 128  # 703 entries: one bit is left

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"'layers\.0\.mlp\.fc1\.weight': its mask has bits beyond its 703 entries"):
        open_task(path, "ape").state_dict()
    open_task(path, "zebra").state_dict()  # another mask


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    _, taus = vectors()
    path = tmp_path / "all.safetensors"
    compress_tasks(taus, path, Emr())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"all\.safetensors"):
        open_task(path, "ape")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It is refused, or reads as numbers of the same shapes."""
    path = tmp_path_factory.mktemp("flipped") / "all.safetensors"
    _, taus = vectors({"w": (9, 5), "b": (3,)})
    compress_tasks(taus, path, Emr())
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    try:
        state = open_task(path, "ape").state_dict()
    except CheckpointError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"w": (9, 5), "b": (3,)}


# A live module.


class Small(nn.Module):
    """Two layers, a buffer and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))


def named() -> dict[str, tuple[int, ...]]:
    return {"embed.weight": (7, 6), "inner.weight": (6, 6), "inner.bias": (6,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [TallMasks(), Emr()], ids=repr)
def test_switching_back_and_forth_gives_the_same_bits(tmp_path: Path, dtype: Any, method: Any) -> None:
    base, taus = vectors(named(), dtype=dtype)
    compress_tasks(taus, tmp_path / "all.safetensors", method)
    opened = open_tasks(tmp_path / "all.safetensors")
    module = Small().to(dtype)
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    parameters = list(module.parameters())
    for task in (*TASKS, "ape", "zebra", "ape"):
        assert switch(module, base + opened[task]) == list(named())
        want = (base + thetau.outputs(taus, method)[task]).state_dict()
        same({name: module.state_dict()[name] for name in want}, want, task)
        assert torch.equal(module.out.weight, module.embed.weight)
    switch(module, base)
    same({name: module.state_dict()[name] for name in named()}, base.state_dict(), "the base again")
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == places
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    assert int(module.count) == 3


def test_a_module_of_a_wider_dtype_gets_the_unrounded_sum(tmp_path: Path) -> None:
    base, taus = vectors(named(), dtype=torch.bfloat16)
    compress_tasks(taus, tmp_path / "all.safetensors", Emr())
    tau = open_task(tmp_path / "all.safetensors", "ape")
    module = Small()
    switch(module, base + tau)
    want = {name: base.state_dict()[name].float() + tensor for name, tensor in tau.state_dict().items()}
    same({name: module.state_dict()[name] for name in want}, want, "in float32")


def test_a_module_that_does_not_fit_stays_as_it_is() -> None:
    base, taus = vectors({"inner.weight": (6, 6), "other.weight": (3,)})
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(AlignmentError, match=r"Small does not fit .*: 'other\.weight' is missing\."):
        switch(module, base + taus[0])
    wide, _ = vectors({"inner.weight": (6, 7)})
    with pytest.raises(AlignmentError, match=r"'inner\.weight' has shape \[6, 6\] instead of \[6, 7\]"):
        switch(module, wide)
    with pytest.raises(AlignmentError, match="needs a model"):
        switch(module, taus[0])
    same(module.state_dict(), before, "after refusals")


# The command.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "emr"],
        ["--method", "emr", "--rescale", "sums", "--dtype", "bfloat16"],
        ["--method", "tall", "--selectivity", "0.3"],
        ["--method", "tall", "--merged", "ties"],
    ],
    ids=" ".join,
)
def test_compress_several_and_apply_one(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, text = run(capsys, "vector", "compress", "-b", "base", "-m", "a", "-m", "b", *arguments, "-o", "t.safetensors")
    assert code == 0, text
    assert "2 tasks in" in text
    assert "t.safetensors#a" in text
    assert run(capsys, "vector", "info", "t.safetensors#a")[0] == 0
    code, text = run(capsys, "vector", "apply", "--base", "base", "--vector", "t.safetensors#b", "-o", "out")
    assert code == 0, text
    want = (thetau.open("base") + open_task("t.safetensors", "b")).state_dict()
    same(thetau.open("out").state_dict(), want, "applied")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "a", "-m", "b"], "Several go with `--method tall` or `emr`."),
        (["--method", "emr"], "give the vectors: `--model` (with `--base`) or `--vector`, once for each."),
        (["-m", "a", "--method", "emr", "--selectivity", "0.3"], "`--selectivity` and `--merged` belong to `--method tall`."),
        (["-m", "a", "--method", "tall", "--rescale", "sums"], "`--rescale` belongs to `--method emr`."),
        (["-m", "a", "--method", "tall", "--density", "0.1"], "`--density` and `--rank` are of one vector"),
        (["-m", "a", "--method", "tall", "--selectivity", "-1"], "a number of at least 0"),
        (["-m", "a", "--method", "emr", "--dtype", "int8"], "must be one of float32, bfloat16, float16. Got 'int8'."),
    ],
)
def test_wrong_options_are_named(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, text = run(capsys, "vector", "compress", "-b", "base", *arguments, "-o", "t.safetensors")
    assert code != 0
    assert message in text
    assert not Path("t.safetensors").exists()
