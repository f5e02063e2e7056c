"""Fuzz for as long as you like: `python tests/fuzz/run.py --minutes 5 [--target NAME] [--seed 0]`.

Mutates the corpus of targets.py; each input has 10 seconds. A finding is written to tests/fuzz/findings/ and the run exits with 1. The
figures go to experiments/fuzz/results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))
from mutate import mutate
from targets import TARGETS, corpus

HERE = Path(__file__).parent
LIMIT = 10  # seconds an input


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def hang(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"an input took more than {LIMIT} s")


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> dict[str, float]:
    """Run one target; its figures."""
    chance, seeds = random.Random(f"{name} {seed}"), list(corpus()[name].values())
    run, tried, read, findings = TARGETS[name], 0, 0, 0
    for data in seeds:
        run(data, folder)
    before, largest, begin = anonymous(), 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        data = mutate(chance.choice(seeds), chance.choice(seeds), chance)
        signal.alarm(LIMIT)
        try:
            accepted = run(data, folder)
            if accepted and len(seeds) < 300:
                seeds.append(data)
            read += accepted
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            findings += 1
            (HERE / "findings").mkdir(exist_ok=True)
            (HERE / "findings" / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            traceback.print_exc()
        finally:
            signal.alarm(0)
        tried += 1
        if tried % 64 == 0:
            largest = max(largest, anonymous() - before)
    return {
        "inputs": tried,
        "read": read,
        "seconds": round(time.monotonic() - begin, 1),
        "findings": findings,
        "growth_mb": round(largest / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, hang)
    warnings.simplefilter("ignore")
    chosen = [options.target] if options.target else list(TARGETS)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            rows[name] = fuzz(name, options.minutes * 60 / len(chosen), options.seed, Path(folder))
            print(name, rows[name], flush=True)
    if not options.target:
        result = {"command": f"python tests/fuzz/run.py --minutes {options.minutes:g} --seed {options.seed}", "targets": rows}
        (HERE.parents[1] / "experiments" / "fuzz" / "results.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
    sys.exit(any(row["findings"] for row in rows.values()))


if __name__ == "__main__":
    main()
