"""docs/write-a-method.md: every block runs, in the order of the page; and the package's files are those of the example."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "thetau-median"
BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', PAGE, flags=re.M | re.S)


def test_every_block_runs(tmp_path: Path) -> None:
    script = ""
    for language, title, body in BLOCKS:
        if title:
            (tmp_path / title).write_text(body, encoding="utf-8")
        elif language == "python":
            script += body.replace("from __future__ import annotations\n", "") + "\n"
    (tmp_path / "page.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(BLOCKS) == 7
    assert {language for language, _, _ in BLOCKS} == {"python", "toml"}


def test_the_page_shows_the_example_as_it_is() -> None:
    titled = {title: body for _, title, body in BLOCKS if title}
    code = (EXAMPLE / "thetau_median.py").read_text(encoding="utf-8")
    assert titled["thetau_median.py"].split("from __future__")[1] == code.split("from __future__")[1]
    shown = tomllib.loads(titled["pyproject.toml"])
    real = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    assert {**real, "project": {key: real["project"][key] for key in shown["project"]}} == shown
