"""The Ray executor: the same bits as threads, on a local cluster of two workers, one of which is killed in the middle."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thetau
from fixtures import write_model
from thetau.engine.work import Call
from thetau.errors import CheckpointError, OutputError, ThetauError
from thetau.methods import Awd, DareTies, TaskArithmetic, Ties, Wudi
from thetau.parts import BlockReduction
from thetau.plan import Step

ray = pytest.importorskip("ray", reason="the executor `ray` is an extra; the tests' own set-up installs it")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

TASKS = ("a", "b", "c")
LAYERS = 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=100_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    shapes = {f"layers.{i}.mlp.fc.weight": (160, 96) for i in range(LAYERS)} | {"norm.weight": (96,), "scale": ()}
    base = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (name, shape) in enumerate(shapes.items())
    }
    write_model(folder / "base", base)
    for number, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(100 + number)
        write_model(folder / task, {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()})
    return [folder / name for name in ("base", *TASKS)]


def merged(inputs: list[Path], method: Any, engine: thetau.Engine) -> thetau.Expression:
    base = thetau.open(inputs[0])
    return base + thetau.merge([thetau.open(path) - base for path in inputs[1:]], method, names=TASKS, engine=engine)


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


METHODS = [TaskArithmetic(), Ties(), Ties(trim="tensor"), Awd(tensors="all"), DareTies(), Wudi(steps=5)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_same_bits_as_threads(tmp_path: Path, inputs: list[Path], cluster: None, method: Any) -> None:
    local, remote = thetau.Engine(), thetau.Engine(executor="ray")
    first = merged(inputs, method, local).save(tmp_path / "local", engine=local, shard_bytes=100_000)
    second = merged(inputs, method, remote).save(tmp_path / "remote", engine=remote, shard_bytes=100_000)
    assert digest(tmp_path / "local") == digest(tmp_path / "remote")
    assert (first.notes, first.warnings) == (second.notes, second.warnings)


class Killer:
    """Kills one worker process, the first time that something is done in the last pass."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self.passes: list[str] = []

    def begin(self, description: str, total: int) -> None:
        self.passes.append(description)

    def advance(self, done: int) -> None:
        if self.passes[-1] == "Writing" and not self.killed:
            workers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if name(pid).startswith("ray::_task")]
            for pid in workers[:1]:
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)

    def end(self) -> None:
        pass


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


class Slowly(TaskArithmetic):
    """Task arithmetic on the torch path, with a pause, so that there is somebody to kill."""

    def chain(self) -> Any:
        from thetau.parts import Chain

        return Chain(reduction=SlowSum())


class SlowSum(BlockReduction):
    def reduce(self, stack: torch.Tensor, state: object, site: object) -> torch.Tensor:
        time.sleep(0.15)
        return stack[0] + stack[1] + stack[2]


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path, inputs: list[Path], cluster: None) -> None:
    killer = Killer()
    remote, local = thetau.Engine(executor="ray", progress=killer), thetau.Engine()
    merged(inputs, Slowly(), remote).save(tmp_path / "remote", engine=remote)
    assert len(killer.killed) == 1
    merged(inputs, Slowly(), local).save(tmp_path / "local", engine=local)
    assert digest(tmp_path / "local") == digest(tmp_path / "remote")


def test_a_tensor_that_no_machine_holds_is_refused(cluster: None) -> None:
    """It would be waited for without an end."""
    engine = thetau.Engine(executor="ray", max_memory=1 << 50)
    with pytest.raises(ThetauError, match="'huge'; the largest machine of the cluster offers"):
        list(engine.run([Step("huge", 1, 1 << 49)], Call(str), "Testing"))


def test_an_error_on_a_worker_is_our_own_and_leaves_nothing(tmp_path: Path, inputs: list[Path], cluster: None) -> None:
    bad = tmp_path / "bad"
    weights = {f"layers.{i}.mlp.fc.weight": torch.full((160, 96), float("nan")) for i in range(LAYERS)}
    write_model(bad, weights | {"norm.weight": torch.zeros(96), "scale": torch.zeros(())})
    engine = thetau.Engine(executor="ray")
    with pytest.raises(CheckpointError, match=r"bad/model\.safetensors: tensor .* holds 15360 NaN"):
        merged([*inputs[:3], bad], TaskArithmetic(), engine).save(tmp_path / "out", engine=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_stopped_run_resumes_on_the_cluster(tmp_path: Path, inputs: list[Path], cluster: None) -> None:
    class Stop:
        count = 0

        def begin(self, description: str, total: int) -> None:
            pass

        def advance(self, done: int) -> None:
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    engine = thetau.Engine(executor="ray", progress=Stop())
    with pytest.raises(KeyboardInterrupt):
        merged(inputs, TaskArithmetic(), engine).save(tmp_path / "out", engine=engine, resume=True)
    again = thetau.Engine(executor="ray")
    report = merged(inputs, TaskArithmetic(), again).save(tmp_path / "out", engine=again, resume=True)
    assert any(note.startswith("3 of ") for note in report.notes)
    merged(inputs, TaskArithmetic(), thetau.Engine()).save(tmp_path / "local")
    assert digest(tmp_path / "local") == digest(tmp_path / "out")


def test_an_input_that_is_another_file_there(tmp_path: Path, inputs: list[Path], cluster: None) -> None:
    """Workers open the files again; one that was replaced meanwhile is noticed."""
    base = {name: thetau.open(inputs[0]).terms[0][1].read(name) for name in thetau.open(inputs[0]).specs()}
    mine = write_model(tmp_path / "mine", base)
    engine = thetau.Engine(executor="ray")
    expression = merged([mine, *inputs[1:]], TaskArithmetic(), engine)
    write_model(tmp_path / "new", base)
    os.replace(tmp_path / "new" / "model.safetensors", mine / "model.safetensors")
    with pytest.raises((CheckpointError, OutputError), match="changed while it was read"):
        expression.save(tmp_path / "out", engine=engine)


def test_no_cluster_there(inputs: list[Path], tmp_path: Path) -> None:
    ray.shutdown()
    engine = thetau.Engine(executor="ray", address="127.0.0.1:1")
    with pytest.raises(ThetauError, match=r"No Ray cluster answers at 127\.0\.0\.1:1"):
        merged(inputs, TaskArithmetic(), engine).save(tmp_path / "out", engine=engine)
