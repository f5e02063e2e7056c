"""AdaMerging's coefficients: gradient against finite differences, steps against a plain loop through autograd, files, resumption, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import thetau
from commands import run
from thetau.errors import AlignmentError, DataError, OutputError, RecipeError
from thetau.evidence import CoefficientConfig, learn_coefficients
from thetau.evidence import adamerging as room
from thetau.evidence.adamerging import Learner, demand
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.batches import training_batches
from thetau.finetune.lesson import Lesson
from thetau.methods import AdaMerging, Awd, TaskArithmetic, Ties
from thetau.models import Encoder, load_encoder, weights_hash
from thetau.tasks import Task, load_task
from thetau.tasks.head import Head
from tiny import make_model, make_task
from tiny import one_thread as one_thread

F32 = torch.finfo(torch.float32).eps


class Points:
    """Inputs of five numbers."""

    hash = unlabelled = "points"
    truncated = 0

    def __init__(self, count: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.labels: Sequence[int] = [0] * count
        self.lengths = (1,) * count

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"x": self.x[list(indices)]}


class Bend(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=dtype))
        self.second = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=dtype))
        self.still = nn.Parameter(torch.ones(6, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize((x @ self.first).tanh() @ self.second * self.still, dim=-1)


def lessons(count: int = 20, dtype: torch.dtype = torch.float32) -> list[Lesson]:
    made = []
    for seed, name in enumerate(("ape", "bee")):
        classes = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        head = Head(classes=nn.functional.normalize(classes, dim=-1), scale=4.0)
        made.append(Lesson(name=name, inputs=Points(count, 10 + seed, dtype), head=head))
    return made


def vectors(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    shapes = {"first": (5, 4), "second": (4, 6)}
    return {
        task: {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(7 * seed + len(name)), dtype=dtype)
            for name, shape in shapes.items()
        }
        for seed, task in enumerate(("ape", "bee"))
    }


def loss(
    module: nn.Module,
    base: dict[str, Tensor],
    values: Tensor,
    group: Sequence[int],
    batches: Sequence[list[int]],
    given: Sequence[Lesson],
) -> Tensor:
    """The objective as the paper writes it, with every task vector in the graph."""
    taus = list(vectors(values.dtype).values())
    weights = {
        name: base[name] + sum(values[task, group[place]] * taus[task][name] for task in range(2))
        for place, name in enumerate(("first", "second"))
    }
    total = torch.zeros((), dtype=values.dtype)
    for lesson, batch in zip(given, batches, strict=True):
        shares = lesson.head.logits(functional_call(module, weights, (), lesson.inputs.batch(batch))).softmax(-1)
        total = total - (shares * shares.log()).sum(-1).mean()
    return total


@pytest.mark.parametrize("group", [(0, 1), (0, 0)])
def test_the_gradient_is_that_of_finite_differences(group: tuple[int, int]) -> None:
    """In float64: central differences err by h² and by rounding / h, so that h = 1e-5 leaves about 1e-10."""
    dtype = torch.float64
    module, given = Bend(dtype), lessons(dtype=dtype)
    base = {name: value.detach().clone() for name, value in module.named_parameters()}
    config = CoefficientConfig(batch=20, clamp=False)
    learner = Learner(module, given, vectors(dtype), config, groups=dict(zip(("first", "second"), group, strict=True)))
    learner.mix()
    for number in range(2):
        learner.entropies.entropy(number).backward()  # type: ignore[no-untyped-call]
    got = learner.slopes()
    batches = [list(range(20))] * 2
    width, h = max(group) + 1, 1e-5
    for task in range(2):
        for place in range(width):
            step = torch.zeros(2, width, dtype=dtype)
            step[task, place] = h
            start = torch.full((2, width), float(torch.tensor(0.3)), dtype=dtype)
            ends = [float(loss(Bend(dtype), base, start + sign * step, group, batches, given).detach()) for sign in (1, -1)]
            assert float(got[task, place]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("clamp", [True, False])
def test_the_first_steps_are_those_of_a_plain_loop_through_autograd(clamp: bool) -> None:
    config = CoefficientConfig(batch=8, lr=0.2, steps=6, clamp=clamp, seed=3)
    given = lessons()
    learner = Learner(Bend(), given, vectors(), config)
    assert learner.finish() is None
    module = Bend()
    base = {name: value.detach().clone() for name, value in module.named_parameters()}
    values = torch.full((2, 2), 0.3, requires_grad=True)
    adam = torch.optim.Adam([values], lr=0.2)
    picks = [training_batches((1,) * 20, 8, f"3/{lesson.name}") for lesson in given]
    said = []
    for _ in range(6):
        adam.zero_grad()
        total = loss(module, base, values.clamp(0, 1) if clamp else values, (0, 1), [next(pick) for pick in picks], given)
        total.backward()  # type: ignore[no-untyped-call]
        adam.step()
        said.append(float(total.detach()))
    torch.testing.assert_close(learner.values.detach(), values.detach(), rtol=1e-4, atol=1e-4)
    assert [sum(row) for row in learner.entropies.history] == pytest.approx(said, rel=1e-4)
    assert said[0] != said[-1]
    assert sorted(learner.names) == ["first", "second"], "what no task changes has no coefficient"
    if clamp:
        assert float(values.detach().min()) < 0 or float(values.detach().max()) > 1, "the clamp has something to hold"


def test_a_coefficient_beyond_the_clamp_gets_no_gradient() -> None:
    learner = Learner(Bend(), lessons(), vectors(), CoefficientConfig(batch=8))
    with torch.no_grad():
        learner.values[0, 0], learner.values[1, 1] = -0.1, 1.2
    learner.mix()
    learner.entropies.entropy(0).backward()  # type: ignore[no-untyped-call]
    slopes = learner.slopes()
    assert float(slopes[0, 0]) == float(slopes[1, 1]) == 0
    assert float(slopes[0, 1]) != 0
    assert learner.coefficients().tolist()[0][0] == 0
    assert learner.coefficients().tolist()[1][1] == 1


def test_a_collapse_to_one_class_stops_and_keeps_what_was_before() -> None:
    """A vector that points every feature to one class, wherever the input: adding more of it lowers the entropy until nothing is told apart."""
    given = lessons()[1:]
    assert isinstance(given[0].head, Head)
    towards = {"bee": {"still": 8 * given[0].head.classes[2]}}

    class Pulled(Bend):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize((x @ self.first).tanh() @ self.second + self.still - 1, dim=-1)

    config = CoefficientConfig(batch=20, start=0.1, lr=0.02, steps=120, window=2)
    learner = Learner(Pulled(), given, towards, config)
    said = learner.finish()
    assert said is not None
    assert "every example of bee in the last 2 steps was told class 2, of 3 classes at first" in said
    assert learner.step < 120
    assert f"Kept are the coefficients of step {learner.step - 2}." in said
    fresh = Learner(Pulled(), given, towards, replace(config, steps=learner.step - 2))
    assert fresh.finish() is None
    torch.testing.assert_close(learner.coefficients(), fresh.coefficients(), rtol=0, atol=0)


def test_what_diverges_is_said() -> None:
    with pytest.raises(
        DataError, match=r"step \d+: the coefficient of (ape|bee) at '(first|second)' is \S+, beyond ± 1: it diverges"
    ):
        Learner(Bend(), lessons(), vectors(), CoefficientConfig(lr=0.4, clamp=False, most=1.0, steps=50)).finish()
    broken = vectors()
    broken["bee"]["second"][0, 0] = float("inf")
    with pytest.raises(DataError, match=r"step 1: the entropy of ape must be finite\. Got nan"):
        Learner(Bend(), lessons(), broken, CoefficientConfig(steps=1)).finish()
    with pytest.raises(AlignmentError, match="there is nothing to learn"):
        Learner(Bend(), lessons(), {"ape": {}, "bee": {}}, CoefficientConfig())


def test_a_whole_number_is_a_start_like_any_other() -> None:
    """As `--set start=1` gives it."""
    learner = Learner(Bend(), lessons(), vectors(), CoefficientConfig(start=1, steps=1, clamp=False))
    assert learner.finish() is None
    assert learner.coefficients().is_floating_point()


def test_memory_does_not_grow_with_the_tasks() -> None:
    few, many = (demand([100, 50], tasks) for tasks in (2, 20))
    assert few["memory"] == many["memory"] == 4 * (3 * 150 + 100)
    assert many["read"] == 10 * few["read"] == 20 * 2 * 4 * 150


# With models, files and the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamerging")
    torch.set_num_threads(1)
    base = make_model(folder / "base")
    for name in ("animals", "weather"):
        task = load_task(make_task(folder / "data", name))
        finetune(load_encoder(base), task, folder / name, FinetuneConfig(steps=10, lr=1e-3, batch_size=16), base=str(base))
    return folder


@pytest.fixture
def encoder(place: Path) -> Encoder:
    return load_encoder(place / "base")


def tasks_of(place: Path) -> dict[str, Task]:
    return {name: load_task(place / "data" / name) for name in ("animals", "weather")}


def opened(place: Path) -> tuple[Any, dict[str, Any]]:
    base = thetau.open(place / "base")
    return base, {name: (thetau.open(place / name) - base).named(name) for name in ("animals", "weather")}


def test_no_learning_is_task_arithmetic(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    _, given = opened(place)
    for config in (CoefficientConfig(lr=0.0, steps=2), CoefficientConfig(steps=0, granularity="task")):
        made = learn_coefficients(encoder, tasks_of(place), given, tmp_path / f"c{config.steps}", config)
        assert weights_hash(encoder.weights()) == encoder.base_hash
        assert made.mean == pytest.approx({"animals": 0.3, "weather": 0.3})
        got = thetau.merge(list(given.values()), AdaMerging(), evidence={"coefficients": made.files}).state_dict()
        want = thetau.merge(list(given.values()), TaskArithmetic(scale=0.3)).state_dict()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=4 * F32, atol=1e-9)
        assert sorted(got) == sorted(want)


@pytest.mark.parametrize("then", [TaskArithmetic(), Ties(density=0.2), Awd()], ids=["plain", "ties", "awd"])
def test_what_was_learned_is_what_a_merge_without_data_makes(place: Path, encoder: Encoder, tmp_path: Path, then: Any) -> None:
    """The live model's last weights are θ₀ and the merged vector."""
    _, given = opened(place)
    method = AdaMerging(then=then)
    config = CoefficientConfig(steps=4, lr=0.05, batch=8)
    seen: dict[str, Tensor] = {}
    finish = Learner.finish

    def watched(self: Learner, *arguments: Any) -> Any:
        said = finish(self, *arguments)
        self.mix()
        seen.update({name.removeprefix("backbone."): value.detach().clone() for name, value in self.own.items()})
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "finish", watched)
        made = learn_coefficients(encoder, tasks_of(place), given, tmp_path / "c", config, method=method)
    start = encoder.weights()
    merged = thetau.merge(list(given.values()), method, evidence={"coefficients": made.files}).state_dict()
    assert seen
    for live, value in seen.items():
        name = encoder.names[live]
        torch.testing.assert_close(start[name] + merged[name], value, rtol=1e-5, atol=1e-6)
    untouched = [name for name, tensor in merged.items() if tensor.any() and name not in {encoder.names[live] for live in seen}]
    assert not untouched
    assert len(set(torch.stack(list(load_file(made.files["animals"]).values())).tolist())) > 1, "they moved apart"


class Stop(Exception):
    pass


def test_cut_off_and_resumed_it_has_the_same_bits(
    place: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, given = opened(place)
    config = CoefficientConfig(steps=7, batch=6, lr=0.02, save_every=2, window=3)
    learn_coefficients(encoder, tasks_of(place), given, tmp_path / "whole", config)

    def stop(step: int, entropy: float) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        learn_coefficients(encoder, tasks_of(place), given, tmp_path / "cut", config, tick=stop)
    assert weights_hash(encoder.weights()) == encoder.base_hash
    again: list[int] = []
    made = learn_coefficients(encoder, tasks_of(place), given, tmp_path / "cut", config, tick=lambda step, _: again.append(step))
    assert again == [5, 6, 7]
    for name, path in made.files.items():
        first, second = load_file(tmp_path / "whole" / f"{name}.safetensors"), load_file(path)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list(tmp_path.glob(".cut*")), "neither state nor vectors are left"
    monkeypatch.setattr(room, "Learner", None)
    kept = learn_coefficients(encoder, tasks_of(place), given, tmp_path / "cut", config)
    assert kept == replace(made, cached=True)
    with pytest.raises(OutputError, match="those of other settings, data or weights"):
        learn_coefficients(encoder, tasks_of(place), given, tmp_path / "cut", replace(config, seed=1))


def test_what_cannot_be_learned(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    _, given = opened(place)
    tasks, out = tasks_of(place), tmp_path / "c"
    with pytest.raises(DataError, match="weather: no task is given for this vector, so it has no unlabelled examples"):
        learn_coefficients(encoder, {"animals": tasks["animals"]}, given, out)
    with pytest.raises(DataError, match="task 'animals': is a regression; its predictions have no entropy"):
        learn_coefficients(encoder, {**tasks, "animals": replace(tasks["animals"], metric="pearson")}, given, out)
    with pytest.raises(ValueError, match=r"must be a method of task vectors without data.*`fisher`"):
        AdaMerging(then=thetau.methods.Fisher())
    with pytest.raises(RecipeError, match="granularity"):
        CoefficientConfig.of({"granularity": "row"}, "here")
    encoder.load({name: value + 1 if value.is_floating_point() else value for name, value in encoder.weights().items()}, "moved")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        learn_coefficients(encoder, tasks, given, out)
    assert not out.exists()


def test_the_command_a_recipe_and_a_warning(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "coefficients"
    models = [str(place / name) for name in ("animals", "weather")]
    arguments = [
        "evidence",
        "adamerging",
        *models,
        "--base",
        str(place / "base"),
        "--data",
        str(place / "data"),
        "--over",
        "ties",
    ]
    code, text = run(capsys, *arguments, "-o", str(out), "--dry-run", "--json", str(tmp_path / "plan.json"))
    assert code == 0, text
    assert "forward and backward over 2 × 32 examples" in text
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["seconds"] > 0 and planned["steps"] == 500, "a step is tried"
    assert f"It took {planned['seconds']:.2f} s here just now" in text
    assert not out.exists()
    learn = [*arguments, "--field", "density=0.3", "--steps", "3", "--granularity", "layer", "-o", str(out), "--set", "lr=0.1"]
    code, text = run(capsys, *learn, "--json", str(tmp_path / "facts.json"))
    assert code == 0, text
    assert "a file of coefficients for each of 2 tasks" in text
    assert json.loads((tmp_path / "facts.json").read_text())["steps"] == 3
    told = load_file(out / "animals.safetensors")
    layer = {float(value) for name, value in told.items() if "layer.0" in name}
    assert len(layer) == 1, "one coefficient for the block"
    lines = "\n".join(f"    {name}: coefficients/{name}.safetensors" for name in ("animals", "weather"))
    recipe = f"base: {place / 'base'}\nmodels: [{', '.join(models)}]\nmethod: {{name: adamerging, then: {{name: ties, density: 0.3}}}}\n"
    (tmp_path / "recipe.yaml").write_text(f"{recipe}evidence:\n  coefficients:\n{lines}\n", encoding="utf-8")
    code, text = run(capsys, "merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "merged"))
    assert code == 0, text
    assert "warning" not in text
    assert thetau.verify(tmp_path / "merged", again=True).good
    base, given = opened(place)
    files = {name: out / f"{name}.safetensors" for name in given}
    with pytest.warns(thetau.ThetauWarning, match="evidence `coefficients` of (animals|weather) was learned over .*ties"):
        (base + thetau.merge(list(given.values()), AdaMerging(), evidence={"coefficients": files})).save(tmp_path / "other")
