"""What a run has finished so far, a line for each tensor, so that a later run of the same can go on from there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from thetau.errors import OutputError


@final
class Journal:
    """The file `.NAME.journal` beside an output. The first line says which run began it, the others name a tensor and the CRC-32 of its bytes.

    Its methods raise `OSError`.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.journal")
        self._handle = -1

    def begin(self, run: str) -> None:
        """A new journal of this run."""
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._write(json.dumps({"run": run}))

    def read(self, run: str, partial: Path) -> Mapping[str, int] | None:
        """The tensors that an earlier run of the same finished, with their checksums; None where there is nothing to go on from.

        Raises:
            OutputError: `partial` was begun by another run.
        """
        try:
            first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            begun = json.loads(first)["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the run died before there was anything to keep
        if begun != run:
            raise OutputError(
                f"{partial}: was begun by another run: its recipe, its options or one of its inputs has changed since. "
                "Run again without `--resume` to start over."
            )
        finished: dict[str, int] = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
                entry = json.loads(line)
                finished[entry["tensor"]] = entry["crc32"]
        return finished

    def go_on(self) -> None:
        """Open it to write on."""
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._write("")  # ends a torn line

    def add(self, name: str, crc: int) -> None:
        """A tensor is finished."""
        self._write(json.dumps({"tensor": name, "crc32": crc}))

    def _write(self, line: str) -> None:
        os.write(self._handle, (line + "\n").encode())

    def close(self) -> None:
        """Close the file; it stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Forget everything."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
