"""Adapters extracted, added and merged, against dense sums in plain torch and against PEFT."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thetau
from thetau.adapters import Adapter, Cut, Factors, add, clear_merge, extract, merge, open_adapter, robust_merge
from thetau.errors import AlignmentError, CheckpointError, RecipeError
from thetau.methods import Average, DareTies, Fisher, Karcher, TaskArithmetic, Ties, TsvM
from tiny_adapters import HIDDEN, Mixture, Pictures, gpt2, llama, unet

Build = Callable[[], nn.Module]
SETS: dict[str, tuple[Build, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "convolutions": (Pictures, {"target_modules": ["conv", "point", "line", "out"]}),
    "biases of B": (Pictures, {"target_modules": ["conv", "out"], "lora_bias": True}),
    "experts": (Mixture, {"target_modules": ["first"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "one rank for all": (llama, {"target_modules": ["q_proj"], "rank": 3}),
}


class Bench:
    """A base and three adapters of several ranks and scales, and what each adds to the base in PEFT."""

    def __init__(self, folder: Path, kind: str, count: int = 3) -> None:
        self.build, options = SETS[kind]
        options = dict(options)
        rank = options.pop("rank", None)
        self.paths, self.deltas = [], []
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in range(count):
                torch.manual_seed(0)
                model = self.build()
                self.base = {name: value.clone() for name, value in model.state_dict().items()}
                r = rank or (3 if kind == "experts" else 2 + task)
                tuned = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=3 + task, use_rslora=task == 1, **options))
                torch.manual_seed(task + 1)
                with torch.no_grad():
                    for parameter in tuned.parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.1 * torch.randn_like(parameter))
                tuned.save_pretrained(folder / f"task{task}", save_embedding_layers=False)
                self.paths.append(folder / f"task{task}")
                merged = tuned.merge_and_unload().state_dict()
                self.deltas.append({name: merged[name] - value for name, value in self.base.items()})
        self.adapters = [open_adapter(path) for path in self.paths]
        self.source = thetau.open(self.base).terms[0][1]

    def total(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """θ₀ + Σ w·Δ, dense."""
        return {
            name: value + sum(weight * delta[name] for weight, delta in zip(weights, self.deltas, strict=True))
            for name, value in self.base.items()
        }

    def loaded(self, folder: Path) -> dict[str, Tensor]:
        """What PEFT makes of an adapter that was written."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = peft.PeftModel.from_pretrained(self.build(), folder)
            state: dict[str, Tensor] = model.merge_and_unload().state_dict()
        return state


def close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# Sums.


@pytest.mark.parametrize("kind", SETS)
def test_a_sum_is_the_dense_sum_for_us_and_for_peft(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, kind)
    weights = [1.0, -0.5, 2.0]
    made = add(bench.adapters, weights, base=bench.source)
    made.save(tmp_path / "sum")
    assert made.error == 0
    want = bench.total(weights)
    close(thetau.open(tmp_path / "sum", base=bench.base).state_dict(), want)
    close(bench.loaded(tmp_path / "sum"), want)


def test_pefts_linear_is_no_sum(tmp_path: Path) -> None:
    """It sums A and B apart; ours and its own `cat` are exact."""
    bench = Bench(tmp_path, "one rank for all", count=2)
    weights = [1.0, -0.5]
    add(bench.adapters, weights).save(tmp_path / "sum")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice to PEFT
        torch.manual_seed(0)
        model = peft.PeftModel.from_pretrained(bench.build(), bench.paths[0], adapter_name="a")
        model.load_adapter(bench.paths[1], adapter_name="b")
    found: dict[str, dict[str, Tensor]] = {}
    for how in ("cat", "linear"):
        model.add_weighted_adapter(["a", "b"], weights, how, combination_type=how)
        found[how] = {
            f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(how).detach()
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }
    got, want = thetau.open(tmp_path / "sum", base=bench.base).state_dict(), bench.total(weights)
    away = {"ours": 0.0, "cat": 0.0, "linear": 0.0}
    norm = 0.0
    for name in found["cat"]:
        delta = want[name] - bench.base[name]
        norm += float(delta.square().sum())
        away["ours"] += float((got[name] - want[name]).square().sum())
        for how in ("cat", "linear"):
            away[how] += float((found[how][name] - delta).square().sum())
    errors = {how: math.sqrt(value / norm) for how, value in away.items()}
    assert errors["ours"] < 1e-5
    assert errors["cat"] < 1e-5
    assert errors["linear"] > 0.3, errors


def test_a_sum_cut_to_an_error_keeps_to_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "linear")
    exact, cut = add(bench.adapters), add(bench.adapters, cut=Cut(error=0.3))
    for fit in cut.fits:
        full, got = (made.modules[fit.layer].factors.dense() for made in (exact, cut))
        assert float((full - got).norm()) == pytest.approx(fit.lost, rel=1e-9, abs=1e-12)
        assert fit.error <= 0.3
        assert fit.rank < exact.modules[fit.layer].factors.rank
    assert cut.error <= 0.3


def test_adapters_of_other_bases_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    first, other = Bench(tmp_path / "a", "linear", 1).adapters[0], tmp_path / "other"
    other.mkdir()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{path}.lora_A.weight": torch.ones(1, 7), f"{path}.lora_B.weight": torch.ones(16, 1)},
        other / "adapter_model.safetensors",
    )
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with pytest.raises(AlignmentError, match=r"q_proj' is linear with inputs \[7\] and 16 outputs, in .* linear with \[16\]"):
        add([first, open_adapter(other)])
    for weights in ([1.0, 2.0], [math.nan], []):
        with pytest.raises(RecipeError, match="must be finite numbers, one for each of 1 adapters"):
            add([first], weights)
    with pytest.raises(CheckpointError, match="no such adapter"):
        open_adapter(tmp_path / "nowhere")


def test_saved_modules_need_the_base(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "modules to save", 2)
    with pytest.raises(RecipeError, match=r"saves 'lm_head\.weight' whole, which can be added only over the model"):
        add(bench.adapters)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "DoRA"),
        (peft.LoHaConfig(r=2, target_modules=["q_proj"]), "LoHa"),
        (peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]), "trained tokens"),
    ],
)
def test_what_is_no_product_is_refused_by_name(tmp_path: Path, config: Any, said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice to PEFT
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"{said} at '.*' is no product of low rank.*adapter extract"):
        open_adapter(tmp_path / "a")


def test_nan_in_a_is_refused_by_name(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "linear", 1)
    file = bench.paths[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name][0, 0] = math.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight' holds NaN or infinite values"):
        add([open_adapter(bench.paths[0])])


# Extraction.


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "convolutions", "biases of B"])
def test_an_adapter_is_found_again_in_the_model_that_it_made(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, kind, 1)
    model = bench.total([1.0])
    base = thetau.open(bench.base)
    made = extract(thetau.open(model) - base, Cut(rank=2))
    made.save(tmp_path / "found")
    assert made.error < 1e-3  # of rank 2; what is left is float32's rounding of the models
    close(thetau.open(tmp_path / "found", base=bench.base).state_dict(), model, atol=1e-5)
    close(bench.loaded(tmp_path / "found"), model, atol=1e-5)


def test_extraction_of_a_whole_fine_tuning(tmp_path: Path) -> None:
    """Every tensor changes: products are the best of their rank, and norms and biases go whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = llama().state_dict()
        tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    for cut in (Cut(rank=3), Cut(error=0.5), Cut(rank=4, error=0.2)):
        made = extract(thetau.open(tuned) - thetau.open(base), cut)
        out = tmp_path / f"{cut.rank}-{cut.error}"
        made.save(out)
        got = thetau.open(out, base=base).state_dict()
        for fit in made.fits:
            delta, kept = (
                tuned[f"{fit.layer}.weight"] - base[f"{fit.layer}.weight"],
                got[f"{fit.layer}.weight"] - base[f"{fit.layer}.weight"],
            )
            s = torch.linalg.svdvals(delta.double())
            assert float(s[fit.rank :].norm()) == pytest.approx(fit.lost, rel=1e-6)
            assert float((delta - kept).norm()) == pytest.approx(fit.lost, rel=1e-4)
            assert fit.rank <= (cut.rank or 99)
            if cut.error is not None and cut.rank is None:
                assert fit.error <= cut.error
                assert float(s[fit.rank - 1 :].norm()) > cut.error * float(s.norm()), "no rank more than it takes"
        norms = [name for name in base if name.endswith("norm.weight")]
        assert norms
        close({name: got[name] for name in norms}, {name: tuned[name] for name in norms})


def test_extraction_of_nothing(tmp_path: Path) -> None:
    base = thetau.open(unet())
    with pytest.raises(AlignmentError, match="changes no layer that LoRA can adapt"):
        extract(thetau.open({name: value.clone() for name, value in unet().items()}) - base, Cut(rank=1))


# Merging.


@pytest.mark.parametrize("kind", [kind for kind in SETS if kind not in ("modules to save", "one rank for all")])
@pytest.mark.parametrize("space", ["product", "core", "knots"])
def test_linear_mergers_are_exact_in_every_space(tmp_path: Path, kind: str, space: Any) -> None:
    bench = Bench(tmp_path, kind)
    made = merge(bench.adapters, TaskArithmetic(scale=0.4), space=space, base=bench.source)
    made.save(tmp_path / "out")
    want = bench.total([0.4] * 3)
    if kind == "biases of B":  # no method sees them: the mean
        want |= {name: value for name, value in bench.total([1 / 3] * 3).items() if name.endswith("bias")}
    close(thetau.open(tmp_path / "out", base=bench.base).state_dict(), want, atol=3e-6)
    close(bench.loaded(tmp_path / "out"), want, atol=3e-6)
    assert made.error < 1e-6


@pytest.mark.parametrize("method", [Ties(density=0.4), Average(), TsvM(), DareTies()])
def test_methods_of_products_are_those_of_dense_vectors(tmp_path: Path, method: Any) -> None:
    bench = Bench(tmp_path, "convolutions")
    made = merge(bench.adapters, method, cut=Cut(rank=99), names=["a", "b", "c"])
    base = thetau.open(bench.base)
    vectors = [thetau.open(path, base=base) - base for path in bench.paths]
    with pytest.warns(thetau.ThetauWarning, match="probably not the model"):  # random adapters are long
        want = thetau.merge(vectors, method, names=["a", "b", "c"], exclude=["*.bias"]).state_dict()
    made.save(tmp_path / "out")
    got = thetau.open(tmp_path / "out", base=bench.base).state_dict()
    for name, delta in want.items():
        torch.testing.assert_close(got[name] - bench.base[name], delta, rtol=1e-4, atol=3e-6, msg=name)


def stacked(bench: Bench, layer: str) -> list[Tensor]:
    return [delta[f"{layer}.weight"].double() for delta in bench.deltas]


def test_core_space_against_dense_bases(tmp_path: Path) -> None:
    """TIES on M_t = Uᵀ Δ_t V, U and V the singular vectors of all B's and all A's, laid out in full here."""
    bench = Bench(tmp_path, "linear")
    method = Ties(density=0.5, trim="tensor")
    made = merge(bench.adapters, method, space="core")
    for layer, module in made.modules.items():
        parts = [adapter.module(layer).factors for adapter in bench.adapters]
        left = torch.linalg.svd(torch.cat([part.b[0] for part in parts], 1), full_matrices=False)[0]
        right = torch.linalg.svd(torch.cat([part.a[0] for part in parts]), full_matrices=False)[2]
        cores = [left.T @ delta @ right.T for delta in stacked(bench, layer)]
        trimmed = []
        for core in cores:
            size = core.abs().flatten().sort(descending=True).values
            trimmed.append(core * (core.abs() >= size[math.ceil(0.5 * core.numel()) - 1]))
        sign = torch.stack(trimmed).sum(0).sign()
        agree = torch.stack([core * (core.sign() == sign) for core in trimmed])
        merged = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
        torch.testing.assert_close(module.factors.dense()[0], left @ merged @ right, rtol=1e-4, atol=1e-6, msg=layer)


def test_knots_against_the_dense_decomposition(tmp_path: Path) -> None:
    """TIES on ΣV_t of the whole [Δ_1 … Δ_K], laid out in full here."""
    bench = Bench(tmp_path, "linear")
    made = merge(bench.adapters, Ties(density=0.5, trim="tensor"), space="knots")
    for layer, module in made.modules.items():
        deltas = stacked(bench, layer)
        u, s, vt = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        kept = int((s > 1e-5).sum())
        parts = (s[:kept, None] * vt[:kept]).chunk(len(deltas), 1)
        trimmed = []
        for part in parts:
            size = part.abs().flatten().sort(descending=True).values
            trimmed.append(part * (part.abs() >= size[math.ceil(0.5 * part.numel()) - 1]))
        sign = torch.stack(trimmed).sum(0).sign()
        agree = torch.stack([part * (part.sign() == sign) for part in trimmed])
        merged = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
        torch.testing.assert_close(module.factors.dense()[0], u[:, :kept] @ merged, rtol=1e-4, atol=1e-6, msg=layer)


@pytest.mark.parametrize("space", ["core", "knots", "clear"])
def test_no_matrix_of_the_bases_size_is_made(tmp_path: Path, space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 3000 × 3000: 72 MB each as float64, where everything here fits into 20 MB."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for task in "ab":
            folder = tmp_path / task
            folder.mkdir()
            path = "base_model.model.layers.0.self_attn.q_proj"
            pair = {f"{path}.lora_A.weight": torch.randn(4, 3000), f"{path}.lora_B.weight": torch.randn(3000, 4)}
            save_file(pair, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, value.numel()) if isinstance(value, Tensor) else largest
            return out

    with Watch():
        opened = [open_adapter(tmp_path / task) for task in "ab"]
        made = clear_merge(opened) if space == "clear" else merge(opened, TaskArithmetic(), space=space)
    assert made.modules
    assert 0 < largest <= 8 * 6000


def test_equal_adapters_and_zeros(tmp_path: Path) -> None:
    """K copies of one adapter merge to it under a mean, with the rank that it has; zeros stay zeros."""
    bench = Bench(tmp_path, "linear", 1)
    zero = tmp_path / "zero"
    zero.mkdir()
    tensors = load_file(bench.paths[0] / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, zero / "adapter_model.safetensors")
    (zero / "adapter_config.json").write_text((bench.paths[0] / "adapter_config.json").read_text())
    for space in ("product", "core", "knots"):
        made = merge([bench.adapters[0]] * 3, Average(), space=space)  # type: ignore[arg-type]
        for layer, module in made.modules.items():
            want = bench.adapters[0].module(layer).factors
            torch.testing.assert_close(module.factors.dense(), want.dense(), rtol=1e-5, atol=1e-7)
            assert module.factors.rank <= want.rank or space == "product"
        nothing = merge([open_adapter(zero)] * 2, Ties(), space=space)  # type: ignore[arg-type]
        assert nothing.error == 0
        assert all(not module.factors.dense().any() for module in nothing.modules.values())


def test_methods_that_look_at_more_than_vectors_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "linear", 2)
    for method in (Fisher(), Karcher()):
        with pytest.raises(RecipeError, match="look at neither the base nor data"):
            merge(bench.adapters, method)


# The default.


@pytest.mark.parametrize("kind", [kind for kind in SETS if kind not in ("one rank for all",)])
def test_the_default_is_written_as_peft_reads_it(tmp_path: Path, kind: str) -> None:
    """One adapter comes back as it was; of several, PEFT's weights are ours, and nothing is lost without a cut."""
    bench = Bench(tmp_path, kind)
    clear_merge(bench.adapters[:1], base=bench.source).save(tmp_path / "one")
    close(bench.loaded(tmp_path / "one"), {n: v + bench.deltas[0][n] for n, v in bench.base.items()}, atol=3e-6)
    made = clear_merge(bench.adapters, base=bench.source)
    assert made.error == 0
    made.save(tmp_path / "out")
    got = thetau.open(tmp_path / "out", base=bench.base).state_dict()
    close(bench.loaded(tmp_path / "out"), got, atol=3e-6)
    assert any(not torch.allclose(got[name], value) for name, value in bench.total([1.0, 1.0, 1.0]).items()), "it is not the sum"
    cut = clear_merge(bench.adapters, base=bench.source, cut=Cut(rank=2))
    assert all(fit.rank <= 2 for fit in cut.fits)
    assert cut.error > 0


def test_the_default_scales_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "linear", 2)
    once, half = clear_merge(bench.adapters), clear_merge(bench.adapters, scale=0.5)
    for layer, module in once.modules.items():
        torch.testing.assert_close(half.modules[layer].factors.dense(), 0.5 * module.factors.dense())
    with pytest.raises(RecipeError, match="needs at least one adapter"):
        clear_merge([])
    for wrong in ({"damping": -0.1}, {"damping": math.inf}, {"damping": math.nan}, {"scale": math.nan}):
        with pytest.raises(RecipeError, match="`damping` must be at least 0 and `scale` a number"):
            clear_merge(bench.adapters, **wrong)


# RobustMerge.


def reference(a: list[Tensor], b: list[Tensor], density: float, quantile: float, scale: float) -> Tensor:
    """From the sheet, entry by entry."""
    kept_a, kept_b, raised = [], [], []
    for one, two in zip(a, b, strict=True):
        masks = []
        for matrix in (one, two):
            size = sorted(matrix.abs().flatten().tolist(), reverse=True)
            masks.append(matrix * (matrix.abs() >= size[round(density * matrix.numel()) - 1]))
        s = torch.tensor(
            [float(one[r].abs().sum() / masks[0][r].abs().sum()) if masks[0][r].any() else 1.0 for r in range(len(one))]
        )
        kept_a.append(masks[0])
        kept_b.append(masks[1])
        raised.append(s.double().clamp(min=float(torch.quantile(s.double(), quantile))))
    total = scale * sum(kept_a)
    columns = [
        scale * sum(s[r] * two[:, r] for s, two in zip(raised, kept_b, strict=True)) / sum(s[r] for s in raised)
        for r in range(len(a[0]))
    ]
    return torch.stack(columns, 1) @ total


def test_robustmerge_against_its_sheet(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "one rank for all")
    made = robust_merge(bench.adapters, density=0.3, quantile=0.8, scale=1.5)
    for layer, module in made.modules.items():
        parts = [adapter.module(layer).factors for adapter in bench.adapters]
        want = reference([part.a[0] for part in parts], [part.b[0] for part in parts], 0.3, 0.8, 1.5)
        torch.testing.assert_close(module.factors.dense()[0], want, rtol=1e-6, atol=1e-9)


def test_robustmerge_of_equal_adapters(tmp_path: Path) -> None:
    """K equal ones give 4K times their pruned product, as the authors' code does."""
    bench = Bench(tmp_path, "one rank for all", 1)
    made = robust_merge([bench.adapters[0]] * 3, density=1.0)
    for layer, module in made.modules.items():
        want = bench.adapters[0].module(layer).factors.dense()
        torch.testing.assert_close(module.factors.dense(), 12 * want, rtol=1e-6, atol=1e-9)


def test_robustmerge_says_what_it_cannot_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "linear", 2)
    with pytest.raises(AlignmentError, match=r"must have one rank. At '.*' they have 2, 3"):
        robust_merge(bench.adapters)
    with pytest.raises(RecipeError, match="`density` must be in"):
        robust_merge(bench.adapters, density=0)


# Spellings.


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_other_spellings_are_written_and_read(tmp_path: Path, layout: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tuned = {name: value + 0.1 * torch.randn_like(value) if "weight" in name else value for name, value in unet().items()}
    made = extract(thetau.open(tuned) - thetau.open(unet()), Cut(error=0))
    made.save(tmp_path / "style.safetensors", layout=layout)
    close(thetau.open(tmp_path / "style.safetensors", base=unet()).state_dict(), tuned, atol=1e-5)
    again: Adapter = open_adapter(tmp_path / "style.safetensors")
    assert again.ranks == {path: module.factors.rank for path, module in made.modules.items()} or all(
        "unet" in p for p in again.ranks
    )
    for name, tensor in load_file(tmp_path / "style.safetensors").items():
        assert name.startswith("lora_unet_down_blocks_0_" if layout == "kohya" else "unet.down_blocks.0."), name
        assert tensor.isfinite().all()


def test_spellings_that_cannot_hold_an_adapter(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "embedding", 1)
    with pytest.raises(RecipeError, match=r"kohya holds linear and convolution layers alone. Got 'model.embed_tokens'"):
        add(bench.adapters).save(tmp_path / "x.safetensors", layout="kohya")
    linear = add(Bench(tmp_path / "l", "linear", 1).adapters)
    with pytest.raises(RecipeError, match=r"must be one of unet, .* Got 'vae'"):
        linear.save(tmp_path / "x.safetensors", layout="kohya", component="vae")


# Factors.


def test_factors_decompose_and_measure_without_the_product() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        factors = Factors(a=torch.randn(2, 3, 7, dtype=torch.float64), b=torch.randn(2, 5, 3, dtype=torch.float64))
    u, s, vt = factors.svd()
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vt, factors.dense())
    assert factors.norm == pytest.approx(float(factors.dense().norm()))
    torch.testing.assert_close(factors.padded(6).dense(), factors.dense())
    assert factors.padded(6).rank == 6


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("error", -0.1), ("error", 1.0)])
def test_cuts_that_are_none(field: str, value: float) -> None:
    with pytest.raises(RecipeError, match=field):
        Cut(**{field: value})  # type: ignore[arg-type]


def test_a_mixtures_adapter_gives_the_sums_outputs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "experts")
    add(bench.adapters, [1, 1, -1]).save(tmp_path / "sum")
    model = Mixture()
    model.load_state_dict(bench.total([1, 1, -1]))
    other = Mixture()
    other.load_state_dict(bench.loaded(tmp_path / "sum"))
    with torch.no_grad():
        torch.testing.assert_close(other(**HIDDEN), model(**HIDDEN), rtol=1e-4, atol=1e-5)
