"""The card of a merged model, read back as the hub reads it, and the way to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from commands import run
from fake_hub import serving
from thetau.errors import CheckpointError, OutputError
from thetau.export import card_of, inherited, push, write_card
from thetau.export.card import read_evaluation


def model_in(folder: Path, seed: int, *, head: str | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True)
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4) + seed
    save_file({"layer.weight": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if head is not None:
        (folder / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def merged(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model_in(tmp_path / "secret-home" / "base", 0, head="license: apache-2.0")
    model_in(tmp_path / "a1b2", 1, head="license: cc-by-nc-4.0")
    model_in(tmp_path / "c3d4", 2, LICENSE="MIT License\n\nCopyright somebody\n")
    models = ("-m", "maths=a1b2", "-m", "x|<img>=c3d4")
    code, printed = run(capsys, "merge", "-b", "secret-home/base", *models, "--method", "average", "-o", "merged", "--quiet")
    assert code == 0, printed
    return tmp_path / "merged"


def test_says_what_it_is_made_of(merged: Path, tmp_path: Path) -> None:
    own = {"tasks": {"sst2": {"metric": "accuracy", "value": 0.9, "low": 0.85, "high": 0.93, "n": 400}}}
    harness = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.02}}}
    for name, content in (("own", own), ("harness", harness)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    card = card_of(merged, evaluations=[tmp_path / "own.json", tmp_path / "harness.json"], name="Both")
    write_card(merged, card)
    read = ModelCard.load(merged / "README.md")
    assert read.data.license == "other" and read.data.license_name == "apache-2.0 and cc-by-nc-4.0 and mit"
    assert read.data.library_name == "transformers" and "average" in read.data.tags
    assert [(one.task_type, one.metric_type, one.metric_value) for one in read.data.eval_results] == [
        ("sst2", "accuracy", 0.9),
        ("arc", "acc", 0.5),
    ]
    text = card.text
    assert "| sst2 | accuracy | 0.9 | 95 %: 0.85 – 0.93, n = 400 | thetau evaluate |" in text
    assert "| arc | acc | 0.5 | ± 0.02 (standard error) | lm-evaluation-harness |" in text
    assert "| maths |  | cc-by-nc-4.0 |" in text and "| base (base) |  | apache-2.0 |" in text
    assert str(tmp_path) not in text and "secret-home" not in text, "no folder of this machine"
    assert "x\\|\\<img\\>" in text and "| x|<img" not in text
    sums = __import__("hashlib").sha256((merged / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{sums}`" in text
    assert [warning.split(" (")[0] for warning in card.warnings] == [
        "The parents are under different licences",
        "maths is under cc-by-nc-4.0, so the model may not be used commercially",
    ]
    write_card(merged, card)  # its own card may be made again
    (merged / "README.md").write_text("# Mine\n")
    with pytest.raises(OutputError, match="thetau did not make it"):
        write_card(merged, card)


def test_licences() -> None:
    assert inherited({"base": "mit", "a": "mit"}).name == "mit" and not inherited({"base": "mit", "a": "mit"}).warnings
    assert (
        inherited({"base": "mit", "a": "apache-2.0"}).name == "other"
        and not inherited({"base": "mit", "a": "apache-2.0"}).warnings
    )
    silent = inherited({"base": "mit", "a": None, "b": None})
    assert silent.name is None and silent.warnings == ("No licence is stated by a, b: ask before the model is given away",)
    bound = inherited({"base": "llama3", "a": "cc-by-nd-4.0"})
    assert bound.warnings[1] == "a is under cc-by-nd-4.0, which allows no derivatives: a merged model is one"


def test_refuses(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"thetau\.json"):
        card_of(tmp_path / "a1b2")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="neither a result of"):
        read_evaluation(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[1")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_evaluation(tmp_path / "bad.json")
    (tmp_path / "a1b2" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match="its head is no YAML"):
        card_of(merged)


def test_to_the_hub(merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            if options["commit_message"] == "fail":
                raise RuntimeError("401 Unauthorized\nmore")
            calls.append(("upload", options))
            return SimpleNamespace(commit_url="https://huggingface.co/org/both/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(CheckpointError, match="has no card"):
        push(merged, "org/both")
    code, printed = run(capsys, "export", "card", str(merged), "--license", "cc-by-nc-4.0")
    assert code == 0 and "warning: The parents are under different licences" in printed
    assert ModelCard.load(merged / "README.md").data.license == "cc-by-nc-4.0"
    code, printed = run(capsys, "export", "push", str(merged), "org/both", "--private")
    assert code == 0 and "https://huggingface.co/org/both/commit/1" in printed
    assert calls[0] == ("org/both", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == merged and calls[1][1]["repo_id"] == "org/both"
    with pytest.raises(OutputError, match=r"does not take .* \(401 Unauthorized\)\. Log in"):
        push(merged, "org/both", message="fail")
    with pytest.raises(OutputError, match="must be the name of a repository"):
        push(merged, "both")
    content = bytearray((merged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (merged / "model.safetensors").write_bytes(content)
    code, printed = run(capsys, "export", "push", str(merged), "org/both")
    assert code == 1 and "is no longer what was written, so it is not uploaded" in printed and len(calls) == 3


def test_parents_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read from the hub's cache, where a folder is called by its commit; the card names, links and asks for the repository."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.chdir(tmp_path)
        hub.push("org/base", model_in(tmp_path / "b", 0, head="license: llama3"))
        revision = hub.push("org/sst2", model_in(tmp_path / "s", 1, head="license: other\nlicense_name: mine"))
        hub.push("org/silent", model_in(tmp_path / "q", 2))
        models = ("-m", "sst2=org/sst2@main", "-m", "quiet=org/silent")
        code, printed = run(capsys, "merge", "-b", "org/base", *models, "--method", "average", "-o", "merged", "--quiet")
        assert code == 0, printed
        card = card_of(tmp_path / "merged")
    assert f"| [org/sst2](https://huggingface.co/org/sst2/tree/{revision}) as sst2 |  | mine |" in card.text
    assert "[org/base](https://huggingface.co/org/base/tree/" in card.text and "| llama3 |" in card.text
    assert card.warnings[-1] == "No licence is stated by quiet: ask before the model is given away"
    assert ModelCard(card.text).data.base_model == ["org/base", "org/silent", "org/sst2"]
    assert "cache" not in card.text and str(tmp_path) not in card.text


def test_names_that_would_end_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(tmp_path / "deep" / "base", 0)
    model_in(tmp_path / "deep" / "a", 1)
    code, printed = run(capsys, "merge", "-b", "deep/base", "-m", "````x=deep/a", "--method", "average", "-o", "out", "--quiet")
    assert code == 0, printed
    text = card_of(tmp_path / "out", name="<script>").text
    assert "\n`````yaml\n" in text and "# \\<script\\>" in text and "deep/" not in text
