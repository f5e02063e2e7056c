"""Hub ids, read by huggingface_hub from a cache folder, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thetau
from fixtures import assert_same, random_weights, shifted, write_hub_cache
from thetau.checkpoint import open_source
from thetau.errors import CheckpointError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_hub_id_is_read_from_the_cache(cache: Path) -> None:
    snapshot = write_hub_cache(cache, "org/name", random_weights(0))
    source = open_source("org/name")
    assert_same({name: source.read(name) for name in source.specs}, random_weights(0))
    assert source.folder == snapshot
    assert (snapshot / "model-00001-of-00002.safetensors").is_symlink()  # into the blobs, which is allowed here


def test_a_revision(cache: Path) -> None:
    write_hub_cache(cache, "org/name", random_weights(0))
    source = open_source("org/name@" + "a" * 40)
    assert_same({name: source.read(name) for name in source.specs}, random_weights(0))
    with pytest.raises(CheckpointError, match="org/name@v2: no such file or folder, and the hub has no such model within reach"):
        open_source("org/name@v2")


def test_a_folder_of_that_name_goes_first_unless_the_prefix_is_given(cache: Path, tmp_path: Path) -> None:
    write_hub_cache(cache, "org/name", random_weights(0))
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="org/name: holds no weights"):
        open_source("org/name")
    assert "logit_scale" in open_source("hub:org/name").specs


def test_merging_from_the_cache_copies_the_config(cache: Path, tmp_path: Path) -> None:
    write_hub_cache(cache, "org/base", random_weights(0))
    write_hub_cache(cache, "org/tuned", shifted(random_weights(0), 1))
    base = thetau.open("org/base")
    report = (base + (thetau.open("org/tuned") - base)).save(tmp_path / "out")
    assert report.path == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "thetau.json"]
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_blob_outside_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    snapshot = write_hub_cache(cache, "org/name", random_weights(0))
    shard = snapshot / "model-00001-of-00002.safetensors"
    shutil.copy(shard, tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the shard 'model-00001-of-00002\.safetensors' is a link to .*elsewhere, outside"):
        open_source("org/name")


def test_an_unknown_id(cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"org/nothing: no such file or folder, and the hub has no such model within reach \("
    ):
        open_source("org/nothing")


@pytest.mark.parametrize("name", ["org/na..me", "org/-name", "a--b/c", "org/name.git"])
def test_ids_that_the_hub_does_not_allow(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_source(name)


def test_torch_files_only_where_there_are_no_safetensors(cache: Path) -> None:
    snapshot = write_hub_cache(cache, "org/name", random_weights(0))
    for path in snapshot.iterdir():
        path.unlink()
    torch.save(random_weights(1), snapshot / "pytorch_model.bin")
    source = open_source("org/name")
    assert torch.equal(source.read("logit_scale"), random_weights(1)["logit_scale"])


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With a hub that does not answer, though nobody said so."""
    write_hub_cache(tmp_path / "cache", "org/name", random_weights(0))
    script = (
        "import thetau, thetau.errors\n"
        "print(round(thetau.open('org/name').state_dict()['logit_scale'].item(), 4))\n"
        "try:\n    thetau.open('org/other')\nexcept thetau.errors.CheckpointError as error:\n    print(str(error)[:60])\n"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    want = [
        str(round(random_weights(0)["logit_scale"].item(), 4)),
        "org/other: no such file or folder, and the hub has no such m",
    ]
    assert done.stdout.splitlines() == want
