"""Draw docs/doctor.md from experiments/doctor/*.json and prose.md.

python -m experiments.doctor.page
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Mapping
from statistics import mean
from typing import Any

from experiments import leads
from experiments.common import DOCS, EXPERIMENTS, table
from experiments.leads import led
from thetau.diagnostics.predictions import wilson

HERE = EXPERIMENTS / "doctor"
PAGE = DOCS / "doctor.md"
POINT = 0.01  # as in the study
CALLED = {"danger": "what j does to i (printed)", "examples": "√τJp on validation examples (`--task`)"}
ENOUGH = 20  # trials from which a verdict is given
SETS = {"demo": "the demo's tasks", "held-out": "held-out tasks"}


def prose() -> dict[str, str]:
    """The sections of prose.md by their names."""
    parts = re.split(r"<!-- ([a-z ]+) -->\n", (HERE / "prose.md").read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def drawn(result: Mapping[str, Any], study: Mapping[str, Any] | None) -> str:
    """The page."""
    said, demo = prose(), result["demo"]
    real = result["continuation"] == "fine-tuned further"
    continuation = "the continuation was fine-tuned further on another task" if real else "the continuation is made by arithmetic"
    findings = [
        [f"`{one['kind']}`", ", ".join(one["models"]), html.escape(one["sentence"], quote=False)]
        for one in result["family"]["findings"]
    ]
    lines = [
        said["intro"],
        *advice(demo),
        "",
        said["harms"].format(seconds=demo["seconds"]),
        *harms(demo),
        said["harms after"],
        *on_examples(result, said),
        said["family"].format(continuation=continuation),
        *table(["finding", "models", "what it says"], findings, words=3),
        said["rules"].rstrip("\n"),
        "",
    ]
    if study is not None:
        limits, tasks = study["limits"], ", ".join(study["sets"]["held-out"]["tasks"])
        lines.append(said["study"].format(command=study["command"], tasks=tasks, **limits))
        lines += [
            *predictors(study["sets"]),
            *costs(study["sets"]),
            "",
            said["subsets"],
            *subsets(study["sets"]),
            *hits(study["hits"], study["sets"]),
        ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def advice(found: Mapping[str, Any]) -> list[str]:
    """As the terminal shows it."""
    lines = ["```"]
    for number, one in enumerate(found["advice"], 1):
        lines += [f"{number}. {one['topic']}: {one['sentence']}", f"   why: {one['evidence']}"]
        lines += [f"   but: {one['uncertainty']}"] if one["uncertainty"] else []
        rate = one["measured"]
        if rate is not None:
            interval = f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f} %"
            lines.append(f"   tried: right in {rate['hits']} of {rate['n']} ({interval}): {rate['what']}")
    return [*lines, "```"]


def harms(found: Mapping[str, Any]) -> list[str]:
    """A row a merge."""
    rows = [
        [
            f"`{one['method']}`" + ("" if one["scale"] is None else f", λ = {one['scale']:.2f}"),
            *(f"{value:.2f}" for value in one["whole"]),
            f"{mean(one['whole']):.2f}",
        ]
        for one in found["harms"]
    ]
    return table(["merge", *found["staying"], "mean"], rows)


def on_examples(result: Mapping[str, Any], said: Mapping[str, str]) -> list[str]:
    """What `--task` adds, where it was measured."""
    found, names = result.get("examples"), result["demo"]["compared"]
    if found is None:
        return []
    tasks = found["tasks"]
    own = {one["task"]: one["tau_jp"][names.index(one["own"])] for one in tasks}
    rows = [[name, *(f"{(one['tau_jp'][i] / own[one['task']]) ** 0.5:.2f}" for one in tasks)] for i, name in enumerate(names)]
    changes = [
        ["base's loss", *(f"{one['base_loss']:.3f}" for one in tasks)],
        *([f"loss of {name}", *(f"{one['loss'][i]:.3f}" for one in tasks)] for i, name in enumerate(names)),
        ["1 − cos x, own model", *(f"{one['direction'][names.index(one['own'])]:.3f}" for one in tasks)],
        ["Δ‖x‖/‖x‖, own model", *(f"{one['magnitude'][names.index(one['own'])]:+.3f}" for one in tasks)],
    ]
    first = next(one for one in found["advice"] if one["sentence"].startswith("On examples"))
    heads = [one["task"] for one in tasks]
    return [
        said["examples"].format(seconds=found["seconds"], n=min(one["n"] for one in tasks), advice=first["sentence"]),
        *table(["√τJp over own's", *heads], rows),
        "",
        *table(["", *heads], changes),
        "",
        said["examples after"],
    ]


def shown(sets: Mapping[str, Any]) -> dict[str, str]:
    """The sets that were measured, and what they are called."""
    return {name: said for name, said in SETS.items() if name in sets}


def predictors(sets: Mapping[str, Any]) -> list[str]:
    """A row a figure."""
    rows = []
    for word in sets["held-out"]["conflict"]["predictors"]:
        cells = [CALLED.get(word, word)]
        for name in shown(sets):
            one = sets[name]["conflict"]["predictors"][word]
            cells += [signed(one["spearman_loss"]), signed(one["spearman_accuracy"]), f"{one['hits']} of {one['n']}"]
        rows.append(cells)
    return table(["figure", *(f"{said}: {what}" for said in shown(sets).values() for what in ("loss", "accuracy", "hits"))], rows)


def costs(sets: Mapping[str, Any]) -> list[str]:
    """How much there was to predict."""
    said = []
    for name, called in shown(sets).items():
        rises = [row["rise"] for row in sets[name]["conflict"]["pairs"]]
        lost = [100 * row["lost"] for row in sets[name]["conflict"]["pairs"]]
        said.append(
            f"Of {called} a partner raised the loss by {mean(rises):.3f} on average ({min(rises):.3f} to {max(rises):.3f}) and cost {mean(lost):.1f} points "
            f"of accuracy ({min(lost):.1f} to {max(lost):.1f})."
        )
    return said


def subsets(sets: Mapping[str, Any]) -> list[str]:
    """A row a subset."""
    rows = []
    for name in shown(sets):
        for row in sets[name]["subsets"]:
            values = (row[key] for key in ("at_scale", "at_validated", "at_one", "wudi", "bilateral"))
            told = [f"{row['scale']:.2f}", f"{row['validated']:g}"]
            rows.append([", ".join(row["tasks"]), *told, *(f"{100 * value:.1f}" for value in values)])
    return table(
        ["models", "λ told", "λ by validation", "at λ told", "at λ by validation", "at λ = 1", "wudi", "bilateral"], rows
    )


def hits(found: Mapping[str, Any], sets: Mapping[str, Any]) -> list[str]:
    """What the doctor prints, and whether the interval excludes a coin."""
    rows = []
    for word, one in found.items():
        low, high = wilson(one["hits"], one["n"])
        verdict = "no better than a coin" if low <= 0.5 else "better than a coin" if one["n"] >= ENOUGH else "too few to call"
        rows.append([word, one["what"], f"{one['hits']} of {one['n']}", f"{100 * low:.0f} to {100 * high:.0f} %", verdict])
    return [
        "On the held-out tasks:",
        "",
        *table(["advice", "a hit", "hits", "95 % interval", "verdict"], rows, words=2),
        *beside(sets),
        "Pairs and subsets of one set share their models, so that they count for less than their number says: the true intervals are wider.",
        "",
    ]


def beside(sets: Mapping[str, Any]) -> list[str]:
    """The same of the first set, which the rules were chosen on."""
    if "demo" not in sets:
        return []
    found, rows = sets["demo"]["conflict"]["predictors"], sets["demo"]["subsets"]
    danger, examples = found["danger"], found.get("examples")
    scale = sum(row["at_scale"] >= row["at_validated"] - POINT for row in rows)
    method = sum(row["bilateral"] > row["at_validated"] for row in rows)
    told = (
        f"{danger['hits']} of {danger['n']} for conflict, "
        + ("" if examples is None else f"{examples['hits']} of {examples['n']} for examples, ")
        + f"{scale} of {len(rows)} for scale and {method} of {len(rows)} for method"
    )
    return [f"On the demo's own tasks it was {told}."]


def signed(value: float | None) -> str:
    """A correlation."""
    return "–" if value is None else f"{value:+.2f}"


def main() -> None:
    """Write the page."""
    study = HERE / "study.json"
    result = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    told = json.loads(study.read_text(encoding="utf-8")) if study.is_file() else None
    text = drawn(result, told)
    if told is not None:
        intervals = {word: wilson(one["hits"], one["n"]) for word, one in told["hits"].items()}
        leads.doctor_chart(told, intervals).draw("doctor.png")
        text = led(text, leads.doctor(told, intervals))
    PAGE.write_text(text, encoding="utf-8")
    sys.stdout.write("docs/doctor.md\n")


if __name__ == "__main__":
    main()
