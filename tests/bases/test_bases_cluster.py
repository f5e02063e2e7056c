"""Clustering of task vectors: against the definition, invariant where it must be, and clear about bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thetau.bases import Similarity, all_partitions, cluster, given_groups, random_partition, spectrum
from thetau.bases.cluster import agreement
from thetau.bases.partitions import bell
from thetau.errors import AlignmentError, RecipeError

NAMES = ("cat", "dog", "rain", "snow", "sun", "tree")


def similarity(rows: Any, names: tuple[str, ...] = NAMES) -> Similarity:
    """Of these vectors, one a row."""
    matrix = torch.as_tensor(np.asarray(rows), dtype=torch.float64)
    order = sorted(range(len(names)), key=lambda i: names[i])
    matrix = matrix[order]
    return Similarity(names=tuple(sorted(names)), gram=matrix @ matrix.T)


def families(sizes: tuple[int, ...], seed: int = 0, width: int = 400, share: float = 0.8) -> np.ndarray[Any, Any]:
    """Vectors that share a direction within a family."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        common = generator.normal(size=width)
        rows += [share * common + (1 - share) * generator.normal(size=width) for _ in range(size)]
    return np.array(rows)


def test_the_eigengap_finds_the_families() -> None:
    found = cluster(similarity(families((2, 3, 1))))
    assert set(found.groups.values()) == {("cat", "dog"), ("rain", "snow", "sun"), ("tree",)}
    assert found.k == 3
    assert found.chosen == "eigengap"
    assert list(found.groups) == ["b1", "b2", "b3"]


def test_the_spectrum_is_that_of_the_unnormalised_laplacian() -> None:
    one = similarity(families((2, 2, 2)))
    weights = one.cosine.abs().numpy() - np.eye(6)
    laplacian = np.diag(weights.sum(1)) - weights
    values = np.sort(np.linalg.eigvals(laplacian).real)
    found = spectrum(one)
    assert np.allclose(found.eigenvalues, values, atol=1e-12)
    assert np.allclose(found.gaps, np.diff(values), atol=1e-12)
    assert len(found.gaps) == 5


@given(seed=st.integers(0, 30), order=st.permutations(range(6)), scales=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_neither_order_nor_length_changes_a_cluster(seed: int, order: list[int], scales: list[float]) -> None:
    rows = families((3, 2, 1), seed=seed, share=0.5)
    plain = cluster(similarity(rows))
    moved = rows[order] * np.array(scales)[:, None]
    other = cluster(similarity(moved, tuple(NAMES[i] for i in order)))
    assert other.groups == plain.groups


def test_bounds_and_given_k() -> None:
    one = similarity(families((2, 2, 2)))
    assert len(cluster(one, 2).groups) == 2
    assert len(cluster(one, k_min=4).groups) >= 4
    assert len(cluster(one, k_max=2).groups) <= 2
    assert len(cluster(one, 6).groups) == 6
    assert len(cluster(one, 1).groups) == 1


def test_one_basis_for_all_is_not_chosen_unless_asked() -> None:
    """A component that all share makes the gap after the first eigenvalue the largest: the paper's Definition 5.1 wants 1 < m < T."""
    generator = np.random.default_rng(0)
    rows = 3 * generator.normal(size=400) + families((2, 2, 2), share=0.7)
    one = similarity(rows)
    found = cluster(one)
    gaps = spectrum(one).gaps
    assert max(range(5), key=lambda i: gaps[i]) == 0
    assert found.k == 1 + max(range(1, 5), key=lambda i: gaps[i]) >= 2
    assert any("largest gap of all is at k = 1" in note for note in found.notes)
    asked = cluster(one, k_min=1)
    assert asked.k == 1
    assert any("k = 1, one basis for all tasks" in note for note in asked.notes)
    natural = cluster(one, centred=True)
    assert set(natural.groups.values()) == {("cat", "dog"), ("rain", "snow"), ("sun", "tree")}


def test_one_less_than_the_tasks_is_said() -> None:
    rows = np.eye(6)
    rows[1] = [0.5, 1, 0, 0, 0, 0]
    rows += 0.01  # so that all are connected
    found = cluster(similarity(rows))
    assert found.k == 5
    assert any("k = 5, one less than the tasks, has the largest gap: only two tasks are alike" in note for note in found.notes)


def test_two_tasks_may_be_one_cluster() -> None:
    assert cluster(similarity(families((2,)), ("a", "b"))).k == 1


def test_centring_is_that_of_the_vectors() -> None:
    rows = families((3, 3), seed=4)
    one = similarity(rows)
    order = np.argsort(NAMES)
    centred = rows[order] - rows.mean(0)
    assert np.allclose(one.centred().gram, centred @ centred.T, atol=1e-9 * float(one.gram.abs().max()))


def test_the_normalised_laplacian_is_that_of_the_textbook() -> None:
    one = similarity(families((2, 2, 2)))
    weights = one.cosine.abs().numpy() - np.eye(6)
    root = np.diag(weights.sum(1) ** -0.5)
    values = np.sort(np.linalg.eigvalsh(np.eye(6) - root @ weights @ root))
    assert np.allclose(spectrum(one, laplacian="normalised").eigenvalues, np.clip(values, 0, None), atol=1e-12)
    assert max(spectrum(one, laplacian="normalised").eigenvalues) <= 2 + 1e-12


def test_opposed_vectors_are_split() -> None:
    rows = families((2, 2, 2))
    rows[1] = -rows[0] + 0.05 * rows[1]
    one = similarity(rows)
    assert ("cat", "dog") in cluster(one, 3, opposed=None).groups.values()
    found = cluster(one, 3)
    assert found.split == (("cat", "dog"),)
    assert len(found.groups) == 4
    assert {("cat",), ("dog",)} <= set(found.groups.values())
    assert any("opposed vectors (cosine below -0.5)" in note for note in found.notes)


def test_a_group_of_opposed_vectors_is_split_by_direction() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(size=300)
    signs = [1, -1, 1, -1, 1, 1]
    rows = [sign * common + 0.2 * generator.normal(size=300) for sign in signs]
    found = cluster(similarity(np.array(rows)), 1)
    assert set(found.groups.values()) == {("cat", "rain", "sun", "tree"), ("dog", "snow")}


def test_three_that_oppose_each_other_all_stay() -> None:
    angles = [0, 2 * np.pi / 3, 4 * np.pi / 3]
    rows = np.array([[np.cos(angle), np.sin(angle)] for angle in angles])
    found = cluster(similarity(rows, ("x", "y", "z")), 1, opposed=-0.4)
    assert sorted(name for members in found.groups.values() for name in members) == ["x", "y", "z"]


def test_identical_and_opposite_vectors_are_named() -> None:
    rows = families((2, 2, 2))
    rows[1] = 3 * rows[0]
    rows[3] = -rows[2]
    said = cluster(similarity(rows)).notes
    assert any("cat and dog point the same way exactly." in note for note in said)
    assert any("rain and snow point opposite ways exactly." in note for note in said)


def test_a_graph_that_falls_apart_is_never_joined() -> None:
    rows = np.zeros((6, 9))
    for place, base in enumerate(families((2, 2, 2), width=3)):
        rows[place, 3 * (place // 2) : 3 * (place // 2) + 3] = base
    one = similarity(rows)
    found = cluster(one)
    assert found.spectrum is not None and found.spectrum.components == 3
    assert set(found.groups.values()) == {("cat", "dog"), ("rain", "snow"), ("sun", "tree")}
    assert any("3 groups that have no entry in common" in note for note in found.notes)
    with pytest.raises(RecipeError, match=r"`k` must be at least 3: .* Got 2; to join unlike tasks on purpose"):
        cluster(one, 2)
    four = cluster(one, 4)
    assert len(four.groups) == 4
    assert all(len({NAMES.index(name) // 2 for name in members}) == 1 for members in four.groups.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"`k` must be between 1 and 6, the number of task vectors, or auto. Got 0"),
        ({"k": 7}, r"`k` must be between 1 and 6"),
        ({"k_max": 7}, r"`k_max` must be between 1 and 6"),
        ({"k_min": 4, "k_max": 3}, r"`k_min` must be between 1 and `k_max`, 3. Got 4"),
        ({"opposed": 0.2}, r"`opposed` must be in \[−1, 0\), or nothing. Got 0.2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cluster(similarity(families((2, 2, 2))), **options)


def test_bad_vectors() -> None:
    rows = families((2, 2, 2))
    rows[3] = 0
    with pytest.raises(AlignmentError, match="snow: the task vector is zero, so it has no direction"):
        cluster(similarity(rows))
    with pytest.raises(AlignmentError, match=r"at least two task vectors\. Got 1"):
        cluster(similarity(rows[:1], ("cat",)))


def test_all_partitions_are_counted_by_bell_numbers() -> None:
    assert [bell(n) for n in range(1, 9)] == [1, 2, 5, 15, 52, 203, 877, 4140]
    found = all_partitions(["d", "a", "c", "b"])
    assert len(found) == 15
    assert len({tuple(sorted(groups.values())) for groups in found}) == 15
    assert found[0] == {"b1": ("a", "b", "c", "d")}
    assert list(found[-1].values()) == [("a",), ("b",), ("c",), ("d",)]
    with pytest.raises(RecipeError, match=r"8 tasks have 4,140 partitions \(the Bell number B\(8\)\); at most 1,000 are made"):
        all_partitions([str(i) for i in range(8)])


@given(count=st.integers(1, 12), seed=st.integers(0, 50), data=st.data())
def test_a_random_partition_is_one(count: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, count))
    names = [f"t{i}" for i in range(count)]
    found = random_partition(names, k, seed)
    assert len(found.groups) == k
    assert sorted(itertools.chain(*found.groups.values())) == sorted(names)
    assert random_partition(names[::-1], k, seed) == found


def test_random_partitions_differ_by_seed_and_k_is_checked() -> None:
    names = [f"t{i}" for i in range(12)]
    assert len({str(random_partition(names, 4, seed).groups) for seed in range(8)}) > 5
    with pytest.raises(RecipeError, match="`k` must be between 1 and 12"):
        random_partition(names, 13, 0)


def test_clusters_by_hand() -> None:
    found = given_groups([["b", "a"]], ["a", "b", "c"])
    assert found.groups == {"b1": ("a", "b"), "b2": ("c",)}
    with pytest.raises(RecipeError, match="'x' is not a task"):
        given_groups([["x"]], ["a"])
    with pytest.raises(RecipeError, match="'a' stands in two clusters"):
        given_groups([["a"], ["a", "b"]], ["a", "b"])


def test_agreement() -> None:
    a = {"x": "b1", "y": "b1", "z": "b2", "w": "b2"}
    assert agreement(a, {"x": "p", "y": "p", "z": "q", "w": "q"}) == 1
    assert agreement(a, {"x": "p", "y": "q", "z": "p", "w": "q"}) < 0.1
