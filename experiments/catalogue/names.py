"""What our methods are called elsewhere: mergekit 0.1.5, FusionBench 0.2.33 and PEFT 0.21.2, with the settings that make ours the same.

Read in their sources. Each row is a method of ours with the fields that differ from its defaults; a test builds every one of them, and
sees to it that no method of ours, no method of mergekit and no combination of PEFT is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Name:
    """One row: a method of ours with settings, and what the others call it; empty where they do not have it."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    mergekit: str = ""
    fusion_bench: str = ""
    peft: str = ""


SIGNS = {"count": "floor", "cancelled": "positive"}
WUDI = {"steps": 400, "lr_absolute": True, "tensors": "matrices", "elsewhere": "mean"}
NAMES: tuple[Name, ...] = (
    Name(method="average", mergekit="`linear`, all weights 1", fusion_bench="`SimpleAverageAlgorithm`"),
    Name(method="linear", mergekit="`linear`", fusion_bench="`WeightedAverageAlgorithm`, `LinearInterpolationAlgorithm`"),
    Name(
        method="linear",
        settings={"normalise": False},
        mergekit="`linear`, `normalize: false`",
        fusion_bench="`WeightedAverageAlgorithm`, `normalize: false`",
    ),
    Name(
        method="task_arithmetic",
        mergekit="`task_arithmetic`; `weight` is λ_t",
        fusion_bench="`TaskArithmeticAlgorithm`",
        peft="`cat`; `svd` and then a truncation to `svd_rank`",
    ),
    Name(method="task_arithmetic", settings={"total": 1.0}, mergekit="`task_arithmetic`, `normalize: true`"),
    Name(method="task_arithmetic", settings={"scale": 1.1}, fusion_bench="`ExPOAlgorithm` (of one model, factor 0.1)"),
    Name(
        method="ties",
        settings={"normalise": False, "cancelled": "majority", "scale": 0.3},
        fusion_bench="`TiesMergingAlgorithm` (`merge_func: sum`)",
    ),
    Name(
        method="ties",
        settings={"trim": "tensor", **SIGNS},
        mergekit="`ties`; `weight` is `weights`",
        peft="`ties_svd`, all weights 1, sign by `total`",
    ),
    Name(
        method="dare_linear",
        settings={"drop": 0.5},
        fusion_bench="`DareTaskArithmetic`; `DareSimpleAverage` with `scale` 1 / K",
        peft="`dare_linear_svd`; `drop` is 1 − density",
    ),
    Name(method="dare_linear", settings={"rescale": "l1"}, mergekit="`dare_linear`; `drop` is 1 − density"),
    Name(
        method="dare_ties",
        settings={"drop": 0.5, "normalise": False, "cancelled": "majority", "scale": 0.5},
        fusion_bench="`DareTiesMerging` (`merge_func: sum`)",
    ),
    Name(
        method="dare_ties",
        settings={"density": 1.0, "cancelled": "positive"},
        peft="`dare_ties_svd`, all weights 1; `drop` is 1 − density",
    ),
    Name(
        method="dare_ties",
        settings={"density": 1.0, "rescale": "l1", "cancelled": "positive", "normalise": False},
        mergekit="`dare_ties`; `drop` is 1 − density",
    ),
    Name(method="breadcrumbs", settings={"count": "floor"}, mergekit="`breadcrumbs`"),
    Name(method="breadcrumbs_ties", settings={**SIGNS, "normalise": False}, mergekit="`breadcrumbs_ties`"),
    Name(
        method="della",
        settings={"rescale": "l1", "cancelled": "positive"},
        mergekit="`della`; `drop` is 1 − density, `epsilon` twice its own",
    ),
    Name(method="della_linear", settings={"rescale": "l1"}, mergekit="`della_linear`; likewise"),
    Name(
        method="topk", settings={"trim": "tensor"}, peft="`magnitude_prune_svd`, all weights 1; `scale` is the number of adapters"
    ),
    Name(method="slerp", mergekit="`slerp`", fusion_bench="`SlerpMergeAlgorithm`"),
    Name(method="nuslerp", mergekit="`nuslerp`"),
    Name(method="nuslerp", settings={"of": "vectors"}, mergekit="`nuslerp` with a `base_model`"),
    Name(method="nuslerp", settings={"along": "rows"}, mergekit="`nuslerp`, `nuslerp_flatten: false`"),
    Name(method="nuslerp", settings={"along": "columns"}, mergekit="`nuslerp`, that and `nuslerp_row_wise: true`"),
    Name(method="multislerp", mergekit="`multislerp`"),
    Name(method="karcher", mergekit="`karcher`"),
    Name(method="nearswap", mergekit="`nearswap`"),
    Name(method="arcee_fusion", mergekit="`arcee_fusion`"),
    Name(method="passthrough", mergekit="`passthrough`"),
    Name(method="sce", settings={"even_below": 1e-6}, mergekit="`sce`"),
    Name(method="ram", mergekit="`ram`"),
    Name(method="ramplus_tl", mergekit="`ramplus_tl`"),
    Name(
        method="model_stock",
        settings={"clamp": False},
        mergekit="`model_stock`",
        fusion_bench="`ModelStock`, which leaves some tensors out (`ignore_keys`)",
    ),
    Name(method="model_stock", settings={"clamp": False, "filter_wise": True}, mergekit="`model_stock`, `filter_wise: true`"),
    Name(method="magmax", fusion_bench="`MagMaxAlgorithm`"),
    Name(method="tsv_m", fusion_bench="`TaskSingularVectorMerging`"),
    Name(method="iso_c", fusion_bench="`ISO_C_Merge`"),
    Name(method="iso_cts", fusion_bench="`ISO_CTS_Merge`"),
    Name(
        method="svc",
        settings={"alpha": 0.1},
        fusion_bench="`SingularValueCalibrationArithmeticTask`, and one class for each of its other methods (`then`)",
    ),
    Name(method="wudi", settings=WUDI, fusion_bench="`WUDIMerging`"),
    Name(method="doge_ta", fusion_bench="`DOGE_TA_Algorithm`"),
    Name(method="emr", fusion_bench="`EMRMerging`"),
    Name(
        method="tall_masks",
        settings={"selectivity": 0.6},
        fusion_bench="`TallMaskTaskArithmeticAlgorithm`, whose masks compare with the base's own weights",
    ),
    Name(method="fisher", fusion_bench="`FisherMergingAlgorithm`, whose Fishers are another estimate"),
    Name(
        method="regmean",
        settings={"off_diagonal": 0.95},
        fusion_bench="`RegMeanAlgorithmForCLIP`, whose fused q/k/v and attention outputs are averaged",
    ),
    Name(method="adamerging", fusion_bench="`CLIPLayerWiseAdaMergingAlgorithm`, with `clamp: false`, 1,000 steps"),
    Name(
        method="adamerging",
        settings={"then": {"name": "ties", "density": 0.2}},
        fusion_bench="the same over trimmed vectors (AdaMerging++ of the authors)",
    ),
    *(
        Name(method=name)
        for name in (
            "ace",
            "actmat",
            "awd",
            "bilateral",
            "cart",
            "consensus",
            "consensus_ta",
            "consensus_ties",
            "dc_merge",
            "esm",
            "inverse_norm",
            "kfac",
            "larv",
            "localize_stitch",
            "optmerge",
            "pcb",
            "star",
            "swudi",
            "swudi_a",
            "twin",
        )
    ),
)
APART = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # PEFT's combinations that merge A and B apart
