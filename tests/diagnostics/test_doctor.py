"""The doctor: every figure against plain torch, everything it has to find in a family made on purpose, and nothing where there is nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch import Tensor

import thetau
from commands import run
from experiments.doctor.family import CLEAN, TRUTH, make_family
from fixtures import shifted, write_model
from thetau.diagnostics.doctor import Doctor, Group, Harm, Pair
from thetau.diagnostics.examine import TRIED, examine
from thetau.diagnostics.predictions import wilson
from thetau.diagnostics.results import load_result
from thetau.diagnostics.spectra import decomposition
from thetau.diagnostics.vectors import measure, products_of
from thetau.engine.executor import Engine
from thetau.facade import as_vector
from thetau.methods import build
from thetau.random import stream

WIDTH, TOKENS = 24, 40
QUERY = "encoder.layer.0.attention.self.query.weight"


def weights(seed: int) -> dict[str, Tensor]:
    """Two blocks, large enough that vectors of chance are nearly orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    found = {"embeddings.word_embeddings.weight": torch.randn(TOKENS, WIDTH, generator=generator)}
    for layer in range(2):
        block = f"encoder.layer.{layer}"
        found |= {
            f"{block}.attention.self.query.weight": torch.randn(WIDTH, WIDTH, generator=generator),
            f"{block}.attention.self.query.bias": torch.randn(WIDTH, generator=generator),
            f"{block}.attention.output.LayerNorm.weight": torch.randn(WIDTH, generator=generator),
            f"{block}.intermediate.dense.weight": torch.randn(2 * WIDTH, WIDTH, generator=generator),
            f"{block}.output.dense.weight": torch.randn(WIDTH, 2 * WIDTH, generator=generator),
        }
    return found


def tokenizer() -> str:
    vocabulary = {f"w{number}": number for number in range(TOKENS)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and three models of it."""
    base = weights(0)
    for name, held in {"base": base, **{name: shifted(base, seed) for seed, name in enumerate("abc")}}.items():
        write_model(tmp_path / name, held, {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": TOKENS})
        (tmp_path / name / "tokenizer.json").write_text(tokenizer())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    return tmp_path


def vectors(*names: str) -> list[dict[str, Tensor]]:
    base = load_file("base/model.safetensors")
    return [
        {key: (value - base[key]).double() for key, value in load_file(f"{name}/model.safetensors").items()} for name in names
    ]


def seen(*names: str, **options: object) -> Doctor:
    return examine(thetau.open("base"), [thetau.open(name) for name in names], **options)  # type: ignore[arg-type]


def matrices(vector: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in vector.items() if value.ndim == 2 and "layer" in name]


def group(found: Doctor, by: str, name: str) -> Group:
    return next(one for one in found.groups if (one.by, one.name) == (by, name))


def flat(vector: Mapping[str, Tensor], part: str = "") -> Tensor:
    return torch.cat([value.flatten() for name, value in vector.items() if part in name])


# A family with everything in it, and a clean one.


def test_everything_in_the_family_is_found_and_nothing_else(folder: Path) -> None:
    family = make_family(folder / "base", [folder / name for name in "abc"], folder / "family")
    found = examine(thetau.open("base"), [thetau.open(path, name=name) for name, path in family.items()])
    assert {one.kind: frozenset(one.models) for one in found.findings} == TRUTH
    assert len(found.findings) == len(TRUTH)
    assert [one.kind for one in found.findings][:2] == ["wrong base", "other vocabulary"]
    left = {name for one in found.advice if one.topic == "leave out" for name in one.models}
    assert left == {"stranger", "copy", "undone", "beta"}, "of a model and its continuation the latter is kept"
    assert set(found.staying) == set(found.compared) - left and len(found.harms[0].whole) == len(found.staying)
    method = next(one for one in found.advice if one.topic == "method")
    assert set(method.models) == set(found.compared) - left
    opposed = next(one for one in found.advice if one.models == ("undone",))
    assert "Do not merge undone with gamma" in opposed.sentence
    assert "spoken" not in found.compared
    assert any("another vocabulary" in line for one in found.models if one.name == "spoken" for line in one.problems)


def test_a_clean_family_has_nothing_to_find(folder: Path) -> None:
    found = seen(*"abc")
    assert found.findings == () and found.compared == ("a", "b", "c")
    assert not [one for one in found.advice if one.topic == "leave out"]
    assert {one.topic for one in found.advice} == {"conflict", "method", "scale", "cost", "check"}


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_of_one_length_are_no_continuation(folder: Path, seed: int) -> None:
    base = weights(0)
    common = shifted(base, 50 + seed)
    for name in "xy":
        own = shifted(base, ord(name) + seed)
        write_model(folder / name, {key: base[key] + (common[key] - base[key]) + (own[key] - base[key]) for key in base})
    assert {one.kind for one in seen("x", "y").findings} <= {"alike"}


def test_a_base_beside_the_true_one_is_found_by_candidates_or_by_length(folder: Path) -> None:
    base = weights(0)
    near = shifted(base, 90, 0.08)
    write_model(folder / "near", near)
    write_model(folder / "d", shifted(near, 91))
    found = seen("a", "b", "d")
    (one,) = found.findings
    assert one.kind == "wrong base" and one.models == ("d",) and "--candidate" in one.sentence
    found = seen("a", "b", "d", candidates=[thetau.open("near")])
    (one,) = found.findings
    assert one.kind == "wrong base" and "fine-tuned from near" in one.sentence
    assert found.candidates is not None


def test_the_base_itself_adds_nothing(folder: Path) -> None:
    write_model(folder / "same", load_file("base/model.safetensors"))
    found = seen("a", "same")
    assert [(one.kind, one.models) for one in found.findings] == [("no change", ("same",))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_fine_tunes_of_small_dtypes_are_neither_copies_nor_nothing(folder: Path, dtype: torch.dtype) -> None:
    """Vectors of a thousandth of the base: less than half a step of bfloat16, and yet no rounding where the base is stored alike."""
    base = {key: value.to(dtype) for key, value in weights(0).items()}
    write_model(folder / "base", base)
    step = float(torch.finfo(dtype).eps)
    for seed, name in enumerate("xy"):
        drawn = torch.Generator().manual_seed(seed)
        moved = {
            key: (value.float() * (1 + step * (torch.rand(value.shape, generator=drawn) < 0.05))).to(dtype)
            for key, value in base.items()
        }
        write_model(folder / name, moved)
    found = seen("x", "y")
    assert found.findings == ()
    assert all(one.shift is not None and one.shift < step / 2 for one in found.models)


def test_the_base_in_another_dtype_is_no_change(folder: Path) -> None:
    write_model(folder / "same", {key: value.bfloat16() for key, value in weights(0).items()})
    assert [one.kind for one in seen("a", "same").findings] == ["no change"]


def test_two_fine_tunes_in_two_dtypes_are_no_copies(folder: Path) -> None:
    base = weights(0)
    for name, seed, dtype in (("x", 1, torch.float32), ("y", 2, torch.bfloat16)):
        write_model(folder / name, {key: value.to(dtype) for key, value in shifted(base, seed, 0.0005).items()})
    assert "duplicate" not in {one.kind for one in seen("x", "y").findings}


def test_a_multiple_of_a_vector_is_told(folder: Path) -> None:
    base = weights(0)
    write_model(
        folder / "half", {key: base[key] + 0.5 * (value - base[key]) for key, value in load_file("a/model.safetensors").items()}
    )
    (one,) = seen("a", "half").findings
    assert one.kind == "rescaled" and "2.00 to 1" in one.sentence


def test_models_that_do_not_fit_or_are_damaged_are_described_and_the_rest_is_looked_at(folder: Path) -> None:
    held = load_file("b/model.safetensors")
    held[QUERY] = held[QUERY][:, :5].contiguous()
    save_file(held, "b/model.safetensors")
    held = load_file("c/model.safetensors")
    held[QUERY][0, 0] = float("nan")
    save_file(held, "c/model.safetensors")
    write_model(folder / "d", shifted(weights(0), 7))
    found = seen(*"abcd")
    assert found.compared == ("a", "d")
    assert {one.models for one in found.findings if one.kind == "does not fit"} == {("b",), ("c",)}
    assert any("NaN" in said for one in found.models if one.name == "c" for said in one.problems)


# Figures.


def test_lengths_and_cosines_by_block_and_kind(folder: Path) -> None:
    found, (a, b, c) = seen(*"abc"), vectors(*"abc")
    base = {name: value.double() for name, value in load_file("base/model.safetensors").items()}
    parts = {
        ("whole", ""): "",
        ("layer", "0"): "layer.0.",
        ("layer", "1"): "layer.1.",
        ("layer", "outside"): "embeddings",
        ("kind", "norm"): "Norm",
    }
    for (by, name), part in parts.items():
        one = group(found, by, name)
        pieces = [flat(vector, part) for vector in (a, b, c)]
        assert one.norms == pytest.approx([float(piece.norm()) for piece in pieces], rel=1e-6)
        assert one.base == pytest.approx(float(flat(base, part).norm()), rel=1e-6)
        assert one.parameters == len(pieces[0])
        for i, x in enumerate(pieces):
            for j, y in enumerate(pieces):
                assert one.cosine[i][j] == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-6)
    assert sum(one.tensors for one in found.groups if one.by == "kind") == group(found, "whole", "").tensors


def pair(found: Doctor, a: str, b: str) -> Pair:
    return next(one for one in found.pairs if (one.a, one.b) == (a, b))


def test_pairs(folder: Path) -> None:
    found, (a, _, c) = seen(*"abc"), vectors(*"abc")
    one, x, y = pair(found, "a", "c"), flat(a), flat(c)
    least = torch.minimum(x.abs(), y.abs())
    assert one.overlap == pytest.approx(float(least.sum() / torch.maximum(x.abs(), y.abs()).sum()), rel=1e-5)
    assert one.conflict == pytest.approx(float(least[x * y < 0].sum() / least.sum()), rel=1e-5)
    assert one.distance == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert one.projection == pytest.approx(float(x @ y / (x @ x)), abs=1e-6)
    assert one.back == pytest.approx(float(x @ y / (y @ y)), abs=1e-6)
    names = matrices(a)
    above = sum(float((c[name] @ a[name].T).square().sum()) for name in names)
    below = sum(float((a[name] @ a[name].T).square().sum()) for name in names)
    assert one.b_on_a == pytest.approx(math.sqrt(above / below), rel=1e-4)
    shared = []
    for name in names:
        left, right = (np.linalg.svd(vector[name].numpy())[2][:16] for vector in (a, c))
        shared.append(float(((left @ right.T) ** 2).sum() / 16))
    assert one.inputs == pytest.approx(np.mean(shared), rel=1e-3)
    assert one.inputs_by_chance == pytest.approx(np.mean([16 / a[name].shape[1] for name in names]))


def eq21(merged: Mapping[str, Tensor], taus: list[dict[str, Tensor]], *, weighed: bool = False) -> list[float]:
    """By task: Σ over matrices of ‖(τ_m − τ_i) τ_iᵀ‖², over ‖τ_i‖² where `weighed`; else relative to θ₀, its root."""
    found = []
    for tau in taus:
        terms = [
            ((merged[name] - tau[name]) @ tau[name].T).square().sum() / (tau[name].square().sum() if weighed else 1)
            for name in matrices(tau)
        ]
        own = [(tau[name] @ tau[name].T).square().sum() for name in matrices(tau)]
        found.append(float(sum(terms)) if weighed else math.sqrt(float(sum(terms)) / float(sum(own))))
    return found


def harm(found: Doctor, method: str) -> Harm:
    return [one for one in found.harms if one.method == method][-1]


def test_what_merges_would_do_is_what_they_do(folder: Path) -> None:
    found, taus = seen(*"abc"), vectors(*"abc")
    opened = [as_vector(thetau.open(name), thetau.open("base")) for name in "abc"]
    average = {name: sum(tau[name] for tau in taus) / 3 for name in taus[0]}
    assert harm(found, "average").whole == pytest.approx(eq21(average, taus), rel=1e-4)
    assert found.best_scale is not None
    summed = {name: found.best_scale * sum(tau[name] for tau in taus) for name in taus[0]}
    assert harm(found, "task_arithmetic").scale == found.best_scale
    assert harm(found, "task_arithmetic").whole == pytest.approx(eq21(summed, taus), rel=1e-4)
    for word, (name, fields) in TRIED.items():
        merged = {key: value.double() for key, value in thetau.merge(opened, build(name, dict(fields))).state_dict().items()}
        assert harm(found, word).whole == pytest.approx(eq21(merged, taus), rel=1e-3)
    assert max(harm(found, "wudi").whole) < min(harm(found, "average").whole)
    layers = [harm(found, "average").layers[layer] for layer in "01"]
    for i in range(3):
        assert min(layer[i] for layer in layers) <= harm(found, "average").whole[i] <= max(layer[i] for layer in layers)


def test_the_scale_is_where_equation_21_is_least(folder: Path) -> None:
    found, taus = seen(*"abc"), vectors(*"abc")

    def whole(scale: float) -> float:
        merged = {name: scale * sum(tau[name] for tau in taus) for name in matrices(taus[0])}
        return sum(eq21(merged, taus, weighed=True))

    assert found.best_scale == pytest.approx(float(minimize_scalar(whole, bounds=(0, 2), method="bounded").x), abs=1e-4)


def test_orthogonal_tasks_want_their_sum(folder: Path) -> None:
    base = weights(0)
    for number, name in enumerate("xy"):
        moved = {key: value.clone() for key, value in base.items()}
        for key in matrices(base):
            moved[key][:, 2 * number : 2 * number + 2] += 0.1  # inputs that the other never sees
        write_model(folder / name, moved)
    found = seen("x", "y")
    assert found.best_scale == pytest.approx(1, abs=1e-4)
    assert pair(found, "x", "y").a_on_b == pytest.approx(0, abs=1e-4)
    said = next(one for one in found.advice if one.topic == "conflict")
    assert "No two of the models" in said.sentence and said.models == ()


def test_tall_matrices_are_estimated_from_signs_within_what_they_can_err() -> None:
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(2, 1200, 12, generator=generator)
    found = products_of(stack, {"sum": stack.sum(0)}, "w")
    exact = torch.stack([torch.stack([(one @ other.T).double().square().sum() for other in stack]) for one in stack])
    # A quadratic form of ±1 has variance 2(‖B‖² − diagonal²) ≤ 2‖B‖² ≤ 2 tr(B)² /rank where the spectrum is flat; 64 are averaged.
    assert torch.allclose(found.cross, exact, rtol=5 * math.sqrt(2 / (64 * 12)))
    assert torch.allclose(found.left["sum"], found.scaled(1.0), rtol=1e-3)
    assert torch.allclose(found.scaled(1.0)[0], found.cross[1, 0], rtol=1e-3), "of two tasks the other one is what is too much"


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_leading_directions_are_singular_vectors_on_their_sides(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = decomposition(matrix, stream("x"))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert found.outputs.shape == (shape[0], 16) and found.inputs.shape == (shape[1], 16)
    assert torch.allclose((found.outputs.T @ u[:, :16]).abs().diagonal(), torch.ones(16), atol=1e-3)
    assert torch.allclose((vt[:16] @ found.inputs).abs().diagonal(), torch.ones(16), atol=1e-3)


def test_fused_and_transposed_matrices_are_looked_at_as_the_matrices_that_they_are(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    base = {
        "transformer.h.0.attn.c_attn.weight": torch.randn(8, 24, generator=generator),
        "transformer.h.0.mlp.c_fc.weight": torch.randn(8, 32, generator=generator),
    }
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 2}
    write_model(folder / "g", base, config)
    for seed, name in enumerate("xy"):
        write_model(folder / name, shifted(base, seed), config)
    root = thetau.open("g")
    found = measure({name: as_vector(thetau.open(name), root) for name in "xy"}, tried={})
    assert sorted(one.shape for one in found.tensors) == [(8, 8), (8, 8), (8, 8), (32, 8)]
    x, y = (
        (load_file(f"{name}/model.safetensors")["transformer.h.0.mlp.c_fc.weight"] - base["transformer.h.0.mlp.c_fc.weight"]).T
        for name in "xy"
    )
    (mlp,) = [one for one in found.tensors if one.shape == (32, 8)]
    assert mlp.products is not None
    assert float(mlp.products.cross[1, 0]) == pytest.approx(float((y @ x.T).square().sum()), rel=1e-4)


def test_workers_and_windows_change_nothing_that_counts(folder: Path) -> None:
    first, second = seen(*"abc"), seen(*"abc", engine=Engine(workers=3, window=100))
    assert first.findings == second.findings and first.spectra == second.spectra
    for one, two in zip(first.harms, second.harms, strict=True):
        assert one.whole == pytest.approx(two.whole, rel=1e-9)


def test_a_small_budget_leaves_out_what_needs_whole_matrices(folder: Path) -> None:
    opened = {name: as_vector(thetau.open(name), thetau.open("base")) for name in "ab"}
    small = measure(opened, tried={}, engine=Engine(workers=1, window=64, max_memory=50_000))
    short = [one for one in small.tensors if one.short]
    assert short and all(one.products is None and one.directions == () for one in short)
    for one, other in zip(small.tensors, measure(opened, tried={}).tensors, strict=True):
        assert torch.allclose(one.gram, other.gram, rtol=1e-9)


def test_what_is_left_out_takes_no_part_in_the_sums(folder: Path) -> None:
    shutil.copytree("a", "again")
    found, without = seen("a", "b", "again", "c"), seen("a", "b", "c")
    assert found.staying == ("a", "b", "c") and found.best_scale == pytest.approx(without.best_scale)
    for one, other in zip(found.harms, without.harms, strict=True):
        assert one.whole == pytest.approx(other.whole, rel=1e-6)


def test_many_models_are_looked_at_on_fewer_places(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"m{number}" for number in range(18)]
    for number, name in enumerate(names):
        write_model(folder / name, shifted(weights(0), 200 + number))
    opened = {name: as_vector(thetau.open(name), thetau.open("base")) for name in names}
    whole = {one.name: one for one in measure(dict(list(opened.items())[:3]), tried={}).tensors}
    monkeypatch.setattr("thetau.diagnostics.vectors.PAIRED", 1)
    for one in measure(opened, tried={}).tensors:
        assert torch.allclose(one.gram[:3, :3], whole[one.name].gram, rtol=1e-9)
        if one.elements > 1024:
            assert 0 < float(one.overlap.size[0]) < float(whole[one.name].overlap.size[0])
        if one.products is not None:
            wanted = whole[one.name].products
            assert wanted is not None
            # 24 or more signed sums of a matrix whose spectrum is that of noise: √(2/24) of a sum over about 12 directions
            assert torch.allclose(one.products.cross[:3, :3], wanted.cross, rtol=0.5)
    code, text = run(capsys, "doctor", "base", *names, "-q")
    assert code == 0 and "pairs that do most to each other" in text
    assert "random signed sums of their rows" in text and max(map(len, text.splitlines())) < 400


# What is said.


def test_one_model_needs_no_merge(folder: Path) -> None:
    found = seen("a")
    assert found.pairs == () and found.harms == ()
    assert any("Nothing is to be merged" in one.sentence for one in found.advice)


def test_adapters_are_sent_to_the_methods_for_adapters(folder: Path) -> None:
    for seed, name in enumerate("xy"):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        module = f"base_model.model.{QUERY.removesuffix('.weight')}"
        factors = {
            f"{module}.lora_A.weight": torch.randn(2, WIDTH, generator=generator),
            f"{module}.lora_B.weight": 0.001 * torch.randn(WIDTH, 2, generator=generator),
        }
        save_file(factors, folder / name / "adapter_model.safetensors")
    base = thetau.open("base")
    found = examine(base, [thetau.open(name, base=base) for name in "xy"])
    assert {one.form for one in found.models} == {"adapter"}
    method = next(one for one in found.advice if one.topic == "method")
    assert "thetau adapter merge" in method.sentence and not [one for one in found.advice if one.topic == "scale"]
    rank = max(one.effective_rank for one in found.spectra)
    assert rank <= 2 + 1e-4
    assert found.findings == (), "short as they are, adapters are not rounded relative to the base"
    shutil.copytree("x", "twin")
    twins = examine(base, [thetau.open(name, base=base) for name in ("x", "twin", "y")])
    assert [(one.kind, set(one.models)) for one in twins.findings] == [("duplicate", {"x", "twin"})]


def test_models_without_blocks_still_get_advice(folder: Path) -> None:
    plain = {"table": torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}
    save_file(plain, "plain.safetensors")
    for seed, name in enumerate("xy"):
        save_file(shifted(plain, seed), f"{name}.safetensors")
    found = examine(thetau.open("plain.safetensors"), [thetau.open(f"{name}.safetensors") for name in "xy"])
    assert found.harms == () and any("task_arithmetic" in one.sentence for one in found.advice if one.topic == "method")


def test_side_files_and_dtypes_are_to_be_checked(folder: Path) -> None:
    for name, text in (("base", "{{ a }}"), ("a", "{{ b }}")):
        Path(name, "chat_template.jinja").write_text(text)
    held = load_file("b/model.safetensors")
    save_file({name: value.half() for name, value in held.items()}, "b/model.safetensors")
    checks = " ".join(one.sentence + one.evidence for one in seen(*"abc").advice if one.topic == "check")
    assert "chat template differs" in checks and "float16, float32" in checks


def test_on_the_command_line_and_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "doctor", "base", "a", "second=b", "c", "-q", "--json", "seen.json")
    assert code == 0, text
    assert "nothing: every model fits the base" in text and "Begin with `bilateral`" in text
    found = load_result(Doctor, Path("seen.json"))
    assert found.compared == ("a", "second", "c")
    assert (
        found == examine(thetau.open("base"), [thetau.open("a"), thetau.open("b", name="second"), thetau.open("c")])
        or found.harms
    )
    code, text = run(capsys, "doctor", "base", "a", "nowhere", "-q")
    assert code != 0 and "nowhere" in text and "Traceback" not in text
    code, text = run(capsys, "doctor", "base", "-q")
    assert code != 0 and "Traceback" not in text


def test_names_with_markup_are_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "doctor", "base", "[red]x[/red]=a", "<script>=b", "-q")
    assert code == 0 and "[red]x[/red]" in text and "<script>" in text


def test_hit_rates_stand_beside_the_advice_and_say_where_they_are_chance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {one.topic: one for one in seen(*"abc").advice}
    for topic in ("conflict", "method", "scale"):
        rate = said[topic].measured
        assert rate is not None and 0 <= rate.hits <= rate.n and rate.low <= rate.hits / rate.n <= rate.high and rate.what
    doubtful = said["conflict"].measured
    assert doubtful is not None
    assert ("no better than a coin" in said["conflict"].uncertainty) == (doubtful.low <= 0.5)
    monkeypatch.setattr("thetau.diagnostics.advice.measured", lambda topic: None)
    assert all(one.measured is None for one in seen(*"abc").advice)


def test_wilson_is_the_textbook_interval() -> None:
    """Brown, Cai and DasGupta (2001): p̂ ± solves (p̂ − p)² = z² p(1 − p)/n."""
    for hits, n in ((0, 5), (3, 7), (9, 9)):
        for bound in wilson(hits, n):
            if 0 < bound < 1:
                assert (hits / n - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n)


def test_the_family_names_are_those_of_the_truth() -> None:
    assert {name for pair in TRUTH.values() for name in pair} >= set(CLEAN)
