"""Killed, failed and interrupted runs: no output that looks whole, and `resume` finishes to the same bits."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import thetau
from experiments.common import EXPERIMENTS, write_result
from fixtures import write_model
from thetau.errors import CheckpointError, OutputError
from thetau.methods import TaskArithmetic, Ties

SHAPES = {f"layers.{i}.mlp.weight": (24, 40) for i in range(12)} | {"norm.weight": (40,), "scale": (), "empty": (0, 3)}
WAIT = -1.0  # a delay after which nobody kills
KILLS, AGAIN = 300, 50  # `make kills` tries 1,000; after so many it is asked again how long a run takes


def weights(seed: int) -> dict[str, Tensor]:
    made = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + index)) * 0.01
        made[name] = base + noise if seed else base
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    paths = [folder / name for name in ("base", "a", "b", "c")]
    for seed, path in enumerate(paths):
        write_model(path, weights(seed))
    return paths


def merged(inputs: list[Path], method: Any, seed: int = 0) -> thetau.Expression:
    base = thetau.open(inputs[0])
    vectors = [thetau.open(path) - base for path in inputs[1:]]
    return base + thetau.merge(vectors, method, names=["a", "b", "c"], seed=seed)


def digests(folder: Path) -> dict[str, str]:
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stop:
    """Progress that raises when some tensors are written."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def begin(self, description: str, total: int) -> None:
        self.writing = description == "Writing"

    def advance(self, done: int) -> None:
        if self.writing:
            self.left -= 1
            if self.left <= 0:
                raise self.error

    def end(self) -> None:
        pass


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("method", [TaskArithmetic(), Ties()], ids=lambda method: type(method).__name__)
def test_what_a_stopped_run_did_is_not_done_again(tmp_path: Path, inputs: list[Path], method: Any, name: str) -> None:
    want = merged(inputs, method).save(tmp_path / f"whole{Path(name).suffix}", shard_bytes=9000)
    stopped = thetau.Engine(workers=1, progress=Stop(7, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        merged(inputs, method).save(tmp_path / name, shard_bytes=9000, engine=stopped, resume=True)
    assert not (tmp_path / name).exists()
    assert (tmp_path / f".{name}.partial").is_dir()
    report = merged(inputs, method).save(tmp_path / name, shard_bytes=9000, resume=True)
    kept = next(note for note in report.notes if "from an earlier run" in note)
    assert 4 <= int(kept.split()[0]) <= 7
    assert want.path is not None
    assert list(digests(tmp_path / name).values()) == list(digests(want.path).values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_without_resume_nothing_is_kept(tmp_path: Path, inputs: list[Path]) -> None:
    stopped = thetau.Engine(workers=1, progress=Stop(7, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        merged(inputs, TaskArithmetic()).save(tmp_path / "out", engine=stopped)
    assert list(tmp_path.iterdir()) == []


def begun(tmp_path: Path, inputs: list[Path], method: Any = None) -> None:
    stopped = thetau.Engine(workers=1, progress=Stop(7, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        merged(inputs, method or TaskArithmetic()).save(tmp_path / "out", engine=stopped, resume=True)


@pytest.mark.parametrize("change", ["scale", "seed", "dtype", "shards"])
def test_another_run_is_not_continued(tmp_path: Path, inputs: list[Path], change: str) -> None:
    begun(tmp_path, inputs)
    method = TaskArithmetic(scale=0.7) if change == "scale" else TaskArithmetic()
    other = merged(inputs, method, seed=1 if change == "seed" else 0)
    options: dict[str, Any] = {"dtype": {"dtype": "bfloat16"}, "shards": {"shard_bytes": 5000}}.get(change, {})
    with pytest.raises(OutputError, match=r"begun by another run.*without `--resume`"):
        other.save(tmp_path / "out", resume=True, **options)
    assert (tmp_path / ".out.journal").exists()  # what the first one did is still there
    other.save(tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_input_is_noticed_even_where_its_samples_agree(tmp_path: Path, inputs: list[Path]) -> None:
    begun(tmp_path, inputs)
    file = inputs[1] / "model.safetensors"
    info = file.stat()
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    try:
        with pytest.raises(OutputError, match="one of its inputs has changed"):
            merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
    finally:
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_damaged_bytes_are_written_again(tmp_path: Path, inputs: list[Path]) -> None:
    want = merged(inputs, TaskArithmetic()).save(tmp_path / "whole")
    begun(tmp_path, inputs)
    file = tmp_path / ".out.partial" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-24 * 40 * 4 * 12 : -24 * 40 * 4 * 9] = bytes(24 * 40 * 4 * 3)  # as pages that a power cut lost
    file.write_bytes(bytes(raw))
    merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
    assert want.path is not None
    assert digests(tmp_path / "out") == digests(want.path)


@pytest.mark.parametrize("damage", ["journal", "header", "size", "file"])
def test_what_cannot_be_continued_is_begun_anew(tmp_path: Path, inputs: list[Path], damage: str) -> None:
    want = merged(inputs, TaskArithmetic()).save(tmp_path / "whole")
    begun(tmp_path, inputs)
    file = tmp_path / ".out.partial" / "model.safetensors"
    if damage == "journal":
        (tmp_path / ".out.journal").write_text('{"ru')
    elif damage == "header":
        file.write_bytes(b"\0" + file.read_bytes()[1:])
    elif damage == "size":
        os.truncate(file, 3000)
    else:
        file.unlink()
    report = merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
    assert any(note.startswith("0 of ") for note in report.notes)
    assert want.path is not None
    assert digests(tmp_path / "out") == digests(want.path)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_finished_run_is_complete_already(tmp_path: Path, inputs: list[Path], name: str) -> None:
    merged(inputs, TaskArithmetic()).save(tmp_path / name)
    before = digests(tmp_path / name)
    report = merged(inputs, TaskArithmetic()).save(tmp_path / name, resume=True)
    assert any("was complete already" in note for note in report.notes)
    assert digests(tmp_path / name) == before
    with pytest.raises(OutputError, match="exists"):
        merged(inputs, TaskArithmetic(scale=2.0)).save(tmp_path / name, resume=True)


def test_a_journal_without_its_output_is_nothing(tmp_path: Path, inputs: list[Path]) -> None:
    """Left by a run that was killed between giving its output the name and removing the journal."""
    (tmp_path / ".out.journal").write_text('{"run": "another"}\n', encoding="utf-8")
    report = merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
    assert any(note.startswith("0 of ") for note in report.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reader_that_fails_in_the_middle(tmp_path: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thetau.engine.kernels._LIBRARY", None)
    want = merged(inputs, TaskArithmetic()).save(tmp_path / "whole")
    real, calls = os.preadv, []

    def failing(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 40:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    expression = merged(inputs, TaskArithmetic())
    for source in expression.sources():
        source.fingerprint()
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises((CheckpointError, OutputError), match="Input/output error"):
        expression.save(tmp_path / "out", resume=True, engine=thetau.Engine(workers=1))
    monkeypatch.setattr(os, "preadv", real)
    assert not (tmp_path / "out").exists()
    merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
    assert want.path is not None
    assert digests(tmp_path / "out") == digests(want.path)


# Killed, many times: a server of forks, so that each run starts at once.

SERVER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
import thetau
from thetau.methods import Ties
base, out, *models = sys.argv[1:]
start = thetau.open(base)
expression = start + thetau.merge([thetau.open(m) - start for m in models], Ties(), names=["a", "b", "c"])
expression.state_dict()  # everything is imported; statistics are made again by each run
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            start = thetau.open(base)
            again = start + thetau.merge([thetau.open(m) - start for m in models], Ties(), names=["a", "b", "c"])
            again.save(out, shard_bytes=9000, resume=True, engine=thetau.Engine(workers=1))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    delay = float(line)
    if delay >= 0:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
"""


@pytest.fixture
def server(tmp_path: Path, inputs: list[Path]) -> Iterator[Any]:
    arguments = [sys.executable, "-c", SERVER, str(inputs[0]), str(tmp_path / "out"), *map(str, inputs[1:])]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == "ready"

        def run(delay: float) -> str:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{delay}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield run
        process.kill()


def test_killed_at_any_moment(tmp_path: Path, inputs: list[Path], server: Any) -> None:
    """Runs are killed at random moments until one finishes; it must have the bits of a run that nobody disturbed. Again and again."""
    want = merged(inputs, Ties()).save(tmp_path / "whole", shard_bytes=9000).path
    assert want is not None
    expected, out = digests(want), tmp_path / "out"
    begin = time.monotonic()
    assert server(0.0) == "killed"
    assert not out.exists()
    chance, took, due = random.Random(7), 0.0, 0
    kills = finished = partly = 0
    while kills < int(os.environ.get("THETAU_KILLS", KILLS)):
        if kills >= due:  # a machine has more to do at one time than at another
            clear(tmp_path, out)
            took, due = calibrate(server, out), due + AGAIN
        outcome = server(chance.uniform(0, took))
        kills += outcome == "killed"
        assert outcome in ("killed", "exit 0")
        partly += (tmp_path / ".out.journal").exists() and not out.exists()
        if out.exists():  # whole, whether or not the run lived to say so
            assert digests(out) == expected
            finished += 1
            clear(tmp_path, out)
    for _ in range(2):  # what the last kill left is finished; the second time there is nothing to do
        assert server(WAIT) == "exit 0"
        assert digests(out) == expected
    assert partly > kills // 4
    figures = {"kills": kills, "finished": finished, "begun_left": partly, "seconds": round(time.monotonic() - begin, 1)}
    if "THETAU_KILLS" in os.environ:  # `make kills`
        result = {"command": "make kills", "runs": [figures | {"outputs_with_other_bits": 0}]}
        write_result(EXPERIMENTS / "kills" / "results.json", result)


def calibrate(server: Any, out: Path) -> float:
    """How long an undisturbed run takes here: the shortest delay, doubled from 20 ms, at which it ends by itself."""
    delay = 0.02
    while server(delay) == "killed":
        delay *= 2
    clear(out.parent, out)
    return delay


def clear(folder: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for path in folder.glob(".out.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_two_runs_to_one_output(tmp_path: Path, inputs: list[Path]) -> None:
    class Other:
        """The second run begins while the first one writes."""

        seen: ClassVar[list[str]] = []

        def begin(self, description: str, total: int) -> None:
            if description == "Writing":
                with pytest.raises(OutputError, match="another run is writing it"):
                    merged(inputs, TaskArithmetic()).save(tmp_path / "out", resume=True)
                self.seen.append(description)

        def advance(self, done: int) -> None:
            pass

        def end(self) -> None:
            pass

    merged(inputs, TaskArithmetic()).save(tmp_path / "out", engine=thetau.Engine(progress=Other()))
    assert Other.seen == ["Writing"]
