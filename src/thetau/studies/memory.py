"""The peak memory of a piece of work, measured in a process of its own.

The largest memory that a process has held only rises, so that what runs later in one process seems to need what ran before. A new process
imports, loads and does one thing, and says at its end what it held at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
    done = subprocess.run(
        [sys.executable, "-m", "thetau.studies.memory"], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise DataError(f"the process that measures memory failed. It said: {said[0]}")
    return float(done.stdout.strip().splitlines()[-1])


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


if __name__ == "__main__":
    _train(json.loads(sys.stdin.read()))
    sys.stdout.write(f"{peak()}\n")
