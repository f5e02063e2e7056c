"""The bank: built, changed online, killed at every write, changed by two at once, damaged."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thetau
from fixtures import write_model
from thetau.bases import Bank, build, drift_of, forget, insert, join_threshold, open_bank, rebuild
from thetau.bases.bank import LOCK, MANIFEST
from thetau.bases.change import changing
from thetau.cli import main
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, BankError, OutputError, RecipeError, ThetauError
from thetau.methods import Average, Ties, Wudi

ONE = Engine(workers=1)
SHAPES = {"layers.0.attention.query.weight": (12, 10), "layers.0.mlp.weight": (16, 12), "norm.weight": (12,), "scale": ()}
FAMILIES = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "b3": "b", "c1": "c"}


def normal(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def weights(task: str | None, size: float = 0.01) -> dict[str, Tensor]:
    """The base, or a model whose vector shares a direction with its family."""
    base = normal(0)
    if task is None:
        return base
    family, own = normal(100 + ord(task[0])), normal(sum(map(ord, task)) * 7)
    return {name: value + size * (family[name] + 0.6 * own[name]) for name, value in base.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and models on disk."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "base", weights(None))
    for task in [*FAMILIES, "a9", "d1"]:
        write_model(root / task, weights(task))
    return root


def vectors(folder: Path, names: list[str]) -> tuple[Any, list[Any]]:
    base = thetau.open(folder / "base")
    return base, [thetau.open(folder / name) - base for name in names]


def made(folder: Path, path: Path, names: list[str] | None = None, **options: Any) -> Bank:
    names = names or list(FAMILIES)
    base, listed = vectors(folder, names)
    return build(path, listed, base, names=names, engine=ONE, **options)


def one(folder: Path, name: str) -> Any:
    return vectors(folder, [name])[1][0]


def values(expression: Any) -> Tensor:
    state = expression.state_dict()
    return torch.cat([state[name].reshape(-1).double() for name in sorted(state)])


def mean_of(folder: Path, names: tuple[str, ...] | list[str]) -> Tensor:
    return torch.stack([values(one(folder, name)) for name in names]).mean(0)


def groups(bank: Bank) -> set[tuple[str, ...]]:
    return {basis.members for basis in bank.bases.values()}


def test_build_clusters_and_merges(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank")
    assert groups(bank) == {("a1", "a2"), ("b1", "b2", "b3"), ("c1",)}
    again = open_bank(tmp_path / "bank")
    assert again.state == bank.state
    for name, basis in again.bases.items():
        assert torch.allclose(values(again.vector(name)), mean_of(folder, basis.members), atol=1e-7)
        assert basis.norm == pytest.approx(float(mean_of(folder, basis.members).norm()), rel=1e-6)
        assert basis.how == ("member" if len(basis.members) == 1 else "merged")
    names, known = again.known()
    assert names == sorted(FAMILIES)
    assert float(known[0, 1]) == pytest.approx(float(values(one(folder, "a1")) @ values(one(folder, "a2"))), rel=1e-9)
    found = torch.tensor(again.state.basis_gram)
    direct = torch.stack([values(again.vector(name)) for name in again.bases])
    assert torch.allclose(found.double(), direct @ direct.T, rtol=1e-5)
    assert again.verify() == []
    operation = bank.state.log[0]
    assert operation.kind == "build"
    assert operation.written == bank.nbytes
    assert operation.read > bank.nbytes


def test_a_bank_is_a_few_task_vectors(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank")
    base = thetau.open(folder / "base")
    merged = base + thetau.merge(list(bank.vectors().values()), Ties(density=0.5))
    assert merged.is_model
    assert set(merged.state_dict()) == set(SHAPES)
    near = bank.similar(one(folder, "a9"))
    assert max(near, key=lambda name: near[name]) == bank.basis_of("a1")


def test_the_mean_over_equal_clusters_of_means_is_the_global_mean(folder: Path, tmp_path: Path) -> None:
    from thetau.bases import given_groups

    names = ["a1", "a2", "b1", "b2"]
    clusters = given_groups([["a1", "b1"], ["a2", "b2"]], names)
    bank = made(folder, tmp_path / "bank", names, clusters=clusters)
    outer = thetau.merge(list(bank.vectors().values()), Average())
    assert torch.allclose(values(outer), mean_of(folder, names), atol=1e-7)


@pytest.mark.parametrize("inner", [Average(), Average(scale=0.5), thetau.methods.TaskArithmetic(scale=0.4)], ids=str)
def test_one_by_one_is_the_offline_build(folder: Path, tmp_path: Path, inner: Any) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2, inner=inner, join=0.3)
    for name in ("b2", "c1", "a2", "b3"):
        bank = insert(bank, one(folder, name), name, engine=ONE)
    assert groups(bank) == {("a1", "a2"), ("b1", "b2", "b3"), ("c1",)}
    offline = made(folder, tmp_path / "offline", inner=inner)
    theirs = {basis.members: values(offline.vector(name)) for name, basis in offline.bases.items()}
    for name, basis in bank.bases.items():
        got, want = values(bank.vector(name)), theirs[basis.members]
        assert float((got - want).norm() / want.norm()) < 3e-7
    products = torch.stack([values(bank.vector(name)) for name in bank.bases])
    assert torch.allclose(torch.tensor(bank.state.basis_gram, dtype=torch.float64), products @ products.T, rtol=1e-5, atol=1e-9)
    found, read = drift_of(bank, engine=ONE)
    assert found["partition"] == 1
    assert 0 < max(found["same_members"].values()) < 3e-7
    assert all(near["cosine"] == pytest.approx(1) for near in found["nearest"].values())
    assert read > 0


def test_what_was_merged_away_is_unknowable(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "c1"], join=0.3)
    bank = insert(bank, one(folder, "b1"), "b1", engine=ONE)
    assert (
        "Inner products of b1 with a1, a2 are unknowable: the bank does not hold their vectors any more."
        in bank.state.log[-1].said
    )
    names, known = bank.known()
    row = known[names.index("b1")]
    assert torch.isnan(row[names.index("a1")])
    assert float(row[names.index("c1")]) == pytest.approx(float(values(one(folder, "b1")) @ values(one(folder, "c1"))), rel=1e-6)
    bank = insert(bank, one(folder, "b2"), "b2", engine=ONE)
    names, known = bank.known()
    assert float(known[names.index("b2"), names.index("b1")]) == pytest.approx(
        float(values(one(folder, "b1")) @ values(one(folder, "b2"))), rel=1e-6
    )


def test_a_budget_of_bases_is_kept(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1", "c1"], k=3, max_bases=3, join=0.3)
    bank = insert(bank, one(folder, "d1"), "d1", engine=ONE)
    assert len(bank.bases) == 3
    assert "to keep to the budget of 3 bases." in " ".join(bank.state.log[-1].said)
    total = sum(len(basis.members) * values(bank.vector(name)) for name, basis in bank.bases.items())
    assert torch.allclose(total, 4 * mean_of(folder, ["a1", "b1", "c1", "d1"]), atol=1e-6)
    bank = insert(bank, one(folder, "a2"), "a2", engine=ONE)
    assert len(bank.bases) == 3


def test_a_budget_of_bytes(folder: Path, tmp_path: Path) -> None:
    size = made(folder, tmp_path / "probe", ["a1", "b1"], k=2).nbytes // 2
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2, max_bytes=2 * size + size // 2, join=0.3)
    bank = insert(bank, one(folder, "c1"), "c1", engine=ONE)
    assert len(bank.bases) == 2
    assert bank.nbytes <= 2 * size + size // 2
    with pytest.raises(RecipeError, match="`max_bytes` must hold at least one basis"):
        made(folder, tmp_path / "tiny", ["a1", "b1"], max_bytes=100)


def test_where_it_goes_may_be_said(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2)
    bank = insert(bank, one(folder, "c1"), "c1", to="b1", engine=ONE)
    assert bank.basis_of("c1") == "b1"
    bank = insert(bank, one(folder, "a2"), "a2", to="new", engine=ONE)
    assert bank.bases[bank.basis_of("a2")].members == ("a2",)
    with pytest.raises(BankError, match="no basis 'b9'"):
        insert(bank, one(folder, "b2"), "b2", to="b9", engine=ONE)


def test_methods_that_are_not_linear_say_so(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "c1"], inner=Ties(density=0.5), join=0.2)
    bank = insert(bank, one(folder, "a9"), "a9", engine=ONE)
    basis = bank.bases[bank.basis_of("a9")]
    assert basis.members == ("a1", "a2", "a9")
    assert basis.how == "online"
    assert "merged by ties from bases that stand for several tasks" in " ".join(bank.state.log[-1].said)
    found = torch.stack([values(bank.vector(name)) for name in bank.bases])
    assert torch.allclose(torch.tensor(bank.state.basis_gram, dtype=torch.float64), found @ found.T, rtol=1e-6)
    drift, _ = drift_of(bank, engine=ONE)
    assert max(drift["same_members"].values()) > 1e-3


def test_wudi_as_inner(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", inner=Wudi(solver="closed_form", elsewhere="mean"))
    base, listed = vectors(folder, ["a1", "a2"])
    direct = thetau.merge(listed, Wudi(solver="closed_form", elsewhere="mean"), names=["a1", "a2"])
    assert torch.allclose(values(bank.vector(bank.basis_of("a1"))), values(direct), atol=1e-7)
    assert base.is_model


def test_a_basis_may_be_given(folder: Path, tmp_path: Path) -> None:
    given = {("a1", "a2"): one(folder, "a9")}
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "c1"], given=given)
    name = bank.basis_of("a1")
    assert bank.bases[name].how == "given"
    assert torch.allclose(values(bank.vector(name)), values(one(folder, "a9")), atol=1e-7)
    with pytest.raises(RecipeError, match=r"a basis is given for a1, c1, which is no cluster\. Clusters: a1, a2; c1"):
        made(folder, tmp_path / "other", ["a1", "a2", "c1"], given={("c1", "a1"): one(folder, "a9")})
    shutil.move(folder / "a1", folder / "moved")
    with pytest.raises(BankError, match="given as one model"):
        forget(bank, "a2", engine=ONE)
    shutil.move(folder / "moved", folder / "a1")
    bank = insert(bank, one(folder, "a9"), "a9", to=name, engine=ONE)
    assert bank.bases[name].how == "given"
    assert "counts as its members' mean" in " ".join(bank.state.log[-1].said)


def test_forget_what_stands_alone(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank")
    before = {basis.members: values(bank.vector(name)) for name, basis in bank.bases.items()}
    bank = forget(bank, "c1", engine=ONE)
    assert groups(bank) == {("a1", "a2"), ("b1", "b2", "b3")}
    assert "exact." in bank.state.log[-1].said[0]
    for name, basis in bank.bases.items():
        assert torch.equal(values(bank.vector(name)), before[basis.members])
    assert {path.name for path in bank.path.iterdir()} == {MANIFEST, LOCK, *(b.file for b in bank.bases.values())}


@pytest.mark.parametrize("inner", [Average(), thetau.methods.TaskArithmetic(scale=0.4)], ids=str)
def test_forget_subtracts_from_a_linear_basis(folder: Path, tmp_path: Path, inner: Any) -> None:
    bank = made(folder, tmp_path / "bank", inner=inner)
    bank = forget(bank, "b2", engine=ONE)
    name = bank.basis_of("b1")
    factor = 1.0 if isinstance(inner, Average) else 0.8
    want = factor * mean_of(folder, ["b1", "b3"])
    assert float((values(bank.vector(name)) - want).norm() / want.norm()) < 3e-7
    assert "exact but for rounding to float32" in bank.state.log[-1].said[0]
    bank = forget(bank, "b3", engine=ONE)
    want = values(one(folder, "b1"))
    assert float((values(bank.vector(name)) - want).norm() / want.norm()) < 1e-6


def test_insert_then_forget_is_where_it_was(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "c1"])
    before = {basis.members: values(bank.vector(name)) for name, basis in bank.bases.items()}
    bank = forget(insert(bank, one(folder, "a9"), "a9", engine=ONE), "a9", engine=ONE)
    after = {basis.members: values(bank.vector(name)) for name, basis in bank.bases.items()}
    assert set(after) == set(before)
    assert all(float((after[key] - before[key]).norm() / before[key].norm()) < 1e-6 for key in before)
    assert sorted(bank.members) == ["a1", "a2", "c1"]


def test_forget_of_another_method_needs_the_others(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    bank = made(moved, tmp_path / "bank", inner=Ties(density=0.5))
    done = forget(bank, "b2", engine=ONE)
    base, listed = vectors(moved, ["b1", "b3"])
    direct = thetau.merge(listed, Ties(density=0.5), names=["b1", "b3"])
    assert base.is_model
    assert torch.allclose(values(done.vector(done.basis_of("b1"))), values(direct), atol=1e-7)
    assert "merged anew from the vectors of b1, b3; exact." in done.state.log[-1].said[0]
    shutil.rmtree(moved / "b3")
    state = done.state
    with pytest.raises(BankError, match=r"cannot take b1 out of b2 \(b1, b3, merged by ties\)\. Give the vectors of b3"):
        forget(done, "b1", engine=ONE)
    assert open_bank(done.path).state == state, "nothing was changed"
    given = forget(done, "b1", vectors={"b3": one(folder, "b3")}, engine=ONE)
    assert torch.allclose(values(given.vector(given.basis_of("b3"))), values(one(folder, "b3")), atol=1e-7)


def test_forget_a_whole_basis(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    bank = made(moved, tmp_path / "bank", inner=Ties(density=0.5))
    for name in ("b1", "b2", "b3"):
        shutil.rmtree(moved / name)
    done = forget(bank, "b1", drop_basis=True, engine=ONE)
    assert groups(done) == {("a1", "a2"), ("c1",)}
    assert "b2, b3 are lost too" in done.state.log[-1].said[0]


def test_another_file_in_a_members_place_does_not_count(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    bank = made(moved, tmp_path / "bank", inner=Ties(density=0.5))
    write_model(moved / "b1", weights("d1"))
    with pytest.raises(BankError, match="is not the vector that went into the bank as b1"):
        forget(bank, "b3", engine=ONE)


def test_rebuild_from_the_originals(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1", "c1"], k=1)
    for name in ("a2", "b2", "b3"):
        bank = insert(bank, one(folder, name), name, to="b1", engine=ONE)
    assert len(bank.bases) == 1
    bank = rebuild(bank, engine=ONE)
    assert groups(bank) == {("a1", "a2"), ("b1", "b2", "b3"), ("c1",)}
    assert not torch.isnan(bank.known()[1]).any()


def test_rebuild_without_the_originals_keeps_together_what_was_merged(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    names = ["a1", "a2", "b1", "b2", "c1"]
    clusters = thetau.bases.given_groups([["a1", "c1"]], names)
    bank = made(moved, tmp_path / "bank", names, clusters=clusters)
    shutil.rmtree(moved / "a1")
    done = rebuild(bank, k=2, engine=ONE)
    assert ("b1", "b2") in groups(done)
    assert "a1, c1: stay together; the vectors of a1 are not at hand." in done.state.log[-1].said
    names, known = done.known()
    total = sum(len(basis.members) * values(done.vector(name)) for name, basis in done.bases.items())
    assert torch.allclose(total, 5 * mean_of(folder, names), atol=1e-6)
    assert not torch.isnan(known[names.index("b1"), names.index("a2")])


@settings(max_examples=8)
@given(order=st.permutations(["a1", "a2", "b1", "b2", "c1"]), leave=st.sampled_from(["a2", "b1", "c1"]))
def test_sums_survive_any_history(folder: Path, tmp_path_factory: pytest.TempPathFactory, order: list[str], leave: str) -> None:
    """Under a mean, Σ n·B is the sum of all members, whatever was joined, opened or forgotten."""
    path = tmp_path_factory.mktemp("history") / "bank"
    bank = made(folder, path, order[:2], k=2, max_bases=2, join=0.3)
    for name in order[2:]:
        bank = insert(bank, one(folder, name), name, engine=ONE)
    bank = forget(bank, leave, engine=ONE)
    total = sum(len(basis.members) * values(bank.vector(name)) for name, basis in bank.bases.items())
    kept = [name for name in order if name != leave]
    assert sorted(bank.members) == sorted(kept)
    assert torch.allclose(total, 4 * mean_of(folder, kept), atol=1e-6)


# Crash, and two at once


def _killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Run in a child that dies at its `step`-th write, rename, link or removal; whether it got that far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = [0]

    def deadly(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if count[0] == step:
                os._exit(9)
            count[0] += 1
            return function(*arguments, **options)

        return call

    for name in ("write", "pwrite", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "fsync", "posix_fallocate"):
        setattr(os, name, deadly(getattr(os, name)))
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("what", ["insert", "forget", "rebuild"])
def test_killed_at_every_write(folder: Path, tmp_path: Path, what: str) -> None:
    start = tmp_path / "start"
    made(folder, start, ["a1", "a2", "c1", "b1"], k=3, max_bases=3, join=0.9)
    work: dict[str, Callable[[Path], Any]] = {
        "insert": lambda path: insert(path, one(folder, "d1"), "d1", engine=ONE),
        "forget": lambda path: forget(path, "a1", engine=ONE),
        "rebuild": lambda path: rebuild(path, k=2, engine=ONE),
    }
    before = open_bank(start).state
    outcomes = set()
    step = 0
    while True:
        path = tmp_path / f"{what}{step}"
        shutil.copytree(start, path)
        killed = _killed_at(step, lambda path=path: work[what](path))  # type: ignore[misc]
        bank = open_bank(path)
        damaged = [problem for problem in bank.verify() if "is no part of the bank any more" not in problem]
        assert damaged == [], f"killed at step {step}"
        same = bank.state == before
        outcomes.add(same)
        after = insert(bank, one(folder, "b2"), "b2", to="new" if len(bank.bases) < 3 else list(bank.bases)[-1], engine=ONE)
        assert after.verify() == []
        assert {entry.name for entry in path.iterdir()} == {MANIFEST, LOCK, *(b.file for b in after.bases.values())}
        if not killed:
            assert not same, "the last run went through"
            break
        step += 1
    assert step > 8
    assert outcomes == {True, False}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_build_killed_at_every_write_leaves_no_bank(folder: Path, tmp_path: Path) -> None:
    step = 0
    while _killed_at(step, lambda: made(folder, tmp_path / "bank", ["a1", "a2", "c1"])):
        bank = tmp_path / "bank"
        if bank.exists():
            assert open_bank(bank).verify() == []
            shutil.rmtree(bank)
        step += 1
    assert step > 8
    assert open_bank(tmp_path / "bank").verify() == []
    assert [path.name for path in tmp_path.iterdir()] == ["bank"], "what the dead left is cleared"


def test_two_writers(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2, join=0.3)
    errors: list[BaseException] = []

    def put(name: str) -> None:
        try:
            insert(bank.path, one(folder, name), name, engine=ONE)
        except BaseException as error:
            errors.append(error)

    names = ["a2", "b2", "b3", "c1"]
    threads = [threading.Thread(target=put, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    done = open_bank(bank.path)
    assert sorted(done.members) == sorted(["a1", "b1", *names])
    assert done.verify() == []
    assert len(done.state.log) == 5


def test_a_writer_waits_only_so_long(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2)
    with changing(bank.path):
        began = time.monotonic()
        with pytest.raises(BankError, match="another process is changing this bank"):
            insert(bank, one(folder, "c1"), "c1", wait=0.1, engine=ONE)
        assert time.monotonic() - began >= 0.1


def test_a_reader_of_an_old_state_is_told(folder: Path, tmp_path: Path) -> None:
    old = made(folder, tmp_path / "bank", ["a1", "b1"], k=2)
    insert(tmp_path / "bank", one(folder, "a2"), "a2", to="b1", engine=ONE)
    with pytest.raises(BankError, match=r"was changed by another process meanwhile\. Open it again"):
        old.vector("b1")
    assert old.vector("b2").is_vector


# Bad input


def test_no_bank_a_newer_one_and_damage(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"holds no bank \(bank.json is missing\)"):
        open_bank(tmp_path)
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "c1"])
    manifest = bank.path / MANIFEST
    good = json.loads(manifest.read_text())

    def broken(**changes: Any) -> str:
        manifest.write_text(json.dumps({**good, **changes}))
        with pytest.raises(BankError) as caught:
            open_bank(bank.path)
        return str(caught.value)

    assert "in format 99; this one knows up to 1. Upgrade thetau." in broken(format=99, thetau="9.0")
    assert "the bank's list is damaged" in broken(bases={})
    assert "bases and members do not agree" in broken(members={})
    assert "inner products are not those of 3 tasks" in broken(gram=[[1.0]])
    assert "inner products are not those of 2 bases" in broken(basis_gram=[[1.0]])
    outside = {name: {**basis, "file": "../" + basis["file"]} for name, basis in good["bases"].items()}
    assert "which is not one beside it" in broken(bases=outside)
    manifest.write_text("{")
    with pytest.raises(BankError, match="the bank's list is damaged"):
        open_bank(bank.path)
    manifest.write_text(json.dumps(good))
    file = bank.path / bank.bases["b1"].file
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BankError, match=r"the file of the basis b1 \(a1, a2\) is not the one that was written there"):
        open_bank(bank.path).vector("b1")
    assert len(open_bank(bank.path).verify()) == 1
    file.write_bytes(bytes(content[:50]))
    with pytest.raises(BankError, match="cannot be read"):
        open_bank(bank.path).vector("b1")
    file.unlink()
    with pytest.raises(BankError, match="cannot be read"):
        open_bank(bank.path).vector("b1")


def test_vectors_that_do_not_belong(folder: Path, tmp_path: Path) -> None:
    base, listed = vectors(folder, ["a1", "b1"])
    other = write_model(tmp_path / "other", weights("zz", size=1.0))
    foreign = thetau.open(folder / "b1") - thetau.open(other)
    with pytest.raises(AlignmentError, match="b1: this task vector was taken from another base than"):
        build(tmp_path / "bank", [listed[0], foreign], base, names=["a1", "b1"], engine=ONE)
    far = thetau.open(other) - base
    with pytest.raises(AlignmentError, match=r"z \(1\.\d+\): the task vector's length, in ‖θ₀‖"):
        build(tmp_path / "bank", [listed[0], far], base, names=["a1", "z"], engine=ONE)
    zero = thetau.open(write_model(tmp_path / "same", weights(None))) - base
    with pytest.raises(AlignmentError, match="z: the task vector is zero"):
        build(tmp_path / "bank", [*listed, zero], base, names=["a1", "b1", "z"], engine=ONE)
    with pytest.raises(
        RecipeError, match=r"at least two task vectors\. Got 1\. To begin a bank that grows by insertion, give k = 1"
    ):
        build(tmp_path / "bank", listed[:1], base, engine=ONE)
    with pytest.raises(AlignmentError, match="needs task vectors"):
        build(tmp_path / "bank", [base, listed[0]], base, engine=ONE)
    assert not list(tmp_path.glob("*bank*")), "nothing is left behind"
    bank = build(tmp_path / "bank", listed, base, names=["a1", "b1"], k=2, engine=ONE)
    with pytest.raises(OutputError, match=r"exists\. An output is never mixed"):
        build(tmp_path / "bank", listed, base, engine=ONE)
    for vector, message in (
        (foreign, "taken from another base"),
        (far, "of the length of"),
        (zero, "the task vector is zero"),
        (base, "needs task vectors"),
    ):
        with pytest.raises(AlignmentError, match=message):
            insert(bank, vector, "x", engine=ONE)
    with pytest.raises(BankError, match="has a task 'a1' already"):
        insert(bank, listed[0], "a1", engine=ONE)
    with pytest.raises(BankError, match=r"no task 'b2'\. Tasks: a1, b1"):
        forget(bank, "b2", engine=ONE)
    assert open_bank(bank.path).state == bank.state


def test_a_bank_begins_with_one(folder: Path, tmp_path: Path) -> None:
    base, listed = vectors(folder, ["a1"])
    bank = build(tmp_path / "bank", listed, base, names=["a1"], k=1, engine=ONE)
    assert join_threshold(bank) == 0.1
    bank = insert(bank, one(folder, "a2"), "a2", engine=ONE)
    assert groups(bank) == {("a1", "a2")}
    bank = insert(bank, one(folder, "c1"), "c1", engine=ONE)
    assert groups(bank) == {("a1", "a2"), ("c1",)}


def test_an_emptied_bank_can_begin_again(folder: Path, tmp_path: Path) -> None:
    base, listed = vectors(folder, ["a1"])
    bank = build(tmp_path / "bank", listed, base, names=["a1"], k=1, engine=ONE)
    bank = forget(bank, "a1", engine=ONE)
    assert not bank.bases
    with pytest.raises(ThetauError):
        rebuild(bank, engine=ONE)
    bank = insert(bank, one(folder, "b1"), "b1", engine=ONE)
    assert groups(bank) == {("b1",)}


@pytest.mark.parametrize(
    "store",
    [
        {"form": "precision", "dtype": "bfloat16"},
        {"form": "precision", "dtype": "int8"},
        {"form": "sparse", "density": 0.3},
        {"form": "low_rank", "rank": 3},
    ],
    ids=str,
)
def test_bases_can_be_stored_smaller(folder: Path, tmp_path: Path, store: dict[str, Any]) -> None:
    bank = made(folder, tmp_path / "bank", store=store)
    assert bank.state.settings.store == store
    for name, basis in bank.bases.items():
        want = mean_of(folder, basis.members)
        assert basis.error == pytest.approx(float((values(bank.vector(name)) - want).norm() / want.norm()), rel=1e-3)
        assert basis.norm == pytest.approx(float(values(bank.vector(name)).norm()), rel=1e-6)
    assert bank.verify() == []
    done = forget(bank, "b1", engine=ONE)
    assert "not exact: its stored forms leave up to" in done.state.log[-1].said[0]
    kept = done.bases[done.basis_of("b2")]
    want = mean_of(folder, kept.members)
    assert kept.slack is not None
    assert float((values(done.vector(kept.name)) - want).norm()) <= kept.slack * (1 + 1e-6)


# What a second pair of eyes found


def test_slack_bounds_what_a_long_history_does(folder: Path, tmp_path: Path) -> None:
    """Every rounding counts: members come and go, and the bound holds at each step."""
    names = [f"b{i}" for i in range(1, 4)]
    models = {name: weights(name) for name in names} | {f"x{i}": weights("b" + "q" * i) for i in range(9)}
    base = thetau.open(folder / "base")
    listed = {name: thetau.open(state, name=name) - base for name, state in models.items()}
    bank = build(tmp_path / "bank", [listed["b1"]], base, names=["b1"], k=1, engine=ONE)
    here = ["b1"]
    for name in list(models)[1:]:
        bank = insert(bank, listed[name], name, to="b1", engine=ONE)
        here.append(name)
    for name in list(models)[:-1]:
        bank = forget(bank, name, vectors=listed, engine=ONE)
        here.remove(name)
        want = torch.stack([values(listed[one]) for one in here]).mean(0)
        basis = bank.bases["b1"]
        assert basis.slack is not None
        assert float((values(bank.vector("b1")) - want).norm()) <= basis.slack < 1e-4 * basis.norm


@pytest.mark.parametrize("form", [{"form": "precision", "dtype": "int8"}, {"form": "sparse", "density": 0.3}], ids=str)
def test_slack_bounds_lossy_forms_written_again(folder: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    bank = made(folder, tmp_path / "bank", ["b1", "b2", "c1"], k=2, store=form, join=0.1)
    bank = insert(bank, one(folder, "b3"), "b3", to=bank.basis_of("b1"), engine=ONE)
    basis = bank.bases[bank.basis_of("b3")]
    want = mean_of(folder, basis.members)
    assert basis.slack is not None
    assert float((values(bank.vector(basis.name)) - want).norm()) <= basis.slack * (1 + 1e-6)


def test_a_lossy_basis_is_merged_anew_rather_than_subtracted_from(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", store={"form": "sparse", "density": 0.2})
    done = forget(bank, "b1", engine=ONE)
    assert "merged anew from the vectors of b2, b3" in done.state.log[-1].said[0]
    again = made(folder, tmp_path / "again", ["b2", "b3"], k=1, store={"form": "sparse", "density": 0.2})
    assert torch.equal(values(done.vector(done.basis_of("b2"))), values(again.vector("b1")))


def test_rebuild_keeps_a_given_basis(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "a2", "b1", "c1"], given={("a1", "a2"): one(folder, "a9")}, k=3)
    done = rebuild(bank, k=2, engine=ONE)
    name = done.basis_of("a1")
    assert done.bases[name].how == "given"
    assert "a1, a2: stay together; their basis was given as one model." in done.state.log[-1].said
    if len(done.bases[name].members) == 2:
        assert torch.allclose(values(done.vector(name)), values(one(folder, "a9")), atol=1e-7)


def test_rebuild_of_lossy_singletons_keeps_what_was_known(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    bank = made(moved, tmp_path / "bank", ["a1", "b1", "c1", "a2"], k=4, store={"form": "sparse", "density": 0.1})
    before = bank.known()[1]
    shutil.rmtree(moved / "a1")
    done = rebuild(bank, k=3, engine=ONE)
    assert torch.allclose(done.known()[1], before, rtol=1e-9)


def test_a_changed_vector_is_noticed_by_its_length(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints look at samples; what lies between them is told by the length."""
    from thetau.bases import members

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    bank = made(moved, tmp_path / "bank")
    known = {name: member.fingerprint for name, member in bank.members.items()}
    changed = weights("b1")
    changed["norm.weight"] = changed["norm.weight"] * 1.001
    write_model(moved / "b1", changed)
    monkeypatch.setattr(members, "fingerprint_of", lambda vector: known[vector.name or "b1"])
    state = bank.state
    for change in (lambda: forget(bank, "b1", engine=ONE), lambda: rebuild(bank, engine=ONE)):
        with pytest.raises(BankError, match="is not the vector that went into the bank as b1: its length is"):
            change()
    assert open_bank(bank.path).state == state


def test_a_failed_change_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "c1"], k=2, store={"form": "sparse", "density": 0.5})
    names = {entry.name for entry in bank.path.iterdir()}
    manifest = json.loads((bank.path / MANIFEST).read_text())
    manifest["settings"]["max_bytes"] = 10
    manifest["bases"] = {key: {**value, "nbytes": 1} for key, value in manifest["bases"].items()}
    (bank.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BankError, match=r"the bases would take .* Nothing was changed"):
        insert(bank.path, one(folder, "b1"), "b1", to="new", engine=ONE)
    assert {entry.name for entry in bank.path.iterdir()} == names | {LOCK}


def test_other_files_are_left_alone_and_left_overs_told(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "c1"], k=2)
    (bank.path / "README.md").write_text("ours")
    (bank.path / "notes").mkdir()
    (bank.path / "b1-000099.safetensors").write_bytes(b"x")
    assert len(bank.verify()) == 1
    assert "is no part of the bank any more" in bank.verify()[0]
    done = insert(bank, one(folder, "b1"), "b1", engine=ONE)
    assert (done.path / "README.md").read_text() == "ours"
    assert (done.path / "notes").is_dir()
    assert done.verify() == []


def test_zero_and_foreign_vectors_are_refused_however_clusters_come(folder: Path, tmp_path: Path) -> None:
    base, listed = vectors(folder, ["a1", "b1"])
    zero = thetau.open(write_model(tmp_path / "same", weights(None))) - base
    clusters = thetau.bases.given_groups([["a1", "z"]], ["a1", "z"])
    with pytest.raises(AlignmentError, match="z: the task vector is zero"):
        build(tmp_path / "bank", [listed[0], zero], base, names=["a1", "z"], clusters=clusters, engine=ONE)
    other = thetau.open(write_model(tmp_path / "other", weights("zz", size=1.0)))
    for foreign, message in (
        (thetau.open(folder / "b1") - other, "taken from another base"),
        (other - base, "it is zero, or of another base"),
    ):
        with pytest.raises(AlignmentError, match=message):
            build(tmp_path / "bank", listed, base, names=["a1", "b1"], k=1, given={("a1", "b1"): foreign}, engine=ONE)


def test_unrelated_vectors_do_not_join(folder: Path, tmp_path: Path) -> None:
    bank = made(folder, tmp_path / "bank", ["a1", "b1"], k=2)
    assert join_threshold(bank) >= 0.1
    bank = insert(bank, one(folder, "c1"), "c1", engine=ONE)
    assert len(bank.bases) == 3


def test_drift_of_unconnected_vectors(tmp_path: Path) -> None:
    """Three tasks without a common entry, two bases: an offline build would need three, and the change is kept all the same."""
    state = {f"w{i}": torch.ones(4, 4) for i in range(3)}
    base = thetau.open(state, name="base")
    tuned = {f"t{i}": thetau.open({**state, f"w{i}": state[f"w{i}"] + 0.01}, name=f"t{i}") - base for i in range(3)}
    bank = build(tmp_path / "bank", [tuned["t0"], tuned["t1"]], base, names=["t0", "t1"], k=2, max_bases=2, engine=ONE)
    bank = insert(bank, tuned["t2"], "t2", drift=True, originals=tuned, engine=ONE)
    drift = bank.state.log[-1].drift
    assert drift is not None
    assert drift["missing"] == []
    assert len(bank.bases) == 2


def test_a_bank_can_be_used_from_any_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    base = thetau.open("base")
    listed = [thetau.open(name) - base for name in ("a1", "a2", "c1")]
    build(tmp_path / "bank", listed, base, names=["a1", "a2", "c1"], engine=ONE)
    monkeypatch.chdir(tmp_path)
    assert groups(forget("bank", "a1", engine=ONE)) == {("a2",), ("c1",)}


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    return (ended.value.code if isinstance(ended.value.code, int) else 0), printed.out + printed.err


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    bank = str(tmp_path / "bank")
    code, text = run(
        capsys, "basis", "build", "-b", "base", "a1", "a2", "b1", "x=c1", "-o", bank, "--json", str(tmp_path / "b.json")
    )
    assert code == 0, text
    assert "4 tasks in 3 bases" in text
    assert "eigenvalues" in text
    assert json.loads((tmp_path / "b.json").read_text())["spectrum"]["gaps"]
    code, text = run(capsys, "basis", "insert", bank, "b2", "--drift")
    assert code == 0, text
    assert "partitions agree 1.00" in text
    code, text = run(capsys, "basis", "forget", bank, "b1")
    assert code == 0, text
    assert "exact but for rounding" in text
    code, text = run(capsys, "basis", "rebuild", bank, "-k", "2")
    assert code == 0, text
    code, text = run(capsys, "basis", "show", bank, "--verify", "--drift", "--plot", str(tmp_path / "c.png"))
    assert code == 0, text
    assert "hold what was written" in text
    assert (tmp_path / "c.png").stat().st_size > 5000
    code, text = run(capsys, "basis", "show", str(folder))
    assert code == 1
    assert "holds no bank" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "x"], "must be a number or auto"),
        (["-k", "9"], "`k` must be between 1 and 3"),
        (["--opposed", "x"], "must be a number in [−1, 0), or none"),
        (["--store", "sparse=2"], "must be in (0, 1]"),
        (["--store", "x"], "must be float32, bfloat16, float16, int8, sparse=SHARE or rank=NUMBER"),
        (["--partition", "x"], "--partition must be spectral, random, one or all"),
        (["--partition", "random"], "--partition random needs -k"),
        (["--partition", "one", "--cluster", "a1,a2"], "give one of them"),
        (["--given", "x"], "must be TASK,TASK=PATH"),
        (["--max-bytes", "x"], "--max-bytes"),
        (["--inner", "tise"], "unknown method 'tise'"),
    ],
)
def test_bad_options_on_the_command_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    code, text = run(capsys, "basis", "build", "-b", "base", "a1", "a2", "c1", "-o", str(tmp_path / "bank"), *options)
    assert code == 1
    assert message in text
    assert not (tmp_path / "bank").exists()


def test_partitions_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for options, count in ((["--partition", "one"], 1), (["--partition", "all"], 3), (["--partition", "random", "-k", "2"], 2)):
        bank = tmp_path / f"bank{count}"
        code, text = run(capsys, "basis", "build", "-q", "-b", "base", "a1", "a2", "c1", "-o", str(bank), *options)
        assert code == 0, text
        assert len(open_bank(bank).bases) == count
    code, text = run(
        capsys,
        "basis",
        "build",
        "-q",
        "-b",
        "base",
        "a1",
        "a2",
        "c1",
        "-o",
        str(tmp_path / "g"),
        "--cluster",
        "a1,c1",
        "--given",
        "a1,c1=a9",
    )
    assert code == 0, text
    assert open_bank(tmp_path / "g").bases["b1"].how == "given"
