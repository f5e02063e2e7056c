"""Every task of the suites that lies on the hub, read from local copies in its layout; GLUE's suites on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import thetau
from thetau.errors import DataError
from thetau.studies.paradigms import run_paradigms
from thetau.studies.suite import run_suite
from thetau.tasks import load_task
from thetau.tasks.encoding import template_of
from thetau.tasks.suite import Limits, Suite, load_suite
from tiny import one_thread as one_thread
from tiny_hub import COUNTS, GLUE, WORDS, labels_of, sentence, write_glue
from tiny_language import folder_of, tokenizer_of

datasets = pytest.importorskip("datasets", reason="the tests' own set-up may leave datasets out")

# What the hub's cards say of the image tasks: the data set, its configuration, how many classes.
IMAGES = {
    "clip_sun397": ("tanganke/sun397", None, 397),
    "clip_stanford_cars": ("tanganke/stanford_cars", None, 196),
    "clip_resisc45": ("tanganke/resisc45", None, 45),
    "clip_eurosat": ("tanganke/eurosat", None, 10),
    "clip_svhn": ("ufldl-stanford/svhn", "cropped_digits", 10),
    "clip_gtsrb": ("tanganke/gtsrb", None, 43),
    "clip_mnist": ("ylecun/mnist", "mnist", 10),
    "clip_dtd": ("tanganke/dtd", None, 47),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        write_glue(root / "data")
        (root / "data" / "none").mkdir()
        (root / "data" / "none" / "meta.json").write_text('{"kind": "text", "labels": ["a", "b"]}')
        yield root / "data"


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_read_as_its_card_says(hub: Path, name: str) -> None:
    """Texts in their order, labels by the data set's names; the public validation split is the test split, and a tenth of train is held out."""
    columns, names, splits = GLUE[name]
    task = load_task(f"glue_{name}", hub)
    public = splits[1]
    found = task.split("test")
    assert list(found.texts) == [sentence(name, columns[0], public, row) for row in range(12)]
    second = [sentence(name, columns[1], public, row) for row in range(12)] if len(columns) == 2 else None
    assert (None if found.texts2 is None else list(found.texts2)) == second
    assert [float(one) for one in found.labels] == pytest.approx([float(one) for one in labels_of(name, public, 12)])
    assert list(task.labels) == (names or [])
    train, validation = task.split("train"), task.split("validation")
    assert (len(train), len(validation)) == (36, 4)
    whole = sorted(sentence(name, columns[0], "train", row) for row in range(COUNTS["train"]))
    assert sorted([*train.texts, *validation.texts]) == whole


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_as_their_cards_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    where, config, count = IMAGES[name]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data" / where
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {number}" for number in range(count)])}
    )
    inside = folder / (config or "data")
    inside.mkdir(parents=True)
    for split, rows in (("train", 20), ("test", 6)):
        drawn = np.random.default_rng(len(split)).integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
        content = {"image": list(drawn), "label": [row * 7 % count for row in range(rows)]}
        datasets.Dataset.from_dict(content, features=features).to_parquet(inside / f"{split}-00000-of-00001.parquet")
    named = config or "default"
    listing = "".join(f"  - split: {split}\n    path: {inside.name}/{split}-*\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {named}\n  data_files:\n{listing}---\n")
    (tmp_path / "data" / "none").mkdir()
    (tmp_path / "data" / "none" / "meta.json").write_text('{"kind": "text", "labels": ["a", "b"]}')
    task = load_task(name, tmp_path / "data")
    assert len(task.labels) == count
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == [18, 2, 6]
    assert list(task.split("test").labels) == [row * 7 % count for row in range(6)]


def test_a_configuration_that_the_copy_lacks_is_named(hub: Path, tmp_path: Path) -> None:
    own = tmp_path / "t"
    own.mkdir()
    shipped = (load_task("glue_rte").folder / "meta.json").read_text()
    (own / "meta.json").write_text(shipped.replace('"rte"', '"wnli"', 1).replace('"config": "rte"', '"config": "wnli"'))
    with pytest.raises(DataError, match=r"nyu-mll/glue \(wnli\), split 'validation': cannot be read"):
        load_task(own, hub).split("test")


# GLUE's suites on Flan-T5

SMALL: dict[str, Any] = {"limits": Limits(validation=4, test=8, max_length=24)}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 that knows the words of GLUE's shipped prompts, so that no label is unknown."""
    prompts = [template_of(load_task(f"glue_{name}"), "text_to_text") for name in GLUE]
    words = [word for prompt in prompts for word in (*prompt.template.split(), *prompt.words)]
    return folder_of(tmp_path_factory.mktemp("t5"), "t5", tokenizer_of("t5", (*WORDS, *words)))


def small(name: str, backbone: Path, **finetune: Any) -> Suite:
    shipped = load_suite(name)
    return replace(
        shipped,
        backbone=str(backbone),
        finetune={**shipped.finetune, "steps": 2, "batch_size": 4, "max_length": 24, **finetune},
        **SMALL,
    )


def test_adapters_of_flan_t5_are_merged_as_products(hub: Path, t5: Path, tmp_path: Path) -> None:
    """Every row; the sum of the adapters' products B A is what task arithmetic adds."""
    suite = small("glue_lora", t5)
    assert set(suite.tasks) == {f"glue_{name}" for name in GLUE}
    rows = tuple(replace(choice, scales=choice.scales[:1]) for choice in suite.methods)
    suite = replace(suite, tasks=("glue_mnli", "glue_stsb"), methods=rows, joint=True)
    results = run_suite(suite, tmp_path / "run", data=hub)
    assert [row.name for row in results.rows] == [
        "pre-trained",
        "individual",
        "joint training",
        *(choice.name for choice in suite.methods),
    ]
    adapters = [next((tmp_path / "run/finetuned" / task).iterdir()) for task in suite.tasks]
    assert all((folder / "adapter_config.json").is_file() for folder in adapters)
    base = thetau.open(t5)
    merged = thetau.merge(
        [thetau.open(folder, base=base) - base for folder in adapters], thetau.methods.TaskArithmetic(scale=1.0)
    )
    summed: dict[str, torch.Tensor] = {}
    for folder in adapters:
        stored = load_file(folder / "adapter_model.safetensors")
        for name, down in stored.items():
            if "lora_A" in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                up = stored[name.replace("lora_A", "lora_B")]
                summed[target] = summed.get(target, 0) + up.double() @ down.double() * (32 / 16)
    assert {name.split(".")[-2] for name in summed} == {"q", "v"}
    found = merged.state_dict()
    assert any(bool(tensor.any()) for tensor in summed.values())
    for name, want in summed.items():
        torch.testing.assert_close(found[name].double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_attention_only_on_seven_tasks(hub: Path, t5: Path, tmp_path: Path) -> None:
    """Table 3's three rows."""
    suite = small("glue_attention", t5)
    assert len(suite.tasks) == 7
    results = run_paradigms(replace(suite, tasks=suite.tasks[:2]), tmp_path / "run", data=hub, memory=False)
    assert results.names() == ["non-linear", "NTK linearisation", "attention only"]
    for row in results.rows:
        assert row.addition is not None
        assert set(row.addition.tuned.accuracy) == set(suite.tasks[:2])
