"""Reading weights: every form they come in, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fixtures import assert_same, bits, odd_weights, random_weights, write_index, write_model, write_shards
from thetau.checkpoint import Source, open_source
from thetau.checkpoint.memory import from_mapping
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.errors import CheckpointError


def contents(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.specs}


# Forms


def test_one_file_reads_as_the_safetensors_library_wrote_it(tmp_path: Path) -> None:
    save_file(odd_weights(), tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert_same(contents(source), odd_weights())
    assert (source.degree, source.partial, source.label) == (1, False, str(tmp_path / "x.safetensors"))


def test_rows_equal_the_whole(tmp_path: Path) -> None:
    save_file(odd_weights(), tmp_path / "x.safetensors")
    for source in (open_source(tmp_path / "x.safetensors"), open_source(odd_weights())):
        for name, spec in source.specs.items():
            if not spec.shape:
                continue
            whole = source.read(name)
            for start in range(spec.rows + 1):
                for stop in range(start, spec.rows + 1):
                    rows = source.read(name, start, stop)
                    assert rows.shape == (stop - start, *spec.shape[1:])
                    assert torch.equal(bits(rows), bits(whole[start:stop])), (name, start, stop)
        with pytest.raises(IndexError, match=r"Rows 2:9 do not lie inside 'volume' with 3 rows"):
            source.read("volume", 2, 9)


def test_specs_come_in_file_order_and_nothing_is_read_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(random_weights(0), tmp_path / "x.safetensors")
    monkeypatch.setattr(SafetensorsFile, "read_bytes", None)  # a read would fail
    source = open_source(tmp_path / "x.safetensors")
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert list(source.specs) == sorted(offsets, key=offsets.__getitem__)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_of_shards(tmp_path: Path, shards: int) -> None:
    weights = random_weights(0)
    folder = write_shards(tmp_path / "m", weights, shards)
    assert_same(contents(open_source(folder)), weights)
    assert_same(contents(open_source(folder / "model.safetensors.index.json")), weights)
    assert open_source(folder).key == open_source(folder / "model.safetensors.index.json").key


def test_a_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    weights = random_weights(0)
    (tmp_path / "m").mkdir()
    save_file(weights, tmp_path / "m" / "weights.safetensors")
    assert_same(contents(open_source(tmp_path / "m")), weights)
    save_file(weights, tmp_path / "m" / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds 2 safetensors files and no index. Name one of them: other\.safetensors, weights"
    ):
        open_source(tmp_path / "m")


def test_two_openings_have_one_key_and_one_fingerprint_until_the_file_changes(base: Path) -> None:
    first, second = open_source(base), open_source(base)
    assert first.key == second.key
    assert first.fingerprint() == second.fingerprint()
    assert not first.changed_files()  # type: ignore[attr-defined]
    write_model(base, random_weights(9))
    third = open_source(base)
    assert third.key != first.key
    assert third.fingerprint() != first.fingerprint()
    assert first.changed_files() == [str(base / "model.safetensors")]  # type: ignore[attr-defined]


def test_shards_that_the_index_does_not_name_are_noted(tmp_path: Path) -> None:
    weights = random_weights(0)
    folder = write_shards(tmp_path / "m", weights)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    lost = "encoder.layer.1.output.dense.weight"
    write_index(folder, {name: file for name, file in index.items() if name != lost})
    source = open_source(folder)
    assert lost not in source.specs
    assert len(source.notes) == 1 and f"1 tensors that the index does not name were left out ({lost}" in source.notes[0]


# Torch files


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_torch_files(tmp_path: Path, legacy: bool, wrapper: str | None) -> None:
    weights = random_weights(0)
    content: dict[str, Any] = weights if wrapper is None else {"epoch": 3, wrapper: OrderedDict(weights)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_same(contents(open_source(tmp_path / "pytorch_model.bin")), weights)
    assert_same(contents(open_source(tmp_path)), weights)


def test_entries_of_a_torch_file_that_are_no_tensors_are_noted(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "epoch": 3, "name": "x"}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert list(source.specs) == ["weight"]
    assert source.notes == (f"{tmp_path / 'x.pt'}: 2 entries that are not tensors were left out (epoch, name).",)


def test_torch_shards_with_their_index(tmp_path: Path) -> None:
    weights = random_weights(0)
    half = len(weights) // 2
    parts = {"a.bin": dict(list(weights.items())[:half]), "b.bin": dict(list(weights.items())[half:])}
    for file, part in parts.items():
        torch.save(part, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    assert_same(contents(open_source(tmp_path)), weights)
    write_index(tmp_path, {**weight_map, "ghost": "a.bin"}, "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match=r"index\.json: names 'ghost', which no shard holds \(1 such"):
        open_source(tmp_path)


class Evil:
    """Unpickled the careless way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, form: str, name: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / name
    content = {"weight": torch.ones(2), "hook": Evil(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=rf"{name}.*(could run code|not a readable torch file)"):
        open_source(path)
    assert not proof.exists()
    if form == "zip":
        torch.load(path, weights_only=False)  # the trap works
        assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02", b"junk" * 50, b"\x80\x02}q\x00X\xff\xff\xff\xff"],
    ids=["empty", "zip", "p2", "junk", "cut"],
)
def test_damaged_torch_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        open_source(tmp_path / "x.bin")


def test_truncated_torch_files(tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save(random_weights(0), tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
        whole = (tmp_path / "x.bin").read_bytes()
        for size in range(0, len(whole), max(1, len(whole) // 23)):
            (tmp_path / "cut.bin").write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=r"cut\.bin"):
                open_source(tmp_path / "cut.bin")


def test_torch_files_without_weights(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin: must hold a state dict. Got list"):
        open_source(tmp_path / "x.bin")
    torch.save({"epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin: holds no tensor"):
        open_source(tmp_path / "x.bin")


# Memory


def test_state_dicts_and_modules_are_read_in_place_and_not_changed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for source in (open_source(module), open_source(module.state_dict())):
        assert_same(contents(source), before)
        assert not any(source.read(name).requires_grad for name in source.specs)
    assert open_source(module).key == open_source(module).key
    assert open_source(module).key != open_source(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).key
    assert_same(module.state_dict(), before)


def test_views_of_one_memory_are_not_taken_for_each_other() -> None:
    memory = torch.arange(6.0)
    assert open_source({"w": memory.reshape(2, 3)}).key != open_source({"w": memory.reshape(3, 2)}).key
    assert open_source({"w": memory[:3]}).fingerprint() != open_source({"w": memory[3:]}).fingerprint()


def test_rows_of_a_transposed_tensor_come_in_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(open_source({"w": matrix.T}).read("w", 1, 3), matrix.T[1:3])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"maps names to dense tensors. Got list at 'w'"),
        (torch.eye(2).to_sparse(), r"maps names to dense tensors. Got Tensor at 'w'"),
        (torch.ones(2, device="meta"), r"'w' lies on the meta device and has no values"),
        (torch.ones(2, dtype=torch.complex64), r"'w' is complex64, which cannot be stored. Known dtypes: bool"),
    ],
    ids=["list", "sparse", "meta", "complex"],
)
def test_state_dicts_of_other_things_are_refused(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source({"v": torch.ones(2), "w": value})


def test_an_empty_state_dict_and_other_keys_are_refused() -> None:
    with pytest.raises(CheckpointError, match="state dict of 0 tensors: holds no tensor"):
        open_source({})
    with pytest.raises(CheckpointError, match="Got Tensor at 3"):
        from_mapping({3: torch.ones(2)}, "mine")


# Paths


@pytest.mark.parametrize("name", ["", "missing", "a/b/c", "x" * 5000, "/missing", "with\0zero", "~/nothing here"])
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(
        CheckpointError, match="no such file or folder, and not a hub id of the form org/name or org/name@revision"
    ):
        open_source(name)


def test_what_a_folder_without_weights_holds_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights that can be read .*It holds: nothing"):
        open_source(tmp_path)
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"It holds: notes\.md"):
        open_source(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"notes\.md: unknown kind of file. Weights end in \.safetensors, \.bin, \.pt, \.pth, \.ckpt or \.gguf",
    ):
        open_source(tmp_path / "notes.md")
