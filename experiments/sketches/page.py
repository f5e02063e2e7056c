"""Draw docs/sketches.md from the result files of experiments/sketches.

python -m experiments.sketches.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from experiments import leads
from experiments.common import DOCS, EXPERIMENTS, table
from experiments.leads import led
from thetau.linalg.leading import BESIDE, FIRST
from thetau.linalg.svd import LOST
from thetau.methods.sketched import SMALLEST, TOLERANCE
from thetau.methods.spectra import DROPPED
from thetau.methods.spectra import FIRST as SPECTRAL_FIRST

HERE = EXPERIMENTS / "sketches"
PAGE = DOCS / "sketches.md"
SIZES = {
    "280m": "280 million parameters, differences with a falling spectrum",
    "280m-noise": "280 million parameters, differences that are noise",
    "280m-cuda": "280 million parameters, solvers on a graphics card",
    "slice": "Two of its blocks, beside the revision before",
    "slice-noise": "Two of its blocks, differences that are noise, beside the revision before",
}
Rows = Mapping[str, Mapping[str, Any]]

TEXT = rf"""
# Sketches

The methods that merge best solve a problem for every matrix. `wudi` (but for `solver: adam`), `bilateral`, `tsv_m` and `dc_merge` can do so with the leading
directions of each task alone. The first three do by default:

```
thetau merge --base BASE --model A --model B --method bilateral -o merged
thetau merge --base BASE --model A --model B --method bilateral --set rank=full -o merged   # all directions
thetau merge --base BASE --model A --model B --method wudi --set solver=gradient_flow --set directions=32 -o merged
thetau merge --base BASE --model A --model B --method tsv_m -o merged
thetau merge --base BASE --model A --model B --method tsv_m --set rank=full -o merged       # the paper's: of each task a K-th
thetau merge --base BASE --model A --model B --method dc_merge --set rank=auto -o merged
```

## What is kept

A task vector τ stands in for the inputs of its layer: τᵀτ is a sample of what their covariance looks like. Its small eigenvalues are mostly the
sample's noise. `auto` keeps as many directions as the spectrum asks for:

- until what is left out is no more than {TOLERANCE:.0%} of ‖τ‖²,
- or until what is left out looks like noise: none of it stands out from its mean by more than from independent numbers, (1 + √β)² times, β being
  the ratio of the matrix's sides (Marchenko and Pastur),
- at most as many as all tasks' directions together can be with a profit. A task that asks for more is taken whole, and so is a matrix whose
  smaller side is below {SMALLEST} (TSV-M and DC-Merge: with its K-th part, as with `full`).

The directions that are left out keep a weight in `wudi` and `bilateral`: all the same one, by what they hold of ‖τ‖² (`tail: flat`). With
`tail: drop` they have none, and what no direction sees stays the sum. TSV-M and DC-Merge drop them, as they drop all beyond a
task's K-th part; their `auto` takes the fewest that leave out no more than {DROPPED:.0%}, and all of a vector of low rank (up to {SPECTRAL_FIRST}).
Nothing else of the objective is changed: it is solved exactly, in the joint span of all tasks' directions and outside it.

## How

Directions are found block by block: {FIRST} random signs a row of the matrix, one power of MᵀM, and each block as large as all before it, orthogonal to
them. The error needs no estimate. V is orthonormal, so ‖M − MVVᵀ‖² = ‖M‖² − ‖MV‖² holds for any V; both sides are summed in float64, and what
is below the rounding of float32 counts as zero. The last values of a sketch are too small, so the one {BESIDE} before the last is asked about noise.
The random signs are a function of task and tensor name: the same bits from any number of workers, in any order.

With A = FᵀF + c, F being the kept directions of all tasks, FFᵀ = EΛEᵀ and the residual R = CF + T at the start, a function g of A acts as
R g(A) = [C E g(Λ + c) + T Fᵀ E (g(Λ + c) − g(c)) / Λ] EᵀF + g(c) T. Nothing larger than FFᵀ is decomposed.

TSV-M and DC-Merge begin with a block of {SPECTRAL_FIRST}, since few tasks need less, and one
wide block costs fewer passes over a matrix than narrow ones.

Where the whole spectrum is wanted (`iso_c`, `iso_cts`, `svc`, `star`, `tsv_m` with `rank: full`), the Gram matrix of the smaller side is made
and decomposed in float64, which is exact for float32 entries down to singular values far below their rounding; the larger side never is. Only
the upper half of a Gram matrix is made. A polar factor has no columns in directions that are not there. It is then a product in float32, which
turns the direction of a singular value σ by ε σ₁/σ at most, about; where that would be more than {LOST:.1%} for the smallest of them, the product is
in float64 too.
"""


def page(accuracy: Rows, timings: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of what was measured."""
    lines = [TEXT.strip(), "", "## What it costs in accuracy", ""]
    lines += [
        "The demo's six fine-tuned models, normalised accuracy on 200 test examples of each task, one seed: an example more or less is 0.1. "
        "The tolerance was chosen on these same examples: of four forms of `auto`, three at 30 % gave `bilateral` 98.6, 97.7 and 98.4, and "
        "20 % gave what stands here, so that the loss elsewhere is not known. Rows with *auto, drop* are of the first form. "
        "Seconds are the processor's, one worker.",
        "",
        *table(
            ["merge", "normalised", "average", "seconds"],
            [
                [label, f"{row['normalised']:.1f}", f"{row['average']:.1f}", f"{row['seconds']:.1f}"]
                for label, row in accuracy.items()
            ],
        ),
        "TSV-M's `auto`, the default, was measured on these six models alone (one seed); `experiments.sketches.confirm` has it among its pairs, and was not "
        "run again since.",
        "",
        *confirmed(),
        "## What it saves",
        "",
        "Whole commands, K = 4, bfloat16, start-up, checks and fsync included, each beside a TIES just before it. The machine had other work: "
        "ratios by the clock vary with it, those of the processors' time less. *Before* is the revision before sketches on the same files, and "
        "*faster* compares the processors' time. The rows of `wudi` and `bilateral` are from before two changes that keep more directions. "
        "`make sketches` runs all of it. The row of `tsv_m` is its default, that of `iso_c` all of its directions. What bounds `iso_c` is one "
        "eigendecomposition in float64 a matrix: a quarter of a second of the processor at a side of 1024, where one product of that size takes "
        "0.018 in float32.",
        "",
    ]
    for size, title in SIZES.items():
        if size in timings:
            lines += [f"### {title}", "", *table(HEAD, [_row(label, row) for label, row in timings[size]["rows"].items()])]
    return "\n".join(lines)


def confirmed() -> list[str]:
    """What six other tasks say, where that was measured."""
    file = HERE / "confirm.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    seeds = found["seeds"]
    rows = [
        [label, *(f"{sum(seed[label]['normalised'].values()) / len(seed[label]['normalised']):.1f}" for seed in seeds.values())]
        for label in next(iter(seeds.values()))
        if label != "individual"
    ]
    verdicts = "; ".join(f"`{label}`: {verdict}" for label, verdict in found["lead of auto over full, points normalised"].items())
    return [
        f"On six tasks that had no part in that choice ({', '.join(found['test'])}), all test examples, nothing tuned, normalised "
        f"(`{found['command']}`):",
        "",
        *table(["merge", *(f"seed {seed}" for seed in seeds)], rows),
        f"The lead of `auto` over all directions, in points, by the rules of [verdicts](verdicts.md): {verdicts}.",
        "",
    ]


HEAD = ["method", "seconds", "× TIES", "processors' seconds", "× TIES", "before", "faster", "operations of the plan"]


def _row(label: str, row: Mapping[str, Any]) -> list[str]:
    before, faster = (
        (f"{row['before_processor_seconds']:.0f}", f"{row['times_faster']:.1f} ×") if "times_faster" in row else ("", "")
    )
    return [
        label,
        f"{row['seconds']:.1f}",
        f"{row['times_ties']:.1f}",
        f"{row['processor_seconds']:.1f}",
        f"{row['times_ties_processor']:.1f}",
        before,
        faster,
        f"{row['operations']:.1e}",
    ]


def main() -> None:
    """Write the page."""
    accuracy = json.loads((HERE / "accuracy.json").read_text(encoding="utf-8"))
    found = {size: HERE / f"{size}.json" for size in SIZES}
    timings = {size: json.loads(path.read_text(encoding="utf-8")) for size, path in found.items() if path.is_file()}
    confirm = HERE / "confirm.json"
    told = json.loads(confirm.read_text(encoding="utf-8")) if confirm.is_file() else None
    leads.sketches_chart(timings, SIZES).draw("sketches.png")
    PAGE.write_text(led(page(accuracy["rows"], timings), leads.sketches(timings, told)) + "\n", encoding="utf-8")
    sys.stdout.write("docs/sketches.md\n")


if __name__ == "__main__":
    main()
