"""Runs commands of thetau or mergekit one after another in one process, for it to start once; either program's Python runs this file.

    PYTHON experiments/mergekit/driver.py < jobs.json > results.json

A job is a list of words: the program's name, then its arguments. A result has the exit code and what was printed or raised.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import traceback
from typing import Any

PROGRAMS = {
    "thetau": "thetau.cli:main",
    "mergekit-yaml": "mergekit.scripts.run_yaml:main",
    "mergekit-multi": "mergekit.scripts.multimerge:main",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch:main",
    "mergekit-moe": "mergekit.scripts.moe:main",
}


def run(job: list[str]) -> dict[str, Any]:
    """One command as the shell would run it."""
    module, function = PROGRAMS[job[0]].split(":")
    main = getattr(importlib.import_module(module), function)
    printed = io.StringIO()
    watcher = logging.StreamHandler(printed)
    logging.getLogger().addHandler(watcher)
    code: int | None = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(job[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            code = None  # it ended in a traceback
            traceback.print_exc()
    logging.getLogger().removeHandler(watcher)
    return {"code": code, "printed": printed.getvalue()}


def main() -> None:
    """Jobs from the standard input, results to the standard output."""
    os.environ["COLUMNS"] = "400"
    jobs = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints shall not stand in the results
    json.dump([run(job) for job in jobs], out)
    out.flush()


if __name__ == "__main__":
    main()
