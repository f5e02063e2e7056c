"""Localize-and-Stitch: the stitch and its shared masks against a dense reference, what has to be stored, and what that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thetau
from commands import folder as folder
from commands import run
from fixtures import write_model
from synthetic import State, differences, merged_vector, models, vectors_of
from thetau.checkpoint.memory import MemorySource
from thetau.compression import Sparse, Storage, compress, stitch, storage, stored
from thetau.errors import AlignmentError, RecipeError
from thetau.methods import LocalizeStitch, PerTask, TopK
from thetau.statistics.quantile import kept_count
from thetau.transforms.share import inner, shared, weights

SHAPES = {"layers.0.mlp.fc1.weight": (24, 16), "layers.0.norm.weight": (16,), "conv.weight": (4, 3, 2, 2), "logit_scale": ()}
TASKS = ("e", "b", "d", "a", "c")
CLUSTERS = {"a": 0, "b": 0, "c": 0, "d": 7, "e": 7}


def masks_of(tau: dict[str, State], density: float, trim: str = "vector") -> dict[str, dict[str, Tensor]]:
    """The largest entries of each task, by sorting."""
    out: dict[str, dict[str, Tensor]] = {}
    for task, state in tau.items():
        groups = [list(state)] if trim == "vector" else [[name] for name in state]
        out[task] = {}
        for names in groups:
            flat = torch.cat([state[name].abs().reshape(-1) for name in names])
            cut = flat.sort(descending=True).values[kept_count(density, len(flat)) - 1]
            out[task] |= {name: (state[name].abs() >= cut) & (state[name] != 0) for name in names}
    return out


def rounded(share: Tensor, rounding: str) -> Tensor:
    """The rule, from the paper's formula: of the exact number, not of counts."""
    return torch.floor(share + 0.5) if rounding == "half_up" else torch.round(share)


def reference(
    tau: dict[str, State], masks: dict[str, dict[str, Tensor]], sharing: str, rounding: str, clusters: dict[str, int]
) -> State:
    """The formulas of Section 6.4, dense and in float64."""
    groups = {number: sorted(t for t in tau if clusters[t] == number) for number in {clusters[t] for t in tau}}
    out: State = {}
    for name in next(iter(tau.values())):
        gamma = {task: masks[task][name].double() for task in tau}
        if sharing == "mask":
            models = {}
            for number, members in groups.items():
                one = rounded(sum(gamma[t] for t in members) / len(members), rounding)
                models[number] = (one, one * sum(tau[t][name].double() for t in members) / len(members))
            total = sum(one for one, _ in models.values())
            out[name] = (sum(model for _, model in models.values()) / torch.as_tensor(total).clamp(min=1)).float()
            continue
        if sharing == "twice":
            gamma = {t: rounded(gamma[t] / sum(gamma[s] for s in groups[clusters[t]]).clamp(min=1), rounding) for t in tau}
        total = sum(gamma.values())
        out[name] = sum(gamma[t] / torch.as_tensor(total).clamp(min=1) * tau[t][name].double() for t in tau).float()
    return out


def close(got: State, want: State) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-8)


def method(sharing: str, rounding: str = "half_up", density: float = 0.4, trim: str = "vector", **more: Any) -> LocalizeStitch:
    fields: dict[str, Any] = {"sharing": sharing, "rounding": rounding, "density": density, "trim": trim, **more}
    return LocalizeStitch(clusters=PerTask({t: float(n) for t, n in CLUSTERS.items()}), **fields)


ALL = [(sharing, rounding) for sharing in ("none", "mask", "twice") for rounding in ("half_up", "half_even")]


# The method


@pytest.mark.parametrize(("sharing", "rounding"), ALL)
@pytest.mark.parametrize("trim", ["vector", "tensor"])
def test_the_method_is_the_dense_reference(sharing: str, rounding: str, trim: str) -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    want = reference(tau, masks_of(tau, 0.4, trim), sharing, rounding, CLUSTERS)
    close(merged_vector(base, tuned, method(sharing, rounding, trim=trim)), want)


def test_the_ways_differ() -> None:
    base, tuned = models(SHAPES, TASKS)
    made = [merged_vector(base, tuned, method(sharing, rounding)) for sharing, rounding in ALL[1:]]
    for one in range(len(made)):
        for other in range(one):
            assert any(not torch.equal(made[one][name], made[other][name]) for name in SHAPES)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    numbers=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    sharing=st.sampled_from(["none", "mask", "twice"]),
    rounding=st.sampled_from(["half_up", "half_even"]),
    density=st.sampled_from([0.1, 0.35, 1.0]),
)
def test_any_clusters(seed: int, numbers: list[int], sharing: str, rounding: str, density: float) -> None:
    tasks = TASKS[: len(numbers)]
    base, tuned = models({"w": (9, 7)}, tasks, seed=seed)
    tau = differences(base, tuned)
    of = dict(zip(tasks, numbers, strict=True))
    fields: dict[str, Any] = {"sharing": sharing, "rounding": rounding}
    made = merged_vector(base, tuned, LocalizeStitch(density=density, clusters=tuple(map(float, numbers)), **fields))
    close(made, reference(tau, masks_of(tau, density), sharing, rounding, of))


@pytest.mark.parametrize("sharing", ["none", "mask", "twice"])
def test_weights_sum_to_one_where_anything_is_kept(sharing: Any) -> None:
    """An entry of the stitched vector is a mean of the tasks' entries."""
    kept = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    clusters = [0, 0, 0, 7, 7]
    masks = shared(kept, clusters, sharing, "half_up")
    total = weights(masks, clusters, sharing).sum(0)
    torch.testing.assert_close(total, masks.any(0).float())


def test_one_task_keeps_its_own() -> None:
    base, tuned = models(SHAPES, ("a",))
    want = merged_vector(base, tuned, TopK(density=0.3))
    for sharing in ("none", "mask", "twice"):
        close(merged_vector(base, tuned, one(sharing)), want)


def one(sharing: Any) -> LocalizeStitch:
    return LocalizeStitch(density=0.3, sharing=sharing, clusters=(0.0,))


# The rounding rule


def bits(*rows: str) -> Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def test_a_mask_of_two_is_their_union_or_what_both_keep() -> None:
    kept = bits("0011", "0101")
    assert torch.equal(shared(kept, [0, 0], "mask", "half_up"), bits("0111", "0111")), "OR"
    assert torch.equal(shared(kept, [0, 0], "mask", "half_even"), bits("0001", "0001")), "AND"


@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
def test_a_mask_of_three_is_the_majority(rounding: Any) -> None:
    kept = bits("00001111", "00110011", "01010101")
    assert torch.equal(shared(kept, [4, 4, 4], "mask", rounding), bits(*["00010111"] * 3))


def test_twice_drops_what_three_share_or_already_what_two_do() -> None:
    kept = bits("00001111", "00110011", "01010101")
    up = bits("00001110", "00110010", "01010100")
    assert torch.equal(shared(kept, [0, 0, 0], "twice", "half_up"), up)
    even = bits("00001000", "00100000", "01000000")
    assert torch.equal(shared(kept, [0, 0, 0], "twice", "half_even"), even)
    assert torch.equal(shared(bits("0011", "0101"), [0, 0], "twice", "half_even"), bits("0010", "0100"))
    assert torch.equal(shared(bits("0011", "0101"), [0, 0], "twice", "half_up"), bits("0011", "0101"))


def test_clusters_of_one_change_nothing() -> None:
    kept = bits("0011", "0101", "1001")
    for sharing in ("mask", "twice"):
        for rounding in ("half_up", "half_even"):
            assert torch.equal(shared(kept, [2, 0, 1], sharing, rounding), kept)


def test_what_is_stored_of_a_cluster_is_its_mean() -> None:
    masks = bits("01", "01", "11")
    torch.testing.assert_close(inner(masks, [0, 0, 1], "mask"), torch.tensor([[0.0, 0.5], [0.0, 0.5], [1.0, 1.0]]))


# What is refused


def test_sharing_needs_clusters_of_these_tasks() -> None:
    base, tuned = models(SHAPES, ("a", "b"))
    with pytest.raises(RecipeError, match=r"`sharing: mask` needs `clusters`, a number for each task"):
        merged_vector(base, tuned, LocalizeStitch(sharing="mask"))
    with pytest.raises(RecipeError, match="'c' is not a task"):
        merged_vector(base, tuned, method("twice"))
    with pytest.raises(RecipeError, match="no value for the task 'b'"):
        merged_vector(base, tuned, LocalizeStitch(sharing="twice", clusters=PerTask({"a": 0.0})))
    with pytest.raises(ValueError, match=r"`LocalizeStitch\(clusters=...\)` must be a whole number for each task .* Got 0.5."):
        LocalizeStitch(clusters=PerTask({"a": 0.5}))


def test_a_recipe_says_the_clusters() -> None:
    built = thetau.methods.build("localize_stitch", {"sharing": "mask", "clusters": {"per_task": {"a": 0, "b": 1}}})
    assert built == LocalizeStitch(sharing="mask", clusters=PerTask({"a": 0.0, "b": 1.0}))


# Masks that were made elsewhere


def localised(tau: dict[str, State], masks: dict[str, dict[str, Tensor]]) -> list[Any]:
    """Sparse task vectors with these masks."""
    states = {t: {name: tau[t][name] * masks[t][name] for name in tau[t]} for t in tau}
    return [thetau.Expression(((1.0, MemorySource(state, label=t, degree=0)),), name=t) for t, state in states.items()]


def random_masks(tau: dict[str, State]) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {t: {name: torch.rand(v.shape, generator=generator) < 0.4 for name, v in state.items()} for t, state in tau.items()}


@pytest.mark.parametrize(("sharing", "rounding"), ALL)
def test_masks_of_any_kind_are_stitched_as_the_formula_says(sharing: Any, rounding: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    masks = random_masks(tau)
    _, vectors = vectors_of(base, tuned)
    numbers = [CLUSTERS[task] for task in TASKS]
    options: dict[str, Any] = {"sharing": sharing, "rounding": rounding, "clusters": numbers, "names": TASKS}
    want = reference(tau, masks, sharing, rounding, CLUSTERS)
    close(stitch(localised(tau, masks), vectors=vectors, **options).state_dict(), want)
    if sharing != "mask":
        close(stitch(localised(tau, masks), **options).state_dict(), want)
    doubled = stitch(localised(tau, masks), vectors=vectors, scale=2.0, **options).state_dict()
    close({name: value / 2 for name, value in doubled.items()}, want)


def test_mask_sharing_needs_the_whole_vectors() -> None:
    base, tuned = models(SHAPES, ("a", "b"))
    tau = differences(base, tuned)
    sparse = localised(tau, random_masks(tau))
    opened, vectors = vectors_of(base, tuned)
    with pytest.raises(RecipeError, match="Mask Sharing takes its values from the whole task vectors"):
        stitch(sparse, sharing="mask", clusters=[0, 0])
    with pytest.raises(RecipeError, match=r"each task needs a localised vector and a whole one. Got 2 and 1."):
        stitch(sparse, vectors=vectors[:1])
    with pytest.raises(RecipeError, match=r"one number for each of the 2 tasks is needed. Got 3."):
        stitch(sparse, vectors=vectors, sharing="mask", clusters=[0, 0, 1])
    with pytest.raises(AlignmentError, match="Stitching needs task vectors"):
        stitch(sparse, vectors=[vectors[0], opened], sharing="mask", clusters=[0, 0])


# What has to be stored


@pytest.mark.parametrize(("sharing", "rounding"), ALL)
def test_the_stored_models_are_enough(tmp_path: Path, sharing: str, rounding: str) -> None:
    """Merged with density 1, from files, they give what the method gives on the whole vectors."""
    base, tuned = models(SHAPES, TASKS)
    _, vectors = vectors_of(base, tuned)
    way = method(sharing, rounding)
    kept = stored(vectors, way, names=TASKS)
    assert list(kept) == (["cluster 0", "cluster 7"] if sharing == "mask" else list(TASKS))
    for name, vector in kept.items():
        compress(vector, tmp_path / f"{name}.safetensors", Sparse(density=None))
    opened = [thetau.open(tmp_path / f"{name}.safetensors") for name in kept]
    close(thetau.merge(opened, LocalizeStitch(density=1.0)).state_dict(), merged_vector(base, tuned, way))


def accounted(density: float, tmp_path: Path | None = None, **options: Any) -> tuple[Storage, dict[str, State]]:
    base, tuned = models(SHAPES, TASKS)
    _, vectors = vectors_of(base, tuned)
    numbers = [CLUSTERS[task] for task in TASKS]
    found = storage(vectors, density=density, clusters=numbers, names=TASKS, folder=tmp_path, **options)
    return found, differences(base, tuned)


@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
@pytest.mark.parametrize("trim", ["vector", "tensor"])
def test_densities_are_exact(rounding: Any, trim: Any) -> None:
    found, tau = accounted(0.4, rounding=rounding, trim=trim)
    n = sum(value.numel() for value in tau["a"].values())
    masks = masks_of(tau, 0.4, trim)
    flat = {t: torch.cat([m.reshape(-1) for m in one.values()]).double() for t, one in masks.items()}
    groups = [[t for t in tau if CLUSTERS[t] == number] for number in (0, 7)]
    sharing = [rounded(sum(flat[t] for t in g) / len(g), rounding) for g in groups]
    twice = [rounded(flat[t] / sum(flat[s] for s in g).clamp(min=1), rounding) for g in groups for t in g]
    wanted = {"localize_stitch": list(flat.values()), "mask_sharing": sharing, "stitch_twice": twice}
    for name, kept in wanted.items():
        row = found.row(name)
        total = int(sum(float(one.sum()) for one in kept))
        assert row.masks == len(kept)
        assert row.density == pytest.approx(total / len(kept) / n, rel=1e-12)
        assert row.values == 4 * total == round(row.masks * row.density * found.elements * found.itemsize)
    assert found.row("dense").values == 5 * n * 4
    assert found.elements == n
    assert found.row("mask_sharing").density > 0


@pytest.mark.parametrize("trim", ["vector", "tensor"])
def test_densities_of_stored_models_are_those_of_models_in_memory(tmp_path: Path, trim: Any) -> None:
    """From files the cuts are counted in the compiled loop, and the masks after them are not."""
    base, tuned = models(SHAPES, TASKS)
    held = {name: write_model(tmp_path / name, state) for name, state in {"base": base, **tuned}.items()}
    start = thetau.open(held["base"])
    vectors = [thetau.open(held[task]) - start for task in TASKS]
    found = storage(vectors, density=0.4, trim=trim, clusters=[CLUSTERS[task] for task in TASKS], names=TASKS)
    assert found == accounted(0.4, trim=trim)[0]


def test_half_up_is_the_rule_whose_densities_move_as_in_the_paper() -> None:
    """Table 8: Mask Sharing a little denser than the masks that it shares, Stitch Twice sparser."""
    up, _ = accounted(0.4)
    even, _ = accounted(0.4, rounding="half_even")
    assert up.row("mask_sharing").density > even.row("mask_sharing").density
    assert up.row("stitch_twice").density < up.row("localize_stitch").density
    assert even.row("stitch_twice").density < up.row("stitch_twice").density


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_files(tmp_path: Path, dtype: Any) -> None:
    from safetensors.torch import load_file

    found, _ = accounted(0.4, tmp_path, dtype=dtype)
    for row in found.rows:
        files = sorted(tmp_path.glob(f"{row.name}-*.safetensors"))
        assert len(files) == row.masks
        assert row.on_disk == sum(file.stat().st_size for file in files)
        assert row.nbytes == sum(t.numel() * t.dtype.itemsize for file in files for t in load_file(file).values())
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["name"] == "dense"


def test_without_clusters_nothing_is_shared() -> None:
    base, tuned = models(SHAPES, TASKS)
    _, vectors = vectors_of(base, tuned)
    assert [row.name for row in storage(vectors, density=0.1).rows] == ["dense", "localize_stitch"]


def test_localised_vectors_count_their_own_masks() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    masks = random_masks(tau)
    found = storage(localised(tau, masks), density=1.0, clusters=[CLUSTERS[t] for t in TASKS], names=TASKS)
    total = sum(int(mask.sum()) for one in masks.values() for mask in one.values())
    assert found.row("localize_stitch").values == 4 * total


# The command line


def test_stitch_and_storage_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        assert (
            run(capsys, "vector", "compress", "-b", "base", "-m", name, "--density", "0.3", "-q", "-o", f"{name}.safetensors")[0]
            == 0
        )
    shared_options = ["--sharing", "mask", "--cluster", "0", "--cluster", "0"]
    files = ["-v", "a.safetensors", "-v", "b.safetensors"]
    code, text = run(
        capsys, "vector", "stitch", "-b", "base", *files, "-q", "--vector-only", *shared_options, "-o", "no.safetensors"
    )
    assert code != 0
    assert "Mask Sharing takes its values from the whole task vectors" in text
    code, text = run(
        capsys,
        "vector",
        "stitch",
        "-b",
        "base",
        *files,
        "--whole",
        "a",
        "--whole",
        "b",
        "-q",
        "--vector-only",
        *shared_options,
        "-o",
        "s.safetensors",
    )
    assert code == 0, text
    base = thetau.open("base")
    way = LocalizeStitch(density=0.3, sharing="mask", clusters=(0.0, 0.0))
    close(thetau.open("s.safetensors").state_dict(), thetau.merge([thetau.open(n) - base for n in "ab"], way).state_dict())
    code, text = run(
        capsys,
        "vector",
        "storage",
        "a",
        "b",
        "-b",
        "base",
        "--density",
        "0.3",
        "--cluster",
        "0",
        "--cluster",
        "0",
        "--folder",
        "bank",
        "--json",
        "s.json",
    )
    assert code == 0, text
    rows = {row["name"]: row for row in json.loads(Path("s.json").read_text())["rows"]}
    assert [rows[name]["masks"] for name in ("dense", "localize_stitch", "mask_sharing", "stitch_twice")] == [2, 2, 1, 2]
    assert "mask_sharing" in text
    assert sum(file.stat().st_size for file in Path("bank").glob("mask_sharing-*")) == rows["mask_sharing"]["on_disk"]
    code, text = run(capsys, "vector", "storage", "a", "b", "-b", "base", "--rounding", "up")
    assert code != 0
    assert "`options(rounding=...)` must be one of half_up, half_even. Got 'up'." in text


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf")])
def test_a_clusters_number_is_whole(bad: Any) -> None:
    base, tuned = models(SHAPES, ["a", "b", "c"])
    _, vectors = vectors_of(base, tuned)
    with pytest.raises(RecipeError, match="a cluster's number is a whole number"):
        storage(vectors, clusters=PerTask({"a": bad, "b": 1.0, "c": 0.0}), names=["a", "b", "c"])
