"""Searches of tiny recipes: what a trial measures, what is pruned, what fails, what is written."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.diagnostics.results import load_result
from thetau.errors import DataError, OutputError, RecipeError
from thetau.evaluate import Session
from thetau.evaluate.options import Reading
from thetau.evidence import MomentConfig, collect_second_moments
from thetau.facade import from_recipe
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.recipes import Recipe, from_mapping, load
from thetau.studies import Search, Searched, best_recipe, search
from thetau.studies.searching import write_best
from thetau.tasks import load_task
from tiny import WORDS
from tiny import one_thread as one_thread
from tiny_causal import causal_task, talker
from tiny_world import NAMES, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("search"))


def recipe(world: World, method: Any = "ties", **more: Any) -> Recipe:
    models = [{"path": str(path), "name": path.name} for path in world.models]
    made = from_mapping({"base": str(world.base), "models": models, "method": method, **more})
    assert isinstance(made, Recipe)
    return made


def run(world: World, given: Recipe, **options: Any) -> Searched:
    return search(given, Search(**options), reading=Reading(data=world.data))


def plainly(world: World, content: dict[str, Any], split: str = "validation") -> tuple[dict[str, float], dict[str, float]]:
    """What `thetau merge` makes of a recipe, measured by the evaluator alone."""
    weights = from_recipe(from_mapping(content)).state_dict()
    session = Session.open(world.models, base=world.base, reading=Reading(data=world.data))
    evaluator = session.evaluator
    return (
        {task: one.value for task, one in evaluator.evaluate(weights, split).items()},
        {task: one.value for task, one in evaluator.losses(weights, split).items()},
    )


@pytest.mark.parametrize(
    ("method", "space"),
    [
        ("ties", ("density=0.05..1 log", "scale=0.2..3")),
        ({"name": "task_arithmetic", "scale": 0.4}, ("scale=-0.5..1.5 by task",)),
        ("task_arithmetic", ("scale=0..1.5 by task by layers",)),
        ({"name": "dare_linear", "scale": 0.5}, ("drop=0..0.9 by task",)),
        ("magmax", ("scale=0.2..2",)),
        ({"name": "linear"}, ("weights=0.1..1 by task",)),
    ],
    ids=["ties", "by task", "by task and layer", "random drops", "one λ", "models"],
)
def test_a_trial_measures_what_its_recipe_merges(world: World, method: Any, space: tuple[str, ...]) -> None:
    found = run(world, recipe(world, method, seed=5), space=space, trials=3)
    for one in found.trials:
        assert one.state == "complete", one.error
        values, losses = plainly(world, best_recipe(found, one.number))
        for task in NAMES:
            assert one.accuracy[task].value == pytest.approx(values[task], abs=1 / 20 + 1e-9), "one example, by rounding"
            assert one.loss[task].value == pytest.approx(losses[task], rel=1e-3)
        own = {task: found.individual[task].value for task in NAMES}
        shares = [one.accuracy[task].value / own[task] for task in NAMES]
        assert one.objectives["normalised"] == pytest.approx(sum(shares) / 3)
    assert found.best[0] == max(found.trials, key=lambda one: (one.objectives["normalised"], -one.number)).number
    assert not found.test


@pytest.mark.parametrize(
    ("method", "space"), [("regmean", "off_diagonal=0..1"), ("esm", "spectrum=0..1")], ids=["regmean", "esm"]
)
def test_methods_with_evidence_are_searched_with_what_was_collected(
    world: World, tmp_path: Path, method: str, space: str
) -> None:
    encoder = load_encoder(world.base)
    config = MomentConfig(examples=8, max_length=24)
    files = {name: tmp_path / f"{name}.safetensors" for name in NAMES}
    for name, path in zip(NAMES, world.models, strict=True):
        collect_second_moments(encoder, load_task(name, world.data), read_weights(path), files[name], "gram", config)
    given = recipe(world, method, evidence={"gram": {name: str(path) for name, path in files.items()}})
    found = run(world, given, space=(space,), trials=2)
    for one in found.trials:
        assert one.state == "complete", one.error
        values, losses = plainly(world, best_recipe(found, one.number))
        for task in NAMES:
            assert one.accuracy[task].value == pytest.approx(values[task], abs=1 / 20 + 1e-9)
            assert one.loss[task].value == pytest.approx(losses[task], rel=1e-3)


def test_the_test_split_is_read_only_where_that_is_asked(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "data")
    for path in (tmp_path / "data").glob("*/test.jsonl.gz"):
        path.unlink()
    options: dict[str, Any] = {"space": ("scale=0.2..2",), "trials": 2, "validation": 10}
    found = search(recipe(world), Search(**options), reading=Reading(data=tmp_path / "data"))
    assert {one.n for trial in found.trials for one in trial.accuracy.values()} == {10}
    with pytest.raises(DataError, match="test"):
        search(recipe(world), Search(**options, test=True), reading=Reading(data=tmp_path / "data"))
    tested = run(world, recipe(world), **options, test=True)
    assert [one.number for one in tested.test] == [None, *tested.best]
    values, _ = plainly(world, best_recipe(tested, tested.best[0]), "test")
    last = tested.test[-1]
    assert {one.n for one in last.accuracy.values()} == {40}
    for task in NAMES:
        assert last.accuracy[task].value == pytest.approx(values[task], abs=1 / 40 + 1e-9)


def test_several_objectives_give_a_front_of_recipes(world: World, tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": ("scale=0..2 by task",), "trials": 14, "objective": ("animals", "weather", "loss")}
    found = run(world, recipe(world, "task_arithmetic"), **options)
    signs = {"larger": 1, "smaller": -1}
    points = {
        one.number: tuple(signs[way] * one.objectives[name] for name, way in found.objectives.items()) for one in found.trials
    }
    better = {
        a
        for a, mine in points.items()
        if any(all(x >= y for x, y in zip(other, mine, strict=True)) and other != mine for other in points.values())
    }
    assert {points[number] for number in found.best} == {point for number, point in points.items() if number not in better}
    paths = write_best(found, tmp_path)
    assert len(paths) == len(found.best)
    for path, number in zip(paths, found.best, strict=True):
        again = load(path)
        assert isinstance(again, Recipe)
        assert again.method == found.trial(number).method


@pytest.mark.parametrize("objective", [("mean",), ("mean", "worst")])
@pytest.mark.parametrize("halving", ["examples", "tasks"])
def test_halving_stops_what_is_behind(world: World, halving: str, objective: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"trials": 12, "objective": objective, "halving": halving, "rungs": 2, "factor": 2}
    by_task = {"space": ("scale=0..3 by task",), "sampler": "random"}
    found = run(world, recipe(world, "task_arithmetic"), **options, **by_task)
    first, last = found.rungs
    assert last == dict.fromkeys(NAMES, 20)
    assert first == (dict.fromkeys(NAMES, 10) if halving == "examples" else dict.fromkeys(("animals", "third"), 20))
    states = {one.state for one in found.trials}
    assert states == {"complete", "pruned"}
    everything = run(world, recipe(world, "task_arithmetic"), **{**options, "halving": "none"}, **by_task)
    for one, whole in zip(found.trials, everything.trials, strict=True):
        assert one.values == whole.values
        read = first if one.state == "pruned" else last
        assert {task: measure.n for task, measure in one.accuracy.items()} == read
        for task, measure in one.accuracy.items():
            if measure.n == 20:
                assert measure.value == pytest.approx(whole.accuracy[task].value, abs=1 / 20 + 1e-9)


def test_what_fails_is_recorded_and_the_search_goes_on(world: World) -> None:
    found = run(world, recipe(world), space=("scale=[0.5, 1.0, 1.0e+38]",), trials=9, sampler="random")
    failed = [one for one in found.trials if one.state == "failed"]
    assert failed and len(found.trials) == 9
    assert {one.values["scale"] for one in failed} == {1e38}
    assert all(one.error is not None and "NaN or Inf" in one.error for one in failed)
    assert found.trial(found.best[0]).values["scale"] != 1e38
    with pytest.raises(DataError, match=r"none of 2 trials was completed\. Trial 0 failed: the model's features must be finite"):
        run(world, recipe(world, {"name": "ties", "scale": 3e38}), space=("scale=2e+38..3e+38",), trials=2)


def test_a_method_that_breaks_costs_one_trial(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from thetau.studies.searching import mixing

    merge = mixing.merge

    def breaks(vectors: Any, method: Any, **more: Any) -> Any:
        if method.density > 0.5:
            raise RuntimeError("no convergence")
        return merge(vectors, method, **more)

    monkeypatch.setattr(mixing, "merge", breaks)
    found = run(world, recipe(world), space=("density=0.1..0.9",), trials=8, sampler="random")
    assert {one.state: one.error for one in found.trials} == {"complete": None, "failed": "no convergence"}
    assert all((one.state == "failed") == (one.values["density"] > 0.5) for one in found.trials)  # type: ignore[operator]


def test_vectors_are_read_once_and_lambda_alone_merges_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thetau.studies.searching import mixing

    merges = []
    merge = mixing.merge

    def counted(*given: Any, **more: Any) -> Any:
        for path in tmp_path.glob("*/model.safetensors"):  # nothing may be read of them any more
            path.write_bytes(b"")
        merges.append(1)
        return merge(*given, **more)

    monkeypatch.setattr(mixing, "merge", counted)
    run(world, recipe(world), space=("scale=0.2..2",), trials=4)
    assert len(merges) == 1
    run(world, recipe(world, "task_arithmetic"), space=("scale=0..1 by task",), trials=3)
    assert len(merges) == 1, "a plain sum is not merged"
    models = [{"path": str(shutil.copytree(path, tmp_path / path.name)), "name": path.name} for path in world.models]
    moved = recipe(world).model_copy(update={"models": from_mapping({**recipe(world).model_dump(), "models": models}).models})
    run(world, moved, space=("density=0.1..1",), trials=3)
    assert len(merges) == 4
    assert all((tmp_path / name / "model.safetensors").stat().st_size == 0 for name in NAMES)


def test_linear_models_are_searched_for_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """J τ is computed once an example; after the first trial no model runs."""
    from thetau.models.linear import LinearModel

    encoder = load_encoder(world.base)
    for number, name in enumerate(("animals", "weather")):
        config = FinetuneConfig(steps=4, lr=4e-3, batch_size=8, max_length=24, seed=number, paradigm="linear")
        finetune(encoder, load_task(name, world.data), tmp_path / name, config, base=str(world.base))
    ran = []
    parts = LinearModel.parts

    def counted(self: Any, *given: Any, **more: Any) -> Any:
        ran.append(1)
        return parts(self, *given, **more)

    monkeypatch.setattr(LinearModel, "parts", counted)
    models = [{"path": str(tmp_path / name), "name": name} for name in ("animals", "weather")]
    given = from_mapping({"base": str(world.base), "models": models, "method": "task_arithmetic"})
    assert isinstance(given, Recipe)
    run(world, given, space=("scale=0..2 by task",), trials=2)
    few = len(ran)
    ran.clear()
    run(world, given, space=("scale=0..2 by task",), trials=9)
    assert len(ran) == few > 0

    ran.clear()
    found = run(world, given.model_copy(update={"method": "ties"}), space=("density=0.2..1", "scale=0.5..1.5"), trials=3)
    assert [one.state for one in found.trials] == ["complete"] * 3
    assert len(ran) > few, "another method's vector is another one for each trial"


def test_a_task_to_keep_is_an_objective_of_its_own(world: World) -> None:
    """The third task has no model among those that are merged, counts in no mean, and is measured first where tasks are halved."""
    two = recipe(world, "task_arithmetic")
    two = two.model_copy(update={"models": [one for one in two.models if "weather" not in str(one)]})
    options: dict[str, Any] = {"space": ("scale=0..2",), "trials": 6, "task": ("weather",), "objective": ("mean", "weather")}
    found = run(world, two, **options)
    assert found.tasks == ("animals", "third", "weather")
    assert set(found.individual) == {"animals", "third"}
    for one in found.trials:
        assert one.objectives["weather"] == one.accuracy["weather"].value
        assert one.objectives["mean"] == pytest.approx((one.accuracy["animals"].value + one.accuracy["third"].value) / 2)
    halved = run(world, two, **options, halving="tasks", rungs=2, factor=3)
    assert halved.rungs == ({"weather": 20}, {"weather": 20, "animals": 20, "third": 20})


def test_the_same_command_again_goes_on_and_another_search_is_refused(world: World, tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": ("density=0.1..1", "scale=0.2..2"), "storage": tmp_path / "t.journal"}
    run(world, recipe(world), **options, trials=3)
    found = run(world, recipe(world), **options, trials=5)
    whole = run(world, recipe(world), space=options["space"], trials=5)
    assert [(one.values, one.objectives) for one in found.trials] == [(one.values, one.objectives) for one in whole.trials]
    assert [one.seconds for one in run(world, recipe(world), **options, trials=4).trials] == [one.seconds for one in found.trials]
    with pytest.raises(OutputError, match="the recipe is not the same"):
        run(world, recipe(world, {"name": "ties", "trim": "tensor"}), **options, trials=5)
    with pytest.raises(OutputError, match="the data, the halving are not the same"):
        run(world, recipe(world), **options, trials=5, validation=7)
    with pytest.raises(OutputError, match="the space is not the same"):
        run(world, recipe(world), **{**options, "space": ("scale=0.2..2",)}, trials=5)


def test_processes_share_the_trials(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process is started with is what does its share; here its work is done on the spot, since a new process takes seconds to begin."""
    from thetau.studies.searching import run as module

    class OnTheSpot:
        exitcode = 0

        def __init__(self, target: Any, args: Any) -> None:
            self.target, self.args = pickle.loads(pickle.dumps((target, args)))

        def start(self) -> None:
            given, options, *rest = self.args
            self.target(given, replace(options, trials=4), *rest)

        def join(self) -> None:
            pass

    monkeypatch.setattr(module, "Process", OnTheSpot)
    options: dict[str, Any] = {"space": ("scale=0..2 by task",), "trials": 9}
    said: list[str] = []
    shared = Search(**options, jobs=2, storage=tmp_path / "t.journal")
    found = search(recipe(world, "task_arithmetic"), shared, reading=Reading(data=world.data), say=said.append)
    assert [one.number for one in found.trials] == list(range(9))
    assert sum(line.startswith("trial") for line in said) == 5, "four were the other's"
    with pytest.raises(RecipeError, match="several jobs share their trials in a file"):
        run(world, recipe(world), **options, jobs=2)


def test_recipes_that_cannot_be_searched_are_told(world: World) -> None:
    with pytest.raises(RecipeError, match="output must be `model`"):
        run(world, recipe(world, output="vector"), space=("scale=0..1",))
    with pytest.raises(RecipeError, match="base is missing"):
        run(world, recipe(world, {"name": "linear"}).model_copy(update={"base": None}), space=("scale=0..1",))
    with pytest.raises(DataError, match="wheather"):
        run(world, recipe(world), space=("scale=0..1",), task=("wheather",))


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from thetau.studies import searching

    monkeypatch.setattr(searching, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"a search needs optuna and cmaes\. Install what is missing: pip install 'thetau\[search\]'"
    ):
        searching.search  # noqa: B018


def test_the_command_writes_all_that_it_found(world: World, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(world).model_dump(exclude_defaults=True)))
    words = ["search", tmp_path / "r.yaml", "--space", "density=0.1..1 log", "--space", "scale=0.2..2", "--trials", 4]
    words += ["--data", world.data, "--validation", 12, "-o", tmp_path / "out"]
    done = CliRunner().invoke(app, [*map(str, words), "--test"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "0, as the recipe" in done.output and "on test, in percent" in done.output
    found = load_result(Searched, tmp_path / "out/search.json")
    assert len(found.trials) == 4 and (tmp_path / "out/search.png").read_bytes().startswith(b"\x89PNG")
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "out/best.yaml"), "-o", str(tmp_path / "merged"), "--quiet"])
    assert merged.exit_code == 0, merged.output
    two = [*map(str, words[:-1]), str(tmp_path / "front"), "--objective", "mean", "--objective", "worst"]
    done = CliRunner().invoke(app, two)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "front/search.png").is_file()
    assert list((tmp_path / "front").glob("best*.yaml"))


# Causal language models


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models of it, a task with choices, one that is generated, and a perplexity."""
    root = tmp_path_factory.mktemp("talkers")
    base = talker(root / "base")
    start = load_file(base / "model.safetensors")
    for seed, name in ((1, "choices"), (2, "sounds")):
        noise = torch.Generator().manual_seed(seed)
        moved = {key: value + 0.05 * torch.randn(value.shape, generator=noise) for key, value in start.items()}
        save_file(moved, talker(root / "models" / name) / "model.safetensors", {"format": "pt"})
    rows = [{"text": "this is about the", "options": [word, "dog"], "label": place % 2} for place, word in enumerate(WORDS[2:11])]
    causal_task(root / "data", rows, "choices", kind="choices", prompt="{text}", choices="options")
    causal_task(root / "data", max_new_tokens=4)
    causal_task(root / "data", [{"text": "the cat"}, {"text": "rain wet puddle"}], "texts", kind="perplexity", prompt=None)
    return root


def talking(root: Path, *tasks: str) -> Recipe:
    models = [{"path": str(root / "models" / ("sounds" if name == "texts" else name)), "name": name} for name in tasks]
    made = from_mapping({"base": str(root / "base"), "models": models, "method": "ties"})
    assert isinstance(made, Recipe)
    return made


def test_causal_models_are_searched(talkers: Path) -> None:
    """Their answers are counted as `evaluate` counts them; a perplexity is better when lower; only what is asked for is read twice."""
    options: dict[str, Any] = {"space": ("density=0.1..1", "scale=0.2..2"), "trials": 6, "sampler": "random", "test": True}
    reading = Reading(data=talkers / "data")
    asked = Search(**options, objective=("mean", "texts"), task=("texts",))
    found = search(talking(talkers, "choices", "sounds"), asked, reading=reading)
    assert found.objectives == {"mean": "larger", "texts": "smaller"}
    session = Session.open(base=talkers / "base", tasks=["choices", "sounds", "texts"], reading=reading)
    for one in found.trials:
        assert one.state == "complete" and not one.loss, one.error
        want = session.evaluator.evaluate(from_recipe(from_mapping(best_recipe(found, one.number))).state_dict(), "validation")
        assert one.accuracy["texts"].value == pytest.approx(want["texts"].value, rel=1e-3)
        for task in ("choices", "sounds"):
            assert one.accuracy[task].value == pytest.approx(want[task].value, abs=1 / want[task].n + 1e-9), (
                "one example, by rounding"
            )
            assert one.accuracy[task].n == want[task].n
        assert one.objectives == {
            "mean": pytest.approx((one.accuracy["choices"].value + one.accuracy["sounds"].value) / 2),
            "texts": one.accuracy["texts"].value,
        }
    points = [(-one.objectives["mean"], one.objectives["texts"]) for one in found.trials]
    assert min(points)[0] == points[found.best[0]][0], "the best of the first objective first"
    assert min(points, key=lambda point: point[1])[1] in {points[number][1] for number in found.best}
    assert [one.accuracy["texts"].n for one in found.test] == [2] * len(found.test)

    halved = search(talking(talkers, "choices"), Search(**options, halving="examples", rungs=2, factor=2), reading=reading)
    assert halved.rungs == ({"choices": 8}, {"choices": 9})
    assert {one.accuracy["choices"].n for one in halved.trials} <= {8, 9}
    losses = search(talking(talkers, "sounds"), Search(**options, objective=("loss",)), reading=reading)
    for one in losses.trials:
        weights = from_recipe(from_mapping(best_recipe(losses, one.number))).state_dict()
        want_loss = session.evaluator.losses(weights, "validation", ["sounds"])["sounds"].value
        assert one.objectives["loss"] == pytest.approx(want_loss, rel=1e-3)


def test_means_over_perplexities_are_refused_before_the_first_trial(talkers: Path) -> None:
    given, reading = talking(talkers, "choices", "texts"), Reading(data=talkers / "data")
    with pytest.raises(RecipeError, match=r"'normalised' is of shares, and texts is measured by its perplexity\. Take `loss`"):
        search(given, Search(space=("scale=0..1",)), reading=reading)
    short = Reading(data=talkers / "data", max_length=5)
    with pytest.raises(
        DataError, match=r"examples are longer than `max_length`, so their loss is not defined\. Raise it, as 5 now"
    ):
        search(given, Search(space=("scale=0..1",), objective=("loss",)), reading=short)
    apart = Search(space=("scale=0..1",), trials=2, objective=("choices", "texts"), test=True)
    found = search(given, apart, reading=reading)
    assert all(one.absolute == one.accuracy["choices"].value for one in found.test)
    alone = Search(space=("scale=0..1",), trials=2, objective=("texts",), test=True)
    found = search(talking(talkers, "texts"), alone, reading=reading)
    assert {(one.absolute, one.normalised) for one in found.test} == {(None, None)}
    best = min(found.trials, key=lambda one: one.objectives["texts"])
    assert found.best == (best.number,)
