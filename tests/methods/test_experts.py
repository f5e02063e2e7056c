"""A mixture of experts gives the same merge whether its experts are stored one by one or in one tensor, in every layout that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import thetau
from mixtures import BLOCK, EXPERTS, FORMS, HIDDEN, INNER, LAYERS, State, alternating, folder, in_out, out_in, single, tuned
from thetau import methods
from thetau.engine.planning import plan
from thetau.errors import CheckpointError
from tiny_adapters import Mixture

METHODS: dict[str, Any] = {
    "task_arithmetic": methods.TaskArithmetic(scale=0.4),
    "ties": methods.Ties(density=0.3),
    "tsv_m": methods.TsvM(),
    "wudi": methods.Wudi(steps=5),
    "wudi, gradient flow": methods.Wudi(solver="gradient_flow"),
    "bilateral": methods.Bilateral(),
    "iso_c": methods.IsoC(),
    "svc": methods.Svc(then=methods.TsvM()),
    "awd before wudi": methods.Awd(then=methods.Wudi(solver="gradient_flow"), tensors="linear"),
    "patterns": methods.Wudi(solver="gradient_flow", tensors=("*.experts.1.*", "*self_attn*"), elsewhere="base"),
    "awd": methods.Awd(),
}


def merged(base: Any, models: list[Any], method: Any, **options: Any) -> State:
    start = thetau.open(base)
    vectors = [thetau.open(model, name=f"t{number}") - start for number, model in enumerate(models)]
    return (start + thetau.merge(vectors, method, **options)).state_dict()


def states(*, biases: bool = False, **sizes: int) -> tuple[State, list[State]]:
    base = single(0, biases=biases, **sizes)
    return base, [tuned(base, seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_the_form_changes_nothing(form: str, method: str) -> None:
    store, biases = FORMS[form]
    base, models = states(biases=biases)
    want = store(merged(base, models, METHODS[method]))
    got = merged(store(base), [store(model) for model in models], METHODS[method])
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("form", ["out_in", "in_out"])
@pytest.mark.parametrize("sizes", [{"hidden": 8, "inner": 8}, {"hidden": 8, "inner": 4}])
def test_equal_sides_leave_no_doubt(form: str, sizes: dict[str, int]) -> None:
    """The way back and the gate with the up projection tell each other's orientation, whatever the sizes."""
    store, _ = FORMS[form]
    base, models = states(**sizes)
    want = store(merged(base, models, methods.TsvM()))
    got = merged(store(base), [store(model) for model in models], methods.TsvM())
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("method", ["tsv_m", "bilateral"])
def test_a_base_and_models_in_different_forms(method: str) -> None:
    base, models = states()
    want = out_in(merged(base, models, METHODS[method]))
    got = merged(out_in(base), [models[0], out_in(models[1]), models[2]], METHODS[method])
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_gate_and_up_of_one_columns_width_follow_the_config(tmp_path: Path) -> None:
    """The same bytes are other matrices where a config says that gate and up alternate, and where it says that they do not."""
    base, models = states(biases=True)
    for kind, store in (("gpt_oss", alternating), ("llama4_text", in_out)):
        want = store(merged(base, models, methods.TsvM()))
        home = folder(tmp_path / kind, store(base), model_type=kind)
        got = merged(home, [store(model) for model in models], methods.TsvM())
        for name in (name for name in want if name in got):
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=f"{kind}: {name}")


@pytest.mark.parametrize("method", ["wudi, gradient flow", "awd before wudi", "awd"])
@pytest.mark.parametrize("store", [out_in, in_out])
def test_files_workers_and_windows_give_the_same_bits(tmp_path: Path, method: str, store: Any) -> None:
    base, models = states()
    homes = [folder(tmp_path / str(n), store(state), model_type="olmoe") for n, state in enumerate((base, *models))]
    alone = [folder(tmp_path / f"one{n}", state, model_type="olmoe") for n, state in enumerate((base, *models))]
    want = store(merged(alone[0], alone[1:], METHODS[method]))
    for number, engine in enumerate((thetau.Engine(workers=1), thetau.Engine(workers=3, window=7))):
        start = thetau.open(homes[0])
        vectors = [thetau.open(home, name=f"t{n}") - start for n, home in enumerate(homes[1:])]
        out = tmp_path / f"out{number}"
        (start + thetau.merge(vectors, METHODS[method], engine=engine)).save(out, engine=engine)
        thetau.verify(out)
        got = thetau.open(out).state_dict()
        assert all(torch.equal(got[name], value) for name, value in want.items())


def test_fields_by_pattern_mean_the_stored_tensor_too() -> None:
    base, models = states()
    by = {"*experts.gate_up_proj": 0.0, "*": 1.0}
    got = merged(out_in(base), [out_in(m) for m in models], methods.TsvM(scale=thetau.PerPattern(by)))
    start = out_in(base)
    for layer in range(LAYERS):
        at = BLOCK.format(layer)
        assert torch.equal(got[f"{at}experts.gate_up_proj"], start[f"{at}experts.gate_up_proj"])
        assert not torch.equal(got[f"{at}experts.down_proj"], start[f"{at}experts.down_proj"])


def test_each_tasks_output_of_a_matrix_method_is_of_the_stored_form() -> None:
    base, models = states()
    emitted = []
    for store in (lambda state: state, out_in):
        start = thetau.open(store(base))
        vectors = [thetau.open(store(model), name=f"t{n}") - start for n, model in enumerate(models)]
        outputs = thetau.outputs(vectors, methods.Twin(then=methods.TsvM()))
        emitted.append({name: vector.state_dict() for name, vector in outputs.items()})
    for name, vector in emitted[0].items():
        want = out_in(vector)
        assert all(torch.equal(emitted[1][name][tensor], value) for tensor, value in want.items())


# What is said, and what it takes.


def notes(base: State, models: list[State], method: Any, **options: Any) -> str:
    start = thetau.open(base, name="base")
    vectors = [thetau.open(model, name=f"t{n}") - start for n, model in enumerate(models)]
    merge = thetau.merge(vectors, method, **options)
    return "\n".join(note for _, source in merge.terms for note in source.notes)


def test_the_summary_says_what_was_done_with_experts_and_routers() -> None:
    base, models = (out_in(states()[0]), [out_in(model) for model in states()[1]])
    said = notes(base, models, methods.TsvM())
    count = LAYERS * EXPERTS * 3
    assert (
        f"{2 * LAYERS} tensors of stacked experts are merged expert by expert, as {count} matrices: 'model.layers.0.mlp" in said
    )
    assert f"{LAYERS} tensors of routers are merged like the others: 'model.layers.0.mlp.gate.weight'" in said
    said = notes(base, models, methods.TsvM(tensors=("*experts*",)))
    assert f"{LAYERS} tensors of routers are averaged: 'model.layers.0.mlp.gate.weight'" in said
    said = notes(base, models, methods.TaskArithmetic(), exclude=["*mlp.gate.weight"])
    assert f"{LAYERS} tensors of routers stay the base's, as what is left out by name" in said
    assert "experts" not in said.replace("experts are", "")


def test_the_plan_counts_single_experts(tmp_path: Path) -> None:
    """Operations are those of the single matrices, and what is read is read once."""
    base, models = states()
    took = {}
    for name, store in (("single", lambda state: state), ("fused", out_in), ("turned", in_out)):
        start = thetau.open(store(base))
        vectors = [thetau.open(store(model)) - start for model in models]
        took[name] = plan(start + thetau.merge(vectors, methods.Wudi()), engine=thetau.Engine(workers=1))
    assert took["fused"].flops == took["turned"].flops == took["single"].flops > 0
    one = 4 * EXPERTS * INNER * HIDDEN  # bytes of all experts' matrices of one role
    assert reads(took["fused"], "down") == 4 * one  # the base and three models
    assert (
        reads(took["fused"], "gate_up") == 2 * 4 * 2 * one
    )  # an expert's two halves, once for each, where they are not in a file
    homes = [folder(tmp_path / str(n), out_in(state)) for n, state in enumerate((base, *models))]
    start = thetau.open(homes[0])
    found = plan(
        start + thetau.merge([thetau.open(home) - start for home in homes[1:]], methods.Wudi()), engine=thetau.Engine(workers=1)
    )
    assert reads(found, "gate_up") == 4 * 2 * one  # of a file no more than what is wanted


def reads(found: Any, role: str) -> int:
    """Bytes that the last pass reads for a mixture's tensor."""
    return next(step.read for step in found.passes[-1].steps if step.name == f"{BLOCK.format(0)}experts.{role}_proj")


@pytest.mark.parametrize("turned", [False, True])
def test_memory_is_that_of_one_expert(turned: bool) -> None:
    shape, most = (384, 192), {}
    for experts in (1, 2, 12):
        generator = torch.Generator().manual_seed(experts)
        state = {
            f"model.layers.0.mlp.experts.{n}.down_proj.weight": torch.randn(shape, generator=generator) for n in range(experts)
        }
        if experts > 1:
            stacked = torch.stack(list(state.values()))
            state = {"model.layers.0.mlp.experts.down_proj": stacked.transpose(1, 2).contiguous() if turned else stacked}
            state["model.layers.0.mlp.gate.weight"] = torch.randn(experts, 384, generator=generator)
        start = thetau.open(state)
        vectors = [thetau.open({name: value * 1.01 for name, value in state.items()}, name=f"t{n}") - start for n in range(2)]
        engine = thetau.Engine(workers=1, window=64)
        method = methods.TsvM(tensors=("*experts*",), elsewhere="base")
        most[experts] = plan(start + thetau.merge(vectors, method), engine=engine).memory
    assert most[2] == most[12]
    assert most[12] <= most[1] + 8 * 4 * 384 * 192  # the expert as it is stored, and put together again


def test_a_value_that_is_no_number_is_refused_by_the_stored_name() -> None:
    base, models = (out_in(states()[0]), [out_in(model) for model in states()[1]])
    models[1][f"{BLOCK.format(1)}experts.gate_up_proj"][2, 3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.1\.mlp\.experts\.gate_up_proj' holds 1 NaN"):
        merged(base, models, methods.TsvM())


def test_a_model_of_another_dtype() -> None:
    base, models = states()
    want = out_in(merged(base, models[:2], methods.TsvM()))
    wide = {name: value.double() for name, value in out_in(models[1]).items()}
    got = merged(out_in(base), [out_in(models[0]), wide], methods.TsvM())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "bilateral", "wudi, gradient flow"])
@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_over_fused_experts(tmp_path: Path, method: str, transposed: bool) -> None:
    """The merge of adapters that PEFT put on experts' parameters is that of the dense models it makes of them, expert by expert."""
    sides = {"target_modules": ["first"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base: State = {}
    dense: list[State] = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Mixture(transposed=transposed)
            base = {name: value.clone() for name, value in module.state_dict().items()}
            model = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=4, **sides))
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(tmp_path / f"t{seed}")
            dense.append({name: value.clone() for name, value in model.merge_and_unload().state_dict().items()})
    start = thetau.open(base)
    vectors = [thetau.open(tmp_path / f"t{seed}", base=start) - start for seed in (1, 2)]
    got = (start + thetau.merge(vectors, METHODS[method])).state_dict()
    want = merged(base, dense, METHODS[method])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    stored, own = "experts.down_proj", "mlp.experts.0.down_proj.weight"
    for expert in range(len(base[stored])):
        way = (lambda value: value.T.contiguous()) if transposed else Tensor.contiguous
        alone = merged({own: way(base[stored][expert])}, [{own: way(state[stored][expert])} for state in dense], METHODS[method])
        torch.testing.assert_close(way(got[stored][expert]), alone[own], rtol=1e-4, atol=1e-5)
