"""The plane of two vectors: against the space itself, projections and barriers by hand, in both spaces, as a chart and a command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from commands import run
from thetau.diagnostics.landscape import Landscape, barrier, landscape, projected
from thetau.diagnostics.results import load_result
from thetau.errors import DataError
from thetau.evaluate import Evaluator
from thetau.evaluate.spaces import WeightSpace
from thetau.evaluate.tuned import make_space, open_tuned, read_vectors
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.plots.landscape import landscape_chart
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

A, B = NAMES = ("animals", "weather")
GRID = (-0.5, 0.0, 0.5, 1.0)


class Bench:
    def __init__(self, root: Path) -> None:
        self.root, self.base, self.data = root, make_model(root / "base"), root / "data"
        self.encoder = load_encoder(self.base)
        tasks = [load_task(make_task(self.data, name)) for name in NAMES]
        self.evaluator = Evaluator(self.encoder, tasks, max_length=32, limits={"test": 20}, cache=root / "cache")
        for task in tasks:
            config = FinetuneConfig(steps=8, lr=5e-3, batch_size=16, max_length=32)
            finetune(self.encoder, task, root / task.name, config, base=str(self.base), heads=self.evaluator.heads)
            self.evaluator.load_base()
        self.weights = self.encoder.weights(exact=True)
        self.vectors = read_vectors([open_tuned(root / name) for name in NAMES], self.encoder, self.weights)
        self.space = WeightSpace(self.evaluator, self.weights, self.vectors)

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        return self.space.weights({A: x, B: y})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("plane"))


@pytest.fixture(scope="module")
def found(bench: Bench) -> Landscape:
    off = {key: value + (0.01 if key.endswith("pooler.dense.weight") else 0) for key, value in bench.at(0.5, 0.25).items()}
    merged = {"inside": bench.at(0.5, 1.0), "off": off}
    return landscape(bench.space, bench.evaluator, bench.vectors, grid=GRID, steps=5, merged=merged, base=bench.weights)


def test_every_point_is_that_of_the_space(bench: Bench, found: Landscape) -> None:
    for i, x in enumerate(GRID):
        for j, y in enumerate(GRID):
            for task in NAMES:
                assert found.loss[task][i][j] == bench.space.losses({A: x, B: y}, [task], "test")[task].value
                assert found.accuracy[task][i][j] == bench.space.accuracy({A: x, B: y}, task, "test").value
    assert found.n == {A: 20, B: 20} and found.space == "weights"
    assert min(min(row) for row in found.joint) == found.joint[GRID.index(found.least[0])][GRID.index(found.least[1])]


def test_merges_are_marked_where_they_lie_and_measured_as_they_are(bench: Bench, found: Landscape) -> None:
    inside, off = found.marks
    assert inside.at == pytest.approx((0.5, 1.0), abs=1e-5) and inside.outside < 1e-6
    i, j = GRID.index(0.5), GRID.index(1.0)
    assert inside.loss[A] == pytest.approx(found.loss[A][i][j], abs=1e-5)
    assert off.at == pytest.approx((0.5, 0.25), abs=0.05) and off.outside > 0.001


def test_lines_go_from_end_to_end(found: Landscape) -> None:
    assert [(line.start, line.end) for line in found.lines] == [("base", A), ("base", B), (A, B)]
    first, _, last = found.lines
    zero, one = GRID.index(0.0), GRID.index(1.0)
    assert first.steps == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert first.loss[A][0] == found.loss[A][zero][zero] and first.loss[A][-1] == found.loss[A][one][zero]
    assert first.loss[A][2] == found.loss[A][GRID.index(0.5)][zero]
    assert last.loss[B][0] == found.loss[B][one][zero] and last.loss[B][-1] == found.loss[B][zero][one]
    whole = [x + y for x, y in zip(last.loss[A], last.loss[B], strict=True)]
    assert last.joint == pytest.approx(max(v - ((4 - k) * whole[0] + k * whole[4]) / 4 for k, v in enumerate(whole)))


@pytest.mark.parametrize(
    ("values", "height"), [((0.0, 0.0, 0.0), 0.0), ((1.0, 2.0, 1.0), 1.0), ((0.0, 0.2, 2.0), 0.0), ((4.0, 4.0, 2.0, 1.0), 1.0)]
)
def test_barriers(values: tuple[float, ...], height: float) -> None:
    assert barrier(values) == pytest.approx(height)


def test_projections_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, v = ({"w": torch.randn(5, 4, generator=generator), "x": torch.randn(3, generator=generator)} for _ in range(3))
    flat = [torch.cat([one["w"].flatten(), one["x"]]).double() for one in (a, b, v)]
    wanted = torch.linalg.lstsq(torch.stack(flat[:2], 1), flat[2][:, None]).solution[:, 0]
    at, outside = projected(v, a, b)
    assert at == pytest.approx(tuple(wanted.tolist()), rel=1e-6)
    left = flat[2] - torch.stack(flat[:2], 1) @ wanted
    assert outside == pytest.approx(float(left.square().sum() / flat[2].square().sum()), rel=1e-6)
    with pytest.raises(DataError, match="span no plane"):
        projected(v, a, {key: 2 * value for key, value in a.items()})


@pytest.fixture(scope="module")
def three(bench: Bench) -> tuple[Landscape, WeightSpace, dict[str, dict[str, Tensor]]]:
    """Two fine-tuned models, and a third one that is a mixture of them and something new."""
    generator = torch.Generator().manual_seed(3)
    third = {key: 0.5 * tau + 0.02 * torch.randn(tau.shape, generator=generator) for key, tau in bench.vectors[A].items()}
    vectors = {**bench.vectors, "both": third}
    encoder = Evaluator(
        bench.encoder,
        [*bench.evaluator.tasks.values(), replace(bench.evaluator.tasks[A], name="both")],
        max_length=32,
        limits={"test": 20},
    )
    space = WeightSpace(encoder, bench.weights, vectors)
    middle = space.weights(dict.fromkeys(vectors, 1 / 3))
    off = {key: value + (0.01 if key.endswith("pooler.dense.weight") else 0) for key, value in middle.items()}
    merged = {"middle": middle, "off": off}
    return (
        landscape(space, encoder, vectors, grid=(0.0, 0.5, 1.0), steps=3, merged=merged, base=bench.weights),
        space,
        vectors,
    )


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in vector.values()])


def test_the_plane_of_three_models_goes_through_them(three: tuple[Landscape, WeightSpace, dict[str, dict[str, Tensor]]]) -> None:
    found, space, vectors = three
    assert found.through == "models" and found.tasks == (A, B, "both")
    assert found.corners == {A: (0.0, 0.0), B: (1.0, 0.0), "both": (0.0, 1.0)}
    for i, x in enumerate(found.grid):
        for j, y in enumerate(found.grid):
            for task in found.tasks:
                expected = space.losses({A: 1 - x - y, B: x, "both": y}, [task], "test")[task].value
                assert found.loss[task][i][j] == pytest.approx(expected, abs=1e-6)
    assert found.joint[1][2] == pytest.approx(sum(found.loss[task][1][2] for task in found.tasks))
    assert found.mean_accuracy[1][2] == pytest.approx(sum(found.accuracy[task][1][2] for task in found.tasks) / 3)
    assert [(line.start, line.end) for line in found.lines] == [(A, B), (A, "both"), (B, "both")]
    assert found.lines[1].loss[B][1] == found.loss[B][0][1]
    for (a, b), length in found.sides.items():
        assert length == pytest.approx(float((flat(vectors[a]) - flat(vectors[b])).norm()), rel=1e-6)


def test_beside_a_plane_of_models_the_base_and_merges_say_how_far_off_they_are(
    three: tuple[Landscape, WeightSpace, dict[str, dict[str, Tensor]]],
) -> None:
    found, space, vectors = three
    base, middle, off = found.marks
    a, b, c = (flat(vectors[name]) for name in found.tasks)
    plane = torch.stack([b - a, c - a], 1)
    nearest = torch.linalg.lstsq(plane, -a[:, None]).solution[:, 0]
    apart = float((-a - plane @ nearest).norm())
    assert base.name == "base" and base.at == pytest.approx(tuple(nearest.tolist()), rel=1e-5, abs=1e-7)
    assert base.distance == pytest.approx(apart, rel=1e-6)
    assert base.outside == pytest.approx(apart**2 / float(((a + b + c) / 3).square().sum()), rel=1e-5)
    assert base.loss[A] == pytest.approx(space.losses({}, [A], "test")[A].value)
    assert middle.at == pytest.approx((1 / 3, 1 / 3), abs=1e-4)
    assert middle.distance is not None and middle.distance < 1e-5 * found.sides[A, B], "weights are rounded to float32"
    assert middle.outside == 0.0, "no share of what is only rounding"
    assert off.distance is not None and off.distance > 1e-3


def test_the_plane_of_three_models_as_json_and_chart(
    three: tuple[Landscape, WeightSpace, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    found = three[0]
    found.save(tmp_path / "plane.json")
    assert load_result(Landscape, tmp_path / "plane.json") == found
    landscape_chart(found, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000


def test_models_that_span_no_plane_are_refused(bench: Bench) -> None:
    a, b = bench.vectors.values()
    line = {A: a, B: b, "between": {key: 0.25 * a[key] + 0.75 * b[key] for key in a}}
    space = WeightSpace(bench.evaluator, bench.weights, line)
    with pytest.raises(DataError, match="three models lie on one line"):
        landscape(space, bench.evaluator, line, grid=(0.0, 1.0))
    with pytest.raises(DataError, match="two task vectors lie on one line"):
        landscape(bench.space, bench.evaluator, {A: a, B: a}, grid=(0.0, 1.0))
    with pytest.raises(DataError, match="'base' is the base"):
        landscape(bench.space, bench.evaluator, {A: a, "base": b}, grid=(0.0, 1.0))
    with pytest.raises(DataError, match="Got 4"):
        landscape(bench.space, bench.evaluator, dict.fromkeys("abcd", a), grid=(0.0, 1.0))


def test_results_without_a_frame_are_still_read(found: Landscape, tmp_path: Path) -> None:
    found.save(tmp_path / "plane.json")
    told = json.loads((tmp_path / "plane.json").read_text())
    for key in ("through", "frame"):
        del told[key]
    for mark in told["marks"]:
        del mark["distance"]
    (tmp_path / "plane.json").write_text(json.dumps(told))
    old = load_result(Landscape, tmp_path / "plane.json")
    assert old.through == "base" and old.sides == {} and old.joint == found.joint
    landscape_chart(old, tmp_path / "old.png")


def test_the_tangent_space_is_exact_and_takes_no_merges(bench: Bench) -> None:
    space = make_space(bench.evaluator, bench.weights, bench.vectors, tangent=True)
    found = landscape(space, bench.evaluator, bench.vectors, grid=(0.0, 1.0), steps=3, name="tangent")
    assert found.space == "tangent"
    assert found.loss[A][1][0] == pytest.approx(space.losses({A: 1.0}, [A], "test")[A].value)
    with pytest.raises(DataError, match="tangent space"):
        landscape(
            space,
            bench.evaluator,
            bench.vectors,
            grid=(0.0, 1.0),
            merged={"m": bench.weights},
            base=bench.weights,
            name="tangent",
        )
    with pytest.raises(DataError, match="Got 1"):
        landscape(bench.space, bench.evaluator, {A: bench.vectors[A]}, grid=(0.0, 1.0))


def test_as_json_and_chart(found: Landscape, tmp_path: Path) -> None:
    found.save(tmp_path / "plane.json")
    assert load_result(Landscape, tmp_path / "plane.json") == found
    landscape_chart(found, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000


def test_on_the_command_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    models = [str(bench.root / name) for name in NAMES]
    shared = (
        "--base",
        str(bench.base),
        "--data",
        str(bench.data),
        "--limit",
        "10",
        "--max-length",
        "32",
        "-o",
        str(tmp_path / "out"),
    )
    code, text = run(
        capsys,
        "diagnose",
        "landscape",
        *models,
        "--points",
        "3",
        "--steps",
        "3",
        "--method",
        "task_arithmetic,scale=0.5",
        *shared,
    )
    assert code == 0, text
    assert "barrier" in text and "task_arithmetic,scale=0.5" in text and "off the plane" in text
    (mark,) = load_result(Landscape, tmp_path / "out" / f"landscape-{A}-{B}.json").marks
    assert mark.at == pytest.approx((0.5, 0.5), abs=1e-4)
    for wrong, message in ((("--low", "2"), "--low"), (("--points", "1"), "points"), (("--method", "nothing"), "unknown method")):
        code, text = run(capsys, "diagnose", "landscape", *models, *wrong, *shared)
        assert code != 0 and message in text and "Traceback" not in text
    code, text = run(capsys, "diagnose", "landscape", models[0], *shared)
    assert code != 0 and "two models, or of three models. Got 1" in text
    third, folder = tmp_path / "third", bench.data / "colours"
    shutil.copytree(bench.data / A, folder)
    (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | {"task": "colours"}))
    task = load_task(folder)
    heads = Evaluator(bench.encoder, [task], max_length=32).heads
    config = FinetuneConfig(steps=2, lr=5e-3, batch_size=16, max_length=32, seed=1)
    finetune(bench.encoder, task, third, config, base=str(bench.base), heads=heads)
    bench.evaluator.load_base()
    code, text = run(
        capsys, "diagnose", "landscape", *models, str(third), "--points", "3", "--steps", "3", "--method", "average", *shared
    )
    assert code == 0, text
    assert "apart, in the length of weights: animals and weather" in text and f"from {B} to colours: barrier" in text
    told = load_result(Landscape, tmp_path / "out" / f"landscape-{A}-{B}-colours.json")
    assert [mark.name for mark in told.marks] == ["base", "average"]
    assert told.marks[1].at == pytest.approx((1 / 3, 1 / 3), abs=1e-3)
