"""The archive and the wheel: built from the sources alone, complete, and working without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import thetau
from experiments.common import ROOT
from fixtures import assert_same, load_folder, random_weights, shifted, write_model

MERGE = """
import json, sys, thetau
from thetau.engine import kernels
assert kernels.available()
ran, run = [], kernels.run
kernels.run = lambda *arguments, **options: (ran.append(1), run(*arguments, **options))[1]
base = thetau.open("base")
vectors = [thetau.open(name) - base for name in ("a", "b")]
(base + thetau.merge(vectors, thetau.methods.Ties(density=0.5))).save("out")
print(json.dumps({"file": thetau.__file__, "loops": len(ran)}))
"""


def sources(root: Path) -> set[str]:
    """The package's files below `root`, those that are made left out."""
    made = {".pyc", ".so"}
    return {
        path.relative_to(root).as_posix() for path in (root / "thetau").rglob("*") if path.is_file() and path.suffix not in made
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build` on a copy of what the package is made of; the wheel is built from the archive."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src" / "thetau", folder / "src" / "thetau", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(next(built.glob("*.whl")))], check=True, capture_output=True, timeout=300)
    return target


def ran(installed: Path, folder: Path, *words: str) -> str:
    """What a Python whose path has the wheel, and not the checkout, prints in `folder`."""
    paths = os.pathsep.join([str(installed), str(next(path for path in sys.path if path.endswith("site-packages")))])
    # -S: no site, and so none of the .pth files by which an editable install puts the checkout on the path
    command = [sys.executable, "-S", "-P", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_wheel_for_every_python(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"thetau-{thetau.__version__}-cp311-abi3-")


def test_nothing_is_missing(built: Path) -> None:
    whole = sources(ROOT / "src")
    assert {"thetau/py.typed", "thetau/engine/kernels.c", "thetau/checkpoint/packages.yaml"} <= whole
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert whole <= names
    assert {name for name in names if name.startswith("thetau/")} - whole == {"thetau/engine/_kernels.abi3.so"}
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/src/")[2] for name in archive.getnames() if "/src/thetau/" in name}
    assert whole <= inside


def test_it_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    base = random_weights(0)
    for name, weights in (("base", base), ("a", shifted(base, 0)), ("b", shifted(base, 1))):
        write_model(tmp_path / name, weights)
    told = json.loads(ran(installed, tmp_path, "-c", MERGE).splitlines()[-1])
    assert Path(told["file"]).is_relative_to(installed)
    assert told["loops"] > 0, "the compiled loop does the work"
    ours = thetau.open(tmp_path / "base")
    vectors = [thetau.open(tmp_path / name) - ours for name in ("a", "b")]
    expected = (ours + thetau.merge(vectors, thetau.methods.Ties(density=0.5))).state_dict()
    assert_same(load_folder(tmp_path / "out"), expected)


def test_its_command_line(installed: Path, tmp_path: Path) -> None:
    said = ran(installed, tmp_path, "-m", "thetau", "methods")
    assert all(name in said for name in thetau.methods.names())
    assert (installed / "bin" / "thetau").is_file()
    assert ran(installed, tmp_path, "-m", "thetau", "--version").strip().endswith(thetau.__version__)
