"""The parts of a search: spaces, halving, CMA-ES by replay, the file of trials."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Barrier
from typing import Any

import cmaes
import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from thetau import PerPattern, PerTask
from thetau.errors import DataError, OutputError, RecipeError
from thetau.methods import AdaMerging, TaskArithmetic, Ties, TsvM, Wudi, build
from thetau.parts import Method
from thetau.studies.searching.halving import dominates, front, goes_on, ladder_of
from thetau.studies.searching.journal import Journal
from thetau.studies.searching.objectives import objectives_of
from thetau.studies.searching.samplers import FAULT, GENERATION, CmaSampler, check_sampler, from_unit, to_unit
from thetau.studies.searching.space import Dimension, layer_groups, read_space
from thetau.studies.searching.trials import Trials

TASKS = ("a", "b")
TENSORS = ("embed.weight", *(f"encoder.layer.{i}.attention.q_proj.weight" for i in range(5)), "norm.weight")


def space(*texts: str, method: Method | None = None) -> Any:
    return read_space(texts, method or Ties(), TASKS, TENSORS)


# Spaces


def test_ranges_are_read() -> None:
    found = space("density=0.05..0.9 log", "scale=0..2", "trim=[vector, tensor]").dimensions
    assert found == (
        Dimension(path="density", low=0.05, high=0.9, log=True),
        Dimension(path="scale", low=0, high=2),
        Dimension(path="trim", choices=("vector", "tensor")),
    )
    (rank,) = space("rank=1..64 log", method=TsvM()).dimensions
    assert (rank.whole, rank.low, rank.high, rank.log) == (True, 1, 64, True), "a rank that is not a share is an integer"
    (share,) = space("rank=0.1..1.0", method=TsvM()).dimensions
    assert not share.whole
    (steps,) = space("steps=10..300", method=Wudi()).dimensions
    assert steps.whole
    (inner,) = space("then.density=0.1..0.5", method=build("consensus", {"then": "ties"})).dimensions
    assert inner.path == "then.density"


def test_by_task_and_layers_it_is_what_a_recipe_says() -> None:
    made = space("scale=0..1.5 by task by layers 2", method=TaskArithmetic())
    names = [one.name for one in made.dimensions]
    assert names == [f"scale[{task}, {group}]" for task in TASKS for group in ("blocks 0–2", "blocks 3–4", "other tensors")]
    values = {name: place / 10 for place, name in enumerate(names)}
    method = made.method_of(values)
    built = build(method["name"], {key: value for key, value in method.items() if key != "name"})
    want = {f"encoder.layer.{i}.*": 0.0 if i < 3 else 0.1 for i in range(5)} | {"*": 0.2}
    assert isinstance(built, TaskArithmetic) and isinstance(built.scale, PerTask)
    assert built.scale.values["a"] == PerPattern(want)
    assert built.scale.values["b"] == PerPattern({pattern: pytest.approx(value + 0.3) for pattern, value in want.items()})


def test_patterns_of_ones_own() -> None:
    made = space("scale=0..1 by pattern *q_proj*, *", method=TaskArithmetic())
    assert made.method_of({"scale[*q_proj*]": 0.2, "scale[*]": 0.7})["scale"] == {"per_pattern": {"*q_proj*": 0.2, "*": 0.7}}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 12))
def test_every_block_is_in_one_group(depths: list[int], count: int) -> None:
    names = [f"tower{t}.layers.{i}.mlp.up_proj.weight" for t, depth in enumerate(depths) for i in range(depth)]
    groups = layer_groups(names, count)
    assert list(groups)[-1] == "other tensors"
    patterns = [pattern for one in list(groups.values())[:-1] for pattern in one]
    assert sorted(patterns) == sorted(f"tower{t}.layers.{i}.*" for t, depth in enumerate(depths) for i in range(depth))
    assert all(groups.values()), "no group is empty"
    sizes = [len(one) for one in list(groups.values())[:-1]]
    if len(depths) == 1:
        assert max(sizes) - min(sizes) <= 1


def test_the_recipes_own_values_start_it_where_they_lie_inside() -> None:
    assert space("density=0.1..0.9", "scale=0.5..2", method=Ties(density=0.2)).start() == {"density": 0.2, "scale": 1.0}
    assert space("density=0.3..0.9", method=Ties(density=0.2)).start() is None
    by_task = space("scale=0..1 by task", method=TaskArithmetic(scale=PerTask({"a": 0.2, "b": 0.4})))
    assert by_task.start() == {"scale[a]": 0.2, "scale[b]": 0.4}
    assert space("scale=0..1", method=TaskArithmetic(scale=PerTask({"a": 0.2, "b": 0.4}))).start() is None
    assert space("then=[task_arithmetic, ties]", method=AdaMerging()).start() == {"then": "task_arithmetic"}


WRONG = [
    ("densty=0.1..1", Ties(), "no such field of ties. Did you mean 'density'? Fields: "),
    ("density=0..1", Ties(), "density: must be in (0, 1]. Got 0, an end of 0..1"),
    ("density=0.1..1.5", Ties(), "Got 1.5, an end of 0.1..1.5"),
    ("density=0.5..0.1", Ties(), "must go from a smaller number to a larger one. Got 0.5..0.1"),
    ("scale=0..1 log", Ties(), "drawn by its logarithm from positive numbers only. Got 0..1"),
    ("scale=0...1", Ties(), "must be LOW..HIGH"),
    ("scale=0..nan", Ties(), "its ends must be finite numbers. Got 'nan'"),
    ("scale=0..1e999", Ties(), "its ends must be finite numbers"),
    ("scale", Ties(), "is not of the form FIELD=RANGE"),
    ("scale=1", Ties(), "must be LOW..HIGH"),
    ("scale=0..1 by taks", Ties(), "Got `by taks`"),
    ("scale=0..1 by layers 0", Ties(), "Got `by layers 0`"),
    ("scale=0..1 by task", Ties(), "scale: does not vary by task"),
    ("alpha=0..1 by layers", build("awd", {}), "alpha: does not vary by layer or pattern"),
    ("scale=0..1 by pattern *q*", Ties(), "patterns must end with `*`"),
    ("scale=0..1 by pattern ,", Ties(), "patterns must end with `*`"),
    ("trim=0..1", Ties(), "trim: must be one of vector, tensor. Got 0"),
    ("trim=[vector]", Ties(), "needs at least two different values"),
    ("trim=[vector, tensr]", Ties(), "Got 'tensr'"),
    ("trim=[vector, [tensor]]", Ties(), "must be a list of numbers, words"),
    ("then.density=0.1..1", Ties(), "takes no method as `then`"),
    ("then.density=0.1..1", AdaMerging(), "no such field of task_arithmetic"),
    ("rank=0.5..2", TsvM(), "rank: must be an integer"),
    ("rank=1..2.5", TsvM(), "Got 2.5"),
]


@pytest.mark.parametrize(("text", "method", "said"), WRONG, ids=[one[0] for one in WRONG])
def test_a_wrong_space_is_told(text: str, method: Method, said: str) -> None:
    with pytest.raises(RecipeError) as told:
        space(text, method=method)
    assert said in str(told.value)


def test_all_that_is_wrong_is_told_together() -> None:
    with pytest.raises(RecipeError) as told:
        space("densty=0.1..1", "scale=2..1", "scale=0..1", "weights=0..1", "weights=0..2")
    assert len(told.value.problems) == 3
    with pytest.raises(RecipeError, match="names no field"):
        space()
    with pytest.raises(RecipeError, match="lies under then, which varies itself"):
        space("then=[ties, average]", "then.density=0.1..1", method=AdaMerging(then=Ties()))
    with pytest.raises(RecipeError, match="no blocks of layers"):
        read_space(["scale=0..1 by layers"], TaskArithmetic(), TASKS, ["w"])
    with pytest.raises(RecipeError, match=r"no objective 'wrost'\. Did you mean 'worst'"):
        objectives_of(["wrost"], TASKS, TASKS)
    with pytest.raises(RecipeError, match="'mean' is given twice"):
        objectives_of(["mean", "mean"], TASKS, TASKS)


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.booleans(), st.floats(0, 1))
def test_the_unit_interval_and_back(a: float, b: float, log: bool, place: float) -> None:
    if a == b:
        return
    one = Dimension(path="scale", low=min(a, b), high=max(a, b), log=log)
    value = from_unit(one, place)
    assert one.holds(value)
    # both ways round a handful of times; the width may be far smaller than the numbers
    slack = 16 * np.finfo(float).eps * (1 + max(abs(np.log(a)), abs(np.log(b)))) / abs(np.log(b / a)) if log else None
    slack = slack or 16 * np.finfo(float).eps * max(a, b) / abs(b - a)
    assert to_unit(one, value) == pytest.approx(place, abs=max(slack, 1e-12))


# Halving


@pytest.mark.parametrize("halving", ["none", "examples", "tasks", "both"])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 4), st.integers(2, 4))
def test_a_ladder_ends_with_everything_and_reads_nothing_twice(halving: Any, sizes: list[int], rungs: int, factor: int) -> None:
    counts = {f"t{i}": size for i, size in enumerate(sizes)}
    ladder = ladder_of(counts, halving, rungs, factor, seed=3)
    assert dict(ladder.rungs[-1]) == counts
    for below, above in zip(ladder.rungs, ladder.rungs[1:], strict=False):
        assert below != above and all(count <= above[task] for task, count in below.items())
    for task, count in counts.items():
        rows = [row for rung, read in enumerate(ladder.rungs) if task in read for row in ladder.rows(task, rung, count)]
        assert sorted(rows) == list(range(count))


def test_a_trial_goes_on_as_asynchronous_halving_has_it() -> None:
    """Optuna's own pruner, which has one objective, decides the same for values that differ."""
    generator = random.Random(0)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3, min_early_stopping_rate=0)
    study = optuna.create_study(pruner=pruner)
    seen: list[list[float]] = []
    for _ in range(40):
        loss = generator.random()
        trial = study.ask()
        trial.report(loss, 1)
        assert goes_on([loss], seen, 3) is not trial.should_prune()
        seen.append([loss])
        study.tell(trial, state=TrialState.PRUNED)


vectors = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(vectors)
def test_a_front_is_what_optuna_calls_best(losses: list[tuple[int, int]]) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    for loss in losses:
        study.add_trial(optuna.trial.create_trial(values=list(map(float, loss))))
    want = {tuple(one.values) for one in study.best_trials}
    found = front(losses)
    assert {losses[place] for place in found} == want
    assert len(found) == len(want), "of equal ones the first"
    assert not any(dominates(a, b) for a, b in product([losses[p] for p in found], repeat=2))


# CMA-ES


def quadratic(x: float, y: float) -> float:
    return (x - 1.7) ** 2 + 3 * (np.log(y) - np.log(0.4)) ** 2


def test_cma_es_by_replay_is_cma_es() -> None:
    """Against a loop that keeps its optimizer, seeded before each point as the sampler is."""
    dimensions = (Dimension(path="x", low=0.0, high=3.0), Dimension(path="y", low=0.01, high=2.0, log=True))
    study = optuna.create_study()
    optimizer: Any = None
    batch: list[Any] = []
    best = []
    for number in range(60):
        sampler = CmaSampler(dimensions, None, seed=0, own=number)
        study.sampler = sampler
        trial = study.ask({one.name: one_distribution(one) for one in dimensions})
        trial.set_user_attr(GENERATION, sampler.generation)
        if optimizer is None:
            optimizer = cmaes.CMA(mean=np.array([0.5, 0.5]), sigma=0.25, bounds=np.array([[0.0, 1.0]] * 2))
        optimizer.reseed_rng(number)
        point = optimizer.ask()
        want = [from_unit(one, float(place)) for one, place in zip(dimensions, point, strict=True)]
        assert [trial.params["x"], trial.params["y"]] == pytest.approx(want, rel=1e-9)
        loss = quadratic(*want)
        batch.append((point, loss))
        if len(batch) == optimizer.population_size:
            optimizer.tell(batch)
            batch = []
        study.tell(trial, loss)
        best.append(loss)
    assert min(best[30:]) < min(best[:12]), "it comes nearer"


def one_distribution(dimension: Dimension) -> Any:
    from thetau.studies.searching.samplers import distribution

    return distribution(dimension)


def test_cma_es_says_what_it_cannot_search() -> None:
    numbers = space("density=0.1..1", "scale=0..2").dimensions
    check_sampler("cmaes", numbers, 1)
    with pytest.raises(RecipeError, match=r"has one objective\. Got 2\. Take `--sampler tpe`"):
        check_sampler("cmaes", numbers, 2)
    with pytest.raises(RecipeError, match="trim has choices"):
        check_sampler("cmaes", space("density=0.1..1", "scale=0..2", "trim=[vector, tensor]").dimensions, 1)
    with pytest.raises(RecipeError, match="at least two numbers"):
        check_sampler("cmaes", numbers[:1], 1)


# The file of trials

OBJECTIVES = objectives_of(["mean"], TASKS, TASKS)


def trials(path: Path | None, *, facts: dict[str, Any] | None = None, sampler: Any = "random") -> Trials:
    return Trials(path, space("density=0.1..1", "scale=0.1..2"), OBJECTIVES, facts or {"the recipe": 1}, sampler=sampler, seed=0)


def fill(open_trials: Trials, total: int) -> None:
    with open_trials as kept:
        go_on(kept, total)


def go_on(kept: Trials, total: int) -> None:
    while (trial := kept.ask(total)) is not None:
        kept.tell(trial, TrialState.COMPLETE, [trial.params["scale"]])


@pytest.mark.parametrize(
    ("name", "sampler"), [("t.journal", "random"), ("t.journal", "tpe"), ("t.journal", "cmaes"), ("t.db", "tpe")]
)
def test_a_study_that_was_cut_off_goes_on_as_it_would_have_gone(tmp_path: Path, name: str, sampler: str) -> None:
    (tmp_path / "a").mkdir()
    fill(trials(tmp_path / "a" / name, sampler=sampler), 11)
    fill(trials(tmp_path / "a" / name, sampler=sampler), 14)
    apart, whole = trials(tmp_path / "a" / name, sampler=sampler), trials(None, sampler=sampler)
    fill(whole, 14)
    assert [one.params for one in apart.ended()] == [one.params for one in whole.ended()]
    assert len(apart.ended()) == 14
    assert apart.ended()[0].params == {"density": 0.2, "scale": 1.0}, "the recipe's own values are the first trial"
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == [name], "no locks are left"


@pytest.mark.parametrize("name", ["trials.journal", "trials.db"])
def test_trials_of_a_process_that_died_do_not_count(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with trials(path) as dead, trials(path) as alive:
        lost, running = dead.ask(10), alive.ask(10)
        assert lost is not None and running is not None
        dead.__exit__()  # as the system does for a process that ends
        with trials(path) as third:
            while (trial := third.ask(4)) is not None:
                third.tell(trial, TrialState.COMPLETE, [1.0])
            assert len(third.ended()) == 3, "three and the one that is at work are four"
            alive.note(running, {FAULT: "a method of its own"})
            alive.tell(running, TrialState.FAIL)
            assert [one.number for one in third.ended()] == [1, 2, 3, 4], "one that failed by itself counts"
            assert third.ended()[1].params == {"density": 0.2, "scale": 1.0}, "the recipe's own values, which died with the first"


def test_several_at_once_make_as_many_as_were_asked(tmp_path: Path) -> None:
    """Each has its own descriptors, and so its own locks, as processes have; the four begin together,
    so that none makes all before another is there.
    """
    together = Barrier(4, timeout=60)

    def work(_: int) -> None:
        with trials(tmp_path / "t.journal") as mine:
            first = mine.ask(30)
            together.wait()
            assert first is not None
            mine.tell(first, TrialState.COMPLETE, [first.params["scale"]])
            go_on(mine, 30)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    ended = trials(tmp_path / "t.journal").ended()
    assert [one.number for one in ended] == list(range(30))
    assert len({json.dumps(one.params) for one in ended}) == 30
    assert len({one.user_attrs["worker"] for one in ended}) == 4


def test_half_a_line_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "t.journal"
    fill(trials(path), 3)
    whole = path.read_bytes()
    for cut in (1, 7, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])  # the last record was not yet acknowledged
        storage = JournalStorage(Journal(path))
        study = optuna.load_study(study_name="thetau search", storage=storage)
        fill(trials(path), 5)
        assert len(study.get_trials()) >= 5
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.txt", b"my notes"), ("n.journal", b'{"a": 1}\n'), ("n.journal", b'{"op_code": 0}\nmine\n'), ("n.db", b"x" * 5000)],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((OutputError, DataError), match=name.replace(".", r"\.")):
        trials(tmp_path / name)
    assert (tmp_path / name).read_bytes() == content


def test_trials_of_another_search_are_refused(tmp_path: Path) -> None:
    fill(trials(tmp_path / "t.journal"), 2)
    with pytest.raises(OutputError, match=r"holds the trials of another search: the recipe is not the same\. Give another name"):
        trials(tmp_path / "t.journal", facts={"the recipe": 2})
