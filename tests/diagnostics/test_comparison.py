"""Two models beside each other: against plain torch, with what one of them lacks, and a merge beside its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import folder as folder
from commands import run
from fixtures import random_weights, shifted, write_model
from thetau.checkpoint import dtype_name
from thetau.diagnostics.comparing import compare
from thetau.diagnostics.comparison import Comparison, TensorPair
from thetau.diagnostics.results import load_result
from thetau.diagnostics.spectra import directions
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError
from thetau.linalg.svd import svd
from thetau.random import stream

QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"


def weights(name: str) -> dict[str, Tensor]:
    return {key: value.double() for key, value in load_file(f"{name}/model.safetensors").items() if value.is_floating_point()}


def change(name: str, **values: Tensor | None) -> None:
    held = load_file(f"{name}/model.safetensors")
    for key, value in values.items():
        held.pop(key, None)
        if value is not None:
            held[key] = value
    save_file(held, f"{name}/model.safetensors")


def row(found: Comparison, name: str) -> TensorPair:
    return next(one for one in found.tensors if one.name == name)


def compared(**options: Any) -> Comparison:
    return compare(thetau.open("a"), thetau.open("b"), **options)


def test_every_figure_is_that_of_plain_torch(folder: Path) -> None:
    found = compared(base=thetau.open("base"))
    a, b, base = weights("a"), weights("b"), weights("base")
    assert {one.name for one in found.tensors} == set(a)
    for one in found.tensors:
        x, y, o = (side[one.name] for side in (a, b, base))
        gap = (x - y).abs()
        assert one.norm_a == pytest.approx(float(x.norm()))
        assert one.norm_b == pytest.approx(float(y.norm()))
        assert one.distance == pytest.approx(float((x - y).norm()))
        assert one.relative == pytest.approx(float((x - y).norm() / x.norm()))
        assert one.largest == pytest.approx(float(gap.max()))
        assert float(gap[one.at] if one.shape else gap) == pytest.approx(float(gap.max()))
        assert one.changed == int((x != y).sum())
        # the base is taken off in float64 here, of float32 values
        assert one.cosine == pytest.approx(float(torch.cosine_similarity((x - o).flatten(), (y - o).flatten(), 0)), abs=1e-9)
        assert (one.shift_a, one.shift_b) == pytest.approx((float((x - o).norm()), float((y - o).norm())))
    whole = [torch.cat([side[name].flatten() for name in a]) for side in (a, b, base)]
    assert found.distance == pytest.approx(float((whole[0] - whole[1]).norm()))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(whole[0] - whole[2], whole[1] - whole[2], 0)), abs=1e-9)
    assert not found.same and not found.agrees and found.complete


def test_without_a_base_the_cosine_is_that_of_the_weights(folder: Path) -> None:
    found = row(compared(), QUERY)
    x, y = weights("a")[QUERY], weights("b")[QUERY]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(x.flatten(), y.flatten(), 0)))
    assert found.shift_a is None


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_directions_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False) ** 2
    shares = values / values.sum()
    found = directions(matrix, stream("x"))
    assert found.exact and found.full == min(shape)
    assert found.stable_rank == pytest.approx(float(1 / shares[0]))
    assert found.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))
    assert found.shares == pytest.approx(shares.tolist())


def test_a_sketch_bounds_the_rank_from_above_and_finds_the_leading_shares() -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(side, 60, generator=generator)).Q for side in (1100, 1300))
    matrix = (left * torch.logspace(0, -3, 60)) @ right.T + 1e-5 * torch.randn(1100, 1300, generator=generator)
    found = directions(matrix, stream("x"))
    values = svd(matrix)[1].double().square()
    shares = values / values.sum()
    whole = float(torch.special.entr(shares).sum().exp())
    assert not found.exact and found.full == 1100
    assert found.shares == pytest.approx(shares[:16].tolist(), rel=1e-3)
    assert whole * (1 - 1e-3) <= found.effective_rank <= 1.2 * whole


def test_zeros_have_no_direction() -> None:
    found = directions(torch.zeros(4, 3), stream("x"))
    assert (found.stable_rank, found.effective_rank, found.shares) == (0.0, 0.0, ())


def test_a_change_of_rank_one_is_seen_as_one(folder: Path) -> None:
    held = load_file("a/model.safetensors")
    held[QUERY] = held[QUERY] + 0.5 * torch.outer(torch.arange(8.0) - 4, torch.ones(8))
    write_model(folder / "c", held)
    found = compare(thetau.open("a"), thetau.open("c"))
    assert [one.name for one in found.tensors if one.changed] == [QUERY]
    assert row(found, QUERY).directions["difference"].effective_rank == pytest.approx(1, abs=1e-4)
    assert found.largest(5)[0].name == QUERY
    layers = {part.name: part.changed for part in found.parts if part.by == "layer"}
    assert layers["0"] == row(found, QUERY).changed and layers["1"] == 0


def test_what_one_of_them_lacks_is_listed_and_the_rest_is_compared(folder: Path) -> None:
    change("b", **{QUERY: None, "classifier.weight": torch.ones(2, 8), WORDS: torch.ones(14, 8)})
    found = compared(base=thetau.open("base"))
    assert found.only_a == (QUERY,) and found.only_b == ("classifier.weight",)
    assert [(one.name, one.shape_a, one.shape_b) for one in found.misfits] == [(WORDS, (12, 8), (14, 8))]
    assert len(found.tensors) == len(weights("a")) - 2 and not found.complete
    assert {"only in", "other shapes"} <= {
        word for said in found.verdict() for word in ("only in", "other shapes") if word in said
    }


def test_a_base_that_lacks_a_tensor_takes_nothing_from_the_others(folder: Path) -> None:
    change("base", **{QUERY: None})
    found = compared(base=thetau.open("base"))
    assert found.complete
    assert row(found, QUERY).distance is not None and row(found, QUERY).shift_a is None and row(found, QUERY).cosine is None


def test_excluded_tensors_are_nobodys(folder: Path) -> None:
    change("b", **{WORDS: torch.ones(14, 8)})
    found = compared(exclude=["embeddings.*"])
    assert found.complete and WORDS not in {one.name for one in found.tensors}


def test_rounding_to_another_dtype_is_no_disagreement(folder: Path) -> None:
    save_file(
        {
            name: value.bfloat16() if value.is_floating_point() else value
            for name, value in load_file("a/model.safetensors").items()
        },
        "b/model.safetensors",
    )
    found = compared()
    assert found.agrees and not found.same
    assert row(found, QUERY).dtype_b == dtype_name(torch.bfloat16)
    assert "up to rounding" in found.verdict()[0]
    held = load_file("b/model.safetensors")
    held[QUERY][3, 4] += 2
    save_file(held, "b/model.safetensors")
    found = compared()
    assert not found.agrees and row(found, QUERY).beyond == 1 and row(found, QUERY).at == (3, 4)


def test_the_same_weights_are_told_as_such(folder: Path) -> None:
    found = compare(thetau.open("a"), thetau.open("a"))
    assert found.same and found.distance == 0 and "hold the same weights" in found.verdict()[0]


def test_integers_are_compared_too(folder: Path) -> None:
    held = load_file("a/model.safetensors")
    held["embeddings.position_ids"] = held["embeddings.position_ids"] + 1
    write_model(folder / "c", held)
    found = compare(thetau.open("a"), thetau.open("c"))
    assert found.buffers == ("embeddings.position_ids",) and not found.agrees


@pytest.mark.parametrize(("first", "second", "only"), [("a", "c", "only_a"), ("c", "a", "only_b")])
def test_integers_that_one_of_them_lacks_are_listed(folder: Path, first: str, second: str, only: str) -> None:
    """As where transformers ceased to save them."""
    write_model(folder / "c", dict(weights("a").items()))
    found = compare(thetau.open(first), thetau.open(second))
    assert getattr(found, only) == ("embeddings.position_ids",) and not found.complete
    assert len(found.tensors) == len(weights("a")) and found.buffers == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_holds_no_numbers_spoils_no_figure_of_the_two(folder: Path, value: float) -> None:
    broken = load_file("base/model.safetensors")[QUERY]
    broken[0, 0] = value
    clean, _ = compared(base=thetau.open("base")), change("base", **{QUERY: broken})
    found = compared(base=thetau.open("base"))
    one, other = row(found, QUERY), row(clean, QUERY)
    assert one.cosine is None and one.shift_a is None and set(one.directions) == {"difference"}
    assert (one.distance, one.directions["difference"]) == (other.distance, other.directions["difference"])
    assert np.isfinite([found.distance, found.cosine]).all()
    assert any("The base holds NaN or infinite values in 1 tensors" in note and QUERY in note for note in found.notes)


def test_values_that_are_no_numbers_are_counted_and_spoil_nothing_else(folder: Path) -> None:
    held = load_file("b/model.safetensors")
    held[QUERY][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(held, "b/model.safetensors")
    found = compared(base=thetau.open("base"))
    broken = row(found, QUERY)
    assert broken.not_finite == 3 and broken.distance is None and broken.directions == {}
    assert np.isfinite([found.distance, found.norm_a, found.norm_b]).all()
    assert any("NaN" in said for said in found.verdict())
    found.save(folder / "c.json")
    assert load_result(Comparison, folder / "c.json") == found


def test_windows_and_workers_change_nothing_but_the_last_bits(folder: Path) -> None:
    first = compared(base=thetau.open("base"))
    second = compared(base=thetau.open("base"), engine=Engine(window=3, workers=3))
    assert [one.name for one in first.tensors] == [one.name for one in second.tensors]
    for one, two in zip(first.tensors, second.tensors, strict=True):
        assert (one.changed, one.beyond, one.at, one.largest) == (two.changed, two.beyond, two.at, two.largest)
        assert one.distance == pytest.approx(two.distance, rel=1e-12)


def test_a_small_budget_leaves_out_ranks_and_says_so(folder: Path) -> None:
    found = compared(engine=Engine(window=16, max_memory=4000, workers=1))
    assert any("larger than the memory budget" in note for note in found.notes)
    assert found.distance == pytest.approx(compared().distance)


def test_vectors_are_compared_with_vectors_only(folder: Path) -> None:
    base = thetau.open("base")
    (thetau.open("a") - base).save("va.safetensors")
    (thetau.open("b") - base).save("vb.safetensors")
    found = compare(thetau.open("va.safetensors"), thetau.open("vb.safetensors"))
    assert found.cosine == pytest.approx(compared(base=base).cosine, abs=1e-6)
    with pytest.raises(AlignmentError, match="give two models, or two task vectors"):
        compare(thetau.open("va.safetensors"), thetau.open("a"))


def test_models_without_a_common_tensor_are_refused(folder: Path) -> None:
    write_model(folder / "other", {"blocks.0.up.weight": torch.ones(3, 3)})
    with pytest.raises(AlignmentError, match="no tensor in common"):
        compare(thetau.open("a"), thetau.open("other"))


def tokenizer(words: list[str], added: list[str]) -> dict[str, Any]:
    entries = [
        {
            "id": len(words) + k,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for k, word in enumerate(added)
    ]
    return {
        "version": "1.0",
        "added_tokens": entries,
        "model": {"type": "WordLevel", "vocab": {word: k for k, word in enumerate(words)}, "unk_token": "a"},
    }


def test_tokens_configs_and_templates(folder: Path) -> None:
    words = list("abcdefghij")
    Path("a/tokenizer.json").write_text(json.dumps(tokenizer(words, ["<x>", "<y>"])))
    Path("b/tokenizer.json").write_text(json.dumps(tokenizer(["b", "a", *words[2:]], ["<x>", "<z>"])))
    Path("a/chat_template.jinja").write_text("{{ one }}")
    Path("b/chat_template.jinja").write_text("{{ two }}")
    Path("b/config.json").write_text(json.dumps({"model_type": "bert", "dtype": "float32", "rope": {"theta": 2}}))
    held = load_file("b/model.safetensors")
    held[WORDS] = load_file("a/model.safetensors")[WORDS]
    held[WORDS][2] += 1
    save_file(held, "b/model.safetensors")
    found = compared()
    beside = found.beside
    assert beside is not None and beside.tokenizer is not None
    assert [(one.key, one.a, one.b) for one in beside.config] == [("rope.theta", None, "2")]
    assert (beside.tokenizer.only_a.first, beside.tokenizer.only_b.first) == (("<y>",), ("<z>",))
    assert beside.tokenizer.moved.first == ("a", "b")
    assert (beside.tokenizer.added_a, beside.tokenizer.added_b) == (("<y>",), ("<z>",))
    assert beside.same_template is False
    moved = row(found, WORDS).rows
    assert [(one.row, one.token) for one in moved] == [(2, "c")]
    assert moved[0].distance == pytest.approx(8**0.5, rel=1e-5)
    said = " ".join(found.verdict())
    assert "configs differ in 1 entries" in said and "tokenizers differ" in said and "templates differ" in said


def test_a_damaged_side_file_is_told_and_no_reason_to_stop(folder: Path) -> None:
    Path("b/config.json").write_text("{")
    assert any("not valid JSON" in said for said in compared().verdict())


# A merge and its recipe.

RECIPE = "base: base\nmodels: [a, b]\nmethod: {name: ties, density: 0.5, scale: 0.7}\ndtype: bfloat16\n"


@pytest.fixture
def merged(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    Path("recipe.yaml").write_text(RECIPE)
    code, text = run(capsys, "merge", "recipe.yaml", "-o", "merged", "-q")
    assert code == 0, text
    return folder


def test_a_merge_is_what_its_recipe_gives(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "compare", "merged", "--against-recipe", "recipe.yaml", "--json", "seen.json", "-q")
    assert code == 0, text
    assert "merged is what recipe.yaml gives" in text and "every value" in text
    found = load_result(Comparison, Path("seen.json"))
    assert found.recipe and found.same and {one.dtype_a for one in found.tensors} == {"bfloat16"}


def test_a_recipe_of_mergekits_is_computed_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = "".join(f"  - {{model: {name}, parameters: {{weight: 0.5}}}}\n" for name in "ab")
    Path("mergekit.yml").write_text(f"merge_method: linear\nmodels:\n{entries}dtype: float32\n")
    code, text = run(capsys, "merge", "mergekit.yml", "-o", "mean", "-q")
    assert code == 0, text
    code, text = run(capsys, "compare", "mean", "--against-recipe", "mergekit.yml", "-q")
    assert code == 0 and "mean is what mergekit.yml gives" in text


def test_a_copy_in_another_dtype_agrees_up_to_rounding(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe32.yaml").write_text(RECIPE.replace("bfloat16", "float32"))
    code, _ = run(capsys, "merge", "recipe32.yaml", "-o", "wide", "-q")
    assert code == 0
    code, text = run(capsys, "compare", "wide", "--against-recipe", "recipe.yaml", "-q")
    assert code == 0 and "every value" in text, "the recipe's values are rounded to the dtype of what they are compared with"


def test_one_changed_entry_is_found(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = load_file("merged/model.safetensors")
    held[QUERY][2, 5] += 0.5
    save_file(held, "merged/model.safetensors")
    code, text = run(capsys, "compare", "merged", "--against-recipe", "recipe.yaml", "-q")
    assert code == 1 and "is NOT what recipe.yaml gives: 1 of" in text and repr(QUERY) in text and "[2, 5]" in text


def test_a_lost_tensor_is_found(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("merged", **{QUERY: None, "more.weight": torch.ones(2, 2)})
    code, text = run(capsys, "compare", "merged", "--against-recipe", "recipe.yaml", "-q")
    assert code == 1
    assert "1 tensors are only in recipe.yaml" in text and "1 tensors are only in merged: 'more.weight'" in text


def test_another_shape_is_told_once(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("merged", **{QUERY: torch.ones(8, 9)})
    code, text = run(capsys, "compare", "merged", "--against-recipe", "recipe.yaml", "-q")
    assert code == 1 and f"1 tensors have other shapes, first {QUERY!r}: [8, 9] and [8, 8]" in text
    assert "only in" not in text


def test_a_recipes_integers_that_a_model_lacks_are_told(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("merged", **{"embeddings.position_ids": None})
    code, text = run(capsys, "compare", "merged", "--against-recipe", "recipe.yaml", "-q")
    assert code == 1 and "1 tensors are only in recipe.yaml: 'embeddings.position_ids'" in text


def test_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "compare", "a", "b", "--base", "base", "--json", "seen.json", "-q")
    assert code == 0, text
    assert "cosine of the changes" in text and "tensors differ; ‖A − B‖ =" in text
    assert load_result(Comparison, Path("seen.json")).base == "base"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "Give two models, or one and --against-recipe RECIPE"),
        (("a", "b", "--against-recipe", "r.yaml"), "Give two models, or one and --against-recipe RECIPE"),
        (("a", "nowhere"), "nowhere"),
        (("a", "b", "--base", "nowhere"), "nowhere"),
        (("a", "--against-recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("a", "b", "--json", "."), "is a folder"),
    ],
)
def test_what_cannot_be_compared_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, text = run(capsys, "compare", *arguments, "-q")
    assert code != 0 and message in text and "Traceback" not in text


def test_an_adapter_is_compared_over_its_base(folder: Path) -> None:
    module = QUERY.removesuffix(".weight")
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]})
    )
    factors = {
        f"base_model.model.{module}.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(factors, "lora/adapter_model.safetensors")
    base = thetau.open("base")
    found = compare(thetau.open("base"), thetau.open("lora", base=base), base=base)
    assert [one.name for one in found.tensors if one.changed] == [QUERY]


def test_shifted_models_of_two_seeds(folder: Path) -> None:
    """A float64 model keeps its precision."""
    held = {name: value.double() if value.is_floating_point() else value for name, value in shifted(random_weights(0), 5).items()}
    write_model(folder / "c", held)
    other = dict(held)
    other[QUERY] = held[QUERY] + 1e-12
    write_model(folder / "d", other)
    found = compare(thetau.open("c"), thetau.open("d"))
    assert row(found, QUERY).changed == 64 and row(found, QUERY).largest == pytest.approx(1e-12, rel=1e-3)
