"""`thetau adapter`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import thetau
from commands import run

BASE = {"layers.0.self_attn.q_proj.weight": torch.eye(6), "layers.0.mlp.up_proj.weight": torch.ones(8, 6)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two adapters of rank 2, of other scales."""
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for alpha, name in enumerate("ab", start=1):
        (tmp_path / name).mkdir()
        tensors = {}
        for path, weight in BASE.items():
            start = f"base_model.model.{path.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{start}.lora_A.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
            tensors[f"{start}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def weights(adapter: str) -> dict[str, torch.Tensor]:
    return thetau.open(adapter, base="base").state_dict()


def test_add_with_signs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, "adapter", "add", "a", "b", "--weights", "1,-0.5", "-o", "sum", "--json", "sum.json")
    assert code == 0, printed
    assert "sum: 2 layers, rank 4 to 4" in printed
    assert "relative error ‖Δ − BA‖ / ‖Δ‖ = 0.00e+00" in printed
    assert json.loads(Path("sum.json").read_text())["error"] == 0
    a, b, total = weights("a"), weights("b"), weights("sum")
    for name, base in BASE.items():
        torch.testing.assert_close(total[name], a[name] - 0.5 * (b[name] - base), rtol=1e-5, atol=1e-6)


def test_extract_from_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "vector", "apply", "--base", "base", "--vector", "a", "-o", "model")
    code, printed = run(capsys, "adapter", "extract", "base", "model", "--rank", "2", "-o", "again", "--layers")
    assert code == 0, printed
    assert "layers.0.mlp.up_proj: rank 2, error " in printed
    for name, value in weights("a").items():
        torch.testing.assert_close(weights("again")[name], value, rtol=1e-4, atol=1e-5)
    code, printed = run(capsys, "adapter", "extract", "base", "model", "-o", "other")
    assert code == 1
    assert "give `--rank N`, `--error SHARE`, or both." in printed


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "concatenation"),
        ("--method", "svd", "--rank", "1"),
        ("--method", "ties", "--rank", "2", "--set", "density=0.5"),
        ("--method", "dare_linear", "--error", "0.5"),
        ("--method", "knots"),
        (),
        ("--method", "clear", "--set", "damping=0.5", "--set", "scale=0.9", "--rank", "3"),
        ("--method", "core_space"),
        ("--method", "ties", "--space", "core"),
        ("--method", "robustmerge", "--set", "density=0.5"),
    ],
)
def test_merges_into_one_adapter(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    code, printed = run(capsys, "adapter", "merge", "a", "b", *options, "-o", "out")
    assert code == 0, printed
    assert "relative error ‖Δ − BA‖ / ‖Δ‖ = " in printed
    assert any(not torch.equal(value, BASE[name]) for name, value in weights("out").items())
    code, printed = run(capsys, "adapter", "merge", "a", "b", *options, "-o", "out")
    assert code != 0
    assert "out" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "tsi"), "unknown method 'tsi'"),
        (("--method", "svd"), "svd takes `--set weights=[…]` alone, and `--rank` or `--error`"),
        (("--method", "robustmerge", "--rank", "2"), "keeps the rank"),
        (("--method", "robustmerge", "--set", "density=much"), "which are numbers"),
        (
            ("--method", "clear", "--space", "core"),
            "clear takes the fields damping and scale, which are numbers, and no `--space`.",
        ),
        (("--set", "density=0.5"), "clear takes the fields damping and scale"),
        (("--set", "damping=-1"), "`damping` must be at least 0"),
        (("--method", "fisher"), "look at neither the base nor data"),
        (("--rank", "0"), "`rank` must be at least 1. Got 0."),
    ],
)
def test_merges_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    code, printed = run(capsys, "adapter", "merge", "a", "b", *options, "-o", "out")
    assert code == 1
    assert message in printed
    assert not Path("out").exists()


def test_conversion_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, "adapter", "convert", "a", "--to", "kohya", "--component", "transformer", "-o", "a.safetensors")
    assert code == 0, printed
    assert all(name.startswith("lora_transformer_layers_0_") for name in load_file("a.safetensors"))
    for name, value in weights("a").items():
        torch.testing.assert_close(weights("a.safetensors")[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "badly"), [("bilateral", True), ("wudi", True), ("bilateral_left", False), ("task_arithmetic", False)]
)
def test_a_merge_of_adapters_is_told_of_the_one_for_them(
    folder: Path, capsys: pytest.CaptureFixture[str], method: str, badly: bool
) -> None:
    """A word of advice, and a plain one where a method takes an adapter's rows for inputs; models get neither."""
    fields = ["--set", "sides=both", "--set", "q=0"] if method == "bilateral_left" else []
    words = ["merge", "--method", method.removesuffix("_left"), *fields, "--base", "base"]
    code, printed = run(capsys, *words, "-m", "a", "-m", "b", "-o", "merged")
    assert code == 0, printed
    assert "2 of these are adapters." in printed
    assert "`thetau adapter merge` makes one adapter of them, and its default, `clear`, has nothing to tune." in printed
    assert ("which the rows of adapters are not, and merges adapters badly" in printed) == badly
    for name in "ab":
        run(capsys, "vector", "apply", "--base", "base", "--vector", name, "-o", f"model-{name}")
    code, printed = run(capsys, *words, "-m", "model-a", "-m", "model-b", "-o", "models")
    assert code == 0, printed
    assert "adapter merge" not in printed


def test_a_model_is_no_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (("adapter", "merge", "base", "base"), ("adapter", "convert", "base", "--to", "kohya")):
        code, printed = run(capsys, *verb, "-o", "none.safetensors")
        assert code == 1 and "base: holds no adapter_model.safetensors or adapter_model.bin, so it is no LoRA adapter" in printed
        assert "thetau adapter extract" in printed and not Path("none.safetensors").exists()
