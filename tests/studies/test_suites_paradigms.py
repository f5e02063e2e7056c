"""The paradigms of glue and clip8, every row of them, on small local copies of their tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thetau.diagnostics.interference import mean_tau_jp
from thetau.studies.paradigms import ParadigmResults, run_paradigms
from thetau.tasks.suite import Limits, load_suite
from tiny import make_model, make_task
from tiny import one_thread as one_thread
from tiny_language import folder_of
from tiny_vision import frame, made, saved

SMALL: dict[str, Any] = {
    "finetune": {"steps": 2, "batch_size": 4, "max_length": 24},
    "limits": Limits(validation=8, test=8, control=8, max_length=24),
}


def text_task(root: Path, name: str, metric: str = "accuracy") -> None:
    """A task of the suite's name, in the words of a tokenizer of a few words."""
    folder = make_task(root, "weather", sizes=(16, 8, 8), metric=metric)
    facts = json.loads((folder / "meta.json").read_text()) | {"task": name}
    (folder / "meta.json").write_text(json.dumps(facts))
    (folder / "mask.yaml").write_text('template: "{text} {mask} ."\nlabels: {sun: dry, rain: wet}\n')
    folder.rename(root / name)


def image_task(root: Path, name: str) -> None:
    """Dark and bright frames, with a probe for a head."""
    arrays = {}
    for seed, (split, count) in enumerate({"train": 12, "validation": 8, "test": 8}.items()):
        labels = np.arange(count) % 2
        pixels = [frame(20, 20, 3, seed=100 * seed + i) // 4 + 120 * int(labels[i]) for i in range(count)]
        arrays |= {f"{split}_images": np.stack(pixels).astype(np.uint8), f"{split}_labels": labels.astype(np.uint8)}
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / f"{name}.npz", **arrays)
    facts = {"task": name, "kind": "image", "labels": ["dark", "bright"], "head": "probe"}
    (root / f"{name}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> ParadigmResults:
    root = tmp_path_factory.mktemp("glue")
    for name, metric in (("glue_cola", "matthews"), ("glue_mnli", "accuracy"), ("glue_rte", "accuracy")):
        text_task(root / "data", name, metric)
    suite = load_suite("glue")
    suite = replace(suite, backbone=str(folder_of(root, "roberta")), tasks=("glue_cola", "glue_mnli", "glue_rte"), **SMALL)
    return run_paradigms(suite, root / "run", data=root / "data", memory=False)


def test_glue_learns_mnli_though_it_is_the_control(glue: ParadigmResults) -> None:
    assert glue.tasks == ("glue_cola", "glue_mnli", "glue_rte")
    assert glue.names() == [choice.name for choice in load_suite("glue").paradigms]
    for row in glue.rows:
        assert row.addition is not None
        assert set(row.addition.tuned.accuracy) == set(glue.tasks)
        assert [found.task for found in row.negation] == ["glue_cola", "glue_rte"], "the control is not negated itself"
        assert {found.control for found in row.negation} == {"glue_mnli"}


def test_clip8_runs_every_row(tmp_path: Path) -> None:
    names = ("clip_stanford_cars", "clip_mnist")
    for name in (*names, "clip_imagenet"):
        image_task(tmp_path / "data", name)
    folder = saved(tmp_path / "clip", made("clip"))
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(make_model(tmp_path / "words")).save_pretrained(folder)
    shipped = load_suite("clip8")
    rows = tuple(replace(one, trace=(0, 2) if one.trace else ()) for one in shipped.paradigms)
    suite = replace(shipped, backbone=str(folder), tasks=names[::-1], paradigms=rows, **SMALL)
    results = run_paradigms(suite, tmp_path / "run", data=tmp_path / "data", memory=False)
    assert results.names() == [choice.name for choice in shipped.paradigms]
    wanted = {"τJp strict", "τJp continued", "mtl linear", "attention + bias", "attention + mlp", "attention + mlp + bias"}
    assert wanted <= set(results.names())
    (tuning,) = results.of("τJp cyclic")[0].tuning
    assert (tuning.field, tuning.task) == ("strength", "clip_stanford_cars"), (
        "λ is chosen on Cars, though it is not the first task"
    )
    assert results.of("τJp strict")[0].tuning == (tuning,)
    first, last = results.of("τJp continued")[0].trace
    assert first.tau_jp is not None
    assert last.tau_jp is not None
    assert first.tau_jp > 0
    joint = results.of("mtl linear")[0].joint
    assert joint is not None
    assert set(joint) == set(names)


def test_tau_jp_of_a_trace_is_equation_nine() -> None:
    """Against terms that are known: E‖J(x)τ‖² is 5/2 over the two examples of one task, and 9 on the other."""

    class Known:
        def terms(self, vector: str, task: str, split: str) -> tuple[Any, Any]:
            change = {("a", "b"): [[1.0, 2.0], [0.0, 0.0]], ("b", "a"): [[3.0, 0.0]]}[vector, task]
            return torch.zeros(1), torch.tensor(change)

    assert mean_tau_jp(Known(), ["a", "b"], "test") == pytest.approx((5 / 2 + 9) / 2)
