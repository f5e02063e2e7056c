"""What experiments share: where things lie, result files, tables."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """A result file as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """The lines of a Markdown table and an empty line after it: columns of words to the left, of numbers to the right."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * words + "---:|" * (len(head) - words),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def machine() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def floor(paths: list[Path], out: Path) -> float:
    """Seconds to read every input and write and sync an output of the base's size."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    buffer = bytearray(1 << 22)
    view = memoryview(buffer)
    begin = time.perf_counter()
    with open(out / "model.safetensors", "wb", buffering=0) as target:
        for number, path in enumerate(paths):
            with open(path / "model.safetensors", "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if number == 0:
                        target.write(view[:count])
        os.fsync(target.fileno())
    return time.perf_counter() - begin


def timed(arguments: list[str], out: Path) -> tuple[float, float, float, float]:
    """Seconds, largest anonymous memory and peak resident memory of a command, in GB, and its processors' seconds.

    This process imports nothing large: a child's peak begins at its parent's.
    """
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    largest = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, largest))
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    watcher.join()
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)}\n{process.stderr.read().decode() if process.stderr else ''}")
    return seconds, largest[0] / 1e6, usage.ru_maxrss / 1e6, usage.ru_utime + usage.ru_stime


def _watch(pid: int, largest: list[int]) -> None:
    while True:
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return
        found = [int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")]
        if not found:  # it has ended
            return
        largest[0] = max(largest[0], found[0])
        time.sleep(0.01)
