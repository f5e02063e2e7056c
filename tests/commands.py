"""The command line as a user types it: a working folder, and a run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import random_weights, shifted, write_model
from thetau.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and two models."""
    base = random_weights(0)
    write_model(tmp_path / "base", base)
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, shifted(base, seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed on both streams."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), printed.out + printed.err
