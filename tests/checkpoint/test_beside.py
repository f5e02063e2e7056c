"""What lies beside weights or among them and is none: configs, tokenizers, templates, running statistics, file names, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thetau
from commands import run
from fixtures import random_weights, shifted, write_model
from thetau.errors import AlignmentError, RecipeError
from thetau.facade import config_folder, from_recipe
from thetau.recipes import from_mapping

State = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "rope_theta": 1e4,
    "max_position_embeddings": 6,
    "eos_token_id": 2,
}


def pair(folder: Path, **changed: Any) -> tuple[Path, Path]:
    base = write_model(folder / "base", random_weights(0), CONFIG)
    return base, write_model(folder / "model", shifted(random_weights(0), 1), {**CONFIG, **changed})


@pytest.mark.filterwarnings("ignore:.*its config differs:thetau.ThetauWarning")  # the reports are looked at
@pytest.mark.parametrize(("key", "value"), [("rope_theta", 1e6), ("max_position_embeddings", 12), ("eos_token_id", 3)])
def test_a_config_that_differs_is_told(tmp_path: Path, key: str, value: Any) -> None:
    base, model = map(thetau.open, pair(tmp_path, **{key: value}))
    said = f"its config differs from that of {tmp_path / 'base'}: {key}: {CONFIG[key]!r} against {value!r}"
    merged = (base + thetau.merge([model - base], thetau.methods.Average())).save(tmp_path / "merged")
    summed = (base + 0.5 * (model - base)).save(tmp_path / "sum")
    for report in (merged, summed):
        assert any(said in warning for warning in report.warnings)


@pytest.mark.parametrize(("key", "value"), [("model_type", "roberta"), ("num_attention_heads", 4), ("hidden_size", 16)])
def test_another_architecture_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    base, model = map(thetau.open, pair(tmp_path, **{key: value}))
    with pytest.raises(
        AlignmentError, match=rf"is of another architecture than .*base: {key}: {CONFIG[key]!r} against {value!r}"
    ):
        thetau.merge([model - base], thetau.methods.Average())


def recipe(folder: Path, base: Path, model: Path, **more: Any) -> dict[str, Any]:
    return {"base": str(base), "models": [{"path": str(model), "name": "tuned"}], "method": "average", **more}


def test_whose_config_the_output_takes(tmp_path: Path) -> None:
    base, model = pair(tmp_path, eos_token_id=3)
    (base / "chat_template.jinja").write_text("base")
    (model / "chat_template.jinja").write_text("tuned")
    for given, want in ((None, 2), ("base", 2), ("tuned", 3), (str(model), 3)):
        said = from_mapping(recipe(tmp_path, base, model, config=given))
        out = tmp_path / f"out {given}".replace("/", "_")
        with pytest.warns(thetau.ThetauWarning, match="its (chat template|config) differs"):
            from_recipe(said).save(out, config=config_folder(said))
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == want
        assert (out / "chat_template.jinja").read_text() == ("base" if want == 2 else "tuned")
    with pytest.raises(RecipeError, match=r"config: must be `base` or a model\. Got 'tunde'\. Did you mean 'tuned'\?"):
        config_folder(from_mapping(recipe(tmp_path, base, model, config="tunde")))


def test_the_command_takes_config_and_rename(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = pair(tmp_path, eos_token_id=3)
    odd = {name.replace("encoder.layer.", "tower_"): value for name, value in load_file(model / "model.safetensors").items()}
    write_model(tmp_path / "odd", odd, {**CONFIG, "eos_token_id": 3})
    words = [
        "merge",
        "--method",
        "average",
        "--base",
        str(base),
        "--model",
        f"tuned={tmp_path / 'odd'}",
        "-o",
        str(tmp_path / "out"),
    ]
    code, printed = run(capsys, *words, "--rename", r"^tower_(\d)=encoder.layer.\1", "--config", "tuned")
    assert code == 0, printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors"))


def tokenizer(folder: Path, *added: str) -> None:
    words = {"a": 0, "b": 1}
    document = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 2 + n,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for n, token in enumerate(added)
        ],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))


def test_added_tokens_that_differ_are_told(tmp_path: Path) -> None:
    base, model = pair(tmp_path)
    tokenizer(base, "<one>")
    tokenizer(model, "<two>")
    start = thetau.open(base)
    with pytest.warns(
        thetau.ThetauWarning, match="model: its tokenizer differs from .*1 tokens are missing.*<one>.*1 tokens are new.*<two>"
    ):
        (start + thetau.merge([thetau.open(model) - start], thetau.methods.Average())).save(tmp_path / "out")


# Running statistics


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        net.train()
        for _ in range(5):
            net(torch.randn(16, 4) * (1 + seed))
    return net.eval()


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0])
@pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning")
def test_variances_are_never_negative(scale: float) -> None:
    nets = [normed(seed) for seed in (4, 0, 1)]
    base, *models = [thetau.open(net) for net in nets]
    vector = thetau.merge([model - base for model in models], thetau.methods.TaskArithmetic(scale=scale))
    got = (base + vector).state_dict()
    assert torch.equal(got["1.running_var"], nets[0].state_dict()["1.running_var"])  # the base's, as said
    with torch.no_grad():
        nets[0].load_state_dict(got)
        assert torch.isfinite(nets[0](torch.randn(4, 4))).all()
    negated = (base - 2 * (models[0] - base)).state_dict()
    assert torch.equal(negated["1.running_var"], got["1.running_var"])


@pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning")
def test_a_mean_of_models_has_the_mean_of_their_statistics(tmp_path: Path) -> None:
    nets = [normed(seed) for seed in range(2)]
    a, b = (thetau.open(net) for net in nets)
    report = (0.25 * a + 0.75 * b).save(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(got[name], 0.25 * nets[0].state_dict()[name] + 0.75 * nets[1].state_dict()[name])
    assert report is not None


@pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning")
def test_the_rule_is_said(tmp_path: Path) -> None:
    base, model = (thetau.open(normed(seed)) for seed in range(2))
    report = (base + thetau.merge([model - base], thetau.methods.Average())).save(tmp_path / "out")
    assert any(
        "running statistics or tables, no weights, and stay the base's: '1.running_mean', '1.running_var'" in note
        for note in report.notes
    )


def test_verify_refuses_a_negative_variance(tmp_path: Path) -> None:
    weights = {**normed(0).state_dict()}
    weights["1.running_var"] = weights["1.running_var"].clone()
    weights["1.running_var"][1] = -0.1
    thetau.open(weights).save(tmp_path / "out")
    found = thetau.facade.verify(tmp_path / "out")
    assert any("'1.running_var': 1 variances are negative" in problem for problem in found.problems)


# Names of files, and dtypes


@pytest.mark.parametrize("shard", [5_000_000_000, 2_000])
def test_a_diffusers_output_is_called_as_diffusers_asks(tmp_path: Path, shard: int) -> None:
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
    base = write_model(tmp_path / "base", random_weights(0), config)
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    start = thetau.open(base)
    vector = thetau.merge([thetau.open(shifted(random_weights(0), 1)) - start], thetau.methods.Average())
    (start + vector).save(tmp_path / "out", shard_bytes=shard)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    if shard > 2_000:
        assert "diffusion_pytorch_model.safetensors" in names
    else:
        weight_map = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
        assert set(weight_map.values()) <= names and all(
            name.startswith("diffusion_pytorch_model-0") for name in weight_map.values()
        )
    assert not any(name.startswith("model") for name in names)
    assert thetau.facade.verify(tmp_path / "out").good
    (start + vector).save(tmp_path / "out", shard_bytes=shard, resume=True)  # it is known to be complete


def test_dtype_reaches_excluded_tensors(tmp_path: Path) -> None:
    base, model = map(thetau.open, pair(tmp_path))
    name = "encoder.layer.0.output.dense.weight"
    for exclude in ([name], []):
        vector = thetau.merge([model - base], thetau.methods.Average(), exclude=exclude)
        out = tmp_path / f"out{len(exclude)}"
        (base + vector).save(out, dtype="bfloat16")
        got = load_file(out / "model.safetensors")
        assert {value.dtype for value in got.values()} == {torch.bfloat16, torch.int64}
        if exclude:
            assert torch.equal(got[name], random_weights(0)[name].bfloat16())
        assert thetau.facade.verify(out).good


def test_exclude_is_heard_where_rows_differ(tmp_path: Path) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    table = "embeddings.word_embeddings.weight"
    model[table] = torch.cat([model[table], torch.ones(2, model[table].shape[1])])
    start = thetau.open(base)
    got = (start + thetau.merge([thetau.open(model) - start], thetau.methods.Average(), exclude=[table])).state_dict()
    assert torch.equal(got[table], base[table])
    torch.testing.assert_close(got["logit_scale"], model["logit_scale"])
