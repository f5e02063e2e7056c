"""Draw docs/disentanglement.md and its figures from experiments/disentanglement/results.json.

python -m experiments.disentanglement.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.common import DOCS, IMAGES, ROOT, table
from experiments.leads import Lead, led, percent
from thetau.plots.figure import INK, MUTED, figure, save

RESULTS = Path(__file__).parent / "results.json"
PAGE = DOCS / "disentanglement.md"
PLACES = {  # distance → its name, its file, what is measured
    "disagreement": ("classifier", "disentanglement-classifier.png", "share of labels that differ, sum of both tasks"),
    "kl": ("representation", "disentanglement-representation.png", "KL of the features' softmax in nats, sum of both tasks"),
}


def inside(kind: Mapping[str, Any], distance: str) -> dict[str, float]:
    """Pair → ξ, mean over α in 0..1."""
    return {pair: both[distance]["inside"] for pair, both in kind["pairs"].items()}


def lead(results: Mapping[str, Any]) -> Lead:
    """What the figures say in three sentences."""
    kinds = results["kinds"]
    at = {distance: {name: mean(inside(kind, distance).values()) for name, kind in kinds.items()} for distance in PLACES}
    least = {distance: min(found, key=lambda name: found[name]) for distance, found in at.items()}
    labels = at["disagreement"]
    most = max(labels, key=lambda name: labels[name])
    sums = {name: mean(one["sum"] / one["own"] for one in kind["accuracy"].values()) for name, kind in kinds.items()}
    best = max(sums, key=lambda name: sums[name])
    return Lead(
        sentences=(
            f"Of {len(kinds)} kinds of vectors, those of *{least['disagreement']}* keep most to their own task at the classifier: with α in 0..1 a partner "
            f"changes {percent(labels[least['disagreement']])} % of the labels (sum of both tasks), where with *{most}* it changes {percent(labels[most])} %.",
            f"At the representation it is *{least['kl']}* ({at['kl'][least['kl']]:.2g} nats).",
            f"The plain sum of all {len(results['tasks'])} keeps {percent(sums[best])} % of the models' own accuracies with *{best}*, the most of "
            f"them; with *standard* it keeps {percent(sums['standard'])} %.",
        ),
        picture=PLACES["disagreement"][1],
        alt="Disentanglement error at the classifier over both coefficients: a row a pair of tasks, a column a kind of vectors",
    )


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    kinds, tasks, settings = results["kinds"], results["tasks"], results["settings"]
    pairs = list(next(iter(kinds.values()))["pairs"])
    lines = [
        "# Does a vector keep to its own task?",
        "",
        "```",
        "thetau diagnose disentanglement models/clinc_domain models/hwu64_scenario --features raw -o diagnostics",
        "make disentanglement    # this page's figures: trains what is missing in runs/disentanglement, one core",
        "```",
        "",
        "ξ(α₁, α₂) is how much the sum θ₀ + α₁τ₁ + α₂τ₂ differs, on each task's examples, from that task's vector alone: at the classifier the share of "
        "labels that differ, at the representation the divergence of the features' softmax, halved over both directions. 0 is a vector that acts on its "
        "own task alone. It is the measure of [Ortiz-Jimenez et al.](https://arxiv.org/abs/2305.12827), of the τJp paper (Eq. 2) and the attention-only "
        "one (Fig. 6). Features are not brought to unit length, as in their code. Linear and τJp vectors are measured in the linear form, where "
        "they belong, the others in the model.",
        "",
        f"{results['base']}, {settings['steps']} steps with batches of {results['batch']}; n = {settings['examples']} test examples a task; α takes "
        f"{settings['points']} values in [−2, 2]. **{len(pairs)} pairs of {len(tasks)} tasks and one seed: a look, not a verdict on the papers.** "
        "clinc_domain and hwu64_scenario are both about requests to an assistant, sms_spam is about something else.",
        "",
        "## With both coefficients in 0..1",
        "",
        "Means over the part of the grid in which coefficients are sought.",
        "",
    ]
    for distance, (name, _, _) in PLACES.items():
        rows = [
            [
                kind,
                *(f"{value:.3f}" for value in inside(found, distance).values()),
                f"{mean(inside(found, distance).values()):.3f}",
            ]
            for kind, found in kinds.items()
        ]
        lines += [f"At the {name}:", "", *table(["vectors", *pairs, "mean"], rows)]
    lines += [
        "## Over the whole grid",
        "",
        "The picture above is of the classifier; this one is of the representation. The cross is the base, the square 0..1.",
        "",
        "![Disentanglement error at the representation over both coefficients: a row a pair of tasks, a column a kind of vectors]"
        f"(images/{PLACES['kl'][1]})",
        "",
        "Means over all of [−2, 2]², a pair's after the other:",
        "",
        *table(
            ["vectors", *(f"{name}, {pair}" for name, _, _ in PLACES.values() for pair in pairs)],
            [
                [kind, *(f"{found['pairs'][pair][distance]['all']:.3f}" for distance in PLACES for pair in pairs)]
                for kind, found in kinds.items()
            ],
        ),
        "## What the models can do",
        "",
        f"Test accuracy in percent, n = {settings['examples']}: each task's own model, and the sum of all {len(tasks)} vectors at α = 1.",
        "",
        *table(
            ["vectors", *(f"{task}, {word}" for task in tasks for word in ("base", "own", "sum"))],
            [
                [kind, *(percent(found["accuracy"][task][word]) for task in tasks for word in ("base", "own", "sum"))]
                for kind, found in kinds.items()
            ],
        ),
        "A vector that does little disturbs little: read ξ beside these accuracies. More tasks and seeds of these kinds: "
        "[paradigms compared](paradigms.md).",
    ]
    return led("\n".join(lines).rstrip() + "\n", lead(results))


def draw(results: Mapping[str, Any], distance: str, path: Path) -> None:
    """A row a pair, a column a kind, one scale of colours."""
    kinds, grid = results["kinds"], results["grid"]
    pairs = list(next(iter(kinds.values()))["pairs"])
    top = max(
        value for kind in kinds.values() for both in kind["pairs"].values() for row in both[distance]["error"] for value in row
    )
    made = figure(2.5 * len(kinds) + 1.6, 2.35 * len(pairs) + 0.5)
    grids = made.subplots(len(pairs), len(kinds), sharex=True, sharey=True, squeeze=False)
    for i, pair in enumerate(pairs):
        first, second = pair.split(" and ")
        for j, (name, kind) in enumerate(kinds.items()):
            axes = grids[i][j]
            picture = axes.pcolormesh(
                grid, grid, kind["pairs"][pair][distance]["error"], cmap="viridis_r", shading="nearest", vmin=0, vmax=top
            )
            axes.set_aspect("equal")
            axes.plot([0], [0], "x", color="#c2382e", markersize=7, markeredgewidth=2)
            axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#c2382e", linewidth=1.2)
            axes.tick_params(colors=MUTED, labelsize=7)
            if i == 0:
                axes.set_title(name, color=INK, fontsize=10)
            if j == 0:
                axes.set_ylabel(f"α of {first}", color=MUTED, fontsize=8)
            axes.set_xlabel(f"α of {second}", color=MUTED, fontsize=8)
    bar = made.colorbar(picture, ax=grids, shrink=0.7)
    bar.set_label(PLACES[distance][2], color=MUTED, fontsize=8)
    save(made, path)


def main() -> None:
    """Write the page and its figures."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(results), encoding="utf-8")
    for distance, (_, name, _) in PLACES.items():
        draw(results, distance, IMAGES / name)
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}, {', '.join(name for _, name, _ in PLACES.values())}\n")


if __name__ == "__main__":
    main()
