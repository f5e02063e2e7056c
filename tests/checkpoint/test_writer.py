"""Writing: a whole checkpoint or nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import thetau
from fixtures import assert_same, leftovers, load_folder, odd_weights, random_weights, shifted, write_model
from thetau._version import __version__
from thetau.checkpoint import Writer, open_source
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError


def write(target: Path, weights: Mapping[str, Tensor], **options: Any) -> None:
    """All tensors, row by row, last rows first."""
    with Writer(target, open_source(weights).specs, {}, **options) as writer:
        for name, value in weights.items():
            if value.ndim == 0:
                writer.write(name, 0, value)
            for row in reversed(range(len(value) if value.ndim else 0)):
                writer.write(name, row, value[row : row + 1])
        writer.commit(copy_from=None, files={})


# What is written


def test_the_safetensors_library_reads_it_back(tmp_path: Path) -> None:
    write(tmp_path / "out", odd_weights())
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), odd_weights())
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(tmp_path / "out") == ["model.safetensors"]


def test_tensors_are_aligned_to_their_width(tmp_path: Path) -> None:
    write(tmp_path / "out.safetensors", odd_weights())
    raw = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    specs = open_source(odd_weights()).specs
    assert all(entry["data_offsets"][0] % specs[name].dtype.itemsize == 0 for name, entry in header.items())


@pytest.mark.parametrize("shard_bytes", [1, 300, 2000, 10**9])
def test_shards_and_their_index(tmp_path: Path, shard_bytes: int) -> None:
    weights = random_weights(0)
    write(tmp_path / "out", weights, shard_bytes=shard_bytes)
    assert_same(load_folder(tmp_path / "out"), weights)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        return
    count = len(files)
    assert count > 1
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert shard_bytes > 1 or count == len(weights)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert sorted(index["weight_map"]) == sorted(weights)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= shard_bytes


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    thetau.open(tmp_path / "base").save(tmp_path / "out", shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    got = transformers.BertModel.from_pretrained(tmp_path / "out").state_dict()
    want = transformers.BertModel.from_pretrained(tmp_path / "base").state_dict()
    assert_same(got, want)


def test_a_single_file(tmp_path: Path, base: Path) -> None:
    report = thetau.open(base).save(tmp_path / "out.safetensors", shard_bytes=10)
    assert_same(load_file(tmp_path / "out.safetensors"), random_weights(0))
    assert leftovers(tmp_path, ["base"]) == ["out.safetensors"]
    assert (report.path, report.tensors, report.nbytes) == (
        tmp_path / "out.safetensors",
        len(random_weights(0)),
        sum(value.nbytes for value in random_weights(0).values()),
    )


def test_side_files(tmp_path: Path, base: Path) -> None:
    copied = {
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "generation_config.json",
        "LICENSE",
        "modules.json",
        "chat_template.jinja",
    }
    left = {
        "README.md",
        "thetau.json",
        "pytorch_model.bin",
        "model.onnx",
        "training_args.bin",
        "tf_model.h5",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        ".gitattributes",
        "trainer_state.json",
    }
    for name in copied | left:
        (base / name).write_text("{}", encoding="utf-8")
    for folder, name in [
        ("1_Pooling", "config.json"),
        ("1_Pooling", "notes.txt"),
        ("checkpoint-5", "config.json"),
        (".cache", "config.json"),
    ]:
        (base / folder).mkdir(exist_ok=True)
        (base / folder / name).write_text("{}", encoding="utf-8")
    thetau.open(base).save(tmp_path / "out")
    assert set(leftovers(tmp_path / "out")) == copied | {"1_Pooling", "model.safetensors", "thetau.json"}
    assert leftovers(tmp_path / "out" / "1_Pooling") == ["config.json"]
    assert json.loads((tmp_path / "out" / "thetau.json").read_text(encoding="utf-8"))["thetau"] == __version__


def test_a_lone_file_takes_nothing_from_its_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", random_weights(0))
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    thetau.open(folder / "model.safetensors").save(tmp_path / "with")
    assert "config.json" in leftovers(tmp_path / "with")
    (folder / "config.json").unlink()  # no model's folder any more
    thetau.open(folder / "model.safetensors").save(tmp_path / "without")
    assert leftovers(tmp_path / "without") == ["model.safetensors", "thetau.json"]


def test_provenance(tmp_path: Path, base: Path, models: list[Path]) -> None:
    start = thetau.open(base)
    vector = thetau.merge([thetau.open(path) - start for path in models], thetau.methods.Average(), seed=7)
    (start + vector).save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "thetau.json").read_text(encoding="utf-8"))
    assert (record["kind"], record["seed"], record["base"], record["thetau"]) == ("model", 7, str(base), __version__)
    assert {entry["path"] for entry in record["inputs"]} == {str(base), *map(str, models)}
    for entry in record["inputs"]:
        source = open_source(entry["path"])
        assert entry["fingerprint"] == source.fingerprint()
        assert entry["headers"] == source.header_hashes()  # type: ignore[attr-defined]
    assert record["recipe"]["merges"][0]["tasks"] == ["model1", "model2"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert (metadata["thetau.kind"], metadata["thetau.version"]) == ("model", __version__)
    assert json.loads(metadata["thetau.recipe"]) == record["recipe"]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, base: Path, models: list[Path]) -> None:
    for name in ("a", "b"):
        start = thetau.open(base)
        (start + thetau.merge([thetau.open(path) - start for path in models], thetau.methods.Average())).save(tmp_path / name)
    for file in leftovers(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_outputs_dtype(tmp_path: Path, key: str) -> None:
    base = write_model(tmp_path / "base", random_weights(0), {"model_type": "bert", key: "float32", "hidden_size": 8})
    thetau.open(base).save(tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    thetau.open(base).save(tmp_path / "half", dtype="bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))
    assert config == {"model_type": "bert", key: "bfloat16", "hidden_size": 8}
    got = load_folder(tmp_path / "half")
    assert {value.dtype for value in got.values()} == {torch.bfloat16, torch.int64}
    assert torch.equal(got["logit_scale"], random_weights(0)["logit_scale"].to(torch.bfloat16))


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_config_is_noticed_before_the_work(tmp_path: Path, base: Path, content: str) -> None:
    (base / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        thetau.open(base).save(tmp_path / "out", dtype="float16")
    assert leftovers(tmp_path) == ["base"]


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int32])
def test_unknown_dtypes(base: Path, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(RecipeError, match=r"unknown dtype '.*'. Known: float32, float16, bfloat16, float64"):
        thetau.open(base).save(tmp_path / "out", dtype=dtype)


# Never mixed, never broken


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "empty folder"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_existing_target_is_refused(tmp_path: Path, base: Path, kind: str, name: str) -> None:
    target = tmp_path / name
    if kind == "file":
        target.write_text("mine", encoding="utf-8")
    elif kind == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine").touch()
    with pytest.raises(
        OutputError, match=rf"{name}: exists\. An output is never mixed with older files: give a new name, or remove"
    ):
        thetau.open(base).save(target)
    assert leftovers(tmp_path) == ["base", name]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_folders_above_a_target_are_made(tmp_path: Path, base: Path, name: str) -> None:
    thetau.open(base).save(tmp_path / "deep" / "er" / name)
    assert leftovers(tmp_path / "deep" / "er") == [name]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    with Writer(tmp_path / "there" / "deep" / "er" / name, open_source({"w": torch.ones(4)}).specs, {}):
        assert (tmp_path / "there" / "deep" / "er").is_dir()
    assert leftovers(tmp_path) == ["there"]
    assert leftovers(tmp_path / "there") == []


def test_a_name_that_no_file_can_have(tmp_path: Path, base: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        thetau.open(base).save(tmp_path / ("x" * 300))


def test_a_folder_that_may_not_be_written(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="out: cannot be written: Permission denied"):
        thetau.open(base).save(tmp_path / "out")
    assert leftovers(tmp_path) == ["base"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    specs = open_source(random_weights(0)).specs
    with Writer(tmp_path / "out", specs, {}):
        with pytest.raises(OutputError, match=r"out: another run is writing it\. Wait for that run, or give another name\."):
            Writer(tmp_path / "out", specs, {})
        with Writer(tmp_path / "other", specs, {}):
            pass
    assert leftovers(tmp_path) == []
    write(tmp_path / "out", random_weights(0))


def test_a_lock_that_its_owner_removed_meanwhile_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open, then the owner removes and releases, then lock: the lock is on a file that is gone, so it must be taken anew."""
    real, removed = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            (tmp_path / ".out.lock").unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Writer(tmp_path / "out", open_source(random_weights(0)).specs, {}):
        assert (tmp_path / ".out.lock").exists()
        with pytest.raises(OutputError, match="another run is writing it"):
            Writer(tmp_path / "out", open_source(random_weights(0)).specs, {})


def test_leftovers_of_a_dead_run_are_replaced(tmp_path: Path) -> None:
    for name in ("out", "out.safetensors"):
        (tmp_path / f".{name}.partial" / "deep").mkdir(parents=True)
        (tmp_path / f".{name}.partial" / "old.safetensors").write_text("old", encoding="utf-8")
        (tmp_path / f".{name}.lock").touch()
        write(tmp_path / name, random_weights(0))
    assert leftovers(tmp_path) == ["out", "out.safetensors"]
    assert leftovers(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_leaving_without_commit_leaves_nothing(tmp_path: Path, name: str) -> None:
    with contextlib.suppress(KeyboardInterrupt), Writer(tmp_path / name, open_source(random_weights(0)).specs, {}):
        assert leftovers(tmp_path) == [f".{name}.journal", f".{name}.lock", f".{name}.partial"]
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_rows_that_were_not_declared(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", open_source({"w": torch.ones(4, 2)}).specs, {}) as writer:
        for rows in (torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 3)):
            with pytest.raises(OutputError, match=r"'w' was declared torch\.float32 \[4, 2\]\. Got rows of"):
                writer.write("w", 0, rows)


def test_a_commit_with_rows_missing_is_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", open_source({"w": torch.ones(4, 2)}).specs, {}) as writer:
        writer.write("w", 0, torch.ones(3, 2))
        with pytest.raises(OutputError, match="'w' was not wholly written \\(24 of 32 bytes\\)"):
            writer.commit(copy_from=None, files={})
    assert leftovers(tmp_path) == []


def test_a_target_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    for name in ("out", "out.safetensors"):
        with Writer(tmp_path / name, open_source({"w": torch.ones(4)}).specs, {}) as writer:
            writer.write("w", 0, torch.ones(4))
            (tmp_path / name).write_text("mine", encoding="utf-8")
            with pytest.raises(OutputError, match=r"appeared while it was being written|File exists"):
                writer.commit(copy_from=None, files={})
        assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
    assert leftovers(tmp_path) == ["out", "out.safetensors"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_full_disk(
    tmp_path: Path, base: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > (5 if call == "pwrite" else 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    start = thetau.open(base)
    with pytest.raises(OutputError, match=rf"{name}: the disk is full; the output needs 0\.00 GB\..*No output was made\."):
        (start + (thetau.open(models[0]) - start)).save(tmp_path / name)
    monkeypatch.undo()
    assert leftovers(tmp_path) == ["base", "model1", "model2"]
    thetau.open(base).save(tmp_path / name)


def test_a_full_disk_while_side_files_are_copied(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OutputError, match="the disk is full"):
        thetau.open(base).save(tmp_path / "out")
    assert leftovers(tmp_path) == ["base"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:5], at))
    write(tmp_path / "out", random_weights(0))
    assert_same(load_folder(tmp_path / "out"), random_weights(0))


def test_an_input_that_changes_while_it_is_read(tmp_path: Path, base: Path, models: list[Path]) -> None:
    class Touch:
        """A progress bar that rewrites an input."""

        def begin(self, description: str, total: int) -> None: ...
        def advance(self, done: int) -> None:
            os.utime(models[0] / "model.safetensors", ns=(1, 1))

        def end(self) -> None: ...

    start = thetau.open(base)
    with pytest.raises(
        CheckpointError, match=r"model1/model\.safetensors: changed while it was read \(1 files did\)\. Nothing was written"
    ):
        (start + (thetau.open(models[0]) - start)).save(tmp_path / "out", engine=Engine(progress=Touch()))
    assert leftovers(tmp_path) == ["base", "model1", "model2"]


def test_neither_model_nor_vector(tmp_path: Path, base: Path, models: list[Path]) -> None:
    start, model = thetau.open(base), thetau.open(models[0])
    for what in (start + model, 2 * model, model - 0.5 * start):
        with pytest.raises(AlignmentError, match=r"is neither a model .* nor a task vector .*Subtract or add the base as needed"):
            what.save(tmp_path / "out")
    with pytest.raises(AlignmentError, match="Nothing is left to save: every term cancels"):
        (model - model).save(tmp_path / "out")
    assert leftovers(tmp_path) == ["base", "model1", "model2"]


KILLED = """
import sys
import thetau
class Held:
    rows = 0
    def begin(self, description, total): print("begun", flush=True)
    def advance(self, done):
        self.rows += 1
        print("row", flush=True)
        if self.rows == 3:
            sys.stdin.read()  # until it is killed
    def end(self): pass
base = thetau.open(sys.argv[1])
(base + (thetau.open(sys.argv[2]) - base)).save(sys.argv[3], engine=thetau.Engine(workers=1, progress=Held()))
"""


def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(tmp_path: Path, base: Path, models: list[Path]) -> None:
    name = "out"
    arguments = [sys.executable, "-c", KILLED, str(base), str(models[0]), str(tmp_path / name)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        assert lines == ["begun", "row", "row", "row"]
        with pytest.raises(OutputError, match="another run is writing it"):
            thetau.open(base).save(tmp_path / name)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert not (tmp_path / name).exists()
    assert (tmp_path / f".{name}.partial").exists()
    thetau.open(base).save(tmp_path / name)
    assert leftovers(tmp_path, ["base", "model1", "model2"]) == [name]
    assert_same(dict(_read(tmp_path / name)), random_weights(0))


def _read(path: Path) -> list[tuple[str, Tensor]]:
    source = open_source(path)
    return [(tensor, source.read(tensor)) for tensor in source.specs]


def test_inputs_in_memory_are_not_changed_and_share_nothing(tmp_path: Path) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    copies = [{name: value.clone() for name, value in weights.items()} for weights in (base, model)]
    start = thetau.open(base)
    for expression in (start, start + (thetau.open(model) - start), start - 0.5 * (thetau.open(model) - start)):
        got = expression.state_dict()
        memory = {value.untyped_storage().data_ptr() for weights in (base, model) for value in weights.values()}
        assert not memory & {value.untyped_storage().data_ptr() for value in got.values()}
        for value in got.values():
            value.fill_(3)
        expression.save(tmp_path / f"{len(leftovers(tmp_path))}")
    for weights, copy in zip((base, model), copies, strict=True):
        assert_same(weights, copy)


def test_a_module_in_and_out() -> None:
    base, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(base.weight + 0.01)
        model.bias.copy_(base.bias)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    start = thetau.open(base)
    got = (start - (thetau.open(model) - start)).state_dict()
    assert_same(base.state_dict(), before)
    assert torch.allclose(got["weight"], before["weight"] - 0.01, atol=1e-6)
    base.load_state_dict(got)
