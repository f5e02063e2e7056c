"""The paradigms of the loop: what each trains, the penalty, resuming, what is refused; and arithmetic in the tangent space."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thetau.errors import DataError
from thetau.evaluate import Evaluator
from thetau.evaluate.spaces import TangentSpace, WeightSpace
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.output import read_record
from thetau.models import Encoder, load_encoder, read_weights
from thetau.models.parts import chosen_names
from thetau.studies.arithmetic import addition, analogy, negation, out_of_distribution
from thetau.tasks import Task, load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

FAST = FinetuneConfig(steps=20, lr=5e-3, batch_size=16, max_length=32)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return load_encoder(make_model(tmp_path / "base"))


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return [load_task(make_task(tmp_path / "data", name)) for name in ("animals", "weather")]


def moved(encoder: Encoder, out: Path) -> set[str]:
    base = encoder.weights()
    return {name for name, tensor in read_weights(out).items() if not torch.equal(tensor, base[name])}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"paradigm": "attention"}, {"attention.weight"}),
        ({"paradigm": "standard", "scope": "attention+bias"}, {"attention.weight", "attention.bias"}),
        ({"paradigm": "attention+linear"}, {"attention.weight"}),
        ({"paradigm": "standard", "scope": "*.intermediate.dense.weight"}, {"intermediate.weight"}),
    ],
)
def test_only_the_scope_moves(
    encoder: Encoder, tasks: list[Task], tmp_path: Path, config: dict[str, Any], expected: set[str]
) -> None:
    finetune(encoder, tasks[0], tmp_path / "out", replace(FAST, **config), base="tiny")
    found = {
        f"{'attention' if '.attention.' in name else name.split('.')[3]}.{name.split('.')[-1]}"
        for name in moved(encoder, tmp_path / "out")
    }
    assert found == expected
    assert not any("LayerNorm" in name for name in moved(encoder, tmp_path / "out"))


def test_a_linear_run_says_that_its_vector_is_of_the_tangent_space(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    from safetensors import safe_open

    result = finetune(encoder, tasks[0], tmp_path / "out", replace(FAST, paradigm="linear"), base="tiny")
    assert result.tangent
    assert result.last_loss < result.first_loss
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["thetau.space"] == "tangent"


def test_the_penalty_keeps_other_inputs_unchanged(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    """The same run with a strong penalty moves the other task's features far less."""
    evaluator = Evaluator(encoder, tasks, max_length=32)
    base = encoder.parameters(encoder.weights())
    change = {}
    for name, config, against in (
        ("free", replace(FAST, paradigm="linear"), []),
        ("kept", replace(FAST, paradigm="taujp", strength=30.0, penalty_batch=16), tasks[1:]),
        ("strict", replace(FAST, paradigm="taujp", strength=30.0, penalty_batch=16, penalty="strict"), tasks[1:]),
    ):
        evaluator.load_base()
        finetune(encoder, tasks[0], tmp_path / name, config, base="tiny", against=against)
        live = encoder.parameters(read_weights(tmp_path / name))
        space = TangentSpace(evaluator, {"a": {key: tensor - base[key] for key, tensor in live.items()}})
        change[name] = float(space.terms("a", "weather", "test")[1].square().sum(-1).mean())
    assert change["kept"] < 0.3 * change["free"]
    assert change["strict"] == pytest.approx(change["kept"], rel=0.2)  # one other task: both are the same sum


@pytest.mark.parametrize("paradigm", ["standard", "taujp"])
def test_an_interrupted_run_goes_on_to_the_same_bits(encoder: Encoder, tasks: list[Task], tmp_path: Path, paradigm: str) -> None:
    config = replace(FAST, paradigm=paradigm, save_every=4)
    others = tasks[1:] if paradigm == "taujp" else []
    whole = finetune(encoder, tasks[0], tmp_path / "whole", config, base="tiny", against=others)

    def stop(step: int, loss: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, tasks[0], tmp_path / "cut", config, base="tiny", against=others, tick=stop)
    assert not (tmp_path / "cut").exists()
    steps: list[int] = []
    again = finetune(
        encoder, tasks[0], tmp_path / "cut", config, base="tiny", against=others, tick=lambda step, loss: steps.append(step)
    )
    assert steps == list(range(9, 21)), "the first eight steps are not done again"
    assert again.weights_hash == whole.weights_hash
    assert not list(tmp_path.glob(".cut*"))


def test_joint_training_learns_all_tasks(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    finetune(encoder, tasks, tmp_path / "mtl", replace(FAST, paradigm="mtl", steps=60), base="tiny")
    found = Evaluator(encoder, tasks, max_length=32).evaluate(read_weights(tmp_path / "mtl"), "test")
    assert min(one.value for one in found.values()) > 0.85
    assert (read_record(tmp_path / "mtl") or {})["tasks"] == ["animals", "weather"]


def test_a_vector_is_trained_further_and_its_course_kept(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    finetune(encoder, tasks[0], tmp_path / "linear", replace(FAST, paradigm="linear"), base="tiny")
    config = replace(FAST, paradigm="taujp", strength=1.0, steps=6)
    finetune(
        encoder, tasks[0], tmp_path / "on", config, base="tiny", against=tasks[1:], start=tmp_path / "linear", snapshots=(0, 6)
    )
    from safetensors.torch import load_file

    first, last = (load_file(tmp_path / "on" / "snapshots" / f"{step:06d}.safetensors") for step in (0, 6))
    begun, ended = read_weights(tmp_path / "linear"), read_weights(tmp_path / "on")
    for name in first:
        torch.testing.assert_close(first[name], begun[name])
        torch.testing.assert_close(last[name], ended[name])


def test_what_is_refused(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    def run(config: FinetuneConfig, **options: Any) -> None:
        finetune(encoder, options.pop("task", tasks[0]), tmp_path / "out", config, base="tiny", **options)

    with pytest.raises(DataError, match="needs at least one other task"):
        run(replace(FAST, paradigm="taujp"))
    with pytest.raises(DataError, match="are for paradigm taujp"):
        run(FAST, against=tasks[1:])
    with pytest.raises(DataError, match="trains on one task"):
        run(FAST, task=tasks)
    with pytest.raises(DataError, match="no task was learnt before"):
        run(replace(FAST, paradigm="taujp", penalty="incremental"), against=tasks)
    with pytest.raises(DataError, match="says nothing of the tangent space"):
        run(replace(FAST, paradigm="linear"), start=encoder.folder)
    with pytest.raises(DataError, match=r"the pattern '\*q_proj\*' matches no parameter"):
        run(replace(FAST, scope="*q_proj*"))
    with pytest.raises(DataError, match="no attention weights are known"):
        chosen_names({"body.0.weight": (3, 3)}, "attention")
    with pytest.raises(ValueError, match="lora joins with mtl only"):
        FinetuneConfig(paradigm="lora+linear")
    assert not (tmp_path / "out").exists()


def test_arithmetic_in_both_spaces(encoder: Encoder, tasks: list[Task], tmp_path: Path) -> None:
    names = [task.name for task in tasks]
    evaluator = Evaluator(encoder, tasks, max_length=32)
    base = encoder.weights()
    live = encoder.parameters(base)
    tangent, weights = {}, {}
    for task in tasks:
        evaluator.load_base()
        finetune(encoder, task, tmp_path / task.name, replace(FAST, paradigm="linear"), base="tiny")
        found = read_weights(tmp_path / task.name)
        tangent[task.name] = {name: tensor - live[name] for name, tensor in encoder.parameters(found).items()}
        weights[task.name] = {name: tensor - base[name] for name, tensor in found.items() if tensor.is_floating_point()}
    linear = TangentSpace(evaluator, tangent, tmp_path / "cache")
    plain = WeightSpace(evaluator, base, weights)
    for space in (linear, plain):
        assert space.accuracy({}, "animals", "test") == evaluator.evaluate(base, "test", ["animals"])["animals"]
        added = addition(space, names, grid=(0.0, 0.5, 1.0))
        assert added.tuned.alpha in (0.0, 0.5, 1.0)
        assert added.individual == {name: space.accuracy({name: 1.0}, name, "test") for name in names}
        gone = negation(space, "animals", "weather", grid=(0.0, 1.0, 2.0))
        assert gone.tuned.qualified
        assert gone.tuned.target.value <= gone.pretrained_target.value + 0.2
        assert [one.task for one in out_of_distribution(space, names, grid=(0.0, 1.0))] == names
    # The sum in the linear form is the linear form of the sum.
    both = {name: tangent["animals"][name] + tangent["weather"][name] for name in tangent["animals"]}
    whole = TangentSpace(evaluator, {"both": both})
    torch.testing.assert_close(
        linear.features(dict.fromkeys(names, 1.0), "animals", "test"), whole.features({"both": 1.0}, "animals", "test")
    )
    again = TangentSpace(evaluator, tangent, tmp_path / "cache")
    torch.testing.assert_close(again.terms("animals", "weather", "test"), linear.terms("animals", "weather", "test"))
    with pytest.raises(DataError, match="three different task vectors"):
        analogy(linear, "animals", "weather", "animals", "weather")
    with pytest.raises(DataError, match="the control task must be another one"):
        negation(linear, "animals", "animals")
    with pytest.raises(DataError, match="no task vector 'x'"):
        linear.accuracy({"x": 1.0}, "animals", "test")
