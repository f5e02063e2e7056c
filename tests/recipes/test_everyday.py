"""The recipes under examples/recipes: each merges to its paper's formula, and what a chat needs is carried over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import thetau
from experiments.common import ROOT
from thetau.cli.app import app
from thetau.evaluate import Evaluator
from thetau.models import load_encoder
from thetau.tasks import load_task
from tiny_causal import TEMPLATE, causal_task, talker

RECIPES = ROOT / "examples" / "recipes"
END = "<end>"


def moved(folder: Path, out: Path, seed: int) -> Path:
    """A model a little way from another one."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(out)
    return out


def taught_to_talk(folder: Path) -> None:
    """Give a model an end token of its own, a row for it, and a template that uses it."""
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    words.add_tokens([END], special_tokens=True)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    words.chat_template, words.eos_token = TEMPLATE.replace("</s>", END), END
    for config in (model.config, model.generation_config):
        config.eos_token_id = words.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def merged(name: str, folder: Path) -> dict[str, Tensor]:
    shutil.copy(RECIPES / f"{name}.yaml", folder / "recipe.yaml")
    done = CliRunner().invoke(app, ["merge", str(folder / "recipe.yaml"), "-o", str(folder / "merged")])
    assert done.exit_code == 0, done.exception
    assert "warning" not in done.output
    return weights(folder / "merged")


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = thetau.open(folder).state_dict()
    return found


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name


def test_a_chat_vector(tmp_path: Path) -> None:
    base = talker(tmp_path / "base", template=None)
    for seed, name in enumerate(("continued", "chat"), start=1):
        moved(base, tmp_path / name, seed)
    taught_to_talk(tmp_path / "chat")
    got = merged("chat-vector", tmp_path)
    start, continued, chat = (weights(tmp_path / name) for name in ("base", "continued", "chat"))
    known = len(start["model.embed_tokens.weight"])
    same(
        {name: tensor[:known] if tensor.shape != start[name].shape else tensor for name, tensor in got.items()},
        {name: continued[name] + chat[name][: len(start[name])] - start[name] for name in start},
    )
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    number = words.convert_tokens_to_ids(END)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(got[name][number], chat[name][number], atol=1e-6), "its word is the chat model's alone"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert words.chat_template == TEMPLATE.replace("</s>", END)
    assert words.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == number
    task = load_task(causal_task(tmp_path, chat=True, max_new_tokens=3))
    encoder = load_encoder(tmp_path / "merged")
    assert Evaluator(encoder, [task]).evaluate(encoder.weights(exact=True), "test")["sounds"].n == 4, "it can be talked to"


def test_forgetting(tmp_path: Path) -> None:
    chat = talker(tmp_path / "chat")
    moved(chat, tmp_path / "unwanted", 1)
    got = merged("forgetting", tmp_path)
    start, unwanted = weights(chat), weights(tmp_path / "unwanted")
    same(got, {name: start[name] - 0.5 * (unwanted[name] - start[name]) for name in start})


def test_restoring_safety(tmp_path: Path) -> None:
    aligned = talker(tmp_path / "aligned")
    moved(aligned, tmp_path / "unaligned", 1)
    moved(aligned, tmp_path / "finetuned", 2)
    got = merged("restoring-safety", tmp_path)
    unaligned, finetuned, safe = (weights(tmp_path / name) for name in ("unaligned", "finetuned", "aligned"))
    same(got, {name: finetuned[name] + 0.5 * (safe[name] - unaligned[name]) for name in safe})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_is_shown_on_the_page(path: Path) -> None:
    page = (ROOT / "docs" / "everyday.md").read_text(encoding="utf-8")
    assert f"examples/recipes/{path.name}" in page
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert "\n".join(lines) in page, "the page shows the recipe as it is"
