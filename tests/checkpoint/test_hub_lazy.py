"""Models on a hub: opened by their headers, downloaded when something is first read; the hub is one of our own on 127.0.0.1."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import run
from fake_hub import FakeHub, serving
from fixtures import assert_same, shifted, write_index, write_model, write_shards
from thetau.checkpoint import Source, open_source
from thetau.checkpoint.hub import HubSource
from thetau.engine.executor import Engine
from thetau.engine.planning import plan, reading_rate
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError, ThetauError
from thetau.facade import from_recipe
from thetau.methods import TaskArithmetic, Ties
from thetau.recipes import load

LAYERS, WIDTH, VOCABULARY = 4, 96, 300
FEW = 60_000  # bytes: listings, configs and headers of three models
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def weights(*, layers: int = LAYERS, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            shapes[f"model.layers.{layer}.{part}.weight"] = (width, width)
    shapes["lm_head.weight"] = (VOCABULARY, width)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a base and two models, of one file and of shards; an empty cache, and a working folder that holds the same models."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with serving() as fake:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        base = weights()
        write_model(tmp_path / "base", base, CONFIG)
        write_model(tmp_path / "a", shifted(base, 1), CONFIG)
        write_shards(tmp_path / "b", shifted(base, 2), 3)
        (tmp_path / "b" / "config.json").write_text(json.dumps(CONFIG))
        for name in ("base", "a", "b"):
            fake.push(f"org/{name}", tmp_path / name)
        yield fake


def cached(folder: Path) -> list[str]:
    """The weights that lie in the cache."""
    return sorted(path.name for path in (folder / "cache").glob("models--*/snapshots/*/*.safetensors"))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def summed(*models: str, base: str = "org/base", **options: Any) -> thetau.Expression:
    opened = thetau.open(base)
    vectors = [thetau.open(model, name=model[-1]) - opened for model in models]
    return opened + thetau.merge(vectors, TaskArithmetic(scale=0.5), **options)


# Opening.


def test_opening_reads_headers_only(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        source, local = open_source(f"org/{name}"), open_source(tmp_path / name)
        assert {name: (spec.shape, spec.dtype) for name, spec in source.specs.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in local.specs.items()
        }
        assert list(source.specs) == list(local.specs)
        assert source.header_hashes() == local.header_hashes()
        assert source.folder is not None and (source.folder / "config.json").exists()
        lack = source.lacking()
        assert lack is not None and lack.nbytes == sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
    assert hub.nbytes < 3 * (1 << 14) + FEW and not hub.downloads() and not cached(tmp_path)


def test_a_long_header_takes_a_second_request(hub: FakeHub, tmp_path: Path) -> None:
    many = {f"layers.{number:04d}.weight": torch.zeros(2) for number in range(1000)} | {"big": torch.zeros(200_000)}
    write_model(tmp_path / "many", many)
    hub.push("org/many", tmp_path / "many")
    assert set(open_source("org/many").specs) == set(many)
    ranges = [asked.nbytes for asked in hub.asked if asked.ranged]
    assert ranges[0] == 1 << 14 and len(ranges) == 2 and not hub.downloads()


def test_reading_downloads_each_file_once_and_says_so(hub: FakeHub, tmp_path: Path) -> None:
    source = open_source("org/b")
    assert not source.notes
    source.prepare()
    source.prepare()
    assert_same({name: source.read(name) for name in source.specs}, shifted(weights(), 2))
    assert hub.downloads() == [f"org/b/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert source.lacking() is None and source.fingerprint() == open_source(tmp_path / "b").fingerprint()
    assert len(source.notes) == 1 and "were downloaded into" in source.notes[0]


def test_what_is_complete_in_the_cache_is_opened_as_before_offline_too(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    lazy = open_source("org/b")
    lazy.prepare()
    hub.forget()
    again = open_source("org/b")
    assert not isinstance(again, HubSource) and not hub.downloads() and hub.nbytes < FEW
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    offline = open_source("org/b")
    assert not hub.asked
    for other in (again, offline):
        assert (other.key, other.label, other.fingerprint()) == (lazy.key, lazy.label, lazy.fingerprint())
        assert list(other.specs.values()) == list(lazy.specs.values())


def test_offline_with_the_small_files_alone_says_that_the_model_is_out_of_reach(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    open_source("org/a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/a: no such file or folder, and the hub has no such model within reach"):
        open_source("org/a")


def test_files_that_are_no_model_of_ours_are_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    """As the one file beside the shards, which many repositories hold for another program."""
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    save_file(weights(), tmp_path / "c" / "consolidated.safetensors")
    hub.push("org/c", tmp_path / "c")
    source = open_source("org/c")
    source.prepare()
    assert len(hub.downloads()) == 3 and not any("consolidated" in name for name in hub.downloads())


def test_a_repository_without_small_files(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    save_file(weights(), tmp_path / "bare" / "model.safetensors")
    hub.push("org/bare", tmp_path / "bare")
    source = open_source("org/bare")
    assert_same({name: source.read(name) for name in source.specs}, weights())


def test_torch_files_and_compressed_vectors_are_downloaded_at_once(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    torch.save(weights(), tmp_path / "torch" / "pytorch_model.bin")
    hub.push("org/torch", tmp_path / "torch")
    source = open_source("org/torch")
    assert torch.equal(source.read("lm_head.weight"), weights()["lm_head.weight"])
    vector = thetau.open(tmp_path / "a") - thetau.open(tmp_path / "base")
    (tmp_path / "vector").mkdir()
    thetau.compress(vector, tmp_path / "vector" / "model.safetensors", form=thetau.Sparse())
    hub.push("org/vector", tmp_path / "vector")
    source = open_source("org/vector")
    assert source.degree == 0
    local = open_source(tmp_path / "vector" / "model.safetensors")
    assert torch.equal(source.read("lm_head.weight"), local.read("lm_head.weight"))


def test_an_adapter_of_a_base_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{target}.lora_A.weight": torch.ones(2, WIDTH), f"{target}.lora_B.weight": torch.ones(WIDTH, 2)},
        adapter / "adapter_model.safetensors",
    )
    hub.push("org/adapter", adapter)
    opened = thetau.open("org/adapter", base="org/base")
    assert hub.downloads() == ["org/adapter/adapter_model.safetensors"]
    out = opened.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(out, weights()["model.layers.0.self_attn.q_proj.weight"] + 4)


# Before the first byte.


def test_the_plan_says_what_is_to_be_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    expression, local = summed("org/a", "org/b"), summed("a", "b", base="base")
    here, there = plan(local, engine=Engine()), plan(expression, engine=Engine())
    nbytes = sum(path.stat().st_size for name in ("base", "a", "b") for path in (tmp_path / name).glob("*.safetensors"))
    assert (here.download, there.download) == (0, nbytes)
    assert [one.steps for one in here.passes] == [one.steps for one in there.passes]  # by the compiled loop, too
    assert reading_rate(expression) is None
    assert not hub.downloads() and hub.nbytes < 3 * (1 << 14) + FEW


def test_a_dry_run(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "merge", "--method", "ties", "-b", "org/base", "-m", "org/a", "-m", "org/b", "--dry-run")
    assert code == 0 and "downloads 2.0" in text and "MB first, into the hub's cache" in text
    assert not hub.downloads() and not cached(tmp_path) and hub.nbytes < 3 * (1 << 14) + FEW


@pytest.mark.parametrize("change", ["shape", "missing"])
def test_a_model_that_does_not_fit_is_told_from_headers(hub: FakeHub, tmp_path: Path, change: str) -> None:
    wrong = weights()
    if change == "shape":
        wrong["model.layers.1.mlp.up_proj.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    else:
        del wrong["model.layers.1.mlp.up_proj.weight"]
    write_model(tmp_path / "wrong", wrong, CONFIG)
    hub.push("org/wrong", tmp_path / "wrong")
    recipe = {"base": "org/base", "models": ["org/a", "org/wrong"], "method": "ties"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(AlignmentError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        plan(from_recipe(load(tmp_path / "recipe.yaml")), engine=Engine())
    assert not hub.downloads() and not cached(tmp_path) and hub.nbytes < 3 * (1 << 14) + FEW


def test_a_mistyped_key_asks_the_hub_nothing(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: org/base\nmodels: [org/a]\nmethod: {name: ties, densty: 0.1}\n")
    with pytest.raises(RecipeError, match="densty"):
        load(tmp_path / "recipe.yaml")
    assert not hub.asked


MERGEKIT = """
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/a
    parameters: {{weight: 0.5}}
  - model: {model}
    parameters: {{{key}: 0.5}}
"""


@pytest.mark.parametrize(("model", "key", "said"), [("org/b", "wieght", "wieght"), ("org/wrong", "weight", "shapes")])
def test_a_wrong_recipe_of_mergekits_is_told_from_headers(hub: FakeHub, tmp_path: Path, model: str, key: str, said: str) -> None:
    wrong = weights() | {"model.layers.1.mlp.up_proj.weight": torch.zeros(WIDTH, WIDTH + 1)}
    write_model(tmp_path / "wrong", wrong, CONFIG)
    hub.push("org/wrong", tmp_path / "wrong")
    (tmp_path / "recipe.yaml").write_text(MERGEKIT.format(model=model, key=key))
    with pytest.raises(RecipeError, match=said):
        from_recipe(load(tmp_path / "recipe.yaml"))
    assert not hub.downloads() and not cached(tmp_path) and hub.nbytes < 3 * (1 << 14) + FEW


def test_a_target_that_exists_and_a_budget_that_is_too_small_are_told_first(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a: exists"):
        summed("org/b").save(tmp_path / "a")
    base = thetau.open("org/base")
    ties = base + thetau.merge([thetau.open("org/a") - base, thetau.open("org/b") - base], Ties(density=0.3))
    with pytest.raises(ThetauError, match="the memory budget is"):
        ties.save(tmp_path / "out", engine=Engine(max_memory=1 << 12))
    assert not hub.downloads() and not (tmp_path / "out").exists()


def test_tensors_that_alignment_compares_are_read_in_place(hub: FakeHub, tmp_path: Path) -> None:
    """A head that is stored once, tied to the embedding as both configs say, fits a base that stores both."""
    config = CONFIG | {"tie_word_embeddings": True}
    tied = weights() | {"lm_head.weight": weights()["model.embed_tokens.weight"].clone()}
    write_model(tmp_path / "tied", tied, config)
    once = {name: tensor for name, tensor in shifted(tied, 3).items() if name != "lm_head.weight"}
    write_model(tmp_path / "once", once, config)
    for name in ("tied", "once"):
        hub.push(f"org/{name}", tmp_path / name)
    planned = plan(summed("org/once", base="org/tied"), engine=Engine())
    assert planned.download and not hub.downloads()
    summed("org/once", base="org/tied").save(tmp_path / "out")
    summed("once", base="tied").save(tmp_path / "want")
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "want").keys()
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "want" / "model.safetensors"))


def test_many_small_reads_bring_the_files(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thetau.checkpoint.hub.PEEKS", 1 << 16)
    source = open_source("org/a")
    name, want = "model.embed_tokens.weight", shifted(weights(), 1)["model.embed_tokens.weight"]
    for row in range(VOCABULARY):
        assert torch.equal(source.read(name, row, row + 1), want[row : row + 1])
    assert hub.downloads() == ["org/a/model.safetensors"] and len(hub.asked) < 40


def test_a_disk_that_is_too_small_is_told_before_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    monkeypatch.setattr("thetau.checkpoint.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=size + 1000))
    expression = summed("org/a")  # either model has room, not both
    with pytest.raises(CheckpointError, match=r"are to be downloaded, and its disk has .* free.*Nothing was downloaded"):
        expression.save(tmp_path / "out")
    assert not hub.downloads() and not (tmp_path / "out").exists()


# Runs.


@pytest.mark.parametrize("recipe", ["ours", "mergekit"])
def test_a_merge_downloads_each_file_once_and_gives_the_same_bits(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    ours = "base: {0}base\nmodels: [{0}a, {0}b]\nmethod: {{name: ties, density: 0.3}}\n"
    text = ours if recipe == "ours" else MERGEKIT.replace("org/", "{0}").replace("{model}", "{0}b").replace("{key}", "weight")
    (tmp_path / "there.yaml").write_text(text.format("org/"))
    (tmp_path / "here.yaml").write_text(text.format(f"{tmp_path}/"))
    code, said = run(capsys, "merge", "there.yaml", "-o", "out")
    assert code == 0 and said.count("were downloaded into") == 3 and "downloading 2.0 MB" in said
    assert hub.downloads() == [
        "org/a/model.safetensors",
        *(f"org/b/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "org/base/model.safetensors",
    ]
    code, said = run(capsys, "merge", "here.yaml", "-o", "want")
    assert code == 0 and "download" not in said
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "want"))
    assert_same(got, want)
    hub.forget()
    code, said = run(capsys, "verify", "out", "--again")
    assert code == 0, said
    assert not hub.downloads()


def test_models_of_which_no_tensor_is_read_are_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: passthrough\nbase_model: org/b\nslices:\n"
        "  - sources: [{model: org/base, layer_range: [0, 2]}]\n"
        "  - sources: [{model: org/base, layer_range: [1, 4]}]\n"
    )
    from_recipe(load(tmp_path / "recipe.yaml")).save(tmp_path / "out")
    assert hub.downloads() == ["org/base/model.safetensors"]


def test_a_download_that_breaks_off_goes_on(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut["model.safetensors"] = 100_000
    source = open_source("org/a")
    hub.forget()
    source.prepare()
    assert_same({name: source.read(name) for name in source.specs}, shifted(weights(), 1))
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert [asked.nbytes for asked in hub.asked if asked.method == "GET"][-2:] == [100_000, size - 100_000]


def test_files_that_came_whole_are_kept_when_another_fails(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken.add("model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"org/b@.*: the download into .* failed \(.*500.*\). Run again"):
        summed("org/b").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = cached(tmp_path)
    hub.broken.clear()
    hub.forget()
    summed("org/b").save(tmp_path / "out")
    assert len(hub.downloads()) + len(kept) == 4 and "org/b/model-00002-of-00003.safetensors" in hub.downloads()


def test_a_run_that_began_with_the_download_is_resumed_from_the_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    seen: list[str] = []
    read = HubSource.place

    def stopping(self: HubSource, name: str) -> tuple[int, int] | None:
        seen.append(name)
        if len(seen) == 20:
            raise Stopped
        return read(self, name)

    engine = Engine(workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(HubSource, "place", stopping)
        patch.setattr(
            HubSource, "read", lambda self, name, start=0, stop=None: stopping(self, name) and self.stored.read(name, start, stop)
        )
        with pytest.raises(Stopped):
            summed("org/a", "org/b", engine=engine).save(tmp_path / "out", resume=True, engine=engine)
    report = summed("org/a", "org/b", engine=engine).save(tmp_path / "out", resume=True, engine=engine)
    assert any("were there from an earlier run" in note and not note.startswith("0 of") for note in report.notes)
    summed("a", "b", base="base").save(tmp_path / "want")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "want" / "model.safetensors"))


def test_wrong_headers_are_noticed(hub: FakeHub, tmp_path: Path) -> None:
    """The file that comes is as long as the promised one and holds other tensors."""
    other = {name.replace("lm_head", "lm_haed"): tensor for name, tensor in weights().items()}
    write_model(tmp_path / "other", other, CONFIG)
    hub.swapped["model.safetensors"] = (tmp_path / "other" / "model.safetensors").read_bytes()
    expression = summed("org/a")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: is not the file of which org/.* gave the header .*other tensors"
    ):
        expression.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_and_a_strange_index(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"x" * 100_000)
    hub.push("org/bad", tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header claims 1099511627776 bytes, the file has 100008"):
        open_source("org/bad")
    shutil.copytree(tmp_path / "b", tmp_path / "odd")
    write_index(tmp_path / "odd", {"lm_head.weight": "model-00009-of-00009.safetensors"})
    hub.push("org/odd", tmp_path / "odd")
    with pytest.raises(
        CheckpointError, match=r"names the shard 'model-00009-of-00009\.safetensors', which org/odd@.* does not hold"
    ):
        open_source("org/odd")
    write_index(tmp_path / "odd", {"lm_head.weight": "../secret.safetensors"})
    revision = hub.push("org/odd", tmp_path / "odd")
    hub.commits["org/odd"][revision]["../secret.safetensors"] = b"x" * 100
    with pytest.raises(CheckpointError, match=r"names the shard '\.\./secret\.safetensors', which lies outside its folder"):
        open_source("org/odd")


def test_several_files_without_an_index(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in "xy":
        save_file(weights(), tmp_path / "two" / f"{name}.safetensors")
    hub.push("org/two", tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"org/two: holds 2 safetensors files and no index\. .*: x\.safetensors, y\.safet"):
        open_source("org/two")
    assert not hub.downloads()


def test_a_repository_that_changes_meanwhile_is_read_at_the_commit_that_was_opened(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.head("org/a")
    source = open_source("org/a")
    hub.push("org/a", tmp_path / "base")
    source.prepare()
    assert torch.equal(source.read("lm_head.weight"), shifted(weights(), 1)["lm_head.weight"])
    newer = open_source("org/a")
    assert newer.key != source.key and torch.equal(newer.read("lm_head.weight"), weights()["lm_head.weight"])
    assert torch.equal(open_source(f"org/a@{first}").read("lm_head.weight"), shifted(weights(), 1)["lm_head.weight"])


def test_another_process_gets_it_as_it_is(hub: FakeHub) -> None:
    source = open_source("org/a")
    early: Source = pickle.loads(pickle.dumps(source))
    source.prepare()
    late: Source = pickle.loads(pickle.dumps(source))
    hub.forget()
    for other in (early, late):
        assert other.key == source.key and other.place("lm_head.weight") is not None
        assert torch.equal(other.read("lm_head.weight"), source.read("lm_head.weight"))
    assert not hub.downloads()


# What the hub does not give.


@pytest.mark.parametrize("name", ["org/nothing", "org/a@v9"])
def test_what_the_hub_does_not_know(hub: FakeHub, name: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"{name}: no such file or folder, and the hub has no such model within reach \\(40[14]"
    ):
        open_source(name)


def test_a_gated_repository(hub: FakeHub) -> None:
    hub.gated.add("org/a")
    with pytest.raises(CheckpointError, match=r"org/a: no such file or folder, and the hub has no such model within reach \(403"):
        open_source("org/a")


def test_a_hub_that_is_gone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="org/a: no such file or folder, and the hub has no such model within reach"):
        open_source("org/a")
