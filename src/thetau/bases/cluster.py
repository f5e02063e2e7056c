"""Which task vectors belong together: spectral clustering of their cosine matrix, with the number of clusters read off its spectrum.

Zeng et al. 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>, Algorithm 1. Lines 2 to 4: M is the
cosine matrix, k the place of the largest gap between consecutive eigenvalues of the unnormalised Laplacian of |M|, the clusters those of
spectral clustering (Ng, Jordan and Weiss 2001) of |M|. Lines 5 to 12, which the paper calls optional: a cluster that holds opposed
vectors is shifted to be non-negative and split in two.

Only the T×T inner products are needed. Tasks are taken in the order of their names, so that neither their order nor the vectors' lengths
change a cluster. Departs from the paper in what it leaves open: k can be bounded or given, since on nearly orthogonal tasks the largest
gap says nothing, and is at least 2 of three or more tasks, as bases are fewer than tasks and more than one (Definition 5.1, 1 < m < T); groups that
share no entry at all are never joined; opposed vectors are split below a cosine of −0.5 by default. Two likenesses stand beside the paper's: of
the vectors without their mean (`centred`), and the gaps of the normalised Laplacian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from thetau.errors import AlignmentError, BankError, RecipeError
from thetau.statistics.gram import cosines

OPPOSED = -0.5  # δ₁
Laplacian = Literal["unnormalised", "normalised"]
Groups = dict[str, tuple[str, ...]]


@final
@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Inner products of named task vectors, in the order of their names; `base_norm` is ‖θ₀‖ where it was measured."""

    names: tuple[str, ...]
    gram: Float[Tensor, "task task"]
    base_norm: float | None = None

    @property
    def cosine(self) -> Float[Tensor, "task task"]:
        """M: cosine similarities, 1 on the diagonal."""
        return cosines(self.gram)

    @property
    def norms(self) -> dict[str, float]:
        """‖τ‖ by task."""
        return dict(zip(self.names, self.gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True))

    def centred(self) -> Similarity:
        r"""Of the vectors without what all share: the Gram of $\tau_t - \bar\tau$, which is $HGH$ with $H = I - 11^\top / T$."""
        middle = self.gram - self.gram.mean(0, keepdim=True)
        return replace(self, gram=middle - middle.mean(1, keepdim=True))

    def of(self, names: Sequence[str]) -> Similarity:
        """The same of some of the tasks."""
        places = [self.names.index(name) for name in sorted(names)]
        return Similarity(names=tuple(sorted(names)), gram=self.gram[places][:, places], base_norm=self.base_norm)


@final
@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of the Laplacian of |M|, unnormalised unless asked otherwise: eigenvalues, rising.

    `gaps[i - 1]` is λ_{i+1} − λ_i, so the largest one at i speaks for k = i. `components`: groups of tasks with no similarity between them at all.
    """

    eigenvalues: tuple[float, ...]
    gaps: tuple[float, ...]
    components: int


@final
@dataclass(frozen=True, kw_only=True)
class Clustering:
    """`groups`: basis → its members, named `b1`, `b2`, … in the order of their first members' names.

    - `k`: clusters before opposed ones were split; there are `len(groups)` after that.
    - `chosen`: how k was chosen: by the `eigengap`, `given`, or a whole partition that was `given`, `random` or `one`/`all`.
    - `split`: groups that held opposed vectors, each now two. `notes`: what a user should know.
    """

    groups: Groups
    k: int
    chosen: str
    spectrum: Spectrum | None = None
    split: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def label(self) -> dict[str, str]:
        """Task → its basis."""
        return {task: basis for basis, members in self.groups.items() for task in members}


def spectrum(similarity: Similarity, *, centred: bool = False, laplacian: Laplacian = "unnormalised") -> Spectrum:
    """The eigenvalues of the Laplacian and their gaps. The normalised one is D^−½ L D^−½, whose gaps do not follow the degrees."""
    return _spectrum_of(_affinity(similarity, centred), laplacian)


def _spectrum_of(weights: np.ndarray[Any, np.dtype[np.float64]], laplacian: Laplacian) -> Spectrum:
    matrix = np.diag(weights.sum(1)) - weights
    if laplacian == "normalised":
        inner = weights - np.diag(weights.diagonal())  # a task's likeness with itself is no edge
        root = np.sqrt(np.maximum(inner.sum(1), np.finfo(np.float64).tiny))
        matrix = matrix / np.outer(root, root)
    values = np.clip(np.linalg.eigvalsh(matrix), 0, None)
    return Spectrum(
        eigenvalues=tuple(map(float, values)),
        gaps=tuple(map(float, np.diff(values))),
        components=int(_components(weights).max()) + 1,
    )


def cluster(
    similarity: Similarity,
    k: int | Literal["auto"] = "auto",
    *,
    k_min: int | None = None,
    k_max: int | None = None,
    opposed: float | None = OPPOSED,
    seed: int = 0,
    centred: bool = False,
    laplacian: Laplacian = "unnormalised",
) -> Clustering:
    """Group task vectors (Algorithm 1, lines 2 to 13).

    Args:
        similarity: of at least two task vectors, none of them zero.
        k: clusters, or `auto` for the eigengap's choice among `k_min`..`k_max` (2 where there are three tasks and room, to T − 1); the smaller one
            among equal gaps. A choice that says little, 1 or T − 1, is in `notes`.
        opposed: δ₁ < 0: a cluster with a cosine below it is split in two; None never splits.
        seed: of the k-means inside spectral clustering.
        centred: likeness of the vectors without their mean, (1 + cosine) / 2, instead of |cosine|. laplacian: the one whose gaps choose k.

    Raises:
        RecipeError: `k`, `k_min`, `k_max` or `opposed` is out of range.
        AlignmentError: a vector is zero, or there is only one.

    Examples:
        >>> import torch
        >>> gram = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.0], [0.1, 0.0, 1.0]], dtype=torch.float64)
        >>> cluster(Similarity(names=("cr", "mr", "rte"), gram=gram)).groups
        {'b1': ('cr', 'mr'), 'b2': ('rte',)}
    """
    _check_vectors(similarity)
    count = len(similarity.names)
    top = count - 1 if k_max is None else k_max
    least = min(2, top) if k_min is None else k_min
    problems = []
    if k != "auto" and not 1 <= k <= count:
        problems.append(f"`k` must be between 1 and {count}, the number of task vectors, or auto. Got {k}.")
    if not 1 <= least <= max(top, 1):
        problems.append(f"`k_min` must be between 1 and `k_max`, {top}. Got {k_min}.")
    if k_max is not None and not 1 <= k_max <= count:
        problems.append(f"`k_max` must be between 1 and {count}, the number of task vectors. Got {k_max}.")
    if opposed is not None and not -1 <= opposed < 0:
        problems.append(f"`opposed` must be in [−1, 0), or nothing. Got {opposed:g}.")
    if problems:
        raise RecipeError(problems, "clustering")
    weights = _affinity(similarity, centred)
    found = _spectrum_of(weights, laplacian)
    notes = _alike(similarity)
    if found.components > 1:
        notes.append(f"The tasks fall into {found.components} groups that have no entry in common; no cluster joins two of them.")
    if k != "auto" and k < found.components:
        raise RecipeError(
            [
                f"`k` must be at least {found.components}: the tasks fall into so many groups with no similarity between them. "
                f"Got {k}; to join unlike tasks on purpose, give the clusters themselves."
            ],
            "clustering",
        )
    if k == "auto":
        low, high = max(least, found.components), min(max(top, found.components), count)
        within = {i: found.gaps[i - 1] if i < count else 0.0 for i in range(low, high + 1)}
        chosen = max(within, key=lambda i: (within[i], -i))
        notes += _at_an_end(found, chosen, count)
    else:
        chosen = k
    labels = _components(weights) if chosen == found.components else _spectral(weights, chosen, seed)
    parts = [tuple(similarity.names[i] for i in np.flatnonzero(labels == label)) for label in np.unique(labels)]
    split: list[tuple[str, ...]] = []
    whole: list[tuple[str, ...]] = []
    for part in parts:
        halves = _split(similarity.of(part), opposed, seed)
        split += [part] if len(halves) > 1 else []
        whole += halves
    if split:
        notes += [f"{', '.join(part)}: opposed vectors (cosine below {opposed:g}), kept in two bases." for part in split]
    return Clustering(
        groups=named_groups(whole),
        k=chosen,
        chosen="eigengap" if k == "auto" else "given",
        spectrum=found,
        split=tuple(split),
        notes=tuple(notes),
    )


def named_groups(parts: Sequence[Sequence[str]]) -> Groups:
    """`b1`, `b2`, … in the order of the first members' names."""
    ordered = sorted(tuple(sorted(part)) for part in parts)
    return {f"b{number}": part for number, part in enumerate(ordered, 1)}


def given_groups(parts: Sequence[Sequence[str]], names: Sequence[str]) -> Clustering:
    """A partition that the user gives; tasks that it does not name stand alone.

    Raises:
        RecipeError: a name is unknown or stands twice.

    Examples:
        >>> given_groups([["rte"], ["mr", "cr"]], ["cr", "mr", "rte"]).groups
        {'b1': ('cr', 'mr'), 'b2': ('rte',)}
    """
    listed = [name for part in parts for name in part]
    problems = [f"{name!r} is not a task. Tasks: {', '.join(sorted(names))}." for name in listed if name not in names]
    problems += [f"{name!r} stands in two clusters." for name in sorted({n for n in listed if listed.count(n) > 1})]
    if problems:
        raise RecipeError(problems, "clusters")
    groups = named_groups([*(part for part in parts if part), *((name,) for name in names if name not in listed)])
    return Clustering(groups=groups, k=len(groups), chosen="given partition")


def _check_vectors(similarity: Similarity) -> None:
    if len(similarity.names) < 2:
        raise AlignmentError(f"Clustering needs at least two task vectors. Got {len(similarity.names)}.")
    refuse_zero(similarity)


def refuse_zero(similarity: Similarity) -> None:
    """Refuse vectors without a direction.

    Raises:
        AlignmentError: naming them.
    """
    zero = [name for name, norm in similarity.norms.items() if norm == 0]
    if zero:
        raise AlignmentError(
            f"{', '.join(zero)}: the task vector is zero, so it has no direction. The model equals its base: leave it out."
        )


def _alike(similarity: Similarity) -> list[str]:
    """Pairs that are the same vector, up to length and rounding."""
    cosine = similarity.cosine
    names = similarity.names
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names)) if float(cosine[i, j].abs()) > 1 - 1e-9]
    return [
        f"{names[i]} and {names[j]} point {'the same' if cosine[i, j] > 0 else 'opposite'} way{'s' if cosine[i, j] < 0 else ''} exactly."
        for i, j in pairs
    ]


def _at_an_end(found: Spectrum, chosen: int, count: int) -> list[str]:
    """What is said of a choice, or of the largest gap of all, that makes no bases: 1 < m < T (Definition 5.1)."""
    if count < 3:
        return []
    widest = 1 + max(range(count - 1), key=lambda i: (found.gaps[i], -i))
    if chosen == count - 1:
        return [
            f"k = {chosen}, one less than the tasks, has the largest gap: only two tasks are alike. Look at the cosines; -k gives fewer bases."
        ]
    if chosen == 1:
        return [
            "k = 1, one basis for all tasks, has the largest gap of those allowed: that is one merge, and no bases. -k gives more."
        ]
    if widest == 1:
        return [
            f"the largest gap of all is at k = 1, which says that the tasks form one cluster; k = {chosen} has the largest one from 2 on. "
            "Vectors that share a component look so: `centred` takes it out."
        ]
    return []


def _affinity(similarity: Similarity, centred: bool = False) -> np.ndarray[Any, np.dtype[np.float64]]:
    cosine = similarity.centred().cosine if centred else similarity.cosine
    # Around the mean, an opposite side is unlikeness, and half of all cosines lie on it.
    likeness = (1 + cosine).clamp(min=0) / 2 if centred else cosine.abs()
    weights: np.ndarray[Any, np.dtype[np.float64]] = likeness.numpy().copy()
    np.fill_diagonal(weights, 1.0)
    return weights


def _components(weights: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Component of each task, numbered from 0 in the order of the tasks."""
    from scipy.sparse.csgraph import connected_components

    labels: np.ndarray[Any, np.dtype[np.int32]] = connected_components(weights > 0, directed=False)[1]
    return labels


def _spectral(weights: np.ndarray[Any, np.dtype[np.float64]], k: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    count = len(weights)
    if k in (1, count):
        return np.arange(count, dtype=np.int32) if k == count else np.zeros(count, dtype=np.int32)
    components = _components(weights)
    if components.max() == 0:
        return _fit(weights, k, seed)
    # Of unconnected groups each gets its share of the clusters: one each, the others where the next gap is the largest.
    members = [np.flatnonzero(components == label) for label in range(components.max() + 1)]
    share = [1] * len(members)
    while sum(share) < k:
        gaps = [_gap(weights[np.ix_(part, part)], have) for part, have in zip(members, share, strict=True)]
        share[int(np.argmax(gaps))] += 1
    labels = np.empty(count, dtype=np.int32)
    offset = 0
    for part, have in zip(members, share, strict=True):
        labels[part] = offset + _spectral(weights[np.ix_(part, part)], have, seed)
        offset += have
    return labels


def _gap(weights: np.ndarray[Any, np.dtype[np.float64]], have: int) -> float:
    """How much a further cluster of this group is worth: how small its next eigenvalue is; nothing where it has no more tasks."""
    if have >= len(weights):
        return -np.inf
    values = np.linalg.eigvalsh(np.diag(weights.sum(1)) - weights)
    return -float(values[have])


def _fit(weights: np.ndarray[Any, np.dtype[np.float64]], k: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise BankError("clustering needs scikit-learn. Install it: pip install 'thetau[bases]'") from error
    model = SpectralClustering(n_clusters=k, affinity="precomputed", assign_labels="kmeans", n_init=10, random_state=seed)
    labels: np.ndarray[Any, np.dtype[np.int32]] = model.fit(weights).labels_
    return labels


def _split(similarity: Similarity, opposed: float | None, seed: int) -> list[tuple[str, ...]]:
    """A cluster as it is, or its two halves where it holds opposed vectors."""
    cosine = similarity.cosine.numpy()
    if opposed is None or cosine.min() >= opposed:
        return [similarity.names]
    shifted = cosine + abs(cosine.min())
    labels = _spectral(shifted, 2, seed)
    return [tuple(similarity.names[i] for i in np.flatnonzero(labels == label)) for label in np.unique(labels)]


def agreement(a: Mapping[str, str], b: Mapping[str, str]) -> float:
    """Adjusted Rand index of two labellings of the same tasks: 1 for the same partition, about 0 for unrelated ones.

    Examples:
        >>> agreement({"cr": "b1", "mr": "b1", "rte": "b2"}, {"cr": "x", "mr": "x", "rte": "y"})
        1.0
    """
    from sklearn.metrics import adjusted_rand_score

    shared = sorted(set(a) & set(b))
    return float(adjusted_rand_score([a[name] for name in shared], [b[name] for name in shared]))
