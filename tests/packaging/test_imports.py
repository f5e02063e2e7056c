"""`import thetau` and `thetau --help` stay light."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import thetau
from thetau.engine import kernels

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
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=300, check=False)
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
    found = loaded("import thetau; thetau.open; import thetau.testing")
    assert "torch" in found
    assert not found.intersection(["transformers", "matplotlib", "peft"])


def test_the_facade_loads_no_torch() -> None:
    assert not loaded("import thetau; thetau.open, thetau.merge, thetau.methods").intersection(
        ["torch", "numpy", "scipy", "jaxtyping"]
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([verb, "--help"] for verb in ("merge", "vector", "inspect", "tune", "evaluate")), *LISTED],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = f"from thetau.cli import main\ntry:\n    main({arguments})\nexcept SystemExit as end:\n    assert not end.code\n"
    allowed = {"pydantic"} if len(arguments) > 1 else set()  # typer itself reads a verb's options with it
    assert not loaded(script).intersection(HEAVY) - allowed


MERGE = ["merge", "-b", "base", "-m", "model1", "-m", "model2"]
HEADERS = [
    ["methods"],
    ["methods", "wudi"],
    ["methods", "--for", "lora"],
    ["inspect", "bare", "--roles"],
    [*MERGE, "--method", "task_arithmetic", "--dry-run"],
    [*MERGE, "--method", "ties", "--dry-run"],
]
ELEMENTWISE = ["task_arithmetic", "average", "linear", "dare_linear"]
compiled = pytest.mark.skipif(not kernels.available(), reason="without the compiled loop torch does the arithmetic")


def command(*arguments: str, before: str = "") -> str:
    """A script that runs a command, and says what is loaded after it."""
    return f"{before}\nfrom thetau.cli import main\ntry:\n    main({list(arguments)})\nexcept SystemExit as end:\n    assert not end.code\n"


@pytest.fixture
def here(base: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two models, where the commands run; of `bare` no config says which library has a tree of its modules."""
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    shutil.copy(base / "model.safetensors", "bare")
    return tmp_path


@pytest.mark.parametrize("arguments", HEADERS, ids=" ".join)
def test_what_headers_tell_takes_no_torch(arguments: list[str], here: Path) -> None:
    assert not loaded(command(*arguments)).intersection(
        ["torch", "numpy", "scipy", "transformers", "jaxtyping", "huggingface_hub"]
    )


@compiled
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_merges_and_their_check_take_no_torch(method: str, here: Path) -> None:
    merge = [*MERGE, "--method", method, "--set", "drop=0.5"] if method == "dare_linear" else [*MERGE, "--method", method]
    assert "torch" not in loaded(command(*merge, "--out", "late"))
    assert "torch" not in loaded(command("verify", "late"))
    assert "torch" in loaded(command(*merge, "--out", "early", before="import torch"))
    assert (here / "late" / "model.safetensors").read_bytes() == (here / "early" / "model.safetensors").read_bytes()


def test_matrix_methods_load_torch(here: Path) -> None:
    assert "torch" in loaded(command(*MERGE, "--method", "tsv_m", "--out", "merged"))


def test_verify_finds_without_torch_what_is_wrong(here: Path) -> None:
    shutil.copytree("base", "merged")
    done = subprocess.run(
        [sys.executable, "-m", "thetau", "verify", "merged"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "has no thetau.json" in done.stderr


def test_a_late_module_gives_way_to_the_real_one() -> None:
    """In our modules, once something of it was asked for; what it has not it has not."""
    out = run("""
import sys
from thetau import random
from thetau._lazy import torch
assert "torch" not in sys.modules
assert random.torch is torch
random.element_bits(("key",), 0, 3)
import torch as real
assert random.torch is real
import thetau._lazy
assert thetau._lazy.torch is real
assert torch.float32 is real.float32
try:
    torch.nonsense
except AttributeError as error:
    print(error)
""")
    assert "module 'torch' has no attribute 'nonsense'" in out


def test_help_as_a_module_names_the_verbs() -> None:
    done = subprocess.run([sys.executable, "-m", "thetau", "--help"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("merge", "inspect", "methods", "vector"))


@pytest.mark.parametrize("name", [name for name in thetau.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(thetau, name) is getattr(thetau, name)
    assert name in dir(thetau)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'thetau' has no attribute 'opne'"):
        thetau.opne  # noqa: B018
