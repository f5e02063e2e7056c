"""Fitting checkpoints to each other: what is an error, what is a note, what is repaired."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import WIDTH, assert_same, random_weights, shifted, write_model
from thetau.checkpoint import Alignment, align, open_source
from thetau.errors import AlignmentError, CheckpointError

LAST = "encoder.layer.1.output.dense.weight"


def fit(base: dict[str, Tensor], *models: dict[str, Tensor], exclude: Sequence[str] = ()) -> Alignment:
    sources = [open_source(weights) for weights in (base, *models)]
    for source, label in zip(sources, ["BASE", "A", "B", "C"], strict=False):
        source.label = label  # type: ignore[misc]
    return align(sources[0].specs, "BASE", sources, exclude)


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in names}


def merged(base: dict[str, Tensor], model: dict[str, Tensor], exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    start = thetau.open(base)
    vector = thetau.merge([thetau.open(model) - start], thetau.methods.TaskArithmetic(scale=1.0), exclude=exclude)
    return (start + vector).state_dict()


# What fits


def test_models_that_fit() -> None:
    base = random_weights(0)
    found = fit(base, shifted(base, 1), shifted(base, 2))
    assert found.names == tuple(name for name in base if name != "embeddings.position_ids")
    assert dict(found.kept) == {"embeddings.position_ids": "int64, the same in all"}
    assert found.notes == (
        "BASE: 1 tensors are not floating-point and are copied from the base: 'embeddings.position_ids (int64, the same in all)'.",
    )


def test_mixed_dtypes_fit_and_the_output_takes_the_bases() -> None:
    base = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in random_weights(0).items()}
    model = {name: value.to(torch.float16) if value.is_floating_point() else value for name, value in random_weights(0).items()}
    got = merged(base, model)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in base.items()}
    want = {name: value.float().to(base[name].dtype) if value.is_floating_point() else value for name, value in model.items()}
    for name, value in want.items():
        assert torch.allclose(got[name].float(), value.float(), rtol=2**-7, atol=1e-6), name


def test_integer_buffers_that_differ_are_noted_and_stay_the_bases() -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    model["embeddings.position_ids"] = model["embeddings.position_ids"] + 1
    assert dict(fit(base, model).kept) == {"embeddings.position_ids": "int64, different among the models"}
    assert torch.equal(merged(base, model)["embeddings.position_ids"], base["embeddings.position_ids"])


def test_integer_buffers_of_other_shapes_are_an_error() -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    model["embeddings.position_ids"] = torch.arange(9)[None]
    with pytest.raises(AlignmentError, match=r"A: 'embeddings\.position_ids' has shape \[1, 9\] instead of \[1, 6\] \(in BASE\)"):
        fit(base, model)
    assert fit(base, model, exclude=["*.position_ids"]).names


def test_buffers_that_only_a_model_has_are_noted() -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    found = fit(without(base, "embeddings.position_ids"), model)
    assert found.notes == ("A: 1 buffers that BASE lacks are left out: 'embeddings.position_ids'.",)


# What does not


def test_a_missing_tensor_is_an_error_unless_excluded() -> None:
    base = random_weights(0)
    model = without(shifted(base, 1), LAST)
    message = rf"A: lacks 1 tensors of BASE: '{LAST}'\. Give a complete checkpoint, or leave them out: `exclude: \[pattern\]`"
    with pytest.raises(AlignmentError, match=message):
        fit(base, model)
    found = fit(base, model, exclude=["encoder.layer.1.output.*"])
    assert LAST not in found.names and found.kept[LAST] == "excluded by the recipe"
    assert f"BASE: 1 tensors are excluded and stay the base's: '{LAST}'." in found.notes
    got = merged(base, model, ["encoder.layer.1.output.*"])
    assert torch.equal(got[LAST], base[LAST])
    assert not torch.equal(got["logit_scale"], base["logit_scale"])


def test_a_tasks_head_is_an_error_unless_excluded() -> None:
    base = random_weights(0)
    model = shifted(base, 1) | {"classifier.weight": torch.ones(2, WIDTH), "classifier.bias": torch.ones(2)}
    message = (
        r"A: has 2 tensors that BASE lacks: 'classifier\.weight', 'classifier\.bias'\. If they are a task's head, leave them out"
    )
    with pytest.raises(AlignmentError, match=message):
        fit(base, model)
    found = fit(base, model, exclude=["classifier.*"])
    assert "A: 2 tensors are excluded and left out: 'classifier.weight', 'classifier.bias'." in found.notes
    assert "classifier.weight" not in merged(base, model, ["classifier.*"])


def test_a_misspelt_name_is_guessed() -> None:
    base = random_weights(0)
    model = shifted(base, 1)
    model["logit_scales"] = model.pop("logit_scale")
    with pytest.raises(AlignmentError, match=r"has 1 tensors that BASE lacks: 'logit_scales'\..*Did you mean 'logit_scale'\?"):
        fit(base, model)


def test_another_shape() -> None:
    base = random_weights(0)
    model = shifted(base, 1) | {LAST: torch.ones(WIDTH, 3)}
    with pytest.raises(
        AlignmentError, match=rf"A: '{LAST}' has shape \[8, 3\] instead of \[8, 16\] \(in BASE\). Models must share one"
    ):
        fit(base, model)
    model[LAST] = torch.ones(2 * WIDTH, WIDTH)  # the same number of elements
    with pytest.raises(AlignmentError, match=r"has shape \[16, 8\] instead of \[8, 16\]"):
        fit(base, model)
    with pytest.raises(AlignmentError, match=r"'logit_scale' has shape \[1\] instead of \[\]"):
        fit(base, shifted(base, 1) | {"logit_scale": torch.ones(1)})


def test_another_vocabulary_is_called_so() -> None:
    base = random_weights(0)
    model = shifted(base, 1) | {"embeddings.word_embeddings.weight": torch.ones(15, WIDTH)}
    with pytest.raises(
        AlignmentError, match=r"word_embeddings\.weight' has another vocabulary: 15 rows instead of 12 \(in BASE\)"
    ):
        fit(base, model)


@pytest.mark.parametrize("shape", [(8, 16), (64, 1)])
def test_quantised_weights(shape: tuple[int, ...]) -> None:
    base = random_weights(0)
    model = shifted(base, 1) | {LAST: torch.ones(shape, dtype=torch.int8)}
    with pytest.raises(
        CheckpointError, match=rf"'{LAST}' \(int8, .* holds codes of a quantised weight that cannot be read: nothing beside"
    ):
        fit(base, model)


def test_all_problems_come_together() -> None:
    base = random_weights(0)
    first = without(shifted(base, 1), LAST) | {"classifier.weight": torch.ones(2, WIDTH)}
    second = shifted(base, 2) | {"logit_scale": torch.ones(3), "embeddings.word_embeddings.weight": torch.ones(15, WIDTH)}
    with pytest.raises(AlignmentError) as caught:
        fit(base, first, second, exclude=["nothing.*"])
    lines = str(caught.value).splitlines()
    starts = [
        "exclude: the pattern 'nothing.*' ma",
        "A: lacks 1 tensors",
        "A: has 1 tensors",
        "B: 'embeddings.word_emb",
        "B: 'logit_scale' has sh",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_long_lists_are_cut() -> None:
    base = random_weights(0, layers=4)
    lost = [name for name in base if "encoder" in name][:11]
    with pytest.raises(AlignmentError, match=rf"lacks 11 tensors of BASE: .*'{lost[7]}' and 3 more\."):
        fit(base, without(base, *lost))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("logit_scal", r"exclude: the pattern 'logit_scal' matches no tensor\. Did you mean 'logit_scale'\?"),
        ("encoder.layer.9.*", r"exclude: the pattern 'encoder\.layer\.9\.\*' matches no tensor\."),
        ("Logit_Scale", r"the pattern 'Logit_Scale' matches no tensor"),
        ("", "the pattern '' matches no tensor"),
    ],
)
def test_patterns_that_match_nothing(pattern: str, message: str) -> None:
    base = random_weights(0)
    with pytest.raises(AlignmentError, match=message):
        fit(base, shifted(base, 1), exclude=["*.bias", pattern])


# Prefixes


@pytest.mark.parametrize("longer", ["model", "base"])
def test_a_leading_part_that_one_of_them_lacks(longer: str) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    want = merged(base, model)
    prefixed = {f"bert.{name}": value for name, value in (model if longer == "model" else base).items()}
    if longer == "model":
        found = fit(base, prefixed)
        assert "A: its names start with 'bert.', which is taken off." in found.notes
        assert_same(merged(base, prefixed), want)
    else:
        found = fit(prefixed, model)
        assert "A: its names lack the leading 'bert.', which is put before them." in found.notes
        assert_same(merged(prefixed, model), {f"bert.{name}": value for name, value in want.items()})


def test_a_prefixed_model_with_a_head() -> None:
    base = random_weights(0)
    model = {f"bert.{name}": value for name, value in shifted(base, 1).items()} | {"classifier.weight": torch.ones(2, WIDTH)}
    with pytest.raises(AlignmentError, match=r"A: has 1 tensors that BASE lacks: 'classifier\.weight'"):
        fit(base, model)
    assert_same(merged(base, model, ["classifier.*"]), merged(base, shifted(base, 1)))


def test_a_prefix_does_not_hide_what_is_missing() -> None:
    base = random_weights(0)
    model = {f"bert.{name}": value for name, value in without(shifted(base, 1), LAST).items()}
    with pytest.raises(AlignmentError, match=rf"A: lacks 1 tensors of BASE: '{LAST}'"):
        fit(base, model)


def test_a_merge_goes_onto_a_base_with_other_names() -> None:
    """Each method reads blocks or whole tensors of a merge; both must find them under the merge's own names."""
    base, model = random_weights(0), shifted(random_weights(0), 1)
    prefixed = {f"bert.{name}": value for name, value in base.items()}
    start = thetau.open(base)
    for method in (thetau.methods.Average(), thetau.methods.Wudi(solver="closed_form")):
        vector = thetau.merge([thetau.open(model) - start, thetau.open(shifted(base, 2)) - start], method)
        want = (start + vector).state_dict()
        with pytest.warns(thetau.ThetauWarning, match="taken from another base"):
            got = (thetau.open(prefixed) + vector).state_dict()
        assert_same({name.removeprefix("bert."): value for name, value in got.items()}, want)


def test_unrelated_models_are_not_forced_together() -> None:
    other = {f"transformer.h.{number}.weight": torch.ones(3) for number in range(4)}
    with pytest.raises(AlignmentError, match=r"A: lacks 16 tensors of BASE"):
        fit(random_weights(0), other)


# Tied weights


def tied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"lm_head.weight": weights["embeddings.word_embeddings.weight"]}  # one storage


def clones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def test_a_head_that_only_the_base_stores() -> None:
    base, model = tied(random_weights(0)), shifted(random_weights(0), 1)
    assert (
        "A: has no 'lm_head.weight'; it is tied to 'embeddings.word_embeddings.weight', which is used for it."
        in fit(base, model).notes
    )
    got = merged(base, model)
    assert torch.equal(got["lm_head.weight"], got["embeddings.word_embeddings.weight"])
    assert torch.allclose(got["lm_head.weight"], model["embeddings.word_embeddings.weight"])


def test_a_head_that_only_the_model_stores() -> None:
    base, model = random_weights(0), tied(shifted(random_weights(0), 1))
    assert "A: 'lm_head.weight' is tied to 'embeddings.word_embeddings.weight' and adds nothing." in fit(base, model).notes
    assert_same(merged(base, model), merged(base, shifted(random_weights(0), 1)))


def test_a_head_that_was_trained_apart_is_no_tie() -> None:
    base, model = random_weights(0), tied(shifted(random_weights(0), 1))
    model["lm_head.weight"] = model["lm_head.weight"].clone()  # equal values are no tie
    with pytest.raises(AlignmentError, match=r"A: has 1 tensors that BASE lacks: 'lm_head\.weight'"):
        fit(base, model)
    with pytest.raises(AlignmentError, match=r"B: lacks 1 tensors of BASE: 'lm_head\.weight'"):
        fit(model, model, random_weights(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_ties_in_other_dtypes(dtype: torch.dtype) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    name = "embeddings.word_embeddings.weight"
    model[name] = model[name].to(dtype)
    assert any("is tied to" in note for note in fit(base, tied(model)).notes)
    base[name] = base[name].to(dtype)
    assert any("is tied to" in note for note in fit(tied(base), model).notes)


def test_notes_reach_the_report(tmp_path: Path) -> None:
    says = {"tie_word_embeddings": True}
    base = thetau.open(write_model(tmp_path / "base", random_weights(0), says))
    model = thetau.open(write_model(tmp_path / "model", clones(tied(shifted(random_weights(0), 1))), says))
    report = (base + thetau.merge([model - base], thetau.methods.Average())).save(tmp_path / "out")
    said = "\n".join(report.notes)
    assert "position_ids (int64, the same in all)" in said
    assert "'lm_head.weight' is tied to" in said
