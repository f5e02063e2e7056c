"""Arithmetic on bases: addition, negation, new tasks, similarity from little training, partitions, and the verbs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor
from typer.testing import CliRunner

import thetau
from thetau.bases import Bank, all_partitions, build, given_groups, open_bank
from thetau.cli.basis import add, compare, negate, ood
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, BankError, DataError, OutputError, RecipeError, ThetauError
from thetau.evaluate import Accuracy, Evaluator, Limits, Reading, Session
from thetau.evaluate.merging import at_scale, merge_out
from thetau.evaluate.similarity import (
    TargetSimilarity,
    similar_bases,
    similarity_given,
    similarity_of_run,
    similarity_of_vector,
)
from thetau.evaluate.spaces import TangentSpace, WeightSpace
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.studies import (
    AddBases,
    CompareBases,
    Finding,
    NegateBasis,
    Outer,
    ServeTask,
    add_bases,
    bank_model,
    compare_bases,
    negate_basis,
    serve_task,
)
from thetau.studies.arithmetic import negation
from thetau.studies.bases import (
    BasesAddition,
    BasisNegation,
    BasisOutOfDistribution,
    bases_addition,
    basis_negation,
    basis_ood,
    outer_space,
)
from thetau.studies.partitions import (
    Bench,
    PartitionStudy,
    Savings,
    compare_savings,
    partition_label,
    study_partitions,
    value_of_partition,
)
from thetau.tasks import load_task
from tiny import KINDS, make_model, rows_of, write_rows
from tiny import one_thread as one_thread

# A random model moves far: warned of, and rightly.
pytestmark = pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.facade.ThetauWarning")

# Two families: their tasks have the same classes and different examples.
OF = {"animals": "animals", "pets": "animals", "skies": "weather", "weather": "weather"}
TASKS = tuple(OF)
NATURAL = {"b1": ("animals", "pets"), "b2": ("skies", "weather")}
NEW = "zoo"  # of the family of animals; in no bank
CONFIG = FinetuneConfig(steps=15, lr=5e-3, batch_size=16, max_length=32)


def make_tasks(root: Path) -> Path:
    for number, (task, kind) in enumerate({**OF, NEW: "animals"}.items()):
        folder = root / task
        folder.mkdir(parents=True)
        facts = {"task": task, "kind": "text", "labels": list(KINDS[kind]), "licence": "made by the test", "source": "here"}
        (folder / "meta.json").write_text(json.dumps(facts), encoding="utf-8")
        for split, size in (("train", 40), ("validation", 12), ("test", 16)):
            write_rows(folder / f"{split}.jsonl.gz", rows_of(kind, size, 10 * number + len(split)))
    return root


class World:
    """A base, five tasks, their models in both paradigms, and banks of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = make_model(root / "base")
        self.data = make_tasks(root / "data")
        self.encoder = load_encoder(self.folder)
        self.tasks = [load_task(name, self.data) for name in (*TASKS, NEW)]
        self.evaluator = Evaluator(self.encoder, self.tasks, max_length=32, cache=root / "cache")
        for paradigm, names in (("standard", (*TASKS, NEW)), ("linear", ("animals", "weather"))):
            for task in self.tasks:
                if task.name in names:
                    config = FinetuneConfig(**{**CONFIG.__dict__, "paradigm": paradigm})
                    finetune(self.encoder, task, self.model(task.name, paradigm), config, base=str(self.folder))
        self.base = thetau.open(self.folder)
        self.weights = self.encoder.weights()
        self.bank = self.make(root / "bank", TASKS, clusters=given_groups(list(NATURAL.values()), TASKS))
        self.linear = self.make(root / "linear-bank", ("animals", "weather"), paradigm="linear", k=2)

    def model(self, task: str, paradigm: str = "standard") -> Path:
        return self.root / paradigm / task

    def vector(self, task: str, paradigm: str = "standard") -> thetau.Expression:
        return (thetau.open(self.model(task, paradigm)) - self.base).named(task)

    def make(self, path: Path, names: Iterable[str], *, paradigm: str = "standard", **options: Any) -> Bank:
        listed = list(names)
        vectors = [self.vector(name, paradigm) for name in listed]
        return build(path, vectors, self.base, names=listed, allow_far=True, **options)

    def bench(self, **options: Any) -> Bench:
        given: dict[str, Any] = {"inner": thetau.methods.Average(), "grid": (0.5, 1.0), "engine": Engine(workers=1), **options}
        return Bench(self.evaluator, self.weights, {name: self.vector(name) for name in TASKS}, **given)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("world"))


def round_trip(kind: Any, result: Any) -> None:
    adapter: Any = TypeAdapter(kind)
    assert adapter.validate_json(adapter.dump_json(result)) == result


class Bowl:
    """A space in which a task's accuracy falls with the squared distance of the coefficients from the task's best ones."""

    def __init__(self, best: Mapping[str, Mapping[str, float]]) -> None:
        self.best = best
        self.asked: list[tuple[tuple[float, ...], str]] = []

    def accuracy(self, coefficients: Mapping[str, float], task: str, split: str) -> Accuracy:
        return self.accuracies(coefficients, [task], split)[task]

    def accuracies(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Accuracy]:
        self.asked.append((tuple(coefficients.values()), split))
        found = {}
        for task in tasks:
            gap = sum((coefficients.get(name, 0.0) - value) ** 2 for name, value in self.best[task].items())
            found[task] = Accuracy.of(max(0, round(10_000 * (1 - gap / 4))), 10_000)
        return found

    def losses(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Any]:
        raise NotImplementedError

    def features(self, coefficients: Mapping[str, float], task: str, split: str) -> Tensor:
        raise NotImplementedError


# Addition


def test_one_coefficient_and_one_for_each_basis() -> None:
    space = Bowl({"t": {"x": 0.2, "y": 0.8}})
    grid = (0.0, 0.2, 0.5, 0.8, 1.0)
    found = bases_addition(space, ["t"], {"x": 1.0, "y": 1.0}, grid=grid, own=True, members=7)
    assert found.scale == 0.5
    assert found.tuned.coefficients == {"x": 0.5, "y": 0.5}
    assert found.own is not None
    assert found.own.coefficients == {"x": 0.2, "y": 0.8}
    assert found.best is found.own
    tried = {values for values, split in space.asked if split == "validation"}
    assert found.effort.evaluations == len(tried) == len(found.trials) == 5 + 2 * 4 - 1, "(0.2, 0.2) was tried already"
    assert (found.effort.vectors, found.effort.coefficients) == (2, 2)
    over = found.effort_over_tasks
    assert (over.vectors, over.coefficients, over.evaluations) == (7, 7, 5 + 7 * 4)
    common = bases_addition(space, ["t"], {"x": 1.0, "y": 1.0}, grid=grid, members=7)
    assert common.own is None
    assert (common.effort.evaluations, common.effort_over_tasks.evaluations) == (5, 5), "one λ costs the same over anything"
    round_trip(BasesAddition, found)


@given(
    best=st.lists(st.sampled_from([0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=4),
    sweeps=st.integers(1, 3),
)
@settings(max_examples=25)
def test_a_coordinate_search_finds_the_best_of_a_separable_surface(best: list[float], sweeps: int) -> None:
    names = [f"b{number}" for number in range(len(best))]
    space = Bowl({"t": dict(zip(names, best, strict=True))})
    found = bases_addition(space, ["t"], dict.fromkeys(names, 1.0), grid=(0.0, 0.3, 0.6, 1.0), own=True, sweeps=sweeps)
    assert found.own is not None
    assert list(found.own.coefficients.values()) == best
    assert found.effort.evaluations <= found.effort_over_tasks.evaluations or len(names) > 1


def test_normalised_accuracy_decides_where_there_is_one() -> None:
    """A hard task with a small own accuracy weighs more in the normalised mean than in the absolute one."""
    space = Bowl({"easy": {"x": 0.0}, "hard": {"x": 1.0}})
    own = {"easy": Accuracy.of(90, 100), "hard": Accuracy.of(30, 100)}
    individual = {"validation": own, "test": own}
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert bases_addition(space, ["easy", "hard"], {"x": 1.0}, grid=grid).scale == 0.5
    found = bases_addition(space, ["easy", "hard"], {"x": 1.0}, grid=grid, individual=individual)
    assert found.scale == 0.75
    assert found.individual == own
    assert found.tuned.normalised == pytest.approx((1 - 0.75**2 / 4) / 0.9 / 2 + (1 - 0.25**2 / 4) / 0.3 / 2, abs=1e-3)


def test_addition_refuses_nothing_to_add() -> None:
    space = Bowl({"t": {}})
    for tasks, parts, options, message in (
        ([], {"x": 1.0}, {}, "at least one task and one basis. Got 0 and 1"),
        (["t"], {}, {}, "Got 1 and 0"),
        (["t"], {"x": 1.0}, {"grid": (1.0, 1.0)}, "different numbers"),
        (["t"], {"x": 1.0}, {"sweeps": 0}, "at least one sweep"),
    ):
        with pytest.raises(DataError, match=message):
            bases_addition(space, tasks, parts, **options)  # type: ignore[arg-type]


def test_the_space_of_a_sum_holds_each_basis_and_of_a_method_their_merge(world: World) -> None:
    vectors = {name: world.bank.vector(name) for name in world.bank.bases}
    space, parts = outer_space(world.evaluator, world.weights, vectors, None, tangent=False)
    assert parts == {"b1": 1.0, "b2": 1.0}
    assert isinstance(space, WeightSpace)
    total = at_scale(world.weights, merge_out(vectors, None).state_dict(), 0.4)
    for name, tensor in space.weights({"b1": 0.4, "b2": 0.4}).items():
        torch.testing.assert_close(tensor, total[name])
    ties = thetau.methods.Ties(density=0.3)
    merged, one = outer_space(world.evaluator, world.weights, vectors, ties, tangent=False)
    assert one == {"merged": 1.0}
    expected = at_scale(world.weights, thetau.merge(list(vectors.values()), ties).state_dict(), 0.7)
    assert isinstance(merged, WeightSpace)
    for name, tensor in merged.weights({"merged": 0.7}).items():
        torch.testing.assert_close(tensor, expected[name])
    none, empty = outer_space(world.evaluator, world.weights, {}, None, tangent=True)
    assert empty == {}
    assert none.accuracy({}, "pets", "test") == world.evaluator.evaluate(world.weights, "test", ["pets"])["pets"]
    other = thetau.open({"not.there": torch.ones(2)}) - thetau.open({"not.there": torch.zeros(2)})
    with pytest.raises(DataError, match=r"a tensor 'not\.there' that the base lacks"):
        outer_space(world.evaluator, world.weights, {"x": other}, None, tangent=False)
    with pytest.raises(AlignmentError, match="at least one task vector"):
        merge_out({}, None)


# Negation


def test_negation_by_a_basis_is_negation_of_that_vector(world: World) -> None:
    space, _ = outer_space(world.evaluator, world.weights, {"b1": world.bank.vector("b1")}, None, tangent=False)
    found = basis_negation(space, "animals", "weather", "b1", members=("animals", "pets"), grid=(0.0, 0.5, 1.0))
    mean = {
        name: (tensor + world.vector("pets").state_dict()[name]) / 2
        for name, tensor in world.vector("animals").state_dict().items()
    }
    same = negation(WeightSpace(world.evaluator, world.weights, {"animals": mean}), "animals", "weather", grid=(0.0, 0.5, 1.0))
    assert found.negation.vector == "b1"
    alphas = [trial.alpha for trial in found.negation.trials]
    assert alphas == sorted(alphas) and {0.0, 0.5, 1.0} <= set(alphas), "the grid, and what it was widened by"
    for mine, theirs in zip(found.negation.trials, same.trials, strict=True):
        assert mine.target == pytest.approx(theirs.target, abs=0.1)  # one example at a near tie
    assert found.negation.tuned.qualified
    assert found.negation.one_shot.target.n == 16
    round_trip(BasisNegation, found)
    with pytest.raises(DataError, match="the control task must be another one"):
        basis_negation(space, "animals", "animals", "b1")


# Similarity


def test_a_converged_vector_is_most_similar_to_the_basis_of_its_family(world: World) -> None:
    vector = world.vector(NEW)
    found = similarity_of_vector(NEW, vector, world.bank.similar, source="there")
    for name in world.bank.bases:
        assert found.cosines[name] == pytest.approx(vector.cosine(world.bank.vector(name)), abs=1e-9)
    assert found.ranked()[0] == "b1"
    assert found.norm == pytest.approx(vector.norm())
    with pytest.raises(DataError, match=r"is zero, so it is similar to nothing\. Fine-tune it longer"):
        similarity_of_vector(NEW, world.vector(NEW) * 0.0 + (world.vector("pets") - world.vector("pets")), lambda _: {})


@pytest.mark.parametrize("how", ["steps", "epochs"])
def test_a_short_run_finds_the_same_basis(world: World, how: str, tmp_path: Path) -> None:
    config = FinetuneConfig(lr=1e-3, batch_size=16, max_length=32, warmup=0.9, weight_decay=0.5)
    options: dict[str, Any] = {how: 1, "run": tmp_path, "config": config}
    args = (world.encoder, load_task(NEW, world.data), world.base, world.bank.similar)
    world.evaluator.load_base()
    found = similarity_of_run(*args, **options)
    assert (found.how, found.steps) == (how, 1 if how == "steps" else 3)  # 40 examples in batches of 16
    assert found.ranked()[0] == "b1"
    assert found.norm is not None and found.norm > 0, "the first step moves the weights, whatever warm-up the config has"
    [made] = tmp_path.glob("short-*")
    stored = read_weights(made)
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert similarity_of_run(*args, **options) == found
    assert (made / "model.safetensors").stat().st_mtime_ns == before, "the run was made once"
    largest = max(float((stored[name].float() - tensor.float()).abs().max()) for name, tensor in world.weights.items())
    assert 0 < largest <= (1 if how == "steps" else 3) * 1e-3 * 1.01, "no decay, no warm-up: lr a step at most"
    if how == "steps":
        assert largest == pytest.approx(1e-3, rel=1e-2)
    for name, tensor in world.encoder.weights().items():
        assert torch.equal(tensor, world.weights[name]), "the encoder runs with the base again"


def test_a_short_run_in_the_tangent_space(world: World) -> None:
    world.evaluator.load_base()
    found = similarity_of_run(world.encoder, load_task(NEW, world.data), world.base, world.linear.similar, tangent=True, steps=2)
    assert found.source == "linear, lr 5e-05, batches of 128, seed 0"
    assert set(found.cosines) == {"b1", "b2"}
    round_trip(TargetSimilarity, found)


def test_short_runs_that_are_refused(world: World) -> None:
    world.evaluator.load_base()
    args: Any = (world.encoder, load_task(NEW, world.data), world.base, world.bank.similar)
    with pytest.raises(DataError, match="steps or of epochs, not both"):
        similarity_of_run(*args, steps=1, epochs=1)
    with pytest.raises(DataError, match=r"at least one epoch\. Got 0"):
        similarity_of_run(*args, epochs=0)
    with pytest.raises(DataError, match=r"the weights: train with paradigm standard\. Got paradigm 'linear'"):
        similarity_of_run(*args, config=FinetuneConfig(paradigm="linear"))
    with pytest.raises(DataError, match="the tangent space: train with paradigm linear"):
        similarity_of_run(*args, config=FinetuneConfig(), tangent=True)
    nothing = FinetuneConfig(lr=1e-30, max_length=32, scope="*.dense.weight")  # less than rounding sees
    with pytest.raises(DataError, match=r"is zero, .*Raise the learning rate \(lr=1e-30\)"):
        similarity_of_run(*args, config=nothing)


def test_which_bases_are_similar_enough() -> None:
    found = TargetSimilarity(task="t", how="vector", cosines={"b1": 0.1, "b2": 0.5, "b3": -0.4, "b4": 0.5})
    assert found.ranked() == ("b2", "b4", "b1", "b3")
    assert similar_bases(found) == ("b2",)
    assert similar_bases(found, most=3) == ("b2", "b4", "b1")
    assert similar_bases(found, 0.1) == ("b2", "b4", "b1")
    assert similar_bases(found, 0.1, most=1) == ("b2",)
    assert similar_bases(found, 0.6) == ()
    assert similar_bases(found, -1.0) == found.ranked()
    for bad in (1.5, -1.01, float("nan")):
        with pytest.raises(DataError, match="a cosine, between −1 and 1"):
            similar_bases(found, bad)
    with pytest.raises(DataError, match="at least one basis must be allowed"):
        similar_bases(found, most=0)
    hand = similarity_given("t", ["b3"], list(found.cosines))
    assert similar_bases(hand) == ("b3",)
    with pytest.raises(DataError, match="leave the threshold"):
        similar_bases(hand, 0.1)
    with pytest.raises(DataError, match=r"no basis 'b33'. Did you mean 'b3'\?"):
        similarity_given("t", ["b33"], list(found.cosines))
    for chosen in ([], ["b1", "b1"]):
        with pytest.raises(DataError, match="different bases, at least one"):
            similarity_given("t", chosen, list(found.cosines))


# Tasks that no basis was made of


def test_a_new_task_takes_the_best_of_its_basis(world: World) -> None:
    similarity = similarity_of_vector(NEW, world.vector(NEW), world.bank.similar)
    [name] = similar_bases(similarity)
    space, parts = outer_space(world.evaluator, world.weights, {name: world.bank.vector(name)}, None, tangent=False)
    found = basis_ood(space, similarity, [name], parts, grid=(0.0, 0.5, 1.0))
    assert found.bases == ("b1",) and not found.store
    best = max(trial.absolute for trial in found.trials)
    assert found.alpha == min(trial.alpha for trial in found.trials if trial.absolute == best)
    assert found.tuned == space.accuracy({name: found.alpha}, NEW, "test")
    assert found.one_shot == space.accuracy({name: 1.0}, NEW, "test")
    assert found.pretrained == space.accuracy({}, NEW, "test")
    assert found.one_shot is not None and found.one_shot.value > found.pretrained.value, "the family's basis serves its new task"
    round_trip(BasisOutOfDistribution, found)


def test_a_task_like_nothing_should_be_stored(world: World) -> None:
    similarity = similarity_of_vector(NEW, world.vector(NEW), world.bank.similar)
    chosen = similar_bases(similarity, 1.0)
    space, parts = outer_space(world.evaluator, world.weights, {}, None, tangent=False)
    found = basis_ood(space, similarity, chosen, parts, threshold=1.0)
    assert found.store and found.bases == ()
    assert (found.one_shot, found.alpha, found.tuned, found.trials) == (None, None, None, ())
    assert found.pretrained.n == 16
    round_trip(BasisOutOfDistribution, found)


# Partitions


def test_the_mean_of_means_over_equal_clusters_is_the_mean(world: World, tmp_path: Path) -> None:
    """With mean in and mean out, one cluster, two of two, and four of one are the same model (Table 12, rows Mean)."""
    bench = world.bench(outer=thetau.methods.Average(), run=tmp_path)
    parts = [groups for groups in all_partitions(TASKS) if len({len(members) for members in groups.values()}) == 1]
    assert len(parts) == 5
    study = study_partitions(bench, parts, natural=NATURAL)
    assert study.natural in study.values, "it was not done twice"
    tuned = [value.addition.one_shot.absolute for value in study.values]
    assert max(tuned) - min(tuned) <= 1 / 16, "the same model but for rounding: at most a near tie differs"
    assert study.overall.count == 5
    assert study.by_size[2].count == 3
    assert study.by_size[2].absolute == pytest.approx(sum(value.absolute for value in study.values if len(value.groups) == 2) / 3)
    better = [value for value in study.values if len(value.groups) == 2 and value.absolute > study.natural.absolute]  # type: ignore[union-attr]
    assert study.rank == 1 + len(better)
    round_trip(PartitionStudy, study)


def test_all_partitions_of_four_tasks_share_their_merges(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = world.bench(inner=thetau.methods.Ties(density=0.5), grid=(1.0,), run=tmp_path)
    partitions = all_partitions(TASKS)
    study = study_partitions(bench, partitions)
    assert len(study.values) == 15
    assert len(list((tmp_path / "merges").iterdir())) == 11, "the subsets of four tasks with at least two of them"
    assert {size: mean.count for size, mean in study.by_size.items()} == {1: 1, 2: 7, 3: 6, 4: 1}
    every = next(value for value in study.values if len(value.groups) == 4)
    expected = at_scale(world.weights, merge_out({name: world.vector(name) for name in TASKS}, None).state_dict(), 1.0)
    found = world.evaluator.evaluate(expected, "test", TASKS)
    assert every.absolute == pytest.approx(sum(one.value for one in found.values()) / 4, abs=1 / 32)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("merged again")

    monkeypatch.setattr(thetau.Expression, "save", never)
    again = study_partitions(world.bench(inner=thetau.methods.Ties(density=0.5), grid=(1.0,), run=tmp_path), partitions[:3])
    assert again.values == study.values[:3]
    with pytest.raises(AssertionError, match="merged again"):
        study_partitions(world.bench(inner=thetau.methods.Ties(density=0.4), grid=(1.0,), run=tmp_path), partitions[:1])


def test_a_basis_that_was_made_elsewhere_takes_the_place_of_the_merge(world: World) -> None:
    made = world.vector("animals")
    bench = world.bench(given={("pets", "animals"): made}, grid=(1.0,))
    value = value_of_partition(bench, NATURAL)
    by_hand = value_of_partition(world.bench(grid=(1.0,)), {"b1": ("animals", "pets"), "b2": ("skies", "weather")})
    torch.testing.assert_close(bench.basis(("animals", "pets")).state_dict(), made.state_dict())
    assert value.groups == by_hand.groups == NATURAL
    assert value.label == "animals+pets | skies+weather"


def test_save_one_bases_and_save_all(world: World, tmp_path: Path) -> None:
    bench = world.bench(run=tmp_path)
    found = compare_savings(bench, NATURAL)
    assert [one.name for one in (found.one, found.bases, found.all)] == ["save-one", "bases", "save-all"]
    assert [one.vectors for one in (found.one, found.bases, found.all)] == [1, 2, 4]
    assert [one.coefficients for one in (found.one, found.bases, found.all)] == [2, 2, 4]
    size = sum(tensor.numel() for tensor in world.vector("pets").state_dict().values())
    assert [one.nbytes for one in (found.one, found.bases, found.all)] == [4 * size, 8 * size, 16 * size]
    labels = {value.label for value in found.one.partitions}
    assert labels == {
        "animals | pets+skies+weather",
        "animals+skies+weather | pets",
        "animals+pets+weather | skies",
        "animals+pets+skies | weather",
    }
    assert found.one.absolute == pytest.approx(sum(value.absolute for value in found.one.partitions) / 4)
    assert found.individual == bench.individual()["test"]
    assert found.all.partitions[0].normalised is not None
    round_trip(Savings, found)


def test_what_is_no_partition_is_refused(world: World) -> None:
    bench = world.bench()
    for groups, got in (
        ({"b1": ("animals",)}, "animals"),
        ({"b1": TASKS, "b2": ("animals",)}, r"animals \| animals\+pets"),
        ({}, "no clusters"),
    ):
        with pytest.raises(DataError, match=f"holds every task once: .*Got {got}"):
            value_of_partition(bench, groups)
    with pytest.raises(DataError, match="at least one partition"):
        study_partitions(bench, [])
    with pytest.raises(DataError, match="no task vector of 'x'"):
        bench.basis(("x",))
    with pytest.raises(DataError, match="'x', which is no task of the evaluator"):
        Bench(world.evaluator, world.weights, {"x": world.vector("pets")}, inner=thetau.methods.Average())
    with pytest.raises(DataError, match=r"tasks with vectors\. Got none"):
        Bench(world.evaluator, world.weights, {}, inner=thetau.methods.Average())
    alone = Bench(world.evaluator, world.weights, {"pets": world.vector("pets")}, inner=thetau.methods.Average())
    with pytest.raises(DataError, match=r"at least two tasks\. Got pets"):
        compare_savings(alone, {"b1": ("pets",)})
    assert partition_label({"b1": ("b", "a"), "b2": ("0",)}) == "0 | a+b"


# The verbs

app = typer.Typer()
for command in (add, negate, ood, compare):
    app.command()(command)


def invoke(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())  # captions wrap


def told(path: Path) -> Any:
    return json.loads(path.read_text())


def options(world: World) -> list[Any]:
    return ["--data", world.data, "--max-length", 32, "--cache", world.root / "cache", "--alphas", "0,0.5,1"]


def test_add_chooses_and_writes(world: World, tmp_path: Path) -> None:
    words = ["add", world.bank.path, *options(world), "--json", tmp_path / "a.json", "-q"]
    said = invoke(*words, "--per-basis", "-o", tmp_path / "model")
    assert "normalised" in said
    assert "own λ" in said
    kept = told(tmp_path / "a.json")
    result = TypeAdapter(BasesAddition).validate_python(kept["result"])
    assert result.individual is not None and set(result.individual) == set(TASKS)
    assert kept["bases"] == {name: list(members) for name, members in NATURAL.items()}
    assert kept["no_individuals"] == {}
    bases = {name: world.bank.vector(name).state_dict() for name in world.bank.bases}
    space = WeightSpace(world.evaluator, world.weights, bases)
    assert result.best.accuracy == {task: space.accuracy(result.best.coefficients, task, "test") for task in TASKS}
    written, expected = read_weights(tmp_path / "model"), space.weights(result.best.coefficients)
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name])
    record = told(tmp_path / "model" / "thetau.json")["recipe"]
    assert record["coefficients"] == result.best.coefficients
    assert record["outer"] == "sum"
    said = invoke(*words[:-1], "-q", "--outer", "ties", "--set", "density=0.5", "--task", "pets")
    assert "ties of the bases" in said
    one = TypeAdapter(BasesAddition).validate_python(told(tmp_path / "a.json")["result"])
    assert one.tasks == ("pets",)
    assert one.effort.vectors == 2
    assert one.parts == {"merged": 1.0}


def test_add_without_the_members_models_is_not_normalised(world: World, tmp_path: Path) -> None:
    lone = tmp_path / "gone"
    shutil.copytree(world.model("pets"), lone)
    vectors = [(thetau.open(lone) - world.base).named("pets"), world.vector("weather")]
    bank = build(tmp_path / "bank", vectors, world.base, names=["pets", "weather"], k=2, allow_far=True)
    shutil.rmtree(lone)
    said = invoke("add", bank.path, *options(world), "-q")
    assert "not normalised, for want of the model of pets" in said
    said = invoke("add", bank.path, *options(world), "-q", "--model", f"pets={world.model('pets')}")
    assert "want of" not in said
    with pytest.raises(RecipeError, match=r"TASK=MODEL with a task of the bank \(pets, weather\). Got 'x=y'"):
        invoke("add", bank.path, *options(world), "-q", "--model", "x=y")


def test_add_by_a_given_scale_reads_no_data(world: World, tmp_path: Path) -> None:
    invoke("add", world.bank.path, "--scale", "0.3", "-o", tmp_path / "sum", "-q")
    invoke("add", world.bank.path, "--scale", "0.3", "--outer", "ties", "-o", tmp_path / "ties", "-q")
    vectors = {name: world.bank.vector(name) for name in world.bank.bases}
    for out, method in (("sum", None), ("ties", thetau.methods.Ties(scale=1.0))):
        expected = at_scale(world.weights, merge_out(vectors, method).state_dict(), 0.3)
        for name, tensor in read_weights(tmp_path / out).items():
            torch.testing.assert_close(tensor, expected[name])
    assert told(tmp_path / "ties" / "thetau.json")["recipe"]["outer"]["name"] == "ties"


def test_negate_by_each_way_of_finding_the_basis(world: World, tmp_path: Path) -> None:
    common = ["negate", world.bank.path, "--control", "weather", *options(world), "--json", tmp_path / "n.json", "-q"]
    for words, basis, how in (
        (("--task", "animals", "-o", tmp_path / "model"), "b1", "own"),
        (("--task", NEW, "--vector", world.model(NEW)), "b1", "similar"),
        (("--task", NEW, "--steps", 1, "--lr", "1e-3"), "b1", "similar"),
        (("--task", "animals", "--basis", "b2"), "b2", "given"),
    ):
        said = invoke(*common, *words)
        found = TypeAdapter(BasisNegation).validate_python(told(tmp_path / "n.json")["result"])
        assert (found.basis, found.how, found.members) == (basis, how, NATURAL[basis])
        assert f"α·{basis}" in said
        assert (found.similarity is not None) == (how != "own")
    with pytest.raises(RecipeError, match=r"below 0 the basis would be added\. Got '-1,0'"):
        invoke(*common, "--task", "animals", "--alphas=-1,0")
    first = read_weights(tmp_path / "model")
    alpha = -told(tmp_path / "model" / "thetau.json")["recipe"]["coefficients"]["b1"]
    expected = at_scale(world.weights, world.bank.vector("b1").state_dict(), -alpha)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, expected[name])
    invoke("negate", world.bank.path, "--task", "pets", "--scale", 2, "-o", tmp_path / "two", "-q")
    expected = at_scale(world.weights, world.bank.vector("b1").state_dict(), -2.0)
    for name, tensor in read_weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name])


def test_ood_serves_or_stores(world: World, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(world.bank.path, bank)
    common = ["ood", bank, "--task", NEW, *options(world), "--json", tmp_path / "o.json", "-q"]
    for words, bases, how in (
        (("--vector", world.model(NEW), "-o", tmp_path / "model"), ("b1",), "vector"),
        (("--steps", 1, "--lr", "1e-3", "--task", world.data / NEW), ("b1",), "steps"),
        (("--epochs", 1, "--batch-size", 20, "--most", 2), ("b1", "b2"), "epochs"),
        (("--basis", "b2"), ("b2",), "given"),
        (("--vector", world.model(NEW), "--threshold", "-1", "--outer", "ties"), ("b1", "b2"), "vector"),
    ):
        said = invoke(*common, *words)
        found = TypeAdapter(BasisOutOfDistribution).validate_python(told(tmp_path / "o.json")["result"])
        assert (found.bases, found.similarity.how, found.store) == (bases, how, False), words
        assert f"bases used: {' + '.join(bases)}" in said
    assert (tmp_path / "model" / "model.safetensors").is_file()
    said = invoke(*common, "--vector", world.model(NEW), "--threshold", "1")
    assert "is like nothing in the bank" in said
    assert told(tmp_path / "o.json")["result"]["store"] is True
    assert NEW not in open_bank(bank).members
    said = invoke(*common, "--vector", world.model(NEW), "--threshold", "1", "--store")
    assert "is stored as the basis" in said
    assert open_bank(bank).basis(open_bank(bank).basis_of(NEW)).members == (NEW,)
    with pytest.raises(RecipeError, match=f"the bank holds '{NEW}' already"):
        invoke(*common, "--vector", world.model(NEW))


def test_compare_clusters_and_compares(world: World, tmp_path: Path) -> None:
    models = [world.model(task) for task in TASKS]
    common = ["compare", *models, "--base", world.folder, *options(world)[:-1], "1", "--json", tmp_path / "c.json"]
    said = invoke(*common, "-k", 2)
    assert "animals+pets | skies+weather" in said
    assert "save-one" in said
    kept = TypeAdapter(Savings).validate_python(told(tmp_path / "c.json")["result"])
    assert kept.bases.partitions[0].groups == NATURAL
    said = invoke(*common, "--cluster", "animals,skies", "--inner", "ties", "--outer", "mean")
    assert "animals+skies | pets | weather" in said
    said = invoke(*common, "-k", 2, "--all-partitions")
    assert "all 15 partitions" in said
    assert "animals+pets | skies+weather ←" in said
    study = TypeAdapter(PartitionStudy).validate_python(told(tmp_path / "c.json")["partitions"])
    assert len(study.values) == 15
    assert study.rank in (1, 2, 3, 4, 5, 6, 7)
    many = [f"t{i}={world.model('animals')}" for i in range(8)]
    with pytest.raises(RecipeError, match=r"the Bell number B\(8\)"):
        invoke("compare", *many, "--base", world.folder, "--all-partitions")
    with pytest.raises(RecipeError, match="a number or auto"):
        invoke(*common, "-k", "two")


def test_python_gives_what_the_command_line_writes(world: World, tmp_path: Path) -> None:
    reading = Reading(data=world.data, max_length=32, cache=world.root / "cache")
    alphas, limits = (0.0, 0.5, 1.0), Limits(test=10).by_split()
    common = [*options(world), "--test", 10]
    bank = open_bank(world.bank.path)

    def same(result: Any, verb: str, *words: Any) -> None:
        invoke(verb, *words, *common, "--json", tmp_path / f"{verb}.json")
        result.save(tmp_path / "python.json")
        assert told(tmp_path / "python.json") == told(tmp_path / f"{verb}.json")

    ties = Outer(outer="ties", fields={"density": 0.5})
    added = add_bases(bank, Session.of_bank(bank, limits=limits, reading=reading), AddBases(alphas=alphas, outer=ties))
    same(added, "add", bank.path, "--outer", "ties", "--set", "density=0.5", "-o", tmp_path / "cli", "-q")
    assert added.coefficients == dict.fromkeys(bank.bases, added.result.scale)
    bank_model(bank, added.coefficients, ties).save(tmp_path / "python")
    for name, tensor in read_weights(tmp_path / "python").items():
        torch.testing.assert_close(tensor, read_weights(tmp_path / "cli")[name])
    session = Session.of_bank(bank, ["animals", "weather"], limits=limits, reading=reading)
    negated = negate_basis(bank, session, NegateBasis(task="animals", control="weather", keep=0.5, alphas=alphas))
    same(negated, "negate", bank.path, "--task", "animals", "--control", "weather", "--keep", 0.5, "-q")
    session = Session.of_bank(bank, [NEW], limits=limits, reading=reading)
    served = serve_task(bank, session, ServeTask(task=NEW, finding=Finding(vector=str(world.model(NEW))), most=2, alphas=alphas))
    same(served, "ood", bank.path, "--task", NEW, "--vector", world.model(NEW), "--most", 2, "-q")
    assert served.coefficients == dict.fromkeys(served.result.bases, served.result.alpha)
    models = [str(world.model(task)) for task in TASKS]
    session = Session.open(models, base=world.folder, limits=limits, reading=reading)
    assert session.tasks == TASKS and not session.tangent
    same(compare_bases(session, CompareBases(k=2, alphas=alphas)), "compare", *models, "--base", world.folder, "-k", 2)


def test_the_page_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bases.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.bank.path, "bank")
    Path("tasks").symlink_to(world.data)
    exec(block.replace("sst2", "animals").replace("agnews", "weather"), {})
    found = TypeAdapter(BasesAddition).validate_python(told(Path("added.json"))["result"])
    assert str(found.scale) in capsys.readouterr().out
    assert Path("merged/model.safetensors").is_file()


def test_a_session_says_which_heads_are_gone(world: World, tmp_path: Path) -> None:
    bank = open_bank(world.bank.path)
    said: list[str] = []
    reading = Reading(data=world.data, max_length=32)
    session = Session.of_bank(bank, ["pets"], models={"pets": tmp_path / "gone"}, reading=reading, say=said.append)
    assert session.tasks == ("pets",)
    assert len(said) == 1 and f"pets: its model is not at {tmp_path / 'gone'}" in said[0]


def test_options_are_checked_where_they_are_made() -> None:
    for make, message in (
        (lambda: AddBases(sweeps=0), r"`sweeps` must be at least 1\. Got 0"),
        (lambda: AddBases(per_basis=True, outer=Outer(outer="ties")), "--per-basis is for a sum"),
        (lambda: NegateBasis(task="x", keep=1.5), r"`keep` must be at most 1\. Got 1\.5"),
        (lambda: ServeTask(task="x"), "how is the task similar"),
        (lambda: Reading(max_length=2), "`max_length` must be at least 3"),
    ):
        with pytest.raises(RecipeError, match=message):
            make()


def test_a_tangent_bank_is_evaluated_in_the_linear_form(world: World, tmp_path: Path) -> None:
    assert world.linear.space == "tangent"
    invoke("add", world.linear.path, *options(world), "--json", tmp_path / "a.json", "-o", tmp_path / "model", "-q")
    kept = told(tmp_path / "a.json")
    assert kept["space"] == "tangent"
    found = TypeAdapter(BasesAddition).validate_python(kept["result"])
    vectors = {name: world.linear.vector(name) for name in world.linear.bases}
    space, parts = outer_space(world.evaluator, world.weights, vectors, None, tangent=True)
    assert isinstance(space, TangentSpace)
    assert found.one_shot.accuracy == {task: space.accuracy(parts, task, "test") for task in ("animals", "weather")}
    from safetensors import safe_open

    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["thetau.space"] == "tangent"
    said = invoke("ood", world.linear.path, "--task", NEW, "--steps", 1, *options(world), "-q")
    assert "bases used: b1" in said
    models = [world.model(task, "linear") for task in ("animals", "weather")]
    assert "save-all" in invoke("compare", *models, "--base", world.folder, *options(world), "-k", 2)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("add --task nothing", DataError, "nothing"),
        ("add --outer tise", RecipeError, "unknown method 'tise'"),
        ("add --set density=1", RecipeError, "a sum has no fields"),
        ("add --per-basis --outer ties", RecipeError, "--per-basis is for a sum"),
        ("negate --task animals", RecipeError, "--control TASK is missing"),
        ("negate --task animals --control animals", DataError, "the control task must be another one"),
        ("negate --task nothing --control animals", DataError, "nothing"),
        ("negate --task zoo --control animals", BankError, "no task 'zoo'"),
        ("negate --task animals --control nothing", DataError, "nothing"),
        ("negate --task animals --control weather --basis b9", DataError, "no basis 'b9'"),
        ("negate --task animals --control weather --basis b1 --basis b2", RecipeError, "subtracts one basis"),
        ("negate --task animals --control weather --basis b1 --steps 1", RecipeError, "ways to find the same thing"),
        ("negate --task animals --control weather --lr 1", RecipeError, "--lr and --batch-size are for"),
        ("negate --task animals --control weather --scale 1", RecipeError, "--scale takes no data"),
        ("ood --task zoo", RecipeError, "how is the task similar"),
        ("ood --task animals --steps 1", RecipeError, "the bank holds 'animals' already"),
        ("ood --task zoo --steps 1 --threshold 2", RecipeError, "a cosine, between −1 and 1. Got 2"),
        ("ood --task zoo --basis b1 --threshold 0.2", RecipeError, "leave --threshold and --most out"),
        ("ood --task zoo --steps 1 --store --threshold 0.5", RecipeError, "not worth keeping"),
        ("ood --task nothing --steps 1", DataError, "nothing"),
    ],
)
def test_words_that_are_refused(world: World, words: str, kind: type[ThetauError], message: str) -> None:
    verb, *rest = words.split()
    with pytest.raises(kind) as refused:
        invoke(verb, world.bank.path, *rest, "--data", world.data, "--max-length", 32, "-q")
    assert message in str(refused.value)


def test_scales_and_outputs_that_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for words, kind, message in (
        (("--scale", "1"), RecipeError, "say where, with --out"),
        (("--scale", "nan", "-o", tmp_path / "x"), RecipeError, "must be a finite number"),
        (("--scale", "1", "-o", tmp_path / "x", "--task", "pets"), RecipeError, "leave --task"),
        (("-o", tmp_path / "there"), OutputError, "exists"),
        (("--json", tmp_path / "file" / "x.json"), OutputError, "is a file"),
    ):
        with pytest.raises(kind, match=message):
            invoke("add", world.bank.path, *words, "-q")
    assert not (tmp_path / "x").exists()
    with pytest.raises(BankError, match="holds no bank"):
        invoke("add", tmp_path / "there", "-q")


def test_other_bases_and_other_spaces_are_refused(world: World, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    for bank in (world.bank, world.linear):
        with pytest.raises(BankError, match=r"of another base than .*fingerprints differ"):
            invoke("add", bank.path, "--base", other, *options(world), "-q")
    copy = tmp_path / "moved"
    shutil.copytree(world.folder, copy)
    assert "average" in invoke("add", world.bank.path, "--base", copy, *options(world), "-q")
    new = ["--task", "zoo", *options(world), "-q", "--vector"]
    with pytest.raises(DataError, match="belongs to the weights, the bank's to the tangent space"):
        invoke("ood", world.linear.path, *new, world.model(NEW))
    with pytest.raises(DataError, match="was fine-tuned on 'pets', and the task is 'zoo'"):
        invoke("ood", world.bank.path, *new, world.model("pets"))
    with pytest.raises(DataError, match="belongs to the tangent space, the bank's to the weights"):
        invoke("ood", world.bank.path, *new, world.model("animals", "linear"))


def test_tasks_without_validation_data_are_refused(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    (data / "pets" / "validation.jsonl.gz").unlink()
    with pytest.raises(DataError, match="validation"):
        invoke("add", world.bank.path, "--data", data, "--max-length", 32, "--alphas", "1", "-q")
