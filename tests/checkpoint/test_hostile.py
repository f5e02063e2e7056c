"""Damaged and hostile files: each is refused by name, none does harm, none hangs."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fixtures import random_weights, write_index, write_raw, write_shards
from thetau.checkpoint import open_source
from thetau.errors import CheckpointError

# Damaged safetensors

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def damaged(**entry: object) -> dict[str, Any]:
    return {"w": {**GOOD, **entry}}


HOSTILE: dict[str, tuple[object, bytes, str]] = {
    "not json": (b"{nonsense", b"", "header is not valid JSON"),
    "not utf-8": (b'{"\xff\xfe": 1}', b"", "header is not valid JSON"),
    "a list": ([1, 2], b"", "header is not a table of tensors"),
    "a number": (7, b"", "header is not a table of tensors"),
    "deep nesting": (b'{"w":' * 100_000, b"", "header is not valid JSON"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, b"", "header is not valid JSON"),
    "a giant number": (b'{"w":' + b"9" * 5000 + b"}", b"", "header is not valid JSON"),
    "two of a name": (b'{"w":1,"w":1}', b"", "the name 'w' stands twice"),
    "two keys in an entry": (
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "'dtype' stands twice",
    ),
    "entry is a number": ({"w": 3}, b"", "entry of tensor 'w' is damaged"),
    "entry is null": ({"w": None}, b"", "entry of tensor 'w' is damaged"),
    "entry is a list": ({"w": [1]}, b"", "entry of tensor 'w' is damaged"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), r"tensor 'w' has no usable entry \('dtype'\)"),
    "unknown dtype": (damaged(dtype="F7"), bytes(8), r"tensor 'w' has no usable entry \('F7'\). Known dtypes: BOOL, U8"),
    "dtype is a list": (damaged(dtype=["F32"]), bytes(8), "entry of tensor 'w' is damaged"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "tensor 'w' has no usable entry"),
    "shape is a number": (damaged(shape=2), bytes(8), "entry of tensor 'w' is damaged"),
    "shape is text": (damaged(shape="2"), bytes(8), "tensor 'w' of shape"),
    "negative shape": (damaged(shape=[-2]), bytes(8), r"tensor 'w' of shape \[-2\] cannot lie at bytes 0:8"),
    "two negatives": (damaged(shape=[-1, -2]), bytes(8), r"tensor 'w' of shape \[-1, -2\] cannot lie"),
    "shape of floats": (damaged(shape=[2.0]), bytes(8), "tensor 'w' of shape"),
    "shape of booleans": (damaged(shape=[True, 2]), bytes(8), "tensor 'w' of shape"),
    "absurd shape": (damaged(shape=[1 << 62, 1 << 62]), bytes(8), "tensor 'w' of shape"),
    "absurd and empty": (damaged(shape=[0, 1 << 70], data_offsets=[0, 0]), b"", "tensor 'w' of shape"),
    "too many axes": (damaged(shape=[1] * 5000 + [2]), bytes(8), "tensor 'w' of shape"),
    "wrong size": (damaged(shape=[3]), bytes(8), r"tensor 'w' of shape \[3\] cannot lie at bytes 0:8"),
    "one offset": (damaged(data_offsets=[8]), bytes(8), "entry of tensor 'w' is damaged"),
    "three offsets": (damaged(data_offsets=[0, 8, 16]), bytes(8), "entry of tensor 'w' is damaged"),
    "offsets of text": (damaged(data_offsets="08"), bytes(8), "tensor 'w' of shape"),
    "offsets backwards": (damaged(data_offsets=[8, 0]), bytes(8), "cannot lie at bytes 8:0"),
    "negative offset": (damaged(data_offsets=[-8, 0]), bytes(8), "cannot lie at bytes -8:0"),
    "a gap at the start": (
        damaged(data_offsets=[4, 12]),
        bytes(12),
        "'w' starts at byte 4 where 0 was due: tensors overlap or leave a gap",
    ),
    "a gap": ({"v": GOOD, "w": {**GOOD, "data_offsets": [12, 20]}}, bytes(20), "'w' starts at byte 12 where 8 was due"),
    "an overlap": ({"v": GOOD, "w": {**GOOD, "data_offsets": [4, 12]}}, bytes(12), "'w' starts at byte 4 where 8 was due"),
    "twice the same bytes": ({"v": GOOD, "w": GOOD}, bytes(8), "'w' starts at byte 0 where 8 was due"),
    "data cut": ({"w": GOOD}, bytes(7), "the header describes 8 bytes of data, the file holds 7. It is truncated"),
    "data gone": ({"w": GOOD}, b"", "the header describes 8 bytes of data, the file holds 0"),
    "data too long": ({"w": GOOD}, bytes(9), "the header describes 8 bytes of data, the file holds 9"),
    "metadata is a list": ({"__metadata__": [1], "w": GOOD}, bytes(8), "`__metadata__` must map strings to strings"),
    "metadata is null": ({"__metadata__": None, "w": GOOD}, bytes(8), "`__metadata__` must map strings to strings"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": GOOD}, bytes(8), "`__metadata__` must map strings to strings"),
    "another kind": (
        {"__metadata__": {"thetau.kind": "x"}, "w": GOOD},
        bytes(8),
        "kind in the files' metadata must be one of model, task_v",
    ),
    "a name of half a character": ({"\ud800": GOOD}, bytes(8), "is damaged"),
    "no tensor": ({}, b"", "holds no tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    header, data, message = HOSTILE[case]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few for a safetensors header"),
        (b"1234567", "7 bytes are too few"),
        (struct.pack("<Q", 0), "header is not valid JSON"),
        (struct.pack("<Q", 3) + b"{}", "the header claims 3 bytes, the file has 10"),
        (struct.pack("<Q", 2**63) + b"{}", f"the header claims {2**63} bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", f"the header claims {2**64 - 1} bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "the header claims 100000001 bytes"),
    ],
)
def test_hostile_lengths(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "x.safetensors")


def test_a_huge_header_is_not_believed(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:  # sparse: the size is real, the header limit must hold
        file.write(struct.pack("<Q", 200_000_000) + b"{}")
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="the header claims 200000000 bytes"):
        open_source(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read(base: Path) -> None:
    source = open_source(base)
    path = base / "model.safetensors"
    os.truncate(path, path.stat().st_size - 64)
    last = list(source.specs)[-1]
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the file ended inside tensor '{last}'; it changed while"):
        source.read(last)


def in_time(action: Any, seconds: float = 20) -> None:
    """Run in a thread: a read that waits for ever is a failure, not a hang."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    assert len(caught) == 1 and isinstance(caught[0], CheckpointError), caught


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "x.pt",
    ],
)
def test_a_fifo_is_refused_without_waiting(tmp_path: Path, base: Path, name: str) -> None:
    folder = tmp_path / "fifo"
    folder.mkdir()
    os.mkfifo(folder / name)
    in_time(lambda: open_source(folder, base=open_source(base)))
    in_time(lambda: open_source(folder / name))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"regular file"):
        open_source(tmp_path)


# Indexes


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "gone.safetensors"}, r"names the shard 'gone\.safetensors', which is not in"),
        ({"w": "x" * 5000}, "which is not in"),
        ({"w": "\ud800.safetensors"}, "which is not in"),
        ({"w": "../outside.safetensors"}, r"names the shard '\.\./outside\.safetensors', which lies outside its folder"),
        ({"w": "a/../../outside.safetensors"}, "lies outside its folder"),
        ({"w": "/etc/passwd"}, "'/etc/passwd', which lies outside its folder"),
        ({"w": "with\0zero"}, "lies outside its folder"),
        ({"w": ""}, "lies outside its folder"),
        ({"w": 3}, "`weight_map` must map at least one tensor name to a file name"),
        ({}, "`weight_map` must map at least one tensor name"),
        ([1], "not an index of shards"),
        (None, "not an index of shards"),
        ("text", "not an index of shards"),
    ],
)
def test_hostile_indexes(tmp_path: Path, weight_map: object, message: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    index = write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert str(index) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b'{"a":' * 100_000, b'{"weight_map":{"w":"a","w":"b"}}'],
    ids=["empty", "cut", "list", "number", "no map", "not utf-8", "deep", "twice"],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_damaged_indexes(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        open_source(tmp_path)


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "shard.safetensors").symlink_to("../outside.safetensors")
    write_index(folder, {"w": "shard.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"the shard 'shard\.safetensors' is a link to .*outside\.safetensors, outside its folder"
    ):
        open_source(folder)
    (folder / "shard.safetensors").unlink()
    (folder / "shard.safetensors").symlink_to("shard.safetensors")  # itself
    with pytest.raises(CheckpointError, match="which is not in"):
        open_source(folder)
    (folder / "shard.safetensors").unlink()
    save_file({"w": torch.ones(2)}, folder / "sub" / "real.safetensors")
    (folder / "shard.safetensors").symlink_to("sub/real.safetensors")  # inside is fine
    assert torch.equal(open_source(folder).read("w"), torch.ones(2))


def test_an_index_that_does_not_belong_to_its_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", random_weights(0), 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    write_index(folder, {**weight_map, "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"the index puts 'ghost' in model-00001-of-00002\.safetensors, which does not hold it"
    ):
        open_source(folder)
    swapped = {"logit_scale": next(file for file in weight_map.values() if file != weight_map["logit_scale"])}
    write_index(folder, {**weight_map, **swapped})
    with pytest.raises(CheckpointError, match="the index puts 'logit_scale' in"):
        open_source(folder)


def test_one_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", random_weights(0), 3)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the header describes .* It is truncated"):
        open_source(folder)


def test_shards_of_models_and_task_vectors_do_not_mix(tmp_path: Path) -> None:
    save_file({"v": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"thetau.kind": "task_vector"})
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    write_index(tmp_path, {"v": "a.safetensors", "w": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"must be one of model, task_vector, evidence. Got model, task_vector"):
        open_source(tmp_path)


# Any damage at all

SMALL = save({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5), "ids": torch.arange(3)}, metadata={"k": "v"})


@settings(max_examples=400)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, len(SMALL))),
    more=st.binary(max_size=4),
)
@example(flips=[], cut=None, more=b"")
def test_damage_gives_a_checkpoint_error_or_readable_tensors(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    content = bytearray(SMALL)
    for place, value in flips:
        content[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content[:cut]) + more)
    message = None
    try:
        source = open_source(path)
        for name, spec in source.specs.items():
            assert source.read(name).shape == spec.shape
        source.fingerprint()
    except CheckpointError as error:
        message = str(error)
    assert message is None or ("x.safetensors" in message and (flips or more or cut is not None))


def test_damage_to_every_header_byte(tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "x.safetensors"
    length = 8 + int.from_bytes(SMALL[:8], "little")
    refused = 0
    for place in range(length):
        content = bytearray(SMALL)
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(content))
        try:
            source = open_source(path)
            for name in source.specs:
                source.read(name)
        except CheckpointError:
            refused += 1
    assert refused > length // 2
