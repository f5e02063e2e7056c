"""Draw docs/paradigms.md and its figures from experiments/paradigms/results.json, the words about it included.

python -m experiments.paradigms.page
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import get_args

from experiments import leads
from experiments.common import DOCS, EXPERIMENTS, IMAGES, ROOT, table
from experiments.leads import led
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.interference import Interference
from thetau.diagnostics.kernel import KernelTest
from thetau.diagnostics.results import load_result
from thetau.plots.diagnose import alpha_chart
from thetau.studies.arithmetic import CONTROL as SHARE
from thetau.studies.arithmetic import Negation
from thetau.studies.by_paradigm import alpha_curves
from thetau.studies.paradigms import ParadigmResults, ParadigmRow, load_paradigm_results
from thetau.studies.verdicts import CONTROL, VALIDATION, AtControl, Verdict, Word, at_control, at_end, few_examples, judge

RESULTS = EXPERIMENTS / "paradigms" / "results.json"
DIAGNOSTICS = EXPERIMENTS / "paradigms" / "diagnostics"
PAGE = DOCS / "paradigms.md"
CHART = IMAGES / "paradigms-alpha.png"
Values = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """An ordering of the papers: `more` is to be above `less`, of `value` (a row → task → number), by row names."""

    paper: str
    words: str
    more: str
    less: str
    value: Callable[[ParadigmRow], Values]
    lower: bool = False  # the claim is that `more` is lower


def one_shot(row: ParadigmRow) -> Values:
    """Accuracy of each task with all vectors added at α = 1."""
    return {task: found.value for task, found in row.addition.one_shot.accuracy.items()} if row.addition else {}


def tuned(row: ParadigmRow) -> Values:
    """The same at the α of validation."""
    return {task: found.value for task, found in row.addition.tuned.accuracy.items()} if row.addition else {}


def alone(row: ParadigmRow) -> Values:
    """Each task's own model."""
    return {task: found.value for task, found in (row.individual or row.joint or {}).items()}


def equal_control(found: Negation) -> AtControl:
    """The target's validation accuracy where the control falls to its share of the pre-trained model's, between the grid's values."""
    curve = [(trial.alpha, trial.target, trial.control) for trial in found.trials]
    return at_control(curve, SHARE * min(found.trials, key=lambda trial: trial.alpha).control)


def forgotten(row: ParadigmRow) -> Values:
    """The target's accuracy at equal control."""
    return {found.task: equal_control(found).target for found in row.negation}


TAU_JP, ATTENTION = "τJp (Yoshida et al.)", "attention-only (Jin et al.)"
CLAIMS = (
    Claim(TAU_JP, "one-shot addition: τJp above linear (Table 1)", "τJp cyclic", "linear", one_shot),
    Claim(TAU_JP, "tuned addition: τJp above linear (Table 1)", "τJp cyclic", "linear", tuned),
    Claim(TAU_JP, "τJp one-shot above linear tuned: no tuning is needed (Table 1)", "τJp cyclic:one", "linear:tuned", one_shot),
    Claim(TAU_JP, "tuned addition: linear above standard (Table 1)", "linear", "standard", tuned),
    Claim(TAU_JP, "negation: τJp forgets more than linear (Table 2)", "τJp cyclic", "linear", forgotten, lower=True),
    Claim(TAU_JP, "negation: linear forgets more than standard (Table 2)", "linear", "standard", forgotten, lower=True),
    Claim(TAU_JP, "incremental τJp above linear, one-shot (Table 3)", "τJp incremental", "linear", one_shot),
    Claim(TAU_JP, "strict a little above cyclic, one-shot (Table 4)", "τJp strict", "τJp cyclic", one_shot),
    Claim(TAU_JP, "continued training lifts an existing linear vector, one-shot (Fig. 3)", "τJp continued", "linear", one_shot),
    Claim(TAU_JP, "joint training above one-shot τJp (Table 5)", "mtl:alone", "τJp cyclic:one", one_shot),
    Claim(ATTENTION, "tuned addition: attention above standard (Table 1)", "attention", "standard", tuned),
    Claim(ATTENTION, "tuned addition: attention above linear (Table 1)", "attention", "linear", tuned),
    Claim(ATTENTION, "single task: standard above attention, by little (Fig. 7)", "standard", "attention", alone),
    Claim(ATTENTION, "biases do not help: attention above attention + bias (Table 5)", "attention", "attention + bias", tuned),
    Claim(ATTENTION, "MLP weights hurt: attention above attention + mlp (Table 5)", "attention", "attention + mlp", tuned),
)
_VALUES = {"one": one_shot, "tuned": tuned, "alone": alone}


def verdict(claim: Claim, results: ParadigmResults) -> Verdict:
    """What the rules say of it, in points."""
    (more, first), (less, second) = (_side(name, claim) for name in (claim.more, claim.less))
    leads: dict[str, list[float]] = {}
    for seed in results.seeds:
        high, low = (next((row for row in results.of(name) if row.seed == seed), None) for name in (more, less))
        if high is None or low is None:
            continue
        a, b = first(high), second(low)
        for task in a.keys() & b.keys():
            leads.setdefault(task, []).append(100 * (a[task] - b[task]))
    reasons = [one for name, value in ((more, first), (less, second)) for one in _against(results, name, value)]
    return judge({task: leads[task] for task in sorted(leads)}, lower=claim.lower, reasons=tuple(dict.fromkeys(reasons)))


def _against(results: ParadigmResults, name: str, value: Callable[[ParadigmRow], Values]) -> list[str]:
    """What rule 4 holds against these values of a row: how their coefficients were chosen."""
    rows = results.of(name)
    if value is tuned:
        chosen = [(row.addition.tuned.alpha, [one.alpha for one in row.addition.trials]) for row in rows if row.addition]
        return [*_few(results, results.tasks, VALIDATION), *at_end(chosen)]
    if value is forgotten:
        curves = [equal_control(found) for row in rows for found in row.negation]
        outside = sum(not one.inside for one in curves)
        short = [f"{name}: {outside} of {len(curves)} curves never reach the control's floor"] if outside else []
        return [*_few(results, [results.control or ""], CONTROL), *short]
    return []


def _few(results: ParadigmResults, tasks: Sequence[str], least: int) -> list[str]:
    found = [
        few_examples(results.sizes[task]["validation"], results.available.get(task, {}).get("validation"), least=least)
        for task in tasks
    ]
    return list(dict.fromkeys(one for listed in found for one in listed))


def _side(name: str, claim: Claim) -> tuple[str, Callable[[ParadigmRow], Values]]:
    row, _, which = name.partition(":")
    return row, _VALUES.get(which, claim.value)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    if not values:
        return "–"
    text = f"{100 * mean(values):.{digits}f}"
    return f"{text} ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else text


def addition_rows(results: ParadigmResults, *, elsewhere: bool = False) -> list[list[str]]:
    """A line a paradigm; with `elsewhere`, of what the same vectors give in the other space."""
    lines = []
    for name in results.names():
        rows = results.of(name)
        found = [row.elsewhere if elsewhere else row.addition for row in rows]
        kept = [one for one in found if one is not None]
        if not kept:
            joint = [mean(one.value for one in row.joint.values()) for row in rows if row.joint is not None]
            if joint and not elsewhere:
                lines.append([name, spread(joint), "–", "–", "–", "–", "–", str(len(joint))])
            continue
        own = [mean(one.value for one in row.individual.values()) for row in kept]
        at_one, best = [one.one_shot for one in kept], [one.tuned for one in kept]
        figures = [
            own,
            [o.absolute for o in at_one],
            [o.normalised for o in at_one],
            [o.absolute for o in best],
            [o.normalised for o in best],
        ]
        lines.append([name, *map(spread, figures), ", ".join(f"{o.alpha:g}" for o in best), str(len(kept))])
    return lines


def negation_rows(results: ParadigmResults) -> list[list[str]]:
    """Tuned and one-shot negation, means over tasks."""
    lines = []
    for name in results.names():
        rows = [row for row in results.of(name) if row.negation]
        if not rows:
            continue
        sides = [
            [mean(getattr(getattr(found, when), side).value for found in row.negation) for row in rows]
            for when in ("one_shot", "tuned")
            for side in ("target", "control")
        ]
        alphas = mean(found.tuned.alpha for row in rows for found in row.negation)
        moved = sum(found.tuned.alpha > 0 for row in rows for found in row.negation)
        total = sum(len(row.negation) for row in rows)
        equal = [mean(equal_control(found).target for found in row.negation) for row in rows]
        lines.append([name, *map(spread, [*sides, equal]), f"{alphas:.2f}", f"{moved} of {total}"])
    return lines


def page(results: ParadigmResults) -> str:
    """The whole page, with its lead where what that tells of was measured."""
    lead = leads.paradigms(results)
    return body(results) if lead is None else led(body(results), lead)


def body(results: ParadigmResults) -> str:
    """The whole page."""
    seeds = len(results.seeds)
    tests = sorted({results.sizes[task]["test"] for task in results.tasks})
    first = results.of("standard")[0].config if results.of("standard") else {}
    settings = {row.name: {one.field: one.chosen for one in row.tuning} for row in results.rows if row.tuning}
    chosen = "; ".join(
        f"{name}: {', '.join(f'{key} = {value:g}' for key, value in each.items())}" for name, each in settings.items()
    )
    counts = {name: len(results.of(name)) for name in results.names()}
    complete = [name for name, count in counts.items() if count == seeds]
    partly = [f"{name} ({count})" for name, count in counts.items() if count < seeds]
    pretrained = mean(results.pretrained[task].value for task in results.tasks)
    widest = max(
        (found.high - found.low) / 2 for row in results.rows if row.addition for found in row.addition.tuned.accuracy.values()
    )
    lines = [
        "# Paradigms of fine-tuning, compared",
        "",
        "Drawn from `experiments/paradigms/results.json` by `experiments/paradigms/page.py`; `make paradigms SEEDS=3` writes that file, about",
        "an hour a seed on two idle cores, and goes on where it was stopped.",
        "",
        f"The tables of the τJp and the attention-only papers at the scale of a small machine: suite `{results.suite}`, "
        f"{results.backbone}, {len(results.tasks)} tasks ({', '.join(results.tasks)}), control task {results.control}, "
        f"{first.get('steps', '?')} steps with batches of {first.get('batch_size', '?')}, n = {', '.join(map(str, tests))} test examples "
        f"a task (95 % interval of one task's accuracy: at most ±{100 * widest:.1f} points), {seeds} seed{'s' if seeds > 1 else ''}."
        + (" **One seed: an early look, not a verdict.**" if seeds == 1 else ""),
        "",
        f"Settings were chosen by the first seed on the validation split of {results.tasks[0]} (for τJp, the mean of that and of what "
        f"the other tasks keep): {chosen}. α is chosen on validation by average normalised accuracy, 0 to 1 by 0.05; for negation 0 to "
        "3 by 0.1, the lowest target accuracy with the control task at 95 % or more of the pre-trained model's. Linear and τJp vectors "
        "are evaluated in the linear form.",
        "",
        f"Whole: {', '.join(complete) or 'none'}." + (f" So far with fewer seeds: {', '.join(partly)}." if partly else ""),
        "",
        "## Addition",
        "",
        f"Test accuracy in percent, means over tasks. The pre-trained model: {100 * pretrained:.1f}.",
        "",
        *table(["paradigm", "individual", "α = 1", "normalised", "tuned", "normalised", "α", "seeds"], addition_rows(results)),
        "### The same vectors in the other space",
        "",
        "Standard and attention-only vectors in the linear form (post hoc), linear ones in the model itself.",
        "",
        *table(
            ["paradigm", "individual", "α = 1", "normalised", "tuned", "normalised", "α", "seeds"],
            addition_rows(results, elsewhere=True),
        ),
        "## Negation",
        "",
        f"Accuracy in percent, means over tasks: the target is to fall, the control task to stay. Pre-trained: target "
        f"{100 * pretrained:.1f}, control {100 * results.pretrained[results.control].value:.1f}. *At equal control*: on validation, where the "
        f"control has fallen to exactly {100 * SHARE:.0f} % of the pre-trained model's, by straight lines between the values of the grid; the "
        "tuned columns keep the control by different amounts, and are not compared."
        if results.control
        else "No control task.",
        "",
        *table(
            [
                "paradigm",
                "target at α = 1",
                "control",
                "target, tuned",
                "control",
                "target at equal control",
                "mean α",
                "forgot something",
            ],
            negation_rows(results),
        ),
        *left_out(results),
        *trace(results),
        "## Which of the papers' orderings hold here",
        "",
        "Each is a difference in points, with a 95 % interval over tasks and seeds, judged by [rules](verdicts.md) that were written down first. "
        "Negation is compared at equal control. Of many comparisons one in twenty may be chance.",
        "",
    ]
    judged = [(claim, verdict(claim, results)) for claim in CLAIMS]
    lines += ["| paper | ordering | here |", "|---|---|---|"]
    lines += [f"| {claim.paper} | {claim.words} | {found} |" for claim, found in judged]
    count = {word: sum(found.word == word for _, found in judged) for word in get_args(Word)}
    lines += [
        "",
        f"{count['holds']} hold, {count['does not hold']} do not, {count['not told apart']} cannot be told apart, and of {count['no verdict']} "
        "the figures carry no verdict.",
        "",
        *missing(results),
        *diagnosed(),
        "## What it costs",
        "",
        "Seconds a step here are those of the fastest seed, on a shared machine and in runs that were not alone on it; `make step` measures the step by itself "
        "([figures](figures.md)). Peak memory is that of a process of its own that trains the paradigm"
        + ("." if all(row.cost.own_process for row in results.rows if row.cost) else "; this file is from before, and has none."),
        "",
        *table(
            ["paradigm", "parameters trained", "share", "seconds a step", "peak GB"],
            [
                [
                    name,
                    f"{costs[0].trained:,}",
                    f"{100 * costs[0].trained / costs[0].parameters:.0f} %",
                    f"{min(cost.seconds_a_step for cost in costs):.2f}",
                    f"{max(cost.peak_gigabytes or 0 for cost in costs):.2f}" if all(cost.own_process for cost in costs) else "–",
                ]
                for name in results.names()
                if (costs := [row.cost for row in results.of(name) if row.cost is not None])
            ],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def missing(results: ParadigmResults) -> list[str]:
    """What a further run must bring before the rest can be judged."""
    ends = dict.fromkeys(
        f"{row.name}, {one.field} = {one.chosen:g}"
        for row in results.rows
        for one in row.tuning
        if len(one.scores) > 1 and one.chosen in (min(map(float, one.scores)), max(map(float, one.scores)))
    )
    added = _few(results, results.tasks, VALIDATION)
    negated = _few(results, [results.control], CONTROL) if results.control else []
    partly = [name for name in results.names() if len(results.of(name)) < len(results.seeds)]
    said = [
        *(f"- α of addition was chosen {few}." for few in added),
        *(f"- The control of negation was measured {few}." for few in negated),
        *([f"- Settings at the end of their grid: {'; '.join(ends)}."] if ends else []),
        *([f"- Rows with fewer seeds than the first: {', '.join(partly)}."] if partly else []),
    ]
    return ["What is missing:", "", *said, ""] if said else []


def diagnosed() -> list[str]:
    """What `make diagnose` found in the vectors of the first seed."""
    found: dict[str, list[str]] = {}
    for folder in sorted(DIAGNOSTICS.iterdir()) if DIAGNOSTICS.is_dir() else []:
        if not (folder / "tau_jp.json").is_file():
            continue
        jp, kernel = load_result(Interference, folder / "tau_jp.json"), load_result(KernelTest, folder / "kernel.json")
        known = jp.correlations[0].spearman
        found[folder.name] = [
            f"{mean(pair.tau_jp for pair in jp.pairs):.3f}",
            f"{mean(abs(pair.cosine) for pair in jp.pairs):.3f}",
            f"{100 * mean(pair.normalised for pair in jp.pairs):.1f}",
            "–" if known is None else f"{known:+.2f}",
            f"{mean(row.error for row in kernel.rows):.2f}",
            f"{100 * mean(row.nonlinear.value for row in kernel.rows):.1f}",
            f"{100 * mean(row.linearised.value for row in kernel.rows):.1f}",
        ]
    if not found:
        return []
    errors = []
    for name in found:
        for path in sorted((DIAGNOSTICS / name).glob("disentanglement-*.json")):
            one = load_result(Disentanglement, path)
            inside = [
                one.error[i][j] for i, a in enumerate(one.grid) for j, b in enumerate(one.grid) if 0 <= a <= 1 and 0 <= b <= 1
            ]
            every = [value for row in one.error for value in row]
            errors.append(
                [f"{name}, {' and '.join(one.tasks)}", f"{mean(inside):.3f}", f"{mean(every):.3f}", str(min(one.n.values()))]
            )
    head = ["paradigm", "τJp", "cosine, abs.", "pairs keep", "Spearman", "relative error", "model", "linear form"]
    return [
        "## Interference and kernel behaviour",
        "",
        "`make diagnose`, first seed, at most 100 test examples a task, so all of it is coarse. τJp and the absolute cosine are means over pairs of "
        "tasks, *pairs keep* the normalised accuracy of the sums of two vectors, *Spearman* the correlation of τJp with it over the pairs "
        "(negative: the paper's Fig. 2). *Relative error* is ‖f − f₀ − Jτ‖ / ‖f − f₀‖ of each task's model, beside its accuracy in the "
        "model and in the linear form (the attention-only paper's test of kernel behaviour).",
        "",
        *table(head, [[name, *cells] for name, cells in found.items()]),
        *(
            [
                "Weight-disentanglement error at the classifier (sum of both tasks' disagreement, means over the grid of [−2, 2]²):",
                "",
                *table(["vectors", "α in 0..1", "all", "n a task"], errors),
            ]
            if errors
            else []
        ),
    ]


def left_out(results: ParadigmResults) -> list[str]:
    """A task whose vector is not added: does the sum of the others hurt it?"""
    rows = []
    for name in results.names():
        found = [one for row in results.of(name) for one in row.left_out]
        kept = [row.others_kept for row in results.of(name) if row.others_kept is not None]
        if found:
            rows.append(
                [
                    name,
                    spread([mean(one.base.value for one in found)]),
                    spread([mean(one.merged.value for one in found)]),
                    spread(kept),
                ]
            )
    if not rows:
        return []
    return [
        "## A task left out",
        "",
        "The sum of the other tasks' vectors, at their α, on the task that is not among them; and what a single vector at α = 1 keeps of "
        "the pre-trained model's accuracy on the other tasks. Percent, means over tasks.",
        "",
        *table(["paradigm", "pre-trained", "others added", "others keep"], rows),
    ]


def trace(results: ParadigmResults) -> list[str]:
    """Continued training, step by step."""
    rows = [row for row in results.rows if row.trace]
    if not rows:
        return []
    steps = [point.step for point in rows[0].trace]
    absolute, relative = (
        [[getattr(row.trace[i], kind) for row in rows] for i in range(len(steps))] for kind in ("absolute", "normalised")
    )
    return [
        "## τJp from an existing linear vector",
        "",
        "One-shot addition after some steps of continued training with the penalty (Fig. 3 of the τJp paper).",
        "",
        *table(
            ["step", *map(str, steps)],
            [
                ["accuracy", *map(spread, absolute)],
                ["normalised", *map(spread, relative)],
                ["τJp", *(_interference([row.trace[i].tau_jp for row in rows]) for i in range(len(steps)))],
            ],
        ),
    ]


def _interference(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{mean(found):.4f}" if found else "–"


def main() -> None:
    """Write the page and its chart."""
    results = load_paradigm_results(RESULTS)
    PAGE.write_text(page(results), encoding="utf-8")
    alpha_chart(alpha_curves(results), CHART)
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}, {CHART.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
