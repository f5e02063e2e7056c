"""Checkpoints behind URLs: read in ranges, written whole, through fsspec's in-memory store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from typer.testing import CliRunner

import thetau
from fixtures import random_weights, shifted, write_model, write_shards
from thetau.checkpoint.remote import is_url
from thetau.cli.app import app
from thetau.errors import CheckpointError, OutputError
from thetau.methods import Ties


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A base in one file and a model in shards, in the store and on the disk."""
    fs = fsspec.filesystem("memory")
    write_model(tmp_path / "base", random_weights(0))
    write_shards(tmp_path / "a", shifted(random_weights(0), 1))
    for name in ("base", "a"):
        for path in (tmp_path / name).iterdir():
            fs.put_file(str(path), f"/bucket/{name}/{path.name}")
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def test_the_same_bits_as_from_a_disk(tmp_path: Path, store: str) -> None:
    def merged(folder: str) -> dict[str, torch.Tensor]:
        base, model = thetau.open(f"{folder}/base"), thetau.open(f"{folder}/a")
        return (base + thetau.merge([model - base], Ties(), names=["a"])).state_dict()

    remote, local = merged(store), merged(str(tmp_path))
    assert sorted(remote) == sorted(local)
    assert all(torch.equal(remote[name], local[name]) for name in local)
    assert thetau.open(f"{store}/base").terms[0][1].fingerprint() == thetau.open(tmp_path / "base").terms[0][1].fingerprint()


def test_an_output_behind_a_url(tmp_path: Path, store: str) -> None:
    base = thetau.open(f"{store}/base")
    report = (base + 0.5 * (thetau.open(f"{store}/a") - base)).save(f"{store}/out", shard_bytes=2000)
    assert report.path == f"{store}/out"
    fs = fsspec.filesystem("memory")
    names = {path.rsplit("/", 1)[-1] for path in fs.find("/bucket/out")}
    assert {"config.json", "thetau.json", "model.safetensors.index.json"} <= names
    again = thetau.open(f"{store}/out").state_dict()
    disk = thetau.open(tmp_path / "base")
    want = (disk + 0.5 * (thetau.open(tmp_path / "a") - disk)).state_dict()
    assert all(torch.equal(again[name], want[name]) for name in want)
    with pytest.raises(OutputError, match="exists"):
        base.save(f"{store}/out")
    with pytest.raises(OutputError, match="only an output on a disk can be resumed"):
        base.save(f"{store}/other", resume=True)


def test_on_the_command_line(tmp_path: Path, store: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"base": f"{store}/base", "models": [f"{store}/a"], "method": "average"}), encoding="utf-8")
    result = CliRunner().invoke(app, ["merge", str(recipe), "-o", f"{store}/merged", "--quiet"])
    assert result.exit_code == 0, result.output
    assert fsspec.filesystem("memory").exists("/bucket/merged/thetau.json")


def test_a_store_that_fails_in_the_middle_leaves_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    real, calls = type(fs).put_file, []

    def failing(self: object, local: str, remote: str, **options: object) -> object:
        calls.append(remote)
        if len(calls) == 3:
            raise OSError("the store is full")
        return real(self, local, remote, **options)

    monkeypatch.setattr(type(fs), "put_file", failing)
    with pytest.raises(OutputError, match="the store is full"):
        thetau.open(f"{store}/base").save(f"{store}/out", shard_bytes=1000)
    assert not fs.exists("/bucket/out")


def test_an_object_that_changes_is_noticed(tmp_path: Path, store: str) -> None:
    base = thetau.open(f"{store}/base")
    write_model(tmp_path / "new", random_weights(5))
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket/base/model.safetensors")
    fs.put_file(str(tmp_path / "new" / "model.safetensors"), "/bucket/base/model.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        base.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/none", "cannot be listed"),
        ("memory://bucket/none.safetensors", "cannot be read"),
        ("nosuch://bucket/x", r"nosuch://bucket/x: (needs a library|cannot be opened)"),
    ],
)
def test_what_is_not_there(store: str, url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        thetau.open(url)


def test_hostile_stores(store: str) -> None:
    fs = fsspec.filesystem("memory")
    with fs.open("/bucket/bad/model.safetensors.index.json", "wb") as file:
        file.write(json.dumps({"weight_map": {"w": "../base/model.safetensors"}}).encode())
    with pytest.raises(CheckpointError, match="which is not beside it"):
        thetau.open(f"{store}/bad")
    with fs.open("/bucket/cut/model.safetensors", "wb") as file:
        file.write(b"123")
    with pytest.raises(CheckpointError, match="3 bytes are too few"):
        thetau.open(f"{store}/cut")


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://b/m", "memory://x", "simplecache::s3://b/m", "gs://b")))
    assert not any(map(is_url, ("org/name", "C:\\x", "./a:b", "hub:org/name", "a", "")))
