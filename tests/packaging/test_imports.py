"""`import thetau` and `thetau --help` stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import thetau

HEAVY = [
    "torch",
    "transformers",
    "matplotlib",
    "pydantic",
    "numpy",
    "scipy",
    "safetensors",
    "huggingface_hub",
    "peft",
    "jaxtyping",
]


LISTED = [
    ["basis", "add", "--help"],
    ["diagnose", "bounds", "--help"],
    ["vector", "localize", "--help"],
    ["suite", "run", "--help"],
    ["search", "--help"],
]


def run(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(script: str) -> set[str]:
    """The top-level modules that a script leaves behind."""
    out = run(script + "\nimport sys\nprint('MODULES', *sorted({name.split('.')[0] for name in sys.modules}))")
    return set(out.rsplit("MODULES", 1)[1].split())


def test_importing_thetau_loads_nothing_heavy() -> None:
    assert not loaded("import thetau; assert thetau.__version__; dir(thetau)").intersection([*HEAVY, "typer", "rich", "yaml"])


def test_importing_the_errors_loads_nothing_heavy() -> None:
    assert not loaded("import thetau.errors").intersection(HEAVY)


def test_the_check_can_fail() -> None:
    found = loaded("import thetau; thetau.open")
    assert "torch" in found
    assert not found.intersection(["transformers", "matplotlib", "peft"])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([verb, "--help"] for verb in ("merge", "vector", "inspect", "tune", "evaluate")), *LISTED],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = f"from thetau.cli import main\ntry:\n    main({arguments})\nexcept SystemExit as end:\n    assert not end.code\n"
    allowed = {"pydantic"} if len(arguments) > 1 else set()  # typer itself reads a verb's options with it
    assert not loaded(script).intersection(HEAVY) - allowed


def test_help_as_a_module_names_the_verbs() -> None:
    done = subprocess.run([sys.executable, "-m", "thetau", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("merge", "inspect", "methods", "vector"))


@pytest.mark.parametrize("name", [name for name in thetau.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(thetau, name) is getattr(thetau, name)
    assert name in dir(thetau)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'thetau' has no attribute 'opne'"):
        thetau.opne  # noqa: B018
