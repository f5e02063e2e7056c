"""Tasks of every kind through one path: data of each layout, an encoder of each kind, its head, fine-tuning, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.errors import DataError
from thetau.evaluate import Evaluator
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.output import trained_heads
from thetau.models import load_encoder, read_weights
from thetau.models.encoder import Encoder
from thetau.models.loading import kind_of
from thetau.tasks import Task, load_task, make_head
from thetau.tasks.heads import read_head, write_head
from thetau.tasks.language_heads import TextToTextHead, VerbaliserHead
from thetau.tasks.probe import LinearHead
from thetau.tasks.suite import load_suite, shipped_suites
from tiny import make_model, make_task, rows_of, write_rows
from tiny import one_thread as one_thread
from tiny_language import folder_of
from tiny_vision import frame, made, saved

SIZES = {"train": 24, "validation": 12, "test": 16}


def pictures(count: int, seed: int) -> tuple[Any, Any]:
    """Half of the frames are darker than the other half."""
    labels = np.arange(count) % 2
    images = np.stack([frame(20, 20, 3, seed=seed * 100 + i) // 4 + 120 * labels[i] for i in range(count)]).astype(np.uint8)
    return images, labels.astype(np.uint8)


def image_task(root: Path, name: str = "light", **meta: Any) -> Path:
    """An npz file with its description beside it."""
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (split, count) in enumerate(SIZES.items()):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = pictures(count, seed)
    np.savez_compressed(root / f"{name}.npz", **arrays)
    facts = {"task": name, "kind": "image", "labels": ["dark", "bright"], **meta}
    (root / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
    return root / f"{name}.npz"


def scored_task(root: Path) -> Path:
    """A regression: the share of wet words."""
    folder = make_task(root, "weather", labels=None, metric="pearson")
    for seed, split in enumerate(("train", "validation", "test")):
        rows = [
            {"text": row["text"], "label": 5.0 * row["label"] + 0.01 * i} for i, row in enumerate(rows_of("weather", 40, seed))
        ]
        (folder / f"{split}.jsonl.gz").unlink()
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def template(folder: Path, name: str, content: str) -> None:
    (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


def run(encoder: Encoder, task: Task, out: Path, **fields: Any) -> tuple[float, float]:
    """Fine-tune; the task's value on train before and after, under the base's or the trained head."""
    config = FinetuneConfig(**{"steps": 30, "batch_size": 8, "lr": 3e-3, "max_length": 24, **fields})
    evaluator = Evaluator(encoder, [task], max_length=24)
    base = encoder.weights()
    before = evaluator.evaluate(base, "train")[task.name].value
    result = finetune(encoder, task, out, config, base="base", heads=evaluator.heads)
    assert result.last_loss < result.first_loss
    heads = trained_heads(out) or evaluator.heads
    after = Evaluator(encoder, [task], max_length=24, heads=heads).evaluate(read_weights(out, base=encoder.folder), "train")
    encoder.load(base, "the base")
    return before, after[task.name].value


def test_images_from_npz_under_a_probe(tmp_path: Path) -> None:
    image_task(tmp_path / "data")
    encoder = load_encoder(saved(tmp_path / "dino", made("dinov2")))
    assert (encoder.kind, encoder.form) == ("image", "cls")
    task = load_task("light", tmp_path / "data")
    assert isinstance(make_head(encoder, task), LinearHead)
    for paradigm in ("standard", "linear"):
        _, after = run(encoder, task, tmp_path / paradigm, paradigm=paradigm)
        assert after > 0.9, paradigm
    found = Evaluator(encoder, [task], image_size=56).inputs("light", "test")
    assert found.batch([0])["pixel_values"].shape == (1, 3, 56, 56)
    assert load_task(tmp_path / "data" / "light.npz").name == "light"


def test_clip_reads_prompts_with_its_own_text_tower(tmp_path: Path) -> None:
    image_task(tmp_path / "data")
    task = load_task("light", tmp_path / "data")
    assert task.prompts.sentences() == [["a photo of a dark."], ["a photo of a bright."]]
    folder = saved(tmp_path / "clip", made("clip"))
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(make_model(tmp_path / "words")).save_pretrained(folder)
    encoder = load_encoder(folder)
    assert (encoder.kind, encoder.form) == ("image", "projected")
    head = make_head(encoder, task)
    assert head.logits(torch.eye(8)).shape == (8, 2)
    assert isinstance(make_head(encoder, task, kind="probe"), LinearHead)
    with pytest.raises(DataError, match="a head from prompts needs a text tower"):
        make_head(load_encoder(saved(tmp_path / "dino", made("dinov2"))), task, kind="prompts")


def test_a_fitted_head_is_kept_and_is_the_same(tmp_path: Path) -> None:
    image_task(tmp_path / "data")
    encoder = load_encoder(saved(tmp_path / "dino", made("dinov2")))
    task = load_task("light", tmp_path / "data")
    first = make_head(encoder, task, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("head-*.safetensors")
    assert make_head(encoder, task, cache=tmp_path / "cache").hash() == first.hash() == read_head(kept).hash()
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"head-.*safetensors: cannot be read as a head"):
        make_head(encoder, task, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="TextToTextHead is part of its model"):
        write_head(tmp_path / "h.safetensors", TextToTextHead())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_masked_language_model_fills_the_gap(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, kind)
    assert kind_of(folder) == "mask"
    encoder = load_encoder(folder)
    data = make_task(tmp_path / "data", "weather")
    task = load_task(data)
    with pytest.raises(DataError, match=r"'weather' has no template for a masked language model\. Write one: .*mask\.yaml"):
        make_head(encoder, task)
    template(data, "mask", 'template: "{text} {mask} ."\nlabels: {sun: dry, rain: wet}\n')
    assert isinstance(make_head(encoder, task), VerbaliserHead)
    before, after = run(encoder, task, tmp_path / "out", steps=60)
    assert after > max(0.75, before)
    template(data, "mask", 'template: "{text} {mask} ."\nlabels: {rain: wet, sun: dry}\n')
    with pytest.raises(DataError, match=r"labels, in their order: sun, rain\. Got rain, sun"):
        make_head(encoder, task)


def test_a_text_to_text_model_scores_the_labels(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "t5")
    assert kind_of(folder) == "text_to_text"
    encoder = load_encoder(folder)
    data = make_task(tmp_path / "data", "weather")
    template(data, "text_to_text", 'template: "{text} is"\nlabels: {sun: bright sun, rain: wet rain}\n')
    _, after = run(encoder, load_task(data), tmp_path / "out", lr=1e-2)
    assert after > 0.8


def test_the_same_files_may_be_read_as_sentences(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert")
    assert load_encoder(folder, "sentence").kind == "sentence"
    data = make_task(tmp_path / "data", "animals")
    words = ["evaluate", "--model", str(folder), "--base", str(folder), "--task", str(data)]
    assert "has no template for a masked" in str(CliRunner().invoke(app, words).exception)
    assert CliRunner().invoke(app, [*words, "--kind", "sentence"]).exit_code == 0
    assert "Did you mean 'sentence'" in str(CliRunner().invoke(app, [*words, "--kind", "sentense"]).exception)


def test_a_regression_is_learnt_under_a_ridge_and_under_words(tmp_path: Path) -> None:
    data = scored_task(tmp_path / "data")
    task = load_task(data)
    assert task.regression
    assert task.labels == ()
    encoder = load_encoder(make_model(tmp_path / "model"))
    before, after = run(encoder, task, tmp_path / "ridge", lr=1e-3)
    assert after > max(0.9, before - 0.02)
    template(data, "mask", 'template: "{text} {mask} ."\nvalues: {dry: 0.0, wet: 5.5}\n')
    masked = load_encoder(folder_of(tmp_path, "bert"))
    _, after = run(masked, task, tmp_path / "words")
    assert after > 0.7


def test_a_trained_head_is_kept_beside_the_encoder(tmp_path: Path) -> None:
    encoder = load_encoder(make_model(tmp_path / "model"))
    task = load_task(make_task(tmp_path / "data", "animals"))
    _, after = run(encoder, task, tmp_path / "out", train_head=True)
    (head,) = trained_heads(tmp_path / "out").values()
    assert isinstance(head, LinearHead)
    assert not head.weight.requires_grad
    start = make_head(encoder, task)
    assert not torch.allclose(head.weight, start.logits(torch.eye(16)).T, atol=1e-3)
    assert after > 0.9
    result = CliRunner().invoke(
        app,
        [
            *(
                "evaluate",
                "--model",
                str(tmp_path / "out"),
                "--base",
                str(tmp_path / "model"),
                "--task",
                str(tmp_path / "data/animals"),
            ),
            *("--split", "train", "--json", str(tmp_path / "e.json")),
        ],
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["tasks"]["animals"]["value"] == after
    masked = load_encoder(folder_of(tmp_path, "bert"))
    template(tmp_path / "data/animals", "mask", 'template: "{text} {mask} ."\nlabels: {cat: cat, dog: dog}\n')
    with pytest.raises(DataError, match="brings its own head, which stays frozen"):
        run(masked, task, tmp_path / "no", train_head=True)


def test_an_interrupted_run_with_a_head_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    encoder = load_encoder(make_model(tmp_path / "model"))
    task = load_task(make_task(tmp_path / "data", "animals"))
    config = FinetuneConfig(steps=12, batch_size=8, lr=1e-3, train_head=True, save_every=4)

    def stop(step: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, task, tmp_path / "cut", config, base="base", tick=stop)
    again = finetune(encoder, task, tmp_path / "cut", config, base="base")
    whole = finetune(encoder, task, tmp_path / "whole", config, base="base")
    assert again.weights_hash == whole.weights_hash
    assert trained_heads(tmp_path / "cut")["animals"].hash() == trained_heads(tmp_path / "whole")["animals"].hash()


def test_images_do_not_go_to_a_model_of_texts(tmp_path: Path) -> None:
    image_task(tmp_path / "data")
    encoder = load_encoder(make_model(tmp_path / "model"))
    with pytest.raises(DataError, match="is of kind image, and the model reads texts"):
        Evaluator(encoder, [load_task("light", tmp_path / "data")]).inputs("light", "test")


# The hub's layout


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local copies of two data sets of the hub, in its layout: parquet files, their configurations in README.md."""
    datasets = pytest.importorskip("datasets", reason="the tests' own set-up may leave datasets out")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "data"
    for split, count in (("train", 40), ("test", 12)):
        images, labels = pictures(count, len(split))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])})
        table = datasets.Dataset.from_dict({"image": list(images), "label": [int(label) for label in labels]}, features=features)
        (root / "ylecun/mnist/mnist").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / f"ylecun/mnist/mnist/{split}-00000-of-00001.parquet")
    for config, names, columns in (
        ("rte", ["entailment", "not_entailment"], ("sentence1", "sentence2")),
        ("cola", ["unacceptable", "acceptable"], ("sentence",)),
    ):
        features = datasets.Features(
            {**{column: datasets.Value("string") for column in columns}, "label": datasets.ClassLabel(names=names)}
        )
        for split, count in (("train", 40), ("validation", 10)):
            rows = rows_of("weather", count, len(split))
            content = {column: [row["text"] for row in rows] for column in columns} | {"label": [row["label"] for row in rows]}
            (root / "nyu-mll/glue" / config).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(content, features=features).to_parquet(
                root / "nyu-mll/glue" / config / f"{split}-00000-of-00001.parquet"
            )
    listing = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "validation"))
        for config in ("rte", "cola")
    )
    (root / "nyu-mll/glue/README.md").write_text(f"---\nconfigs:\n{listing}---\n", encoding="utf-8")
    make_task(root, "weather")
    return root


def test_data_sets_of_the_hub_are_read_from_a_local_copy(hub: Path) -> None:
    digits = load_task("clip_mnist", hub)
    train, validation, test = (digits.split(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (36, 4, 12)
    assert {split.hash() for split in (train, validation)} == {digits.split(split).hash() for split in ("train", "validation")}
    assert digits.prompts.sentences()[7] == ['a photo of the number: "7".']
    pair = load_task("glue_rte", hub)
    assert (len(pair.split("train")), len(pair.split("validation")), len(pair.split("test"))) == (36, 4, 10)
    assert load_task("glue_cola", hub).metric == "matthews"
    assert len(load_task("glue_cola", hub).split("test")) == 10


def test_the_suites_glue_and_clip8_run_on_local_copies(hub: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from thetau.studies.suite import run_suite
    from thetau.tasks.suite import Limits

    glue = load_suite("glue")
    encoder = folder_of(tmp_path, "roberta")
    for name in ("rte", "cola"):  # their shipped words are not in the vocabulary of a few words
        text = "{text} {mask} , {text2}" if name == "rte" else "{text} {mask} ."
        labels = {"rte": "{entailment: same, not_entailment: other}", "cola": "{unacceptable: wet, acceptable: dry}"}[name]
        own = tmp_path / "own" / f"glue_{name}"
        own.mkdir(parents=True)
        shipped = load_task(f"glue_{name}").folder
        (own / "meta.json").write_text((shipped / "meta.json").read_text().replace("nyu-mll/glue", str(hub / "nyu-mll/glue")))
        template(own, "mask", f'template: "{text}"\nlabels: {labels}\n')
    small = {"finetune": {"steps": 4, "batch_size": 4, "max_length": 24}, "limits": Limits(validation=8, test=8, max_length=24)}
    suite = replace(glue, backbone=str(encoder), tasks=("glue_rte", "glue_cola"), methods=glue.methods[:2], **small)
    # A model this small may answer one class only; Matthews' correlation is 0 then, and the run goes on all the same.
    results = run_suite(suite, tmp_path / "glue", data=tmp_path / "own")
    assert {row.role for row in results.rows} == {"pretrained", "individual", "joint", "merged"}
    clip = load_suite("clip8")
    assert {"clip_sun397", "clip_dtd"} <= set(clip.tasks)
    folder = saved(tmp_path / "clip", made("clip"))
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(make_model(tmp_path / "words")).save_pretrained(folder)
    image_task(hub)
    suite = replace(clip, backbone=str(folder), tasks=("clip_mnist", "light"), methods=clip.methods[:1], **small)
    assert run_suite(suite, tmp_path / "clip8", data=hub).rows[-1].role == "merged"


def test_shipped_suites_and_hub_tasks_are_whole() -> None:
    for name in shipped_suites():
        load_suite(name)
    expected = {
        "sun397": 397,
        "stanford_cars": 196,
        "resisc45": 45,
        "eurosat": 10,
        "svhn": 10,
        "gtsrb": 43,
        "mnist": 10,
        "dtd": 47,
    }
    for name, count in {**expected, "imagenet": 1000}.items():
        task = load_task(f"clip_{name}")
        assert len(task.labels) == count
        assert len(task.prompts.sentences()) == count
        assert task.crop == "center"
    for name in load_suite("glue").tasks:
        assert load_task(name).metric in ("accuracy", "f1", "matthews", "pearson")


def test_a_data_set_with_other_classes_is_refused(hub: Path) -> None:
    meta = json.loads((load_task("clip_mnist").folder / "meta.json").read_text())
    (hub / "few").mkdir()
    (hub / "few/meta.json").write_text(json.dumps({**meta, "task": "few", "labels": ["0", "1"]}))
    with pytest.raises(DataError, match="the data set has 10 classes and the task 2"):
        load_task("few", hub).split("test")
    (hub / "other").mkdir()
    named = {**meta, "task": "other", "labels": list("abcdefghij"), "hub": {"name": "ylecun/mnist"}}
    (hub / "other/meta.json").write_text(json.dumps(named))
    with pytest.raises(DataError, match="`labels` must be the data set's own names in its order"):
        load_task("other", hub).split("test")
