"""The file in which a search keeps its trials: a line of JSON a record, which a process that dies at any instant cannot spoil for the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from optuna.storages.journal import BaseJournalBackend

from thetau.checkpoint.disk import Held, busy, failed
from thetau.checkpoint.disk.locks import locked
from thetau.errors import DataError

HEAD = b'{"op_code"'
WAIT = 60.0  # seconds for the others' writing


@final
class Journal(BaseJournalBackend):
    """Optuna's journal in a file under the system's own lock. What a process left of a line when it died is cut off by the next one that writes.

    Raises `DataError`: it holds something else; `OutputError`: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends = [0]  # bytes before each record
        head = b""
        if path.exists():
            try:
                with path.open("rb") as file:
                    head = file.read(len(HEAD))
            except OSError as error:
                raise failed(path, error) from error
        if not HEAD.startswith(head):  # a last line is cut off where it is not whole: never of a file that is not ours
            raise DataError(f"{path}: is not the file of a search. Give another name.")

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from that number on."""
        start = min(log_number_from, len(self._ends) - 1)
        try:
            with self._path.open("rb") as file:
                file.seek(self._ends[start])
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise failed(self._path, error) from error
        for number, line in enumerate(lines, start=start):
            if not line.endswith(b"\n"):  # another process is at it, or died
                return
            if number + 1 == len(self._ends):
                self._ends.append(self._ends[number] + len(line))
            if number >= log_number_from:
                yield self._record(line, number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records, whole."""
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        try:
            handle = locked(self._path, wait=WAIT)
        except Held as error:
            raise busy(self._path, error.holder) from error
        except OSError as error:
            raise failed(self._path, error) from error
        try:
            with open(handle, "r+b", closefd=False) as file:
                file.truncate(_whole(handle))
                file.seek(0, os.SEEK_END)
                file.write(content)
                file.flush()
                os.fsync(handle)
        except OSError as error:
            raise failed(self._path, error) from error
        finally:
            os.close(handle)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._path}: line {number + 1} is not a record of a search. Give another file.") from error
        if not isinstance(found, dict) or "op_code" not in found:
            raise DataError(f"{self._path}: line {number + 1} is not a record of a search. Give another file.")
        return found


def _whole(handle: int) -> int:
    """The bytes up to the end of the last whole line."""
    size = os.fstat(handle).st_size
    step = 4096
    end = size
    while end > 0:
        start = max(0, end - step)
        place = os.pread(handle, end - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
