"""Inner merges that look at data, are trained or lie in the tangent space: partitions, negation, a new task; banks of them and the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import thetau
from commands import run
from thetau.bases import build, drift_of, forget, insert, open_bank, rebuild
from thetau.bases.cluster import given_groups
from thetau.errors import BankError, RecipeError, ThetauError
from thetau.evaluate.similarity import TargetSimilarity
from thetau.evidence import CoefficientConfig, FisherConfig, MomentConfig
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import AdaMerging, Average, ConsensusTa, Fisher, LocalizeStitch, RegMean
from thetau.parts import Method
from thetau.studies.arithmetic import negation
from thetau.studies.bases import basis_ood, outer_space
from thetau.studies.inner import Collector
from thetau.studies.partitions import Bench, study_partitions
from thetau.tasks import load_task
from tiny import one_thread as one_thread
from tiny_world import NAMES, World

SMALL: dict[str, Any] = {"examples": 6, "max_length": 24}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("inner"))


def vectors_of(world: World, folder: Path | None = None) -> dict[str, Any]:
    base: Any = thetau.open(world.base)
    return {name: (thetau.open((folder or world.base.parent) / name) - base).named(name) for name in NAMES}


def collector(world: World, method: Method, folder: Path) -> Collector:
    return Collector(
        method=method,
        evaluator=world.session.evaluator,
        models={path.name: path for path in world.models},
        vectors=vectors_of(world),
        folder=folder,
        fisher=FisherConfig(**SMALL),
        moments=MomentConfig(**SMALL),
        coefficients=CoefficientConfig(steps=2, batch=4, lr=0.05, **SMALL),
    )


def together(world: World, folder: Path, cluster: tuple[str, ...]) -> Any:
    out = folder / "+".join(cluster)
    tasks = [load_task(name, world.data) for name in cluster]
    world.session.evaluator.load_base()
    finetune(
        world.session.encoder,
        tasks,
        out,
        FinetuneConfig(paradigm="mtl", steps=4, batch_size=8, max_length=24),
        base=str(world.base),
    )
    return (thetau.open(out) - thetau.open(world.base)).named("+".join(cluster))


def linear(world: World, folder: Path) -> dict[str, Any]:
    for name in NAMES:
        world.session.evaluator.load_base()
        config = FinetuneConfig(paradigm="linear", steps=4, lr=4e-3, batch_size=8, max_length=24)
        finetune(world.session.encoder, load_task(name, world.data), folder / name, config, base=str(world.base))
    return vectors_of(world, folder)


INNER: Mapping[str, Method] = {
    "fisher": Fisher(),
    "regmean": RegMean(),
    "adamerging": AdaMerging(),
    "consensus": ConsensusTa(),
    "mtl": Average(),
    "tangent": Average(),
}


@pytest.mark.filterwarnings("ignore:.*fine-tuning gives less than")  # of a base of a few thousand weights, taught in long steps
@pytest.mark.parametrize("name", INNER)
def test_partitions_negation_and_a_new_task(world: World, tmp_path: Path, name: str) -> None:
    inner, tangent = INNER[name], name == "tangent"
    collected = collector(world, inner, tmp_path / "evidence")
    vectors = linear(world, tmp_path / "linear") if tangent else vectors_of(world)
    more: dict[str, Any] = {"tangent": tangent, "grid": (1.0,), "run": tmp_path / "bench"}
    if name == "mtl":
        more["given"] = lambda cluster: together(world, tmp_path / "together", cluster)
    if inner.chain().needs:
        more["evidence"] = collected
    bench = Bench(world.session.evaluator, world.session.weights, vectors, inner=inner, **more)
    study = study_partitions(bench, [{"all": NAMES}], natural=given_groups([NAMES[:2]], NAMES).groups)
    assert study.natural is not None
    assert (len(study.values[0].groups), len(study.natural.groups)) == (1, 2)
    basis = bench.basis(NAMES[:2])
    if name == "mtl":
        want = together(world, tmp_path / "together", NAMES[:2])
    else:
        known = collected(NAMES[:2]) if inner.chain().needs else None
        want = thetau.merge([vectors[task] for task in NAMES[:2]], inner, names=NAMES[:2], evidence=known)
    close(basis, want.state_dict())
    space, _ = outer_space(world.session.evaluator, world.session.weights, {"basis": basis}, None, tangent=tangent)
    forgot = negation(space, NAMES[0], NAMES[2], vector="basis", grid=(0.0, 1.0))
    assert {trial.alpha for trial in forgot.trials} >= {0.0, 1.0}
    space, parts = outer_space(world.session.evaluator, world.session.weights, {"basis": basis}, None, tangent=tangent)
    similar = TargetSimilarity(task=NAMES[2], how="vector", cosines={"basis": 0.5})
    served = basis_ood(space, similar, ("basis",), parts, grid=(0.0, 1.0))
    assert served.one_shot is not None
    again = Bench(world.session.evaluator, world.session.weights, vectors, inner=inner, **more)
    assert (
        study_partitions(again, [{"one": NAMES}]).values[0].addition
        == next(v for v in study.values if len(v.groups) == 1).addition
    )


def test_adamergings_coefficients_are_of_a_clusters_tasks_together(world: World, tmp_path: Path) -> None:
    collected = collector(world, AdaMerging(), tmp_path)
    two, three = collected(NAMES[:2])["coefficients"], collected(NAMES)["coefficients"]
    assert (sorted(two), sorted(three)) == (list(NAMES[:2]), list(NAMES))
    assert two[NAMES[0]] != three[NAMES[0]]
    assert collected(NAMES[:2][::-1])["coefficients"] == two, "the order says nothing, and a later run takes them again"


def test_what_cannot_be_collected_or_is_not_asked_for(world: World, tmp_path: Path) -> None:
    assert collector(world, LocalizeStitch(), tmp_path)(NAMES[:2]) == {}
    with pytest.raises(RecipeError, match="`average`, the inner method, asks for no evidence `fisher`"):
        Bench(world.session.evaluator, world.session.weights, vectors_of(world), inner=Average(), evidence={"fisher": {}})
    bench = Bench(world.session.evaluator, world.session.weights, vectors_of(world), inner=Fisher())
    with pytest.raises(RecipeError, match="needs the evidence `fisher`, a file for each task"):
        bench.basis(NAMES[:2])
    assert bench.basis(NAMES[:1]).label == NAMES[0], "a cluster of one needs none"


# Banks


def fishers(world: World, folder: Path) -> dict[str, Path]:
    """A positive number for every entry; large ones where a task's name says."""
    folder.mkdir(exist_ok=True)
    found = {}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        held = {key: torch.rand(tensor.shape, generator=generator) for key, tensor in values(vectors_of(world)[name]).items()}
        found[name] = folder / f"{name}.safetensors"
        save_file(held, found[name], metadata={"thetau.kind": "evidence", "thetau.evidence": "fisher"})
    return found


def values(vector: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = vector.state_dict()
    return state


def weighted(world: World, files: Mapping[str, Path], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Σ F τ / Σ F, each F over its norm, in float64."""
    total: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    for task in tasks:
        held = {key: tensor.double() for key, tensor in thetau.open(files[task]).state_dict().items()}
        norm = torch.stack([tensor.square().sum() for tensor in held.values()]).sum().sqrt()
        for key, tensor in values(vectors_of(world)[task]).items():
            total[key] = total.get(key, 0) + held[key] / norm * tensor.double()
            weight[key] = weight.get(key, 0) + held[key] / norm
    return {key: (total[key] / weight[key]).float() for key in total}


def close(got: Any, want: Mapping[str, Tensor]) -> None:
    state = values(got)
    assert set(state) == set(want)
    for key, tensor in want.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


def test_a_bank_of_fisher_merges_and_all_that_changes_it(world: World, tmp_path: Path) -> None:
    files, base = fishers(world, tmp_path / "f"), thetau.open(world.base)
    listed = vectors_of(world)
    inner = Fisher(floor=0.0)
    clusters = given_groups([NAMES[:2]], NAMES)
    bank = build(
        tmp_path / "bank", list(listed.values()), base, names=NAMES, inner=inner, clusters=clusters, evidence={"fisher": files}
    )
    assert bank.state.settings.evidence == {"fisher": {name: str(path) for name, path in files.items()}}
    close(bank.vector("b1"), weighted(world, files, NAMES[:2]))
    close(bank.vector("b2"), values(listed[NAMES[2]]))
    told, _ = drift_of(bank)
    assert max(told["same_members"].values()) < 1e-5
    with pytest.raises(
        BankError, match=r"fisher needs evidence of every vector that it merges, and the basis of animals, third has none"
    ):
        insert(bank, listed[NAMES[2]], "again", to="b1", evidence={"fisher": {"again": files[NAMES[2]]}})
    assert sorted(open_bank(bank.path).members) == sorted(NAMES), "nothing was changed"
    apart = insert(bank, listed[NAMES[2]], "again", to="new", evidence={"fisher": {"again": files[NAMES[2]]}})
    assert set(apart.state.settings.evidence["fisher"]) == {*NAMES, "again"}
    left = forget(apart, "again")
    assert set(left.state.settings.evidence["fisher"]) == set(NAMES)
    whole = rebuild(left, k=1, k_min=1)
    close(whole.vector("b1"), weighted(world, files, NAMES))
    two = forget(whole, NAMES[0])
    close(two.vector("b1"), weighted(world, files, NAMES[1:]))
    joined = insert(forget(two, NAMES[1]), listed[NAMES[0]], NAMES[0], to="b1", evidence={"fisher": {NAMES[0]: files[NAMES[0]]}})
    close(joined.vector("b1"), weighted(world, files, (NAMES[0], NAMES[2])))


def test_evidence_that_is_missing_is_said(world: World, tmp_path: Path) -> None:
    files, base = fishers(world, tmp_path / "f"), thetau.open(world.base)
    listed = vectors_of(world)

    def make(evidence: Any, inner: Method | None = None, path: str = "bank") -> Any:
        clusters = given_groups([NAMES], NAMES)
        return build(
            tmp_path / path,
            list(listed.values()),
            base,
            names=NAMES,
            inner=inner or Fisher(),
            clusters=clusters,
            evidence=evidence,
        )

    for evidence, message in (
        (None, r"needs the evidence `fisher`, a file for each task\. `thetau evidence fisher` collects it"),
        ({"fisher": {name: files[name] for name in NAMES[:2]}}, "fisher: none for the task 'weather'"),
        ({"fisher": {**files, "waether": files["weather"]}}, r"fisher: 'waether' is not a task\. Did you mean 'weather'\?"),
        ({"fisher": files, "gram": files}, "`fisher`, the inner method, asks for no evidence `gram`"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(evidence)
        assert not (tmp_path / "bank").exists()
    bank = make({"fisher": files})
    files[NAMES[1]].unlink()
    with pytest.raises(ThetauError, match=r"third\.safetensors"):
        forget(bank, NAMES[0])
    assert sorted(open_bank(bank.path).members) == sorted(NAMES)


@pytest.mark.parametrize(("groups", "most"), [([("animals", "third", "weather")], 3), ([("animals", "third")], 2), ([], 3)])
def test_an_offline_build_holds_as_many_vectors_as_its_formula_says(world: World, tmp_path: Path, groups: Any, most: int) -> None:
    """max(max |C_i|, m), of the paper's Section 5.1: all three in one cluster, two and one, three alone."""
    clusters = given_groups(groups, NAMES)
    bank = build(tmp_path / "bank", list(vectors_of(world).values()), thetau.open(world.base), names=NAMES, clusters=clusters)
    sizes = [len(basis.members) for basis in bank.bases.values()]
    assert bank.offline_vectors == max(*sizes, len(bank.bases)) == most


def test_the_command(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = fishers(world, tmp_path / "f")
    models = [str(path) for path in world.models]
    words = [
        "basis",
        "build",
        "-b",
        str(world.base),
        *models,
        "--inner",
        "fisher",
        "--cluster",
        "animals,third",
        "-o",
        str(tmp_path / "bank"),
    ]
    code, text = run(capsys, *words)
    assert code == 1
    assert "needs the evidence `fisher`" in text
    code, text = run(capsys, *words, "--evidence", "fisher=x")
    assert code == 1
    assert "`--evidence` takes `kind:task=file`" in text
    given = [word for name, path in files.items() for word in ("--evidence", f"fisher:{name}={path}")]
    code, text = run(capsys, *words, *given, "--json", str(tmp_path / "bank.json"))
    assert code == 0, text
    assert "an offline build holds 2 whole vectors at once, max(max |C|, m)" in " ".join(text.split())
    assert sorted(json.loads((tmp_path / "bank.json").read_text())["settings"]["evidence"]["fisher"]) == sorted(NAMES)
    code, text = run(capsys, "basis", "show", str(tmp_path / "bank"), "--drift")
    assert code == 0, text
    assert "one merge of all would hold 3" in " ".join(text.split())
    code, text = run(capsys, "basis", "rebuild", str(tmp_path / "bank"), "-k", "1", "--evidence", "gram:animals=x")
    assert code == 1
    assert "asks for no evidence `gram`" in text
    code, text = run(capsys, "basis", "rebuild", str(tmp_path / "bank"), "-k", "1")
    assert code == 0, text
    compare = [
        "basis",
        "compare",
        *models,
        "-b",
        str(world.base),
        "--data",
        str(world.data),
        "--inner",
        "fisher",
        "--cluster",
        "animals,third",
    ]
    code, text = run(capsys, *compare, *given, "--alphas", "1", "--validation", "8", "--test", "8")
    assert code == 0, text
    shutil.rmtree(tmp_path / "f")
    code, text = run(capsys, "basis", "forget", str(tmp_path / "bank"), "weather")
    assert code == 1
    assert "animals.safetensors" in text
