"""The peak memory of a piece of work, measured in a process of its own.

The largest memory that a process has held only rises, so that what runs later in one process seems to need what ran before. A new process
imports, loads and does one thing, and says at its end what it held at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from thetau.errors import DataError
from thetau.finetune.config import FinetuneConfig

STEPS = 2


def peak_of_training(
    backbone: str,
    tasks: Sequence[str],
    config: FinetuneConfig,
    *,
    against: Sequence[str] = (),
    start: Path | None = None,
    data: Path | None = None,
    raw: bool = False,
    steps: int = STEPS,
) -> float:
    """Peak resident memory, in GB, of a new process that opens the backbone and the tasks and trains `steps` steps.

    The arguments are those of `finetune`, tasks by name. The second step holds the optimiser's state too. Raises `DataError` with what the
    process said when it fails.
    """
    given = {
        "backbone": backbone,
        "tasks": list(tasks),
        "config": asdict(replace(config, steps=steps, save_every=0)),
        "against": list(against),
        "start": None if start is None else str(start.resolve()),
        "data": None if data is None else str(data.resolve()),
        "raw": raw,
    }
    return float(_said(given))


def cost_of_merge(base: Path, models: Mapping[str, Path], method: str, fields: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a merge at λ = 1 in a new process, without its start, and the process's peak resident memory in GB.

    `models`: task → its fine-tuned model. Raises `DataError` with what the process said when it fails.
    """
    given = {
        "base": str(base.resolve()),
        "models": {name: str(path.resolve()) for name, path in models.items()},
        "method": method,
        "fields": dict(fields),
    }
    seconds, gigabytes = _said(given).split()
    return float(seconds), float(gigabytes)


def _said(given: Mapping[str, Any]) -> str:
    """The last line that this module, run as a process of its own, gives for these words."""
    done = subprocess.run(
        [sys.executable, "-m", "thetau.studies.memory"], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise DataError(f"the process that measures memory failed. It said: {said[0]}")
    return done.stdout.strip().splitlines()[-1]


def peak() -> float:
    """The most resident memory of this process, in GB. Linux says it by the process, elsewhere it is the system's count of it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _train(given: dict[str, Any]) -> None:
    from thetau.finetune import finetune
    from thetau.models import load_encoder
    from thetau.tasks import load_task

    data = None if given["data"] is None else Path(given["data"])
    tasks = [load_task(name, data) for name in given["tasks"]]
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            load_encoder(given["backbone"], raw=given["raw"]),
            tasks if len(tasks) > 1 else tasks[0],
            Path(folder) / "model",
            FinetuneConfig.of(given["config"], "memory"),
            base=given["backbone"],
            against=[load_task(name, data) for name in given["against"]],
            start=None if given["start"] is None else Path(given["start"]),
        )


def _merge(given: dict[str, Any]) -> float:
    import time

    from thetau.evaluate.merging import build_method, merged_vector
    from thetau.tasks.suite import MethodChoice

    method = build_method(MethodChoice(name=given["method"], method=given["method"], fields=given["fields"]))
    begin = time.perf_counter()
    merged_vector(Path(given["base"]), [Path(path) for path in given["models"].values()], list(given["models"]), method)
    return time.perf_counter() - begin


def main() -> None:
    """Do what standard input asks for, and say what it took."""
    given = json.loads(sys.stdin.read())
    if "models" in given:
        seconds = _merge(given)
        sys.stdout.write(f"{seconds:.3f} {peak()}\n")
    else:
        _train(given)
        sys.stdout.write(f"{peak()}\n")


if __name__ == "__main__":
    main()
