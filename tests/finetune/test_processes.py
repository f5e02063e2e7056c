"""Two real processes over gloo: the same weights as one process, one writer, and no process left waiting for one that failed.

This file is also the program that the processes run: `test_processes.py WORK FOLDER`.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thetau.errors import DataError, ThetauError
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.processes import Processes
from thetau.finetune.progress import bar
from thetau.finetune.state import StateFolder
from thetau.models import Encoder, load_encoder, read_weights
from thetau.tasks import Task, load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

# 64 examples in batches of 7 end in one example, of which the second process has no share.
FAST = FinetuneConfig(steps=12, lr=1e-3, batch_size=7, max_length=32)
CASES: dict[str, FinetuneConfig] = {
    "standard": FAST,
    "decay": replace(FAST, weight_decay=0.5),
    "accumulation": replace(FAST, accumulation=2),
    "linear": replace(FAST, paradigm="linear", accumulation=2),
    "taujp": replace(FAST, paradigm="taujp", strength=1.0, penalty_batch=3),
    "taujp of one": replace(FAST, paradigm="taujp", strength=1.0, penalty_batch=1),
    "mtl": replace(FAST, paradigm="mtl"),
    "lora": replace(FAST, paradigm="lora"),
}


def run(folder: Path, encoder: Encoder, out: Path, config: FinetuneConfig, **more: Any) -> str:
    """The hash of the weights that this process ends with."""
    tasks = [load_task(folder / "data" / name) for name in ("animals", "weather")]
    against = tasks[1:] if config.how.penalty else []
    trained: list[Task] = tasks if config.how.joint else tasks[:1]
    return finetune(encoder, trained, out, config, base="tiny", against=against, **more).weights_hash


# What the processes do


def cases(folder: Path) -> dict[str, Any]:
    encoder = load_encoder(folder / "still")
    snapshots = {"linear": (0, 3)}
    return {
        name: run(folder, encoder, folder / "two" / name, config, snapshots=snapshots.get(name, ()))
        for name, config in CASES.items()
    }


def interrupted(folder: Path) -> dict[str, Any]:
    """With dropout, so that each process's random state matters."""
    encoder = load_encoder(folder / "base")
    config = replace(FAST, save_every=4)
    steps: list[int] = []

    def stop(step: int, loss: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    whole = run(folder, encoder, folder / "whole", config)
    with suppress(KeyboardInterrupt):
        run(folder, encoder, folder / "cut", config, tick=stop)
    (state,) = folder.glob(".cut*")
    kept = StateFolder(folder=state, key=json.loads((folder / "whole" / "thetau_finetune.json").read_text())["key"]).load()
    assert kept is not None
    same = torch.equal(kept.tensors["random"], kept.tensors["random/1"])
    Processes("cpu").sum([torch.zeros(1)])  # a meeting point: the state was read by both before it is removed
    again = run(folder, encoder, folder / "cut", config, tick=lambda step, loss: steps.append(step))
    return {"whole": whole, "again": again, "steps": steps, "same random state": same}


def failing(folder: Path) -> dict[str, Any]:
    """Errors that both processes meet, and one of the first alone; after each, both can go on."""
    encoder = load_encoder(folder / "base")

    def message(work: Callable[[], object]) -> str:
        try:
            work()
        except ThetauError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    found = {"diverging": message(lambda: run(folder, encoder, folder / "diverging", replace(FAST, lr=1e30)))}
    empty = load_task(folder / "empty" / "animals")
    found["task"] = message(lambda: finetune(encoder, empty, folder / "task", FAST, base="tiny"))
    saved, os.fsync = os.fsync, full
    found["disk"] = message(lambda: run(folder, encoder, folder / "disk", FAST))
    os.fsync = saved
    found["after"] = run(folder, encoder, folder / "after", FAST)
    from rich.console import Console

    with bar("bar", 1, "steps", Console(file=io.StringIO(), force_terminal=True)) as progress:
        found["bar"] = "no" if progress.progress.disable else "yes"
    return found


def dying(folder: Path) -> dict[str, Any]:
    """The second process ends in the middle."""

    def die(step: int, loss: float) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            raise MemoryError("on purpose")

    run(folder, load_encoder(folder / "base"), folder / "dying", FAST, tick=die)
    return {}


# The tests


def launch(work: str, folder: Path, *, count: int = 2, seconds: float = 240) -> list[tuple[int, str, dict[str, Any]]]:
    """Exit code, errors and result of each process. No launcher ends the one when the other fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, work, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ended = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    results = [json.loads(out.splitlines()[-1]) if out else {} for out, _ in ended]
    return [(process.returncode, error, result) for process, (_, error), result in zip(running, ended, results, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with dropout (`base`) and without (`still`), and tasks."""
    make_model(tmp_path / "base")
    config = json.loads((make_model(tmp_path / "still") / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "still" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("animals", "weather"):
        make_task(tmp_path / "data", name)
    make_task(tmp_path / "empty", "animals", sizes=(0, 4, 4))
    return tmp_path


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    adapter = out / "adapter_model.safetensors"
    return load_file(adapter) if adapter.is_file() else read_weights(out)


def test_two_processes_end_with_the_weights_of_one(folder: Path) -> None:
    ended = launch("cases", folder)
    assert [code for code, *_ in ended] == [0, 0], ended[0][1] + ended[1][1]
    (*_, first), (*_, second) = ended
    assert first == second
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(CASES), "written once, nothing left beside"
    encoder = load_encoder(folder / "still")
    base = encoder.weights()
    for name, config in CASES.items():
        run(folder, encoder, folder / "one" / name, config)
        one, two = weights_of(folder / "one" / name), weights_of(folder / "two" / name)
        assert set(one) == set(two)
        for key, tensor in one.items():
            if key.endswith("key.bias"):
                continue  # attention does not depend on it: its gradient is rounding alone, which Adam blows up to the step size
            torch.testing.assert_close(
                two[key], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, where=f"{name}, {key}": f"{where}: {text}"
            )
            if "pooler" in key and key in base:
                assert torch.equal(two[key], base[key]), f"{name}: what no process has a gradient of is not decayed"
        records = [json.loads((folder / side / name / "thetau_finetune.json").read_text()) for side in ("one", "two")]
        for key in ("losses", "penalties"):
            assert records[1].get(key, []) == pytest.approx(records[0].get(key, []), rel=1e-3, abs=1e-6)
    assert [path.name for path in sorted((folder / "two" / "linear" / "snapshots").iterdir())] == [
        "000000.safetensors",
        "000003.safetensors",
    ]


def test_an_interrupted_run_of_two_goes_on_to_the_same_bits(folder: Path) -> None:
    ended = launch("interrupted", folder)
    assert [code for code, *_ in ended] == [0, 0], ended[0][1] + ended[1][1]
    for *_, found in ended:
        assert found["whole"] == found["again"] == ended[0][2]["whole"]
        assert found["steps"] == [9, 10, 11, 12]
        assert not found["same random state"], "each draws dropout masks of its own"
    assert not list(folder.glob(".cut*"))


def test_a_failure_ends_both(folder: Path) -> None:
    ended = launch("failing", folder)
    assert [code for code, *_ in ended] == [0, 0], ended[0][1] + ended[1][1]
    (*_, first), (*_, second) = ended
    for found in (first, second):
        assert found["diverging"].startswith("DataError: the loss diverged: nan at step 2 of 12.")
        assert found["task"].startswith("DataError: ")
    assert first["disk"].startswith(f"OutputError: {folder / 'disk' / 'model.safetensors'}: the disk is full.")
    assert second["disk"] == "OutputError: the first process could not write what it has to; its own message says why."
    assert first["after"] == second["after"]
    assert (first["bar"], second["bar"]) == ("yes", "no")
    assert not any((folder / name).exists() for name in ("diverging", "task", "disk"))


def test_a_process_that_dies_takes_the_other_along(folder: Path) -> None:
    (code, error, _), (other, reason, _) = launch("dying", folder)
    assert (code, other) == (1, 1)
    assert "MemoryError: on purpose" in reason
    assert "DataError: process 0 of 2: another one has ended; its own message says why." in error


def test_the_command_under_accelerate_speaks_once(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", str(port)]
    command = ["-m", "thetau", "finetune", "-m", str(folder / "base"), "-t", "animals", "--data", str(folder / "data")]
    ended = subprocess.run(
        [sys.executable, *launcher, *command, "--steps", "3", "-o", str(folder / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("animals, 64 examples, 3 steps in") == 1
    assert (folder / "out" / "model.safetensors").is_file()


def test_a_stray_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise half of each batch would be left out."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="says WORLD_SIZE=2, but not which of them this process is"):
        Processes("cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    works = {"cases": cases, "interrupted": interrupted, "failing": failing, "dying": dying}
    print(json.dumps(works[sys.argv[1]](Path(sys.argv[2]))))
