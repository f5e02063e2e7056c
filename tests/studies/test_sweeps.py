"""Sweeps over fields, λ, subsets and left-out tasks: against plain loops, and in JSON and as a chart."""

from __future__ import annotations

from itertools import combinations
from math import comb
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.diagnostics.results import load_result
from thetau.errors import DataError, RecipeError
from thetau.models import load_encoder, read_weights
from thetau.studies.options import Sweep
from thetau.studies.sweeps import SubsetValue, Swept, over_subsets, subsets_of, sweep
from tiny import one_thread as one_thread
from tiny_world import NAMES, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def found(world: World) -> Swept:
    options = Sweep(
        method="ties", over={"density": [0.2, 1.0]}, alphas=(0.5, 1.0), subsets=(2, 3), left_out=True, upper_bound=True
    )
    return sweep(world.session, options)


def test_a_point_is_what_the_weights_give(world: World, found: Swept) -> None:
    """At density 1 TIES is trim-free; task arithmetic by hand is another row, so a sum is compared by plain weights."""
    told = sweep(world.session, Sweep(alphas=(0.5, 1.0)))
    (row,) = told.rows
    assert {0.5, 1.0} <= {point.scale for point in row.points}
    base = load_encoder(world.base).weights(exact=True)
    models = [read_weights(path) for path in world.models]
    for point in row.points:
        weights = {
            name: tensor + point.scale * sum(model[name] - tensor for model in models) if tensor.is_floating_point() else tensor
            for name, tensor in base.items()
        }
        expected = world.session.evaluator.evaluate(weights, "test")
        loss = world.session.evaluator.losses(weights, "test")
        for name in NAMES:
            assert point.accuracy[name].value == pytest.approx(expected[name].value, abs=1 / 20 + 1e-9), (
                "one example at most, by rounding"
            )
            assert point.loss[name].value == pytest.approx(loss[name].value, rel=1e-3)
        assert point.absolute == pytest.approx(mean(one.value for one in point.accuracy.values()))
    best = max(row.points, key=lambda point: (point.validation, -point.scale))
    assert row.chosen == best.scale
    assert [one.fields for one in found.rows] == [{"density": 0.2}, {"density": 1.0}]


def test_subsets_left_out_and_upper_bound(found: Swept) -> None:
    two, three = found.subsets
    assert (two.size, two.every, len(two.values)) == (2, True, 3)
    assert [value.tasks for value in two.values] == list(combinations(NAMES, 2))
    values = [value.normalised for value in two.values]
    half = 4.302652729696142 * stdev(values) / 3**0.5  # t of 2 degrees of freedom, from tables
    assert (two.mean, two.low, two.high) == pytest.approx((mean(values), mean(values) - half, mean(values) + half))
    assert three.values[0].normalised == pytest.approx(found.rows[0].best.normalised), "all three are the first row's merge"
    assert [one.task for one in found.left_out] == list(NAMES)
    for one in found.alone:
        assert one.one == found.individual[one.task]


def test_drawn_subsets_are_different_and_follow_the_seed() -> None:
    names = [f"t{i}" for i in range(14)]
    drawn = subsets_of(names, 5, 8)
    assert len(set(drawn)) == 8
    assert all(list(one) == sorted(one, key=names.index) and len(set(one)) == 5 for one in drawn)
    assert subsets_of(names, 5, 8) == drawn
    assert subsets_of(names, 5, 8, seed=1) != drawn
    assert len(subsets_of(names, 13, 20)) == comb(14, 13)
    alone = SubsetValue(tasks=("a",), chosen=1.0, at_end=False, absolute=0.5, normalised=0.9)
    assert over_subsets(1, [alone], every=True).mean == 0.9


def test_the_command_writes_json_and_a_chart(world: World, tmp_path: Path) -> None:
    words: list[Any] = ["sweep", *world.models, "--base", world.base, "--data", world.data, "--method", "ties"]
    words += [
        "--over",
        "density=[0.2, 0.5]",
        "--alphas",
        "0.5,1",
        "--subsets",
        "2",
        "--draws",
        "2",
        "--validation",
        "12",
        "--test",
        "12",
    ]
    done = CliRunner().invoke(app, [*map(str, words), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")])
    assert done.exit_code == 0, (done.output, done.exception)
    told = load_result(Swept, tmp_path / "s.json")
    assert [row.fields for row in told.rows] == [{"density": 0.2}, {"density": 0.5}]
    assert all(one.n == 12 for row in told.rows for point in row.points for one in point.accuracy.values())
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_bank_names_its_tasks_by_their_records(world: World, tmp_path: Path) -> None:
    """`finetuned/TASK/KEY`, as suites write them, is the task's, not the path's: every verb that takes a task accepts it."""
    import shutil

    import thetau
    from thetau.bases import build
    from thetau.evaluate.tuned import task_vectors

    places = []
    for name, model in zip(NAMES, world.models, strict=True):
        place = tmp_path / "finetuned" / name / "d62560ef"
        shutil.copytree(model, place)
        places.append(str(place))
    base = thetau.open(world.base)
    names, vectors = task_vectors(places, base)
    assert names == list(NAMES)
    bank = build(tmp_path / "bank", vectors, base, names=names)
    assert set(bank.members) == set(NAMES)
    assert task_vectors([f"mine={places[0]}"], base)[0] == ["mine"]


def test_what_is_refused(world: World) -> None:
    with pytest.raises(RecipeError, match=r"--over density must be a list of values, as 'density=\[0.1, 0.2\]'. Got 0.1"):
        Sweep(method="ties", over={"density": 0.1})
    with pytest.raises(RecipeError, match="density is given by --set and by --over"):
        Sweep(method="ties", over={"density": [0.1]}, fields={"density": 0.1})
    with pytest.raises(DataError, match=r"subsets must have 1 to 3 of the tasks. Got 4"):
        sweep(world.session, Sweep(subsets=(4,)))
    with pytest.raises(RecipeError, match="densty"):
        sweep(world.session, Sweep(method="ties", over={"densty": [0.1]}))
    with pytest.raises(DataError, match="a sum has no fields"):
        sweep(world.session, Sweep(over={"density": [0.1]}))
