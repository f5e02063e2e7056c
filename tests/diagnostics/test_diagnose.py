"""Diagnostics of the papers: against hand computation, as JSON and charts, and by the command line; `thetau tune` beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from thetau import studies
from thetau.cli.app import app
from thetau.diagnostics.disentanglement import Disentanglement, disentanglement, divergence
from thetau.diagnostics.interference import Interference, cosine_matrix, interference
from thetau.diagnostics.kernel import KernelTest, kernel_test
from thetau.diagnostics.results import correlate, load_result
from thetau.errors import DataError
from thetau.evaluate import Evaluator, Limits, Reading, Sample, Session
from thetau.evaluate.spaces import TangentSpace, WeightSpace
from thetau.evaluate.tuned import is_tangent, make_space, one_space, open_tuned, read_vectors, task_vectors
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.plots import diagnose as charts
from thetau.studies import DisentanglementGrid, Evaluate, Tune
from thetau.studies.by_paradigm import AlphaCurves, Costs, SingleTasks, alpha_curves, costs, single_tasks
from thetau.studies.paradigms import load_paradigm_results
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

NAMES = ("animals", "weather")


class Bench:
    """Two tasks, learnt in both paradigms, and their spaces."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_model(root / "base")
        self.encoder = load_encoder(self.base)
        self.data = root / "data"
        tasks = [load_task(make_task(self.data, name)) for name in NAMES]
        self.evaluator = Evaluator(self.encoder, tasks, max_length=32)
        for paradigm in ("standard", "linear"):
            for task in tasks:
                self.evaluator.load_base()
                config = FinetuneConfig(paradigm=paradigm, steps=15, lr=5e-3, batch_size=16, max_length=32)
                finetune(self.encoder, task, self.folder(paradigm, task.name), config, base=str(self.base))
        self.evaluator.load_base()
        self.weights = self.encoder.weights(exact=True)

    def folder(self, paradigm: str, task: str) -> Path:
        return self.root / paradigm / task

    def vectors(self, paradigm: str) -> dict[str, dict[str, Tensor]]:
        return read_vectors([open_tuned(self.folder(paradigm, name)) for name in NAMES], self.encoder, self.weights)

    def linear(self, paradigm: str) -> TangentSpace:
        space = make_space(self.evaluator, self.weights, self.vectors(paradigm), tangent=True)
        assert isinstance(space, TangentSpace)
        return space

    def plain(self, paradigm: str) -> WeightSpace:
        return WeightSpace(self.evaluator, self.weights, self.vectors(paradigm))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("bench"))


def invoke(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())  # captions wrap


def refused(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code != 0
    return str(result.exception or "") + result.output


# τJp


def by_hand(bench: Bench, vector: str, task: str) -> float:
    """‖J(x; θ₀) τ‖² by torch's own forward mode, example after example."""
    module, encoder = bench.encoder.module, bench.encoder
    bench.evaluator.load_base()
    tau = encoder.parameters(bench.vectors("linear")[vector])
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}
    inputs = bench.evaluator.inputs(task, "test")
    total = 0.0
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for i in range(len(inputs)):
            columns = inputs.batch([i])

            def run(values: dict[str, Tensor]) -> Tensor:
                out: Tensor = torch.func.functional_call(module, values, (), columns)  # noqa: B023
                return out

            tangents = {name: tau.get(name, torch.zeros_like(value)) for name, value in parameters.items()}
            total += float(torch.func.jvp(run, (parameters,), (tangents,))[1].square().sum())
    return total / len(inputs)


def test_the_product_is_that_of_forward_mode(bench: Bench) -> None:
    linear = bench.linear("linear")
    result = interference(linear, linear, bench.vectors("linear"))
    for i, vector in enumerate(NAMES):
        for j, task in enumerate(NAMES):
            assert result.products[i][j] == pytest.approx(by_hand(bench, vector, task), rel=1e-4)
    (pair,) = result.pairs
    assert pair.tau_jp == (result.products[0][1] + result.products[1][0]) / 2
    assert result.unit["animals"] == pytest.approx(1.0, abs=1e-5)
    assert result.n == dict.fromkeys(NAMES, 40)
    assert result.space == "tangent"
    kept = [
        linear.accuracy(dict.fromkeys(NAMES, 1.0), name, "test").value / linear.accuracy({name: 1.0}, name, "test").value
        for name in NAMES
    ]
    assert pair.normalised == pytest.approx(sum(kept) / 2)
    plain = interference(bench.plain("standard"), bench.linear("standard"), bench.vectors("standard"))
    assert plain.space == "weights"
    with pytest.raises(DataError, match="at least two are needed"):
        interference(linear, linear, {"animals": bench.vectors("linear")["animals"]})


def test_cosines_by_hand() -> None:
    a, b = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([0.0])}, {"x": torch.tensor([4.0, 3.0])}
    zero = {"x": torch.zeros(2)}
    assert cosine_matrix([a, b, zero])[0] == pytest.approx((1.0, 0.96, 0.0))
    assert cosine_matrix([zero])[0] == (0.0,)
    found = correlate([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], ("a", "b"))
    assert found.spearman == pytest.approx(1.0)
    assert found.pearson == pytest.approx(0.98974, abs=1e-5)
    assert correlate([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], ("a", "b")).pearson is None


# Disentanglement


@pytest.mark.parametrize("distance", ["disagreement", "kl"])
def test_one_vector_alone_is_disentangled(bench: Bench, distance: Any) -> None:
    """On the axis α₂ = 0, the first task sees the same model twice; what is left is the second task's."""
    space, grid = bench.linear("linear"), (-1.0, 0.0, 1.0)
    result = disentanglement(space, bench.evaluator, NAMES, grid=grid, distance=distance)
    first, second = (result.parts[name] for name in NAMES)
    assert all(first[i][1] == pytest.approx(0.0, abs=1e-9) for i in range(3))
    assert all(second[1][j] == pytest.approx(0.0, abs=1e-9) for j in range(3))
    assert result.error[1][1] == pytest.approx(0.0, abs=1e-9)
    assert result.n == dict.fromkeys(NAMES, 40)
    both = space.features({"animals": 1.0, "weather": -1.0}, "weather", "test")
    alone = space.features({"weather": -1.0}, "weather", "test")
    head = bench.evaluator.heads["weather"]
    if distance == "disagreement":
        expected = float((head.predict(both) != head.predict(alone)).double().mean())
    else:
        p, q = alone.double().softmax(-1), both.double().softmax(-1)
        expected = float(((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2)
    assert second[2][0] == pytest.approx(expected, rel=1e-6)
    assert result.error[2][0] == pytest.approx(first[2][0] + second[2][0])


def test_the_divergence_in_one_direction(bench: Bench) -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert float(divergence(p, q)) == pytest.approx(0.5108, abs=1e-4)
    both = [
        disentanglement(bench.linear("linear"), bench.evaluator, NAMES, grid=(1.0,), distance="kl", symmetric=symmetric)
        for symmetric in (True, False)
    ]
    assert both[0].error != both[1].error
    with pytest.raises(DataError, match="two different tasks"):
        disentanglement(bench.linear("linear"), bench.evaluator, ("animals", "animals"))
    with pytest.raises(DataError, match="finite numbers that rise"):
        disentanglement(bench.linear("linear"), bench.evaluator, NAMES, grid=(1.0, 0.0))


# Kernel behaviour


def test_a_small_step_is_its_linearisation(bench: Bench) -> None:
    """The error of a vector falls with its length, in proportion to it, and a vector that does nothing is refused."""
    errors = []
    for scale in (1.0, 0.1, 0.01):
        vectors = {"animals": {name: scale * tau for name, tau in bench.vectors("standard")["animals"].items()}}
        linear = make_space(bench.evaluator, bench.weights, vectors, tangent=True)
        assert isinstance(linear, TangentSpace)
        result = kernel_test(WeightSpace(bench.evaluator, bench.weights, vectors), linear, bench.evaluator, ["animals"])
        errors.append(result.rows[0].error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)
    zero = {"animals": {name: torch.zeros_like(tau) for name, tau in bench.vectors("standard")["animals"].items()}}
    linear = make_space(bench.evaluator, bench.weights, zero, tangent=True)
    assert isinstance(linear, TangentSpace)
    with pytest.raises(DataError, match="its vector changes no feature"):
        kernel_test(WeightSpace(bench.evaluator, bench.weights, zero), linear, bench.evaluator, ["animals"])


# Results, charts and the command line


def test_the_commands_write_json_and_charts(bench: Bench, tmp_path: Path) -> None:
    own = ["--base", bench.base, "--data", bench.data, "--max-length", 32, "-o", tmp_path]
    standard = [bench.folder("standard", name) for name in NAMES]
    linear = [bench.folder("linear", name) for name in NAMES]
    assert "animals · weather" in invoke("diagnose", "tau-jp", *linear, *own)
    found = load_result(Interference, tmp_path / "tau_jp.json")
    assert found.space == "tangent"
    invoke("diagnose", "tau-jp", *standard, *own)
    assert load_result(Interference, tmp_path / "tau_jp.json").space == "weights"
    for distance in ("kl", "disagreement"):
        told = invoke("diagnose", "disentanglement", *linear, *own, "--points", 3, "--distance", distance, "--limit", 10)
        assert "animals 10, weather 10 examples" in told
        assert load_result(Disentanglement, tmp_path / f"disentanglement-animals-weather-{distance}.json").distance == distance
    invoke("diagnose", "kernel", *standard, *own)
    assert {row.task for row in load_result(KernelTest, tmp_path / "kernel.json").rows} == set(NAMES)
    groups = [f"standard={','.join(map(str, standard))}", f"linear={','.join(map(str, linear))}"]
    assert "mean |cos|" in invoke("diagnose", "cosine", "-g", groups[0], "-g", groups[1], "--base", bench.base, "-o", tmp_path)
    for name in ("tau_jp", "disentanglement-animals-weather-kl", "kernel", "cosine"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "belongs to the tangent space" in refused("diagnose", "tau-jp", standard[0], linear[1], *own)
    assert "of each two of several. Got 1" in refused("diagnose", "disentanglement", standard[0], *own)
    (tmp_path / "tau_jp.json").write_text("{}")
    with pytest.raises(DataError, match=r"tau_jp\.json: cannot be read as Interference"):
        load_result(Interference, tmp_path / "tau_jp.json")


SUITE = """
backbone: {base}
tasks: [animals, weather, third]
control: third
finetune: {{steps: 4, batch_size: 8, lr: 5.0e-3, max_length: 24}}
evaluation: {{validation: 12, test: 16, max_length: 24}}
methods:
  - {{method: ties, scales: [0.5]}}
paradigms:
  - {{name: standard, fields: {{paradigm: standard}}, grid: {{lr: [1.0e-3, 5.0e-3]}}, leave_out: true, elsewhere: true}}
  - {{name: linear, fields: {{paradigm: linear}}, like: standard}}
  - {{name: τJp, fields: {{paradigm: taujp}}, like: linear, grid: {{strength: [0.1, 1.0]}}}}
  - {{name: continued, fields: {{paradigm: taujp, steps: 2}}, start: linear, trace: [0, 2], negate: false}}
  - {{name: joint, fields: {{paradigm: mtl}}}}
"""


def test_a_comparison_of_paradigms_its_methods_and_its_charts(bench: Bench, tmp_path: Path) -> None:
    third = make_task(tmp_path / "d", "animals")
    (third / "meta.json").write_text((third / "meta.json").read_text().replace('"task": "animals"', '"task": "third"'))
    third.rename(bench.data / "third")
    (tmp_path / "s.yaml").write_text(SUITE.format(base=bench.base), encoding="utf-8")
    run = ["suite", "run", tmp_path / "s.yaml", "--data", bench.data, "-o", tmp_path / "run", "--quick"]
    told = invoke(*run, "--paradigm", "all", "--methods", "ties,average")
    assert "+ ties" in told
    results = load_paradigm_results(tmp_path / "run/paradigms.json")
    assert results.tasks == NAMES
    assert results.control == "third"
    assert results.names() == ["standard", "linear", "τJp", "continued", "joint"]
    linear, continued = results.of("linear")[0], results.of("continued")[0]
    assert linear.space == "tangent"
    assert set(linear.merged) == {"ties", "average"}
    assert [point.step for point in continued.trace] == [0, 2]
    assert continued.negation == ()
    assert results.of("standard")[0].left_out
    assert results.of("joint")[0].joint is not None
    # A second call finds everything; a named paradigm needs no row of its own.
    again = invoke(*run, "--paradigm", "standard,attention")
    assert "attention, seed 0" in again
    assert load_paradigm_results(tmp_path / "run/paradigms.json").of("standard")[0].addition == results.of("standard")[0].addition
    results.save(tmp_path / "run/paradigms.json")
    for name, kind in (("alpha", AlphaCurves), ("single", SingleTasks), ("cost", Costs)):
        invoke("diagnose", name, tmp_path / "run/paradigms.json", "-o", tmp_path)
        made: Any = {"alpha": alpha_curves, "single": single_tasks, "cost": costs}[name](results)
        assert load_result(kind, tmp_path / f"{name}.json") == made
        assert (tmp_path / f"{name}.png").is_file()
    assert "pair" in invoke(
        *("diagnose", "tau-jp", f"{tmp_path / 'run'}:linear", "--base", bench.base, "--data", bench.data, "-o", tmp_path)
    )
    assert "no row 'linear' of seed 3" in refused("diagnose", "tau-jp", f"{tmp_path / 'run'}:linear:3", "-o", tmp_path)
    assert "no paradigm" in refused(*run, "--paradigm", "not there")


def test_a_chart_that_cannot_be_written_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    from thetau.diagnostics.cosines import cosines
    from thetau.errors import OutputError

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"c\.png: cannot be written"):
        charts.cosines_chart(cosines({"a": bench.vectors("standard")}), tmp_path / "file" / "c.png")
    with pytest.raises(DataError, match="at least one group"):
        cosines({})


def test_python_gives_what_the_command_line_writes(bench: Bench, tmp_path: Path) -> None:
    own = ["--base", bench.base, "--data", bench.data, "--max-length", 32]
    reading, limits = Reading(data=bench.data, max_length=32), Sample(limit=20).by_split()

    def same(result: Any, file: str) -> None:
        result.save(tmp_path / "python.json")
        assert json.loads((tmp_path / "python.json").read_text()) == json.loads((tmp_path / file).read_text())

    models = [bench.folder("standard", name) for name in NAMES]
    session = Session.open(models, base=bench.base, limits=limits, reading=reading, exact=True)
    assert isinstance(session.space, WeightSpace)
    invoke("diagnose", "tau-jp", *models, *own, "--limit", 20, "-o", tmp_path)
    same(studies.tau_jp(session, Sample(limit=20)), "tau_jp.json")
    invoke("diagnose", "kernel", *models, *own, "--limit", 20, "-o", tmp_path)
    same(studies.kernel(session, Sample(limit=20)), "kernel.json")
    grid = DisentanglementGrid(points=3, distance="kl", one_way=True, sample=Sample(limit=20))
    words = ["--points", 3, "--distance", "kl", "--one-way"]
    invoke("diagnose", "disentanglement", *models, *own, "--limit", 20, *words, "-o", tmp_path)
    same(studies.disentanglement(session, grid), "disentanglement-animals-weather-kl.json")
    listed = {paradigm: [bench.folder(paradigm, name) for name in NAMES] for paradigm in ("standard", "linear")}
    groups = [word for name, found in listed.items() for word in ("-g", f"{name}={','.join(map(str, found))}")]
    invoke("diagnose", "cosine", *groups, "--base", bench.base, "-o", tmp_path)
    same(studies.cosines(listed, base=bench.base), "cosine.json")
    for words, options in (
        (("--alphas", "0.5,1"), Tune(alphas=(0.5, 1.0))),
        (
            ("--method", "ties", "--set", "density=0.5", "--alphas", "1"),
            Tune(method="ties", fields={"density": 0.5}, alphas=(1.0,)),
        ),
        (("--left-out", "--alphas", "0,1"), Tune(left_out=True, alphas=(0.0, 1.0))),
        (("--negate", "--control", "weather", "--alphas", "0"), Tune(negate=True, control="weather", alphas=(0.0,))),
    ):
        chosen = models[:1] if options.negate else models
        invoke("tune", *chosen, *own, *words, "--json", tmp_path / "tune.json")
        tasks = ["animals", "weather"]
        session = Session.open(chosen, base=bench.base, tasks=tasks, limits=Limits().by_split(), reading=reading)
        same(studies.tune(session, options), "tune.json")
    with pytest.raises(DataError, match=r"the session has no task 'weather'\. It has animals"):
        studies.tune(Session.open(models, base=bench.base, tasks=["animals"], reading=reading), Tune())
    invoke("evaluate", "-m", models[0], "-t", "animals", *own, "--limit", 20, "--json", tmp_path / "e.json")
    session = Session.open(base=bench.base, tasks=["animals"], limits=limits, reading=reading)
    found = studies.evaluate_checkpoint(models[0], session, Evaluate(limit=20))
    assert found.to_json() == json.loads((tmp_path / "e.json").read_text())


def test_the_page_runs(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for place, target in (("base", bench.base), ("tasks", bench.data), ("models", bench.root / "standard")):
        Path(place).symlink_to(target)
    exec(block.replace("sms_spam", "animals").replace("qnli", "weather"), {})
    assert load_result(Interference, Path("diagnostics/tau_jp.json")).n == dict.fromkeys(NAMES, 40)
    assert "Accuracy(" in capsys.readouterr().out


def test_models_are_called_by_their_records(bench: Bench, tmp_path: Path) -> None:
    import thetau

    folders = [tmp_path / "finetuned" / name / f"{number}abc" for number, name in enumerate(NAMES)]
    for folder, name in zip(folders, NAMES, strict=True):
        shutil.copytree(bench.folder("standard", name), folder)
    base = thetau.open(bench.base)
    assert task_vectors(list(map(str, folders)), base)[0] == list(NAMES)
    names, vectors = task_vectors([f"mine={folders[0]}", str(folders[1])], base)
    assert names == ["mine", "weather"]
    assert vectors[1].name == "weather"
    twice = task_vectors([str(folders[0]), str(bench.folder("standard", "animals"))], base)[0]
    assert len(set(twice)) == 2
    said = invoke("basis", "build", "-b", bench.base, *folders, "-k", 2, "--allow-far", "-o", tmp_path / "bank")
    assert "animals" in said and "0abc" not in said
    assert set(thetau.bases.open_bank(tmp_path / "bank").members) == set(NAMES)


# Tuning


def test_tune_adds_negates_and_leaves_out(bench: Bench, tmp_path: Path) -> None:
    own = ["--base", bench.base, "--data", bench.data, "--max-length", 32, "--json", tmp_path / "t.json"]
    for paradigm in ("standard", "linear"):
        models = [bench.folder(paradigm, name) for name in NAMES]
        told = invoke("tune", *models, *own, "--alphas", "0.5,1")
        assert "normalised" in told
        kept = json.loads((tmp_path / "t.json").read_text())
        assert kept["space"] == ("tangent" if paradigm == "linear" else "weights")
        assert [trial["alpha"] for trial in kept["result"]["trials"]][:2] == [0.5, 1.0]  # and what the grid is widened by
        space: Any = bench.linear(paradigm) if paradigm == "linear" else bench.plain(paradigm)
        expected = space.accuracy(dict.fromkeys(NAMES, 1.0), "animals", "test").value
        assert kept["result"]["one_shot"]["accuracy"]["animals"]["value"] == expected
        assert "ties" in invoke("tune", *models, *own, "--method", "ties", "--set", "density=0.5", "--alphas", "1")
        assert "control" in invoke("tune", models[0], *own, "--negate", "--control", "weather", "--alphas", "0,1")
        assert "left out" in invoke("tune", *models, *own, "--left-out", "--alphas", "0,1")
    third = f"third={bench.folder('standard', 'animals')}"
    standard = [bench.folder("standard", name) for name in NAMES]
    told = invoke("tune", *standard, third, *own, "--analogy", "animals,weather,third,weather", "--alphas", "0,1")
    assert "animals is to weather as third is to weather" in told
    for words, message in (
        (("--negate",), "needs --control"),
        (("--negate", "--control", "weather", "--left-out"), "ask one"),
        (("--analogy", "animals,weather"), "--analogy must be A,B,C,D"),
        (("--alphas", "x"), "must be numbers"),
        (("--alphas", "nan"), "must be finite"),
        (("--method", "tise"), "tise"),
        (("--set", "density=1"), "a sum has none"),
    ):
        assert message in refused("tune", *standard, *own, *words), words


def test_vectors_of_another_paradigm_or_base_are_told_apart(bench: Bench, tmp_path: Path) -> None:
    import thetau

    standard, linear = (bench.folder(paradigm, "animals") for paradigm in ("standard", "linear"))
    assert is_tangent(linear)
    assert not is_tangent(standard)
    base = thetau.open(bench.base)
    vector = thetau.open(linear) - base
    vector.save(tmp_path / "v.safetensors")
    (base + 0.5 * vector).save(tmp_path / "sum")
    assert is_tangent(tmp_path / "v.safetensors")
    assert is_tangent(tmp_path / "sum")
    with pytest.warns(thetau.ThetauWarning, match=r"belongs to the tangent space and .* does not"):
        (base + vector + (thetau.open(standard) - base)).save(tmp_path / "mixed")
    assert not is_tangent(tmp_path / "mixed")
    told = [
        invoke(
            "evaluate",
            "-m",
            tmp_path / "sum",
            "-b",
            bench.base,
            "-t",
            bench.data / "animals",
            "--json",
            tmp_path / "e.json",
            *more,
        )
        for more in ((), ("--space", "weights"))
    ]
    assert "in the linear form" in told[0]
    assert "in the linear form" not in told[1]
    invoke("evaluate", "-m", tmp_path / "sum", "-b", bench.base, "-t", bench.data / "animals", "--json", tmp_path / "e.json")
    expected = bench.linear("linear").accuracy({"animals": 0.5}, "animals", "test").value
    assert json.loads((tmp_path / "e.json").read_text())["tasks"]["animals"]["value"] == expected
    other = load_encoder(make_model(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="was fine-tuned from another base"):
        one_space([open_tuned(standard)], other)
    with pytest.raises(DataError, match=r"has no record of its task\. Name it: TASK="):
        open_tuned(bench.base)
    with pytest.raises(DataError, match="each model must be of another task"):
        one_space([open_tuned(standard), open_tuned(standard)], bench.encoder)
