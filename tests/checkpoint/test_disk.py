"""The layer that writes to a disk: whole or not there, alone, and with one wording for what goes wrong."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import thetau
from fixtures import leftovers, random_weights, shifted, write_model
from thetau.checkpoint import open_source
from thetau.checkpoint.disk import (
    Held,
    Lock,
    NotConfirmed,
    Place,
    check_file,
    check_json,
    check_place,
    copy_side_files,
    is_side_file,
    new_folder,
    replacing,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from thetau.checkpoint.disk import files as disk_files
from thetau.errors import OutputError
from thetau.finetune.output import RECORD, write_checkpoint
from thetau.methods import Average


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.md", "τ\n")
    write_json(tmp_path / "a.json", {"x": (1, 2.5, None)})
    assert (tmp_path / "deep" / "er" / "a.md").read_text(encoding="utf-8") == "τ\n"
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, None]}
    write_bytes(tmp_path / "a.json", b"1")
    assert (tmp_path / "a.json").read_bytes() == b"1"
    assert leftovers(tmp_path) == ["a.json", "deep"]


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("moment", ["os.replace", "os.fsync", "os.ftruncate"])
@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_leaves_a_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, new: bool) -> None:
    path = tmp_path / "deep" / "a" if new else tmp_path / "a"
    if not new:
        path.write_bytes(b"old")
    monkeypatch.setattr(moment, full)
    with pytest.raises(OutputError, match=r"a: the disk is full\. Free some space or write elsewhere\. No output was made\.$"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert leftovers(tmp_path) == ([] if new else ["a"])
    assert new or path.read_bytes() == b"old"


def test_a_block_that_fails_or_is_interrupted_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    write_bytes(tmp_path / "a", b"old")
    for error in (KeyboardInterrupt(), ValueError("mine")):
        with pytest.raises(type(error)):
            fail(error)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert leftovers(tmp_path) == ["a"]


def test_other_errors_are_told_in_the_same_form(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, said in (
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(OutputError, match=rf"{path.name}: cannot be written: {said}\."):
            write_bytes(path, b"")
    assert leftovers(tmp_path) == ["file", "folder"]


def test_a_folder_that_does_not_confirm_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk_files, "sync", broken)
    with pytest.raises(
        NotConfirmed, match=r"a: was written, but the disk does not confirm it: Input/output error\. Check the disk\."
    ):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_links_are_followed_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_bytes(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"1"
    script = (
        "from pathlib import Path; from thetau.checkpoint.disk import write_json; write_json(Path('/dev/stdout'), [1], indent=0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == [1]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each content is whole, whoever is the last; the second waits while the first writes."""
    contents = [bytes([65 + number]) * 200_000 for number in range(6)]
    order: list[str] = []

    def slow() -> None:
        with replacing(tmp_path / "a") as file:
            order.append("first begins")
            begun.set()
            time.sleep(0.2)
            file.write(b"first")
            order.append("first ends")

    begun = threading.Event()
    first = threading.Thread(target=slow)
    first.start()
    begun.wait(10)
    write_bytes(tmp_path / "a", b"second")
    order.append("second")
    first.join()
    assert order == ["first begins", "first ends", "second"]
    assert (tmp_path / "a").read_bytes() == b"second"
    threads = [threading.Thread(target=write_bytes, args=(tmp_path / "a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents
    assert leftovers(tmp_path) == ["a"]


def test_a_writer_waits_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_files, "WAIT", 0.1)
    with replacing(tmp_path / "a"), pytest.raises(OutputError, match=r"a: another run is writing it\. Wait for that run"):
        write_bytes(tmp_path / "a", b"")
    assert leftovers(tmp_path) == ["a"]


DYING = """
import os, signal, sys
from pathlib import Path
from thetau.checkpoint.disk import new_folder, replacing
path, what, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment != "inside":
    setattr(os, moment, die)
if what == "file":
    with replacing(path) as file:
        file.write(b"new" * 1000)
        file.flush()
        if moment == "inside":
            die()
else:
    with new_folder(path) as folder:
        (folder / "weights").write_bytes(b"new" * 1000)
        if moment == "inside":
            die()
"""


def dying(path: Path, what: str, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, str(path), what, moment], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["inside", "fsync", "replace"])
def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    (tmp_path / "a").write_bytes(b"old")
    dying(tmp_path / "a", "file", moment)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert leftovers(tmp_path) == [".a.part", "a"]
    write_bytes(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short", "nothing of the dead one's longer content"
    assert leftovers(tmp_path) == ["a"], "what the dead left is cleared by the next"


@pytest.mark.parametrize("moment", ["inside", "fsync", "rename"])
def test_a_process_killed_before_the_rename_leaves_no_folder(tmp_path: Path, moment: str) -> None:
    dying(tmp_path / "deep" / "a", "folder", moment)
    assert leftovers(tmp_path / "deep") == [".a.lock", ".a.partial"]
    with new_folder(tmp_path / "deep" / "a") as folder:
        assert leftovers(folder) == []
        (folder / "x").touch()
    assert leftovers(tmp_path / "deep") == ["a"]
    assert leftovers(tmp_path / "deep" / "a") == ["x"]


# Tensors


def test_the_safetensors_library_reads_tensors_back(tmp_path: Path) -> None:
    square = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "turned": square.T,
        "part": square[:, 1],
        "zero": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "count": torch.tensor([1, 2]),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"kind": "τ"})
    got = load_file(tmp_path / "a.safetensors")
    assert sorted(got) == sorted(tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "τ"}
    write_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"kind": "τ"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes(), "in any order"
    assert {spec.shape for spec in open_source(tmp_path / "a.safetensors").specs.values()} == {
        tuple(tensor.shape) for tensor in tensors.values()
    }


def test_a_dtype_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a: 'w' is of torch\.complex64, which safetensors cannot hold\. Known: BOOL"):
        write_tensors(tmp_path / "a", {"w": torch.ones(1, dtype=torch.complex64)})
    assert leftovers(tmp_path) == []


# Folders


def test_a_folder_is_there_at_the_end_only(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert leftovers(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("moment", ["os.rename", "os.fsync", "os.mkdir"])
def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "deep" / "out") as folder:
            (folder / "x").touch()

    monkeypatch.setattr(moment, full)
    with pytest.raises(OutputError, match=r"out: the disk is full\. Free some space"):
        fill()
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    fill()


def test_a_file_inside_is_named_as_it_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=rf"^{tmp_path}/out/x\.json: the disk is full"), new_folder(tmp_path / "out") as folder:
        write_json(folder / "x.json", {})
    assert leftovers(tmp_path) == []


def test_folders_above_that_hold_something_else_stay(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "deep" / "er" / "out"):
            (tmp_path / "deep" / "other").touch()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert leftovers(tmp_path) == ["deep"]
    assert leftovers(tmp_path / "deep") == ["other"]


def test_an_output_that_is_there_or_appears_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"link: exists\. An output is never mixed with older files"):
        Place(tmp_path / "link")
    place = Place(tmp_path / "out")
    place.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match=r"out: appeared while it was being written"):
        place.commit()
    place.clear()
    place.leave()
    assert leftovers(tmp_path / "out") == ["mine"]
    assert leftovers(tmp_path) == ["link", "out"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        with pytest.raises(OutputError) as caught:
            Place(tmp_path / "out")
        assert f"{tmp_path / 'out'}: another run is writing it. Wait for that run, or give another name." in str(caught.value)
        assert "It is this very process, since 2" in str(caught.value)
    assert leftovers(tmp_path) == ["out"]


def test_places_are_looked_at_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_place(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.json")
    check_file(Path("/dev/null"))
    for check in (check_place, check_file):
        with pytest.raises(OutputError, match=r"x: cannot be written: .*file is a file\. Give a place in a folder\."):
            check(tmp_path / "file" / "deep" / "x")
    with pytest.raises(OutputError, match=r"is a folder\. Give the name of a file\."):
        check_file(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=r"may not be changed\. Give another place\."):
        check_place(tmp_path / "a" / "b")
    assert leftovers(tmp_path) == ["file"]


# Locks


HOLDING = """
import sys
from pathlib import Path
from thetau.checkpoint.disk import Lock
with Lock(Path(sys.argv[1]), keep=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", HOLDING, str(tmp_path / "lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_says_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    with pytest.raises(Held) as caught:
        Lock(tmp_path / "lock", wait=0.1)
    assert time.monotonic() - began >= 0.1
    assert caught.value.holder.startswith(f" It is process {holder.pid} on {os.uname().nodename}, since 2")
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    with Lock(tmp_path / "lock", wait=20) as lock:
        assert lock.held
    assert not lock.held
    assert leftovers(tmp_path) == []


def test_the_dead_hold_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait(20)
    with Lock(tmp_path / "lock", keep=True):
        pass
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_lock_whose_note_cannot_be_read_names_nobody(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock"):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(Held) as caught:
            Lock(tmp_path / "lock")
        assert caught.value.holder == ""


def test_a_file_system_without_locks_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(OutputError, match="out: cannot be written: No locks available"):
        Place(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()


# Documents


def test_what_json_cannot_hold_is_named_with_its_place(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value, said in (
        (torch.ones(1), r"a value of type torch\.Tensor at `recipe\.merges\[1\]\.scale`"),
        (np.float32(1), r"a value of type numpy\.float32 at `recipe\.merges\[1\]\.scale`"),
        ({1, 2}, r"a value of type set at `recipe\.merges\[1\]\.scale`"),
        (tmp_path, r"a value of type pathlib\.\S*PosixPath at `recipe\.merges\[1\]\.scale`"),
        (float("inf"), r"inf at `recipe\.merges\[1\]\.scale`"),
        ({3: 0.5}, r"a key of type int \(3\) at `recipe\.merges\[1\]\.scale`"),
        (loop, r"a list that holds itself at `recipe\.merges\[1\]\.scale\[0\]`"),
    ):
        with pytest.raises(
            OutputError, match=rf"x: the provenance can hold only what JSON can: .*Got {said}\. Give plain values"
        ):
            check_json({"recipe": {"merges": [{}, {"scale": value}]}}, tmp_path / "x", "provenance")
    check_json({"a": [1, 2.0, None, True, "x", (1, np.float64(2))]}, tmp_path / "x")
    shared = [1]
    check_json({"a": shared, "b": shared}, tmp_path / "x")
    with pytest.raises(OutputError, match="and 3 more"):
        check_json([{1}] * 8, tmp_path / "x")
    with pytest.raises(OutputError, match=r"Got a value of type set at the whole\."):
        write_json(tmp_path / "x", {1})
    assert leftovers(tmp_path) == []


def test_a_provenance_that_json_cannot_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    class Never:
        def begin(self, description: str, total: int) -> None:
            raise AssertionError(description)

        def advance(self, done: int) -> None: ...
        def end(self) -> None: ...

    base = thetau.open(random_weights(0))
    vector = thetau.open(shifted(random_weights(0), 1)) - base
    bad = {"recipe": {"method": {"scale": torch.ones(2)}}}
    engine = thetau.Engine(progress=Never())
    with pytest.raises(OutputError, match=r"out: the provenance can.*torch\.Tensor at `recipe\.method\.scale`"):
        (base + vector).save(tmp_path / "out", provenance=bad, engine=engine)
    with pytest.raises(OutputError, match=r"torch\.Tensor at `recipe\.method\.scale`"):
        thetau.compress(vector, tmp_path / "x.safetensors", thetau.Sparse(density=0.5), provenance=bad, engine=engine)
    assert leftovers(tmp_path) == []


# Side files

KEPT = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "modeling_own.py",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.md",
    "license.txt",
    "NOTICE",
    "USE_POLICY.md",
}
LEFT = {
    *(f"model.{kind}" for kind in ("gguf", "ckpt", "npz", "bin", "pt", "pth", "onnx", "h5", "msgpack", "ot", "tflite", "pkl")),
    "LICENSE.bin",
    "pytorch_model.bin.index.json",
    "README.md",
    "thetau.json",
    RECORD,
    "adapter_config.json",
    "trainer_state.json",
    "training_args.bin",
    "eval_results.json",
    ".gitattributes",
    ".cache/config.json",
    "checkpoint-5/config.json",
    "1_Pooling/notes.txt",
    "onnx/model.onnx",
    "photo.png",
}


@pytest.fixture
def full_base(tmp_path: Path) -> Path:
    base = write_model(tmp_path / "base", random_weights(0))
    for name in KEPT | LEFT:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}", encoding="utf-8")
    return base


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_list_of_side_files(full_base: Path, tmp_path: Path) -> None:
    assert {name for name in KEPT | LEFT if is_side_file(name)} == KEPT
    (tmp_path / "copy").mkdir()
    assert set(copy_side_files(full_base, tmp_path / "copy")) == names(tmp_path / "copy") == KEPT


def test_a_merge_and_a_fine_tuned_output_copy_the_same(full_base: Path, tmp_path: Path) -> None:
    base = thetau.open(full_base)
    task = thetau.open(write_model(tmp_path / "task", shifted(random_weights(0), 1)))
    (base + thetau.merge([task - base], Average())).save(tmp_path / "merged")
    write_checkpoint(tmp_path / "tuned", random_weights(0), full_base, {"task": "x"})
    assert names(tmp_path / "merged") - {"model.safetensors", "thetau.json"} == KEPT
    assert names(tmp_path / "tuned") - {"model.safetensors", RECORD} == KEPT


def test_a_very_large_file_is_no_side_file(full_base: Path, tmp_path: Path) -> None:
    os.truncate(full_base / "tokenizer.model", 300_000_000)  # sparse
    (tmp_path / "copy").mkdir()
    assert set(copy_side_files(full_base, tmp_path / "copy")) == KEPT - {"tokenizer.model"}


# Nothing else writes

SOURCE = Path(thetau.__file__).parent
LAYER = SOURCE / "checkpoint" / "disk"
FORBIDDEN = {
    "write_text",
    "write_bytes",
    "rename",
    "renames",
    "fsync",
    "fdatasync",
    "link",
    "flock",
    "lockf",
    "mkstemp",
    "mkdtemp",
    "NamedTemporaryFile",
    "save_file",
    "savez",
}
# What is written elsewhere, and why.
EXCEPTIONS = {
    "checkpoint/remote.py": {"mkdtemp", "write_bytes"},  # a store's side files, in a folder that ends with the process
}


def writes(file: Path) -> set[str]:
    """Calls that put something on a disk by themselves, by name; functions of thetau's own are no such calls."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    foreign = {"open"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("thetau"):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if name in foreign:
                called = name
            case ast.Attribute(attr=name):
                called = name
            case _:
                continue
        if called in FORBIDDEN:
            found.add(called)
        # `path.replace(other)` and `os.replace(a, b)`, not `text.replace(a, b)`, nor that of dataclasses
        if isinstance(node.func, ast.Attribute) and called == "replace":
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            if of_os or (len(node.args) == 1 and not node.keywords):
                found.add("replace")
        modes = [
            *node.args[1 if isinstance(node.func, ast.Name) else 0 :],
            *(key.value for key in node.keywords if key.arg == "mode"),
        ]
        if called == "open" and any(
            isinstance(mode, ast.Constant)
            and isinstance(mode.value, str)
            and set(mode.value) <= set("rwxabt+")
            and set("wxa+") & set(mode.value)
            for mode in modes
        ):
            found.add("open to write")
    return found


def test_no_other_module_writes_files_by_itself() -> None:
    found = {
        str(file.relative_to(SOURCE)): calls
        for file in sorted(SOURCE.rglob("*.py"))
        if LAYER not in file.parents and (calls := writes(file))
    }
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.replace(a, b)",
        "path.replace(target)",
        "path.rename(target)",
        "from os import rename; rename(a, b)",
        "os.fsync(handle)",
        "tempfile.mkstemp()",
        "path.write_text('x')",
        "open(path, 'wb')",
        "path.open('w')",
        "open(path, mode='a')",
        "from safetensors.torch import save_file; save_file({}, path)",
    ],
)
def test_the_rule_can_fail(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.py").write_text(line)
    assert writes(tmp_path / "x.py")


def test_the_rule_lets_others_be(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "text.replace('a', 'b'); replace(self, x=1); open(path, 'rb'); path.open(); dataclasses.replace(a, b=1)\n"
        "from thetau.checkpoint.disk import write_bytes\nwrite_bytes(path, b'')"
    )
    assert writes(tmp_path / "x.py") == set()
