"""Draw docs/bilateral.md from experiments/bilateral/results.json, the verdicts included; sections that the file lacks are said to be missing.

python -m experiments.bilateral.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from experiments import leads
from experiments.common import DOCS, EXPERIMENTS, ROOT, table
from experiments.leads import led
from thetau.methods import Bilateral

RESULTS = EXPERIMENTS / "bilateral" / "results.json"
PAGE = DOCS / "bilateral.md"
MEASURED = Bilateral(rank=None)  # the default, but with all directions: sketches are on a page of their own
Rows = Sequence[Mapping[str, Any]]

DATA = "--data-text FOLDER --data-image FOLDER --backbone-vision MODEL --threads 1"
COMMANDS = (
    "--sections choice --suites text --validation 300",
    "--sections main --seeds 0,1,2 --ks 2,4,6,8 --vectors standard,attention,lora",
    "--sections ablations,oracle --suites text",
    "--sections cost --threads 2",
)
DERIVATION = r"""
## The idea

For one linear layer y = W a, let τ_i be what fine-tuning on task i added to W, and g the gradient of the loss in y. Gradient descent makes τ_i a
sum of outer products, τ_i = −η Σ g aᵀ: its *rows* lie in the span of the layer's inputs a, its *columns* in the span of the output
gradients g. WUDI uses the first half: the rows of τ_i stand in for the inputs, and Σ_i ‖(τ_m − τ_i) τ_iᵀ‖² / ‖τ_i‖² is the interference that
the layer's outputs suffer. But an output error matters only as far as the loss feels it, and what the loss feels is g.

To second order around task i's own model, where the gradient vanishes, replacing τ_i by τ_m changes task i's loss by
½ vec(Δ)ᵀ F_i vec(Δ) with Δ = τ_m − τ_i, layer by layer. F_i = E[g gᵀ ⊗ a aᵀ] is its Fisher matrix; taking g and a as independent (K-FAC)
gives F_i ≈ E[g gᵀ] ⊗ E[a aᵀ], and the change is ½ tr[Δᵀ H_i Δ G_i] with H_i = E[g gᵀ] and G_i = E[a aᵀ]. Both are now read off the task vector
alone, with τ_i = U s Vᵀ and ‖s‖ = 1:

    H_i = U s^{2p} Uᵀ ∝ (τ_i τ_iᵀ)^p      G_i = V s^{2q} Vᵀ ∝ (τ_iᵀ τ_i)^q

    minimise over τ_m:  Σ_i w_i tr[(τ_m − τ_i)ᵀ H_i (τ_m − τ_i) G_i]

A power of 0 is the identity on the whole space, also where τ_i is singular. Setting the gradient to 0 gives the linear system
Σ w_i H_i τ_m G_i = Σ w_i H_i τ_i G_i, a sum of K Kronecker products, whose right-hand side is Σ w_i U s^{2p+1+2q} Vᵀ.

### One side a matrix: the default

The product H_i ⊗ G_i protects of task i only what lies in its columns' *and* its rows' span. One side alone protects more: with G = I, all that
the task's layer says in its own output directions, whatever the input; with H = I, all that happens to its own inputs. Which side separates
tasks depends on what the matrix does, and that can be read off its place (`sides="by_role"`):

- *MLP, widening (up, gate)*: the left side, its outputs, which are the hidden neurons. The larger side has the most room for K tasks to be apart,
  and a nonlinearity acts on each neuron by itself.
- *MLP, narrowing (down)*: the right side, its inputs, for the same reasons.
- *q, k, v (also fused)*: the right side, their inputs, the residual stream. Attention's function is W_qᵀW_k and W_oW_v, from stream to stream;
  between q and k, or v and o, any invertible change of a head's coordinates leaves it as it is, so that only the stream's side means something.
- *Attention's output*: the left side, its outputs, the residual stream again.

So every matrix is weighed on the side whose coordinates the function of its block fixes. p is the power of the left factors and q of the right
ones. It was found by trying both sides, role by role, on validation data of both suites (seed 0); the reason was found after it. WUDI is the
right side everywhere; the ablations below have each side everywhere, and both at once.

### What is assumed, and where it fails

- *Layers do not interact*, and inputs and gradients are independent within a layer: K-FAC's assumptions, false to a degree everywhere.
- *The loss is quadratic from τ_i to τ_m*, with no gradient at τ_i. Σ τ_j is far from τ_i, so that this is a picture of the direction of harm,
  not of its size; short fine-tuning leaves a gradient.
- *τ_i shows both moments.* From one step, τ = −η g aᵀ, it does. After many steps with Adam it shows where the weights went, which is not
  where the loss is curved: τ τᵀ mixes g gᵀ with the inputs' own spread (Σ g aᵀa' g'ᵀ), and Adam evens out the spectrum. What a vector's own
  factors measure is rather *what this task changed*, and keeping that is another aim than keeping the loss's curvature: the oracle below
  puts measured moments in their place.
- *Every task counts the same* (w_i = 1 at ‖s‖ = 1, which is WUDI's balance), since no vector tells how much its loss matters.
- Low-rank vectors (LoRA) leave most of the space without curvature; there the sum stays as it is. Their rows are those of A, which starts at
  random and moves little: they are no sample of inputs, and adapters of one seed share them, so that the right side takes them for the same task.
  Merge adapters by [`thetau adapter merge`](adapters.md) instead.
- The roles are those of transformers; a matrix of an MLP with equal sides, or of an unknown block, is weighed on its inputs, as in WUDI.
@LANGUAGE@

### What it reduces to

| setting | it is |
|---|---|
| `sides="both"`, p, q = 0, 1 | WUDI: H = I. To the end, WUDI's closed form with ω → 0 (a test asserts 1e-5); `solver="flow"` is its `gradient_flow` |
| 0, 1 with G_i = E[a aᵀ] from data | RegMean: Σ_i ‖(W − W_i) A_i‖² over the inputs A_i, here approached from the sum and stopped early |
| H_i, G_i from data | merging by K-FAC's quadratic, as Fisher merging does with the diagonal; `with_factors`, the oracle |
| 0, 0 | the weighted mean of the vectors |

### How it is solved

*One side.* A = Σ w_i G_i (or Σ w_i H_i) and B = Σ w_i τ_i G_i are summed up task by task, as products of matrices for powers 1 and 2, in float64
where terms cancel; memory does not grow with K. One eigendecomposition of A then gives gradient descent in continuous time from Σ τ_i,
τ₀ + R Q (1 − e^{−2sΛ})/Λ Qᵀ with R = B − τ₀A, at any time s at once. `time` is s in units of 1 / mean non-zero eigenvalue of A, which has no
unit (scaling all vectors scales the result), needs no data, and does not change when dimensions are added that no task uses.

*Both sides.* Per task, r singular vectors are kept, by a random sketch where r is small. The operator is applied through them and never formed:
8 r d_out d_in + 4 r² min(d_out, d_in) operations a task. **Truncation simplifies the loss and no vector**: Σ τ_i and every τ_i in the
right-hand side are exact. The directions left out get equal weight in each factor, such that they hold what is missing to ‖s‖ = 1
(`tail="flat"`): a low-rank factor plus a multiple of the identity. Dropping them (`tail="drop"`) leaves the full sum Σ τ_i standing wherever
no kept direction looks, which is costly where spectra are long. Vectors of low rank (LoRA) have no tail; where all ranks together are less
than a side, everything happens in their joint span, with the same iterates, and costs next to nothing. Memory grows by r (d_out + d_in) a task.

Conjugate gradients (`solver="cg"`) start from Σ τ_i and stop when the norm of the residual is down to a share, `tolerance`, of what it was. This
is the discrepancy principle: the system is an estimate, and solving it more exactly than it is known fits the error of the estimate, which
the directions of small curvature would amplify. `solver="flow"` with both sides is a Chebyshev polynomial of the operator. `precondition` uses
the inverse of the mean factors; it is for going to the minimum, since it makes the directions of small curvature come first, which is what
stopping early avoids.
"""


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    text = f"{100 * mean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def points(told: Mapping[str, float]) -> str:
    """A difference with its interval."""
    return f"{told['mean']:+.1f} ({told['low']:+.1f} to {told['high']:+.1f})"


def verdict(told: Mapping[str, float]) -> str:
    """What an interval says."""
    if told["low"] > 0:
        return "better"
    return "worse" if told["high"] < 0 else "not told apart"


def choice(content: Mapping[str, Any]) -> list[str]:
    """The settings, on validation."""
    section = content.get("choice", {})
    rows = sorted(section.get("rows", []), key=lambda row: -row["normalised"])
    if not rows:
        return missing("choice")
    told = section.get("against_default", {})
    counts = sorted({n for row in rows for n in row["n"].values()})
    lines = [
        "## The default, and how it was chosen",
        "",
        f"`{default()}`. On {section['date']}, before any test example was looked at, on the validation data of the {section['suite']} suite "
        f"({', '.join(section['tasks'])}; n = {', '.join(map(str, counts))} a task; standard vectors, the first seed); the rule: "
        f"{section['rule']}. Everything below uses it unchanged.",
        "",
        *table(
            ["setting", "validation, %", "normalised", "against the default, points", "seconds"],
            [
                [
                    row["name"],
                    f"{100 * row['absolute']:.1f}",
                    f"{100 * row['normalised']:.1f}",
                    points(told[row["name"]]["normalised"]) if row["name"] in told and row["name"] != "the default" else "",
                    f"{row['seconds']:.0f}",
                ]
                for row in rows
            ],
        ),
    ]
    better = [name for name, one in told.items() if one["normalised"]["low"] > 0]
    same = [
        name for name, one in told.items() if one["normalised"]["low"] <= 0 <= one["normalised"]["high"] and name != "the default"
    ]
    lines += [
        (
            f"Better than the default here: {'; '.join(better)}."
            if better
            else "No setting of the grid is better than the default with 95 % confidence."
        )
        + f" {len(same)} of {max(len(told) - 1, 0)} others cannot be told apart from it.",
        "",
    ]
    if section.get("default") != repr(MEASURED):
        lines += ["**The default has changed since; this section must be run again.**", ""]
    return lines


def default() -> str:
    """The default's fields that say how it works."""
    one = MEASURED
    stop = (
        f"time = {one.time:g}" if one.solver == "flow" else f"tolerance = {one.tolerance:g}, at most {one.iterations} iterations"
    )
    return f"bilateral: sides = {one.sides}, p = {one.p:g}, q = {one.q:g}, {one.solver}, {stop}, rank = {one.rank}"


def groups(rows: Rows) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """The main rows by suite, vectors and K."""
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["vectors"], row["k"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "standard", item[0][1], item[0][2])))


def comparison(content: Mapping[str, Any]) -> list[str]:
    """The main tables and their verdicts."""
    found = groups(content.get("main", {}).get("rows", []))
    if not found:
        return missing("main")
    told = {(one["suite"], one["vectors"], one["k"], one["against"]): one for one in content.get("comparisons", [])}
    lines = [
        "## Against other data-free merges",
        "",
        "Test accuracy in percent, means over tasks ± standard deviation over seeds. *Normalised*: relative to each task's own model. λ of the tuned rows is "
        "chosen on validation data, by average normalised accuracy; all the others need no data. The last column is bilateral minus the row, "
        "in points of normalised accuracy, with a bootstrap interval of 95 % that is paired over test examples; it says nothing of other "
        "tasks or of what training adds, and of many intervals one in twenty misses.",
        "",
    ]
    for (suite, vectors, k), rows in found.items():
        seeds = sorted({row["seed"] for row in rows})
        n = sorted({count for row in rows for count in row["n"].values()})
        names = list(dict.fromkeys(row["name"] for row in rows))
        by_name = {name: [row for row in rows if row["name"] == name] for name in names}
        names.sort(key=lambda name: -mean(row["normalised"] for row in by_name[name]))
        tasks = ", ".join(rows[0]["n"])
        lines += [
            f"### {suite}, {vectors} vectors, K = {k}",
            "",
            f"{tasks}; n = {', '.join(map(str, n))} a task; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}.",
            "",
            *table(
                ["method", "accuracy", "normalised", "λ", "bilateral minus it"],
                [
                    [
                        (f"**{name}**" if name == "bilateral" else name) + fewer(by_name[name], seeds),
                        percent([row["absolute"] for row in by_name[name]]),
                        percent([row["normalised"] for row in by_name[name]]),
                        ", ".join(f"{row['scale']:g}" for row in by_name[name]) if by_name[name][0]["trials"] else "",
                        points(told[suite, vectors, k, name]["normalised"]) if (suite, vectors, k, name) in told else "",
                    ]
                    for name in names
                ],
            ),
        ]
    return lines + edges(content["main"]["rows"]) + summary(content)


def fewer(rows: Rows, seeds: Sequence[int]) -> str:
    """Which seeds a row of the table has, where it lacks some."""
    mine = sorted({row["seed"] for row in rows})
    return "" if mine == list(seeds) else f" (seed {', '.join(map(str, mine))} alone)"


def edges(rows: Rows) -> list[str]:
    """Where validation chose the first or the last λ of a grid that does not end there by nature."""
    found: dict[str, list[str]] = {}
    for row in rows:
        grid = sorted(float(value) for value in row["trials"] or {})
        if grid and row["scale"] in (grid[0], grid[-1]):
            told = f"{row['suite']}, {row['vectors']}, K = {row['k']}, seed {row['seed']} ({row['scale']:g})"
            found.setdefault(row["name"], []).append(told)
    if not found:
        return ["Validation chose no λ at the edge of its grid.", ""]
    return [
        "Where validation chose λ at the edge of its grid, a wider one might do better (the grids were widened once, after first test figures, for "
        "that reason): " + "; ".join(f"{name}: {', '.join(places)}" for name, places in found.items()) + ".",
        "",
    ]


def summary(content: Mapping[str, Any]) -> list[str]:
    """How often bilateral is better, worse, or not told apart, by the method that it stands against."""
    told = content.get("comparisons", [])
    if not told:
        return []
    names = list(dict.fromkeys(one["against"] for one in told))
    rows = []
    for name in names:
        mine = [one for one in told if one["against"] == name]
        words = [verdict(one["normalised"]) for one in mine]
        rows.append(
            [
                name,
                *(str(words.count(word)) for word in ("better", "not told apart", "worse")),
                f"{mean(one['normalised']['mean'] for one in mine):+.2f}",
            ]
        )
    worse = [
        f"{one['suite']}, {one['vectors']}, K = {one['k']}: {one['against']} ({points(one['normalised'])})"
        for one in told
        if verdict(one["normalised"]) == "worse"
    ]
    lines = [
        "### In sum",
        "",
        "In how many of the tables above bilateral is better than each other method, by the interval of the paired difference in normalised "
        "accuracy; and the mean difference.",
        "",
        *table(["against", "better", "not told apart", "worse", "mean, points"], rows),
        (
            "Where it does not help: " + "; ".join(worse) + "."
            if worse
            else "In no table is it worse than another method with 95 % confidence."
        ),
        "",
    ]
    best = [row for row in rows if float(row[4]) < 0]
    if best:
        lines += [f"On average over the tables it is below {', '.join(row[0] for row in best)}.", ""]
    return lines


def ablations(content: Mapping[str, Any]) -> list[str]:
    """One field at a time."""
    rows = content.get("ablations", {}).get("rows", [])
    if not rows:
        return missing("ablations")
    lines = [
        "## Ablations",
        "",
        "Each row names all fields in which it differs from the default: one, or those of the product of both sides and one more. Standard vectors "
        "of the first seed, all tasks, test data; nothing is chosen from it. The last column is the difference from the default in points of "
        "normalised accuracy, paired.",
        "",
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        lines += [
            f"### {suite}",
            "",
            *table(
                ["changed", "accuracy", "normalised", "difference", "seconds"],
                [
                    [
                        row["name"],
                        f"{100 * row['absolute']:.1f}",
                        f"{100 * row['normalised']:.1f}",
                        points(row["against_default"]["normalised"]) if row["name"] != "the default" else "",
                        f"{row['seconds']:.0f}",
                    ]
                    for row in mine
                ],
            ),
        ]
        for words, keep in (("Better", "better"), ("Worse", "worse")):
            found = [
                row["name"]
                for row in mine
                if verdict(row["against_default"]["normalised"]) == keep and row["name"] != "the default"
            ]
            lines += [f"{words} than the default: {'; '.join(found) or 'none'}.", ""]
    return lines


def oracle(content: Mapping[str, Any]) -> list[str]:
    """True second moments."""
    section = content.get("oracle", {})
    if not section.get("rows"):
        return missing("oracle")
    lines = [
        "## How much is the estimate's fault?",
        "",
        f"The same descent with second moments measured on {section['examples']} training examples a task, at its own model, in the place of one estimate or "
        "both: inputs for G, output gradients (labels drawn from the model) for H; *role* is a factor only where the matrix faces that side. Factors "
        "have unit trace and all singular vectors; conjugate gradients stop at the same share of the first residual. Differences are from the first "
        "row, in points of normalised accuracy, paired.",
        "",
    ]
    for suite in dict.fromkeys(row["suite"] for row in section["rows"]):
        mine = [row for row in section["rows"] if row["suite"] == suite]
        lines += [
            f"### {suite}",
            "",
            *table(
                ["factors", "accuracy", "normalised", "difference"],
                [
                    [
                        row["name"],
                        f"{100 * row['absolute']:.1f}",
                        f"{100 * row['normalised']:.1f}",
                        points(row["against_estimated"]["normalised"]) if "against_estimated" in row else "",
                    ]
                    for row in mine
                ],
            ),
        ]
        estimated = next((row for row in mine if row["name"] == "H role, estimated, G role, estimated"), None)
        for name, words in (("H role, true, G role, true", "on the side of the role"), ("H true, G true", "on both sides")):
            true = next((row for row in mine if row["name"] == name), None)
            if true is not None and estimated is not None and "against_estimated" in true:
                left, gain = 100 * (1 - estimated["normalised"]), true["against_estimated"]["normalised"]
                lines += [
                    f"True factors {words} are {verdict(gain)}: {points(gain)} points, where {left:.1f} are missing to the individual models.",
                    "",
                ]
    return lines


def cost(content: Mapping[str, Any]) -> list[str]:
    """Seconds and operations."""
    rows = content.get("cost", {}).get("rows", [])
    if not rows:
        return missing("cost")
    timed = [row for row in rows if "seconds" in row]
    large = [row for row in rows if "seconds" not in row]
    return [
        "## Cost",
        "",
        f"One matrix, K = {rows[0]['tasks']}, from the first vector to the result, medians in turns in one run; `bilateral` is the default.",
        "",
        *table(
            ["matrix, method", "seconds", "ratio to adam", "ratio to gradient flow"],
            [
                [
                    f"{row['shape']}, {row['name']}",
                    f"{row['seconds']:.3f}",
                    f"{row['ratio_to_adam']:.2f}",
                    f"{row['ratio_to_gradient_flow']:.1f}",
                ]
                for row in timed
            ],
        ),
        "A model of 7 billion parameters, by the cost model that `--dry-run` prints: operations if every iteration is made, and the working "
        "memory of its largest matrix.",
        "",
        *table(
            ["method", "operations, at most", "memory, GB"],
            [[row["name"], f"{row['operations_at_most']:.1e}", f"{row['memory_mb'] / 1e3:.1f}"] for row in large],
        ),
    ]


def missing(section: str) -> list[str]:
    """What stands where nothing was measured."""
    return [f"*Not measured yet: {section} (`python -m experiments.bilateral.run --sections {section}`).*", ""]


def page(content: Mapping[str, Any]) -> str:
    """The whole page, with its lead where there are comparisons."""
    return led(body(content), leads.bilateral(content)) if content.get("comparisons") else body(content)


def language() -> str:
    """What `make llm` found of it, beside WUDI."""
    found = json.loads((EXPERIMENTS / "llm" / "results.json").read_text(encoding="utf-8"))
    ours, theirs = (100 * found["rows"][name]["average"] for name in ("bilateral", "wudi"))
    return (
        f"- *Language models* are not among the suites below. On [four small skills in one model of 135 million parameters](llm.md), one seed, defaults, "
        f"`bilateral` kept {ours:.1f} % exact match and `wudi` {theirs:.1f}."
    )


def body(content: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# Bilateral merging",
        "",
        "`bilateral` merges task vectors without data: each matrix by the interference that its task vectors show on the side which its role in "
        "the block makes the telling one, or on both. Drawn from `experiments/bilateral/results.json` by `experiments/bilateral/page.py`; "
        "`experiments/bilateral/run.py` writes that file and goes on where it was stopped.",
        "",
    ]
    if content.get("quick"):
        lines += ["**From a `--quick` run on toy data: the numbers mean nothing.**", ""]
    lines += [
        "    thetau merge --method bilateral -b BASE -m A -m B -o OUT",
        "",
        "The figures are those of these commands; sections, suites, seeds, K and kinds of vectors can be run one after the other:",
        "",
        *(f"    make bilateral ARGS='{DATA} {rest}'" for rest in COMMANDS),
        "",
        DERIVATION.strip().replace("@LANGUAGE@", language()),
        "",
        *choice(content),
        *comparison(content),
        *ablations(content),
        *oracle(content),
        *cost(content),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    PAGE.write_text(page(content), encoding="utf-8")
    if content.get("comparisons"):
        leads.bilateral_chart(content, "bilateral.png")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
