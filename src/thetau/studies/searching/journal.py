"""The file in which a search keeps its trials: a line of JSON a record, which a process that dies at any instant cannot spoil for the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from optuna.storages.journal import BaseJournalBackend

from thetau.checkpoint.disk import append_lines, failed
from thetau.errors import DataError

HEAD = b'{"op_code"'


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
        append_lines(self._path, content)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._path}: line {number + 1} is not a record of a search. Give another file.") from error
        if not isinstance(found, dict) or "op_code" not in found:
            raise DataError(f"{self._path}: line {number + 1} is not a record of a search. Give another file.")
        return found
