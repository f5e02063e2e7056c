"""Recipes in mergekit's format against what mergekit itself made of them: fingerprints of its outputs, kept by `make mergekit`.

The models are the same bits on every machine; so are the recipes, experiments/mergekit/recipes. mergekit need not be there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from commands import run
from experiments.mergekit.comparing import BOUND, fingerprint, read
from experiments.mergekit.models import build, build_bad
from experiments.mergekit.run import BAD, PRINTS, RECIPES
from tiny import one_thread as one_thread

STORED = np.load(PRINTS)
NAMES = sorted(name.removesuffix(".values") for name in STORED.files if name.endswith(".values"))
KEPT = (  # of the recipes whose fingerprints are kept: each method, and each of what recipes can say
    "arcee-fusion-tied",
    "base-vocabulary",
    "breadcrumbs-rescaled",
    "breadcrumbs-ties",
    "karcher",
    "linear-gpt2-names",
    "linear-gradient-filters",
    "linear-slices",
    "model-stock-filters",
    "model-vocabulary",
    "modules-slices",
    "multi",
    "multislerp-tied",
    "nearswap-filters",
    "nuslerp-columns",
    "passthrough-layer-filters",
    "passthrough-scaled",
    "ram",
    "ramplus-tl",
    "raw",
    "sce-tied",
    "slerp-slices",
    "slerp-union",
    "slices-own-base",
    "task-arithmetic-lora",
    "ties",
    "union-tokens",
)
SIZE = 4096  # entries of the largest tensor in these models

# What a bad recipe must say; those that run must warn.
WORDS = {
    "adapter-of-another": "which the base llama/base lacks",
    "base-missing": "`base_model` is missing",
    "circle": "in a circle",
    "della-epsilon": "`density` + `epsilon` must lie in (0, 1)",
    "density-above-1": "`density` is a share, from 0 to 1. Got 50",
    "filter-of-nothing": "line 9, column 7: the filter 'self_atn' fits no tensor. Did you mean 'self_attn'?",
    "gradient-empty": "a gradient needs at least one value",
    "gradient-mixed": "a gradient has numbers, or none",
    "key-twice": "the key 't' stands twice",
    "mistyped-key": "line 6, column 1: unknown key 'paramters'. Did you mean 'parameters'?",
    "mistyped-key-of-model": "unknown key 'paramters'",
    "mistyped-parameter": "unknown parameter 'densty'. Did you mean 'density'?",
    "no-such-model": "llama/z: no such file or folder",
    "not-a-number": "holds 1 NaN",
    "nuslerp-of-one": "takes 2 models besides the base",
    "other-architecture": "model_type: 'llama' against 'gpt2'",
    "other-depth": "a 4, deep 6",
    "other-family": "model_type: 'qwen2' against 'llama'",
    "other-rotation": "rope_theta: 10000.0 against 500000.0",
    "other-width": "hidden_size: 32 against 16",
    "parameter-under-model": "`normalize` is a setting of the whole merge",
    "passthrough-of-two": "takes 1 model. Got 2: a, b",
    "range-beyond": "b has 4 layers, 0 to 3. Got the range [2, 9]",
    "range-reversed": "Got [3, 1]",
    "ranges-unequal": "equally many layers",
    "same-model-twice": "llama/a stands twice; it counts twice",
    "slerp-of-three": "takes 1 model besides the base. Got 2: b, c",
    "stock-of-one": "takes at least 2 models besides the base",
    "template-unknown": "Did you mean 'chatml'?",
    "token-of-nobody": "headers has no token '<|im_begin|>'",
    "tokenizer-of-nobody": "unknown key 'sourc'. Did you mean 'source'?",
    "two-forms": "exactly one of `models`, `slices` and `modules`",
    "unknown-dtype": "Did you mean 'float32'?",
    "unknown-method": "Did you mean 'ties'?",
    "unrelated-base": "They are probably not related",
    "vocabularies-differ": "'lm_head.weight' has 89 rows in a, 93 in headers: their vocabularies differ",
    "vocabularies-moved": "2 tokens are missing ('<|im_start|>', '<|im_end|>')",
    "weight-missing": "`weight` is missing for a",
    "weight-missing-somewhere": "`weight` is missing for a",
    "weight-of-words": "`weight` for a must be a number. Got 'half'",
    "weight-under-base": "`weight` has no effect under the base",
    "weights-not-1": "the weights add up to 1.1 and are divided by it",
    "weights-sum-to-0": "the weights add up to 0",
    "weights-sum-to-0-ties": "the weights add up to 0",
}
RUN = (  # these run, with a warning or a note
    "density-above-1",
    "other-rotation",
    "parameter-under-model",
    "same-model-twice",
    "stale-file",
    "unrelated-base",
    "vocabularies-moved",
    "weight-under-base",
    "weights-not-1",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all models."""
    return build_bad(build(tmp_path_factory.mktemp("models")))


@pytest.fixture
def beside(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models' folder, where commands are given."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return models


def test_what_is_kept_was_made_by_the_version_that_the_pages_name() -> None:
    assert str(STORED["mergekit"]) == "0.1.5"
    assert set(KEPT) <= set(NAMES)
    assert len(NAMES) >= 70


@pytest.mark.parametrize("name", KEPT)
def test_a_recipe_gives_what_mergekit_made_of_it(
    name: str, beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(capsys, "merge", str(RECIPES / f"{name}.yml"), "-o", str(tmp_path / "out"), "--quiet")
    assert code == 0, said
    ours = fingerprint(read(tmp_path / "out"))
    theirs = STORED[f"{name}.values"]
    assert str(ours["names"]) == str(STORED[f"{name}.names"])
    difference = np.abs(ours["values"] - theirs)
    assert difference[:, 1:].max() <= BOUND
    # Norms differ by at most the norm of the difference, √n entries of at most BOUND.
    assert difference[:, 0].max() <= BOUND * SIZE**0.5


@pytest.mark.parametrize("name", sorted(file.stem for file in BAD.glob("*.yml")))
def test_a_bad_recipe_is_refused_or_told(name: str, beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "merge", str(BAD / f"{name}.yml"), "-o", str(tmp_path / "out"))
    assert (code == 0) == (name in RUN), said
    assert (tmp_path / "out").exists() == (code == 0)
    assert WORDS.get(name, "") in " ".join(said.split())


def test_of_shards_and_an_older_single_file_the_shards_are_read(
    beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(capsys, "merge", str(BAD / "stale-file.yml"), "-o", str(tmp_path / "out"), "--quiet")
    right, found = read(beside / "llama" / "a"), read(tmp_path / "out")
    assert code == 0
    assert all(bool((found.tensors[name] == tensor).all()) for name, tensor in right.tensors.items())
