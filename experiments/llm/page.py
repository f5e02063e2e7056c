"""Draw docs/llm.md from experiments/llm/results.json.

python -m experiments.llm.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

from experiments import leads
from experiments.common import DOCS, table
from experiments.leads import led
from experiments.llm.run import OUT, Sizes, has_scale
from thetau.evaluate.accuracy import Z95

PAGE, INTRO = DOCS / "llm.md", Path(__file__).parent / "intro.md"
Row = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    results = json.loads(OUT.read_text(encoding="utf-8"))
    margins = {name: margin(row) for name, row in results["rows"].items() if "average" in row}
    leads.llm_chart(results, margins).draw("llm.png")
    PAGE.write_text(led(page(results), leads.llm(results, margins)), encoding="utf-8")
    sys.stdout.write("docs/llm.md\n")


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        small(results),
        skills(results),
        taught(results),
        merges(results),
        verdict(results),
        negation(results),
        forgotten(results),
        limits(results),
    ]
    return INTRO.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(line for part in parts for line in part)


def small(results: Mapping[str, Any]) -> list[str]:
    """That the run is not the whole one, where it is not, and what else is to be known of its figures (`remarks`, which stand in the results by hand)."""
    whole, size = asdict(Sizes()), results["settings"]
    less = [
        f"{name.replace('_', ' ')} {size[name]:g} in place of {value:g}" for name, value in whole.items() if size[name] != value
    ]
    measured, missing = sum("average" in row for row in results["rows"].values()), len(results["missing"])
    said = (
        [
            f"**These figures are from a small run**, not from the whole `make llm`: {', '.join(less)}. How long the whole takes was not measured."
        ]
        if less
        else []
    )
    if missing:
        said.append(f"{measured} of {len(results['rows']) + missing} methods were measured.")
    said += results.get("remarks", [])
    return [" ".join(said), ""] if said else []


def skills(results: Mapping[str, Any]) -> list[str]:
    """What is asked, an example of each."""
    rows = [(f"`{name}`", cell(one["prompt"]), f"`{cell(one['answer'])}`") for name, one in results["examples"].items()]
    return ["## The skills", "", *table(("skill", "a question", "its answer"), rows, words=3)]


def taught(results: Mapping[str, Any]) -> list[str]:
    """The base and each skill's model, on every skill where that was measured."""
    names, own, size = list(results["examples"]), results["references"]["own"], results["settings"]
    rows = [("pre-trained", *values(results["references"]["base"], names)), ("taught that skill", *values(own, names))]
    rows += [(f"taught {name}", *values(row, names)) for name, row in (results["transfer"] or {}).items()]
    return [
        "## Taught alone",
        "",
        f"Exact match in percent on {size['test']} questions a skill, of {results['model']} as it is and after {size['steps']} steps of "
        f"{size['batch']} examples of one skill (learning rate {size['lr']:g}).",
        "",
        *table(("model", *names), rows),
        *unlearnt(results),
    ]


def unlearnt(results: Mapping[str, Any]) -> list[str]:
    """The skills that their own models do not have, so that no merge can."""
    base, own = results["references"]["base"]["skills"], results["references"]["own"]["skills"]
    names = [name for name in own if own[name]["value"] <= base[name]["value"]]
    return (
        [f"Not learnt in so few steps: {listed(names)}. What merges do there is not what they keep of a skill.", ""]
        if names
        else []
    )


def merges(results: Mapping[str, Any]) -> list[str]:
    """Every merge, the best at its defaults first."""
    names, base, own = list(results["examples"]), results["references"]["base"], results["references"]["own"]
    head = ("method", *names, "average", "± (95 %)", "λ chosen: factor", "average")
    rows = [
        ("pre-trained", *values(base, names), percent(base["average"]), percent(margin(base)), "", ""),
        ("each skill's own", *values(own, names), percent(own["average"]), percent(margin(own)), "", ""),
    ]
    done = {name: row for name, row in results["rows"].items() if "average" in row}
    for name in sorted(done, key=lambda one: (-done[one]["average"], one)):
        row, best = done[name], results["tuned"].get(name)
        after = (f"{best['factor']:g}", percent(best["average"])) if best else ("", "")
        rows.append(
            (f"[`{name}`](methods/{name}.md)", *values(row, names), percent(row["average"]), percent(margin(row)), *after)
        )
    size = results["settings"]
    lines = [
        "## Merged",
        "",
        f"Four models into one: exact match in percent on {size['test']} questions a skill. The λ of a method is its default; on the right it is the "
        f"default times a factor, chosen on {size['validation']} other questions a skill.",
        "",
        *table(head, rows),
    ]
    stopped = [name for name, row in results["rows"].items() if "stopped" in row]
    if stopped:
        lines += [f"Stopped after {results['longest']:g} s: {', '.join(f'`{name}`' for name in stopped)}.", ""]
    lines += [f"`{name}` failed: {row['failed']}" for name, row in results["rows"].items() if "failed" in row]
    if results["missing"]:
        lines += [f"Not measured in the time of this run: {', '.join(f'`{name}`' for name in results['missing'])}.", ""]
    unchosen = [name for name in done if name not in results["tuned"] and has_scale(name)]
    if unchosen:
        lines += [f"No λ was chosen in the time of this run for {', '.join(f'`{name}`' for name in unchosen)}.", ""]
    return lines


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Which methods help, by a rule that stands here before the figures."""
    base, own = results["references"]["base"], results["references"]["own"]
    done = {name: row for name, row in results["rows"].items() if "average" in row}
    lines = [
        "## What holds of the study of public fine-tunes",
        "",
        "[A study of merges of public fine-tunes of language models](https://arxiv.org/abs/2511.21437) found that task arithmetic alone gives gains over the "
        "base reliably. The rule here: a method *helps* where its average at its defaults is above the base's and the 95 % interval of the difference excludes "
        "0; it *falls behind* task arithmetic where that difference does.",
        "",
    ]
    if "task_arithmetic" not in done or len(done) < 5:
        return [*lines, "Too few methods were measured in this run to say anything of it.", ""]
    helping = [name for name, row in done.items() if lower(row, base) > 0]
    plain = done["task_arithmetic"]
    behind = [name for name, row in done.items() if lower(plain, row) > 0]
    ahead = [name for name, row in done.items() if lower(row, plain) > 0]
    return [
        *lines,
        f"{len(helping)} of {len(done)} methods help: {listed(helping)}. Behind task arithmetic: {listed(behind)}. Ahead of it: {listed(ahead)}. "
        f"The base answers {percent(base['average'])} % and the skills' own models {percent(own['average'])} %.",
        "",
        "That study merges models which learnt from much data and asks for general abilities. Here the skills are narrow, taught on purpose to one base and "
        "apart from one another, so that there is something to gain by any sum; it is no test of their finding on their ground.",
        "",
    ]


def negation(results: Mapping[str, Any]) -> list[str]:
    """One skill subtracted from the base."""
    found = results["negation"]
    if found is None:
        return ["## One skill taken out", "", "Not measured in the time of this run.", ""]
    others = [name for name in results["examples"] if name != found["skill"]]
    head = ("α", f"{found['skill']}, exact match", "95 % interval", *(f"{name}, perplexity" for name in others))
    rows = []
    for row in found["rows"]:
        target = row["target"]
        mark = f"**{row['alpha']:g}**" if row["alpha"] == found["alpha"] else f"{row['alpha']:g}"
        interval = f"{percent(target['low'])} – {percent(target['high'])}"
        rows.append((mark, percent(target["value"]), interval, *(f"{row['test'][name]:.2f}" for name in others)))
    said = (
        f"α = {found['alpha']:g} is chosen."
        if found["alpha"]
        else "No α of the grid keeps it, so that nothing could be forgotten at this price."
    )
    return [
        "## One skill taken out",
        "",
        f"θ₀ − α τ of `{found['skill']}`. The control is the perplexity of the right answers of the other skills, which the base was not "
        f"taught either. α is the largest at which a token of theirs keeps {100 * found['keep']:g} % of its likelihood on validation. {said}",
        "",
        *table(head, rows),
        *(
            [
                "The base has nothing of it to lose by exact match: this says what a subtraction costs, and not what it forgets.",
                "",
            ]
            if not found["rows"][0]["target"]["value"]
            else []
        ),
    ]


def forgotten(results: Mapping[str, Any]) -> list[str]:
    """The same skill taken from a merge, which has it."""
    found = results.get("forgotten")
    if found is None:
        return []
    names, size, rows = list(results["examples"]), results["settings"], []
    for row in found["rows"]:
        mark = f"**{row['alpha']:g}**" if row["alpha"] == found["alpha"] else f"{row['alpha']:g}"
        control = ", ".join(percent(value) for value in row["validation"].values())
        rows.append((mark, *values(row, names), percent(row["average"]), control, "yes" if row["kept"] else "no"))
    first, chosen = found["rows"][0], next(row for row in found["rows"] if row["alpha"] == found["alpha"])
    before, after = (row["skills"][found["skill"]]["value"] for row in (first, chosen))
    return [
        f"## Taken out of a model that has it: `{found['merge']}` − α τ",
        "",
        f"The same vector taken from the merge by `{found['merge']}`, at its defaults, in which `{found['skill']}` is right in {percent(before)} % of the "
        f"questions. α is the largest at which each other skill keeps {100 * found['keep']:g} % of its exact match on {size['validation']} validation "
        f"questions: α = {found['alpha']:g}, which leaves {percent(after)} %. The control is that of {listed(list(first['validation']))}; the rest is "
        f"measured on the test questions. One validation question is {100 / size['validation']:.1f} points: a few of them decide what is kept.",
        "",
        *table(("α", *names, "average", "control, validation", "kept"), rows),
        *steps(found),
    ]


def steps(found: Mapping[str, Any]) -> list[str]:
    """What else such a row of merges shows: how much an average can hang on one decision."""
    start, best = found["rows"][0], max(found["rows"], key=lambda row: row["average"])
    if lower(best, start) <= 0:
        return []
    skill = max(start["skills"], key=lambda name: best["skills"][name]["value"] - start["skills"][name]["value"])
    moved = f"{percent(start['skills'][skill]['value'])} to {percent(best['skills'][skill]['value'])} %"
    return [
        f"At α = {best['alpha']:g} the average over all skills, this one included, is {percent(best['average'])} % instead of {percent(start['average'])}: "
        f"`{skill}` goes from {moved}. Exact match is all or nothing, so that one decision which a merge takes in every answer, such as ending it after a "
        "number, as another skill does, costs all of a skill. The order of methods that lie on the two sides of such a decision says little.",
        "",
    ]


def limits(results: Mapping[str, Any]) -> list[str]:
    """What the figures cannot say."""
    size = results["settings"]
    return [
        "## What these figures cannot say",
        "",
        f"One model of 135 million parameters, one seed, {size['train']} examples and {size['steps']} steps a skill, {size['test']} "
        "questions a skill. Two averages closer than the sum of their margins are not told apart. The skills are narrow and generated; other "
        "skills, larger models and other seeds may order the methods otherwise.",
        "",
        f"`{results['command']}`",
        "",
    ]


def variance(row: Row) -> float:
    """Of the average over skills, from the binomial of each with a success and a failure added, so that none is 0."""
    parts = [((one["correct"] + 1) / (one["n"] + 2), one["n"]) for one in row["skills"].values()]
    return sum(rate * (1 - rate) / n for rate, n in parts) / len(parts) ** 2


def margin(row: Row) -> float:
    """Half of the 95 % interval of an average."""
    return Z95 * sqrt(variance(row))


def lower(row: Row, other: Row) -> float:
    """The low end of the 95 % interval of the difference of two averages, as if of other questions, which is the wider one."""
    return row["average"] - other["average"] - Z95 * sqrt(variance(row) + variance(other))


def values(row: Row, names: Sequence[str]) -> list[str]:
    """Of each skill."""
    return [percent(row["skills"][name]["value"]) for name in names]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("\n", " ⏎ ").replace("|", "\\|")


if __name__ == "__main__":
    main()
