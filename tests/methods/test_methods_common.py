"""What every method must do, whatever it is: the checks of `thetau.testing`, over the registry and over variants of its members.

A method that cannot pass one of these says so in `EXEMPT`, with the reason. What only some methods promise follows below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from synthetic import differences, merged, merged_vector, models, relative
from thetau import methods
from thetau.errors import AlignmentError, RecipeError, ThetauError
from thetau.methods import Awd, Bilateral, DareTies, PerPattern, PerTask, TaskArithmetic, Ties, TsvM, Wudi
from thetau.testing import CHECKS, SHAPES, Case, check_method, same, with_scale

STEPS = 8  # of Adam: enough to tell, and fast


def quick(method: Any) -> Any:
    """The same with fewer steps."""
    if isinstance(method, Wudi | Awd | methods.OptMerge | methods.DogeTa):
        method = replace(method, steps=STEPS)
    return replace(method, then=quick(method.then)) if isinstance(method, Awd) else method


MODELS = (
    methods.Linear,
    methods.Slerp,
    methods.Nuslerp,
    methods.Multislerp,
    methods.Karcher,
    methods.ArceeFusion,
)  # no λ: no vector
CLUSTERS = PerTask({"zebra": 1.0, "ape": 0.0, "Cat": 1.0})


def by_task(*values: float) -> PerTask:
    """A field's values for the three tasks."""
    return PerTask(dict(zip(("zebra", "ape", "Cat"), values, strict=True)))


WEIGHTS = PerTask({"zebra": 0.7, "ape": PerPattern({"layers.0.*": -0.4, "*": 1.5}), "Cat": 1.3})
VARIANTS: dict[str, Any] = {
    **{name: methods.get(name)() for name in methods.names()},
    "ties-majority": Ties(cancelled="majority", density=0.5),
    "ties-tensor": Ties(trim="tensor"),
    "ties-weights": Ties(
        trim="tensor",
        count="floor",
        density=PerTask({"zebra": 0.5, "ape": PerPattern({"layers.*": 0.3, "*": 1.0}), "Cat": 0.6}),
        weights=WEIGHTS,
        cancelled="positive",
    ),
    "ties-weighted-sum": Ties(density=by_task(0.5, 0.3, 1.0), weights=PerPattern({"layers.*": 0.5, "*": 2.0}), normalise=False),
    "ties-rescaled": Ties(density=0.4, rescale="l1"),
    "task_arithmetic-total": TaskArithmetic(scale=WEIGHTS, total=0.5),
    "dare_linear-rescaled": methods.DareLinear(drop=by_task(0.5, 0.2, 0.7), rescale="l1"),
    "dare_linear-bare": methods.DareLinear(drop=PerPattern({"layers.*": 0.2, "*": 0.5}), rescale="none"),
    "dare_ties-weights": DareTies(density=1.0, drop=0.5, rescale="l1", weights=WEIGHTS, normalise=False, cancelled="positive"),
    "della-weights": methods.Della(drop=by_task(0.5, 0.3, 0.0), epsilon=0.4, rescale="l1", weights=WEIGHTS),
    "della_linear-bare": methods.DellaLinear(drop=by_task(0.5, 0.3, 0.4), epsilon=by_task(0.1, 0.2, 0.3), rescale="none"),
    "breadcrumbs-floor": methods.Breadcrumbs(
        count="floor", density=by_task(0.5, 0.7, 0.9), gamma=by_task(0.1, 0.0, 0.05), rescale="l1"
    ),
    "breadcrumbs_ties-weights": methods.BreadcrumbsTies(density=0.6, gamma=0.1, weights=WEIGHTS, rescale="l1", trim="vector"),
    "dare_ties-untrimmed": DareTies(density=1.0, drop=0.5),
    "linear-weights": methods.Linear(weights=WEIGHTS),
    "linear-sum": methods.Linear(weights=by_task(0.5, 0.25, -0.5), normalise=False),
    "slerp-pattern": methods.Slerp(t=PerPattern({"layers.*": 0.2, "*": 1.5})),
    "nuslerp-vectors": methods.Nuslerp(of="vectors", weights=PerTask({"zebra": 0.2, "ape": 0.8})),
    "nuslerp-rows": methods.Nuslerp(along="rows", weights=PerTask({"zebra": 0.2, "ape": 0.8})),
    "nuslerp-columns": methods.Nuslerp(along="columns", of="vectors"),
    "multislerp-vectors": methods.Multislerp(of="vectors", weights=WEIGHTS),
    "multislerp-sum": methods.Multislerp(weights=WEIGHTS, normalise=False),
    "karcher-weights": methods.Karcher(weights=by_task(0.7, 0.2, 1.3), tol=1e-9),
    "model_stock-open": methods.ModelStock(clamp=False),
    "model_stock-rows": methods.ModelStock(filter_wise=True),
    "ramplus-vector": methods.RamPlus(scope="vector", epsilon=1e-2, r=0.5, alpha=1.0),
    "sce-select": methods.Sce(select_topk=0.3, even_below=1e-6),
    "inverse_norm-tensor": methods.InverseNorm(lengths="tensor"),
    "passthrough-scaled": methods.Passthrough(scale=0.5),
    "breadcrumbs-vector": methods.Breadcrumbs(trim="vector", density=0.5, gamma=0.2),
    "consensus-ties": methods.Consensus(then=Ties(trim="tensor", cancelled="majority"), selectivity=0.2),
    "consensus-tsv_m": methods.Consensus(then=TsvM()),
    "emr-sums": methods.Emr(rescale="sums", cancelled="zero"),
    "tall_masks-ties": methods.TallMasks(vector="ties", density=0.5),
    "pcb-tensor": methods.Pcb(scope="tensor", density=0.2),
    "pcb-sum": methods.Pcb(variant="sum"),
    "pcb-raw": methods.Pcb(variant="raw"),
    "twin-magnitude": methods.Twin(keep="magnitude", then=Ties()),
    "localize_stitch-mask": methods.LocalizeStitch(density=0.3, sharing="mask", clusters=CLUSTERS),
    "localize_stitch-twice": methods.LocalizeStitch(density=0.3, sharing="twice", clusters=CLUSTERS, rounding="half_even"),
    "localize_stitch-all": methods.LocalizeStitch(density=1.0, trim="tensor", sharing="mask", clusters=CLUSTERS),
    "wudi-closed_form": Wudi(solver="closed_form"),
    "wudi-gradient_flow": Wudi(solver="gradient_flow"),
    "wudi-all-mean": Wudi(tensors="all", elsewhere="mean"),
    "wudi-split-sum": Wudi(split_fused=True, elsewhere="sum"),
    "wudi-cut-mean": Wudi(solver="gradient_flow", filter="cut", rank="entropy", start="mean"),
    "wudi-tikhonov-zero": Wudi(solver="gradient_flow", filter="tikhonov", keep=0.5, start="zero"),
    "wudi-landweber": Wudi(solver="gradient_flow", filter="landweber", rank="gavish_donoho"),
    "swudi-linear": methods.Swudi(tensors="linear", elsewhere="base", split_fused=True),
    "swudi_a-variance": methods.SwudiA(tensors="all", rank="variance", keep=0.9),
    "optmerge-lora": methods.OptMerge(variant="lora"),
    "optmerge-closed_form": methods.OptMerge(solver="closed_form", tensors="matrices", elsewhere="mean"),
    "optmerge-lora-flow": methods.OptMerge(variant="lora", solver="gradient_flow", rank=2),
    "actmat-tact": methods.ActMat(trim=0.5, tensors="all"),
    "actmat-linear": methods.ActMat(balance="covariance", ridge=1e-3, tensors="linear", elsewhere="base"),
    "ace-authors": methods.Ace(relative=False),
    "ace-always-whole": methods.Ace(balance="always", target="whole", tensors="all"),
    "adamerging-ties": methods.AdaMerging(then=Ties(density=0.2)),
    "adamerging-awd": methods.AdaMerging(then=Awd()),
    "regmean-exact": methods.RegMean(off_diagonal=1.0, unseen="mean", coefficients=by_task(1.0, 0.5, 2.0)),
    "regmean-diagonal": methods.RegMean(off_diagonal=0.0, tensors="linear", elsewhere="base"),
    "esm-plain": methods.Esm(power=0.0, spectrum=0.0, scale=1.0, split_fused=True),
    "kfac-weights": methods.Kfac(coefficients=by_task(1.0, 0.5, 2.0), tolerance=0.0, iterations=5, tensors="matrices"),
    "doge_ta-cg": methods.DogeTa(solver="cg", tensors="all"),
    "doge_ta-split": methods.DogeTa(density=1.0, split_fused=True, elsewhere="mean"),
    "wudi-random": Wudi(reference="random", rows=0.5),
    "bilateral-all-mean": Bilateral(tensors="all", elsewhere="mean", solver="flow"),
    "bilateral-split-sum": Bilateral(split_fused=True, elsewhere="sum", rank=0.3, balance="loss"),
    "bilateral-right": Bilateral(p=0.0, start="mean", precondition=True),
    "bilateral-random": Bilateral(reference="random"),
    "tsv_m-linear": methods.TsvM(tensors="linear", split_fused=True, rank=2),
    "star-rank": methods.Star(rank=4, eta=0.7),
    "cart-rank": methods.Cart(rank=3, residual=-0.5, tensors="linear", elsewhere="sum", split_fused=True),
    "dc_merge-linear": methods.DcMerge(rank=4, smoothing="linear", keep=2.0),
    "dc_merge-average": methods.DcMerge(rank=0.2, smoothing="average", split_fused=True),
    "svc-tsv_m": methods.Svc(then=TsvM(), alpha=1.0),
    "svc-ties": methods.Svc(then=Ties(), matrices="linear"),
    "svc-split": methods.Svc(then=Wudi(solver="gradient_flow", split_fused=True)),
    "svc-awd": methods.Svc(then=Awd()),
    "larv-tanh": methods.Larv(then=Ties(), gate="tanh"),
    "larv-tsv_m": methods.Larv(then=TsvM(), tiers=(0.8, 1.2)),
    "larv-svc": methods.Larv(then=methods.Svc(then=DareTies(drop=0.5))),
    "svc-larv": methods.Svc(then=methods.Larv()),
    "awd-svc": Awd(then=methods.Svc(then=Ties())),
    "awd-larv": Awd(then=methods.Larv(then=Wudi(solver="gradient_flow"))),
    "awd-tensor": Awd(scope="tensor", tensors=("layers.0.mlp*",)),
    "awd-row": Awd(scope="row", tensors=("layers.0.mlp*",)),
    "awd-adam": Awd(solver="adam", elsewhere="mean"),
    "awd-ties": Awd(then=Ties(), tensors="all"),
    "awd-dare": Awd(then=DareTies(drop=0.5)),
    "awd-wudi": Awd(then=Wudi(solver="gradient_flow")),
}
VARIANTS = {name: quick(method) for name, method in VARIANTS.items()}
ALPHA = "α‖δ‖ stands beside cosines, so α belongs to the scale of the vectors: see `test_awd_doubles_with_half_of_alpha`"
NEGATIVE = "SVC measures the merged vector with its λ: one of -3 turns against every task, so that each counts as α"
OF_THE_BASE = "LARV weighs the merged vector against the base's own weights, and a base of zeros is another one"
BLOCKS = "LARV scales every tensor of a block, what is averaged outside the selection too"
SVC = {"linear_in_scale": NEGATIVE}
LARV = {"saved_vectors": OF_THE_BASE}
UNIT = "ε is a length in the unit of the weights"
PROPORTIONS = "with `total` only the proportions of the scales count"
EPSILON = "the authors' ε is absolute: `relative` is for that"
WEIGHED = "its coefficients weigh what is averaged elsewhere too"
ETA = "each task's tensor is scaled to the norm η, whatever its size"
EXEMPT = {  # variant: check: reason
    "task_arithmetic-total": {"linear_in_scale": PROPORTIONS},
    "awd-row": {"doubling": ALPHA},
    "awd-adam": {"doubling": ALPHA},
    "nearswap": {"doubling": "t is a length in the unit of the weights"},
    "ram": {"doubling": UNIT},
    "ramplus_tl": {"doubling": UNIT},
    "ramplus-vector": {"doubling": UNIT},
    "arcee_fusion": {"doubling": "a softmax of twice the weights is another distribution"},
    "regmean-exact": {"selection": WEIGHED},
    "kfac-weights": {"selection": WEIGHED},
    "ace-authors": {"doubling": EPSILON},
    "doge_ta": {"doubling": ETA},
    "doge_ta-cg": {"doubling": ETA},
    "doge_ta-split": {"doubling": ETA},
    **dict.fromkeys(("svc", "svc-tsv_m", "svc-ties", "svc-split", "svc-awd", "awd-svc"), SVC),
    **dict.fromkeys(("larv", "larv-tanh", "awd-larv"), LARV),
    "larv-tsv_m": {**LARV, "selection": BLOCKS},
    **{variant: {**SVC, **LARV} for variant in ("larv-svc", "svc-larv")},
}
TASKS = ("zebra", "ape", "Cat")  # sorted otherwise than given


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the engine's workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method(variant: str, check: str) -> None:
    exempt = {name: reason for name, reason in EXEMPT.get(variant, {}).items() if name == check}
    check_method(VARIANTS[variant], tasks=TASKS, only=[check], exempt=exempt)


def test_every_registered_method_is_covered() -> None:
    assert {type(method) for method in VARIANTS.values()} == {methods.get(name) for name in methods.names()}
    task_vectors = [method for method in VARIANTS.values() if not isinstance(method, MODELS)]
    assert all(any(field.name in ("scale", "then") for field in fields(method)) for method in task_vectors)
    assert set(EXEMPT) <= set(VARIANTS)


# What some methods promise.


def touched(variant: str, name: str, shape: tuple[int, ...]) -> bool:
    return Case(method=VARIANTS[variant], tasks=TASKS).touched(name, shape)


DROPS_ZEROS = ["wudi", "wudi-closed_form", "bilateral", "wudi-cut-mean", "swudi-linear", "actmat-linear"]
ALONE = [
    "wudi",
    "wudi-closed_form",
    "bilateral",
    "wudi-cut-mean",
    "swudi",
    "swudi_a",
    "optmerge",
    "optmerge-lora",
    "actmat",
    "tsv_m",
]


@pytest.mark.parametrize("variant", ALONE)
def test_one_task_alone_comes_back(variant: str) -> None:
    base, tuned = models(SHAPES, TASKS[:1])
    out = merged(base, tuned, VARIANTS[variant])
    for name, shape in SHAPES.items():
        if touched(variant, name, shape):
            torch.testing.assert_close(out[name], tuned[TASKS[0]][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", DROPS_ZEROS)
def test_a_zero_vector_drops_out(variant: str) -> None:
    """In the last bits it can change on which side A is kept."""
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, {**tuned, "none": base}, VARIANTS[variant])
    want = merged(base, tuned, VARIANTS[variant])
    for name in base:
        torch.testing.assert_close(out[name], want[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["average", "wudi-closed_form"])
def test_where_all_agree_the_result_is_what_they_agree_on(variant: str) -> None:
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, dict.fromkeys(TASKS, tuned["ape"]), VARIANTS[variant])
    for name, shape in SHAPES.items():
        if touched(variant, name, shape):
            assert relative(out[name] - base[name], tuned["ape"][name] - base[name]) < 1e-3, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_random_hangs_on_the_seed(variant: str) -> None:
    base, tuned = models(SHAPES, TASKS[: Case(method=VARIANTS[variant]).fits(len(TASKS))])
    first, other = (merged(base, tuned, VARIANTS[variant], seed=seed) for seed in (0, 1))
    randomised = "drop=" in repr(VARIANTS[variant]) or "reference='random'" in repr(VARIANTS[variant])
    assert randomised == any(not torch.equal(first[name], other[name]) for name in base)


@pytest.mark.parametrize("variant", ["average", "ties", "wudi", "awd"])
def test_patterns_must_cover_every_tensor(variant: str) -> None:
    base, tuned = models(SHAPES, TASKS)
    with pytest.raises(ThetauError, match=r"layers\.1|no pattern fits"):
        merged_vector(base, tuned, with_scale(VARIANTS[variant], PerPattern({"layers.1.*": 1.0})))


@pytest.mark.parametrize(
    "method", [TsvM(scale=PerPattern({"layers.1.*": 1.0, "*": 1.0})), Ties(scale=PerPattern({"layers.1.*": 1.0, "*": 1.0}))]
)
def test_a_problem_is_told_once(method: Any) -> None:
    """Also where the method is its own reduction, so that its fields stand in two parts."""
    base, tuned = models(SHAPES, TASKS)
    with pytest.raises(RecipeError) as caught:
        merged_vector(base, tuned, method)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("variant", [name for name, method in VARIANTS.items() if isinstance(method, Awd)])
def test_awd_doubles_with_half_of_alpha(variant: str) -> None:
    method = VARIANTS[variant]
    base, tuned = models(SHAPES, TASKS)
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    tau = differences(base, tuned)
    once = merged_vector(zero, tau, method)
    doubled = {task: {name: 2 * t for name, t in state.items()} for task, state in tau.items()}
    twice = merged_vector(zero, doubled, replace(method, alpha=method.alpha / 2))
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-4, atol=1e-6)


BY_TASK = [TaskArithmetic(), methods.DareLinear(drop=0.5), Awd(then=methods.DareLinear(drop=0.5))]


@pytest.mark.parametrize("method", BY_TASK, ids=repr)
def test_scale_by_task(method: Any) -> None:
    """A sum takes weights by task: by name, or in the order in which the tasks are given."""
    base, tuned = models(SHAPES, TASKS)
    values = dict(zip(TASKS, (0.5, -1.0, 2.0), strict=True))
    total: dict[str, Tensor] = {}
    for task in TASKS:
        one = merged_vector(base, tuned, with_scale(method, PerTask({t: float(t == task) for t in TASKS})))
        total = {name: total.get(name, 0) + values[task] * tensor for name, tensor in one.items()}
    got = merged_vector(base, tuned, with_scale(method, PerTask(values)))
    for name in got:
        torch.testing.assert_close(got[name], total[name], rtol=1e-5, atol=1e-7)
    same(merged_vector(base, tuned, with_scale(method, tuple(values.values()))), got, "a tuple")
    turned = {task: tuned[task] for task in reversed(TASKS)}
    same(merged_vector(base, turned, with_scale(method, tuple(reversed(values.values())))), got, "a tuple, turned")


@pytest.mark.parametrize("method", BY_TASK, ids=repr)
def test_wrong_scales_by_task(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    with pytest.raises(RecipeError, match="`scale` has 2 values for 3 tasks"):
        merged_vector(base, tuned, with_scale(method, (1.0, 2.0)))
    with pytest.raises(RecipeError, match=r"'aep' is not a task\. Did you mean 'ape'\?"):
        merged_vector(base, tuned, with_scale(method, PerTask({"zebra": 1.0, "aep": 1.0, "Cat": 1.0})))


@pytest.mark.parametrize("method", BY_TASK, ids=repr)
def test_scale_by_task_and_by_pattern(method: Any) -> None:
    """Layer-wise coefficients: each task has its own at each tensor, as AdaMerging would write them."""
    base, tuned = models(SHAPES, TASKS)
    layers = {"zebra": {"layers.0.mlp*": 0.5, "*": 2.0}, "ape": {"*.weight": -1.0, "*": 0.0}}
    value = PerTask({**{task: PerPattern(patterns) for task, patterns in layers.items()}, "Cat": 0.25})
    got = merged_vector(base, tuned, with_scale(method, value))
    ones = {task: merged_vector(base, tuned, with_scale(method, PerTask({t: float(t == task) for t in TASKS}))) for task in TASKS}
    for name, tensor in got.items():
        zebra = 0.5 if name.startswith("layers.0.mlp") else 2.0
        ape = -1.0 if name.endswith(".weight") else 0.0
        want = zebra * ones["zebra"][name] + ape * ones["ape"][name] + 0.25 * ones["Cat"][name]
        torch.testing.assert_close(tensor, want, rtol=1e-5, atol=1e-7)
    same(merged_vector(base, tuned, methods.build(*named(with_scale(method, value)))), got, "built from its record")
    lost = PerTask({**{task: PerPattern({"layers.7.*": 1.0, "*": 1.0}) for task in layers}, "Cat": 0.25})
    with pytest.raises(RecipeError, match=r"layers\.7"):
        merged_vector(base, tuned, with_scale(method, lost))


def named(method: Any) -> tuple[str, dict[str, Any]]:
    plain = methods.plain(method)
    return plain.pop("name"), plain


@pytest.mark.parametrize("cls", [Wudi, Awd])
def test_tensors_by_pattern(cls: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, tuned, quick(cls(tensors=("layers.0.mlp*", "conv.weight"))))
    changed = {name for name in base if not torch.equal(out[name], base[name])}
    assert changed == {"layers.0.mlp.fc1.weight", "conv.weight"}
    with pytest.raises(AlignmentError, match=r"(?s)nothing\.like\.it"):
        merged(base, tuned, cls(tensors=("nothing.like.it",)))
