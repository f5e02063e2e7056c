"""RegMean++ against a loop that builds every hybrid model by hand, and against RegMean where the layers below are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import run
from synthetic import relative
from thetau.errors import DataError, OutputError
from thetau.evidence import MomentConfig, collect_merged_grams, collect_second_moments
from thetau.evidence.files import read_facts
from thetau.evidence.layers import measurable, sharing
from thetau.methods import PerTask, RegMean
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.tasks import Task, encode, load_task
from tiny import make_task
from tiny import one_thread as one_thread
from tiny_language import folder_of, tokenizer_of

TASKS = ("animals", "weather")
F32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two blocks and two models near it, as checkpoints; sentences of two tasks."""
    folder = tmp_path_factory.mktemp("layerwise")
    torch.set_num_threads(1)
    made = folder_of(folder, "bert", tokenizer_of("bert"))
    weights = load_file(made / "model.safetensors")
    for seed, name in enumerate(TASKS):
        make_task(folder / "data", name)
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) * tensor.std().nan_to_num(0.1)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in weights.items()
        }
        (folder / name).mkdir()
        save_file({key: value.contiguous() for key, value in moved.items()}, folder / name / "model.safetensors")
    return folder


def opened(place: Path) -> tuple[Encoder, dict[str, Task], dict[str, Any]]:
    encoder = load_encoder(place / "bert", "sentence")
    base: Any = thetau.open(place / "bert")
    vectors = {name: (thetau.open(place / name) - base).named(name) for name in TASKS}
    return encoder, {name: load_task(place / "data" / name) for name in TASKS}, vectors


def grams_of(encoder: Encoder, weights: dict[str, Tensor], inputs: Any, names: list[str]) -> dict[str, Tensor]:
    """Example by example, so without padding, in float64."""
    encoder.load(weights, "hybrid")
    found = {}
    for name in names:
        module = encoder.backbone.get_submodule(
            {known: live for live, known in encoder.names.items()}[name].removesuffix(".weight")
        )
        rows: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, given, out, rows=rows: rows.append(given[0].detach().flatten(0, -2)))
        for index in range(len(inputs)):
            encoder.module(**inputs.batch([index]))
        handle.remove()
        whole = torch.cat(rows).double()
        found[name] = (whole.T @ whole / len(whole)).float()
    return found


def test_blocks_are_merged_one_after_the_other_on_what_the_merged_ones_give(place: Path, tmp_path: Path) -> None:
    encoder, tasks, vectors = opened(place)
    coefficients = PerTask({"animals": 1.0, "weather": 2.0})
    method = RegMean(off_diagonal=0.8, coefficients=coefficients)
    config = MomentConfig(examples=12, batch=5)
    done: list[int] = []
    made = collect_merged_grams(encoder, tasks, vectors, tmp_path / "g", config, method=method, tick=done.append)
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert made.blocks == len(done) == 2 + ("pooler" in str(encoder.names))
    base = encoder.weights()
    tuned = {name: read_weights(place / name, base=encoder.folder) for name in TASKS}
    inputs = {name: encode(encoder, tasks[name], "train", max_length=64, limit=12) for name in TASKS}
    layers = list(sharing(encoder, measurable(encoder), inputs["animals"].batch([0])))
    weigh = {"animals": 1 / 3, "weather": 2 / 3}
    merged = {
        key: sum(weigh[name] * tuned[name][key].double() for name in TASKS).float()  # type: ignore[union-attr]
        if value.is_floating_point()
        else value
        for key, value in base.items()
    }
    for block in ("layer.0.", "layer.1."):
        names = [name for name in layers if block in name]
        mine: dict[str, dict[str, Tensor]] = {}
        for name in TASKS:
            hybrid = {key: tuned[name][key] if block in key else value for key, value in merged.items()}
            mine[name] = grams_of(encoder, hybrid, inputs[name], names)
            kept = load_file(made.files[name])
            for key in names:
                assert relative(kept[key], mine[name][key]) < 1e-4, (name, key)
        for key in names:
            shrunk = {}
            for name in TASKS:
                gram = mine[name][key].double()
                shrunk[name] = weigh[name] * (0.8 * gram + 0.2 * gram.diagonal().diag())
            right = sum((tuned[name][key] - base[key]).double() @ shrunk[name] for name in TASKS)
            merged[key] = (base[key].double() + right @ torch.linalg.inv(sum(shrunk.values()))).float()  # type: ignore[arg-type,operator]
    encoder.load(base, "base")
    got = thetau.merge(list(vectors.values()), method, evidence={"gram": made.files}).state_dict()
    for key in layers:
        assert relative(got[key], merged[key] - base[key]) < 1e-3, key
    plain = thetau.merge(list(vectors.values()), method, evidence={"gram": regmean_grams(place, tmp_path)}).state_dict()
    above = next(name for name in layers if "layer.1." in name)
    assert relative(plain[above], got[above]) > 1e-4, "the models' own activations are others"


def regmean_grams(place: Path, folder: Path) -> dict[str, Path]:
    encoder, tasks, _ = opened(place)
    files = {name: folder / f"own-{name}.safetensors" for name in TASKS}
    for name, path in files.items():
        weights = read_weights(place / name, base=encoder.folder)
        collect_second_moments(encoder, tasks[name], weights, path, "gram", MomentConfig(examples=12))
    return files


def test_where_only_the_first_block_differs_it_is_regmean(place: Path, tmp_path: Path) -> None:
    """Its inputs are the base's for every candidate, so that the Gram matrices are RegMean's own."""
    encoder, tasks, _ = opened(place)
    base: Any = thetau.open(place / "bert")
    start = load_file(place / "bert" / "model.safetensors")
    vectors, own = {}, {}
    for name in TASKS:
        moved = load_file(place / name / "model.safetensors")
        mixed = {key: moved[key] if "layer.0." in key else value for key, value in start.items()}
        vectors[name] = (thetau.open(mixed) - base).named(name)
        weights = {key: mixed.get(key, value) for key, value in encoder.weights().items()}
        out = tmp_path / f"{name}.safetensors"
        collect_second_moments(encoder, tasks[name], weights, out, "gram", MomentConfig(examples=8))
        own[name] = load_file(out)
    made = collect_merged_grams(encoder, tasks, vectors, tmp_path / "g", MomentConfig(examples=8))
    for name in TASKS:
        kept = load_file(made.files[name])
        first = [key for key in kept if "layer.0." in key]
        assert first
        assert all(torch.equal(kept[key], own[name][key]) for key in first)


def test_what_is_kept_and_what_is_refused(place: Path, tmp_path: Path) -> None:
    encoder, tasks, vectors = opened(place)
    config = MomentConfig(examples=4)
    made = collect_merged_grams(encoder, tasks, vectors, tmp_path / "g", config)
    assert not list(tmp_path.glob(".g*"))
    assert collect_merged_grams(encoder, tasks, vectors, tmp_path / "g", config) == replace(made, cached=True)
    with pytest.raises(OutputError, match="hold this very evidence of merged activations"):
        collect_merged_grams(encoder, tasks, vectors, tmp_path / "g", config, method=RegMean(off_diagonal=0.5))
    with pytest.raises(DataError, match="set no field but off_diagonal, coefficients and unseen"):
        collect_merged_grams(encoder, tasks, vectors, tmp_path / "h", config, method=RegMean(scale=0.5))
    with pytest.raises(DataError, match="weather: no task is given for this vector"):
        collect_merged_grams(encoder, {"animals": tasks["animals"]}, vectors, tmp_path / "h", config)
    encoder.load(read_weights(place / "animals", base=encoder.folder), "animals")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        collect_merged_grams(encoder, tasks, vectors, tmp_path / "h", config)
    assert not (tmp_path / "h").exists()


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [f"{name}={place / name}" for name in TASKS]
    places = ["--base", str(place / "bert"), "--data", str(place / "data"), "--kind", "sentence"]
    arguments = [
        "evidence",
        "gram-merged",
        *given,
        *places,
        "--examples",
        "4",
        "--off-diagonal",
        "0.5",
        "-o",
        str(tmp_path / "g"),
    ]
    code, text = run(capsys, *arguments)
    assert code == 0, text
    assert "layers in 2 blocks, a file for each of 2 tasks" in text
    assert '"off_diagonal": 0.5' in read_facts(tmp_path / "g" / "weather.safetensors", "gram")["regmean"]
