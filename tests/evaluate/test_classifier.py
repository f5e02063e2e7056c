"""A checkpoint's own classifier: used where there is one, by the names of its classes; what is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.models.loading import is_causal, kind_of
from thetau.studies.checkpoints import evaluate_classifier, has_classifier
from thetau.studies.options import Evaluate
from thetau.tasks import load_task
from tiny import make_task
from tiny import one_thread as one_thread
from tiny_language import config_of, tokenizer_of
from tiny_vision import made, saved


def classifier(folder: Path, *, labels: list[str] | None = None, count: int = 2) -> tuple[Path, Any, Any]:
    """A BERT with a random classifier."""
    tokenizer = tokenizer_of("bert")
    config = config_of("bert", len(tokenizer))
    config.num_labels = count
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.BertForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def share_right(model: Any, tokenizer: Any, data: Path, order: list[int]) -> float:
    """Example by example, through the library alone."""
    split = load_task(data).split("test")
    right = 0
    for text, label in zip(split.texts, split.labels, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        right += int(logits[order].argmax()) == label
    return right / len(split)


@pytest.mark.parametrize(("labels", "order"), [(None, [0, 1]), (["Dog", "cat"], [1, 0]), (["cat", "dog"], [0, 1])])
def test_the_own_classifier_gives_what_the_library_gives(tmp_path: Path, labels: list[str] | None, order: list[int]) -> None:
    data = make_task(tmp_path / "data", "animals")
    folder, model, tokenizer = classifier(tmp_path / "model", labels=labels)
    assert has_classifier(folder)
    found = evaluate_classifier(folder, [data])
    assert found.tasks["animals"].value == pytest.approx(share_right(model, tokenizer, data, order))
    assert found.head == "the checkpoint's own classifier"
    assert found.to_json()["head"] == found.head


def test_the_command_says_which_head_it_used(tmp_path: Path) -> None:
    data = make_task(tmp_path / "data", "animals")
    folder, model, tokenizer = classifier(tmp_path / "model", labels=["cat", "dog"])
    words = ["evaluate", "--model", str(folder), "--base", str(folder), "--task", str(data), "--json", str(tmp_path / "e.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["head"] == "the checkpoint's own classifier"
    assert told["tasks"]["animals"]["value"] == pytest.approx(share_right(model, tokenizer, data, [0, 1]))
    assert CliRunner().invoke(app, [*words[:-2], "--json", str(tmp_path / "n.json"), "--head", "names"]).exit_code == 0
    assert json.loads((tmp_path / "n.json").read_text())["head"] == f"made from {folder}"


def test_classes_of_another_task_are_refused(tmp_path: Path) -> None:
    data = make_task(tmp_path / "data", "animals")
    folder, _, _ = classifier(tmp_path / "model", labels=["positive", "negative"])
    with pytest.raises(DataError, match=r"classes are positive, negative; those of task 'animals' are cat, dog.*--head names"):
        evaluate_classifier(folder, [data])
    three, _, _ = classifier(tmp_path / "three", count=3)
    with pytest.raises(DataError, match="classes are 3 without names"):
        evaluate_classifier(three, [data])


def test_a_classifier_that_is_not_in_the_file_is_not_made_up(tmp_path: Path) -> None:
    """transformers would draw the missing weights at random, with a warning."""
    from safetensors.torch import load_file, save_file

    data = make_task(tmp_path / "data", "animals")
    folder, _, _ = classifier(tmp_path / "model")
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "classifier" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AlignmentError, match=r"2 of them are missing: classifier"):
        evaluate_classifier(folder, [data])


def test_an_image_classifier(tmp_path: Path) -> None:
    import numpy as np

    from thetau.models.classifier import classifier_of, load_classifier

    model = made("vit-classifier")
    folder = saved(tmp_path / "vit", model)
    assert classifier_of(folder) == "ViTForImageClassification"
    found = load_classifier(folder)
    pixels = torch.tensor(
        np.random.default_rng(0).normal(size=(2, 3, model.config.image_size, model.config.image_size)), dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.allclose(found.encoder.module(pixel_values=pixels), model(pixel_values=pixels).logits, atol=1e-6)


def test_a_causal_language_model_is_no_sentence_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert kind_of(tmp_path) == "causal", "which refuses tasks with classes, unless it is read as another kind"
    (tmp_path / "modules.json").write_text("[]")
    assert kind_of(tmp_path) == "sentence", "sentence-transformers says how it is pooled"
    assert is_causal("gpt2")
    assert not is_causal("bert"), "that is a masked language model in the first place"
    assert not is_causal("")


def test_options_and_folders_without_a_classifier(tmp_path: Path) -> None:
    folder, _, _ = classifier(tmp_path / "model")
    assert not has_classifier(folder, Evaluate(head="names"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert not has_classifier(folder)
    data = make_task(tmp_path / "data", "animals")
    with pytest.raises(CheckpointError, match="holds no classifier; its config names none"):
        evaluate_classifier(folder, [data], Evaluate(head="classifier"))
