"""docs/everyday.md: the three recipes, and what they did to a real model.

python -m experiments.everyday.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import DOCS, table
from experiments.everyday.run import OUT

PAGE, INTRO = DOCS / "everyday.md", Path(__file__).parent / "intro.md"
Row = Mapping[str, Any]


def main() -> None:
    """Write the page from the results."""
    PAGE.write_text(page(json.loads(OUT.read_text(encoding="utf-8"))), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.name}\n")


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [measured(results), forgetting(results["forgetting"]), chat(results["chat_vector"]), restoring(results["restoring"])]
    return INTRO.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(line for part in parts for line in part)


def measured(results: Mapping[str, Any]) -> list[str]:
    """What was run."""
    sizes, asked = results["sizes"], results["restoring"][0]["sentiment"]["n"]
    return [
        "## On a real model",
        "",
        "```",
        "make everyday   # the models of `make llm` are taken, and made where they are not there",
        "```",
        "",
        "SmolLM2-135M-Instruct and the [skills of `make llm`](llm.md), each recipe as it stands above with other weights, by "
        f"`thetau merge`. At most {sizes['test']} texts for a perplexity, {asked} questions for an exact match; "
        f"in brackets the 95 % interval. Spam and the language were learnt in {sizes['steps']} steps of {sizes['batch']} texts (learning rates "
        f"{sizes['lr']:g} and {10 * sizes['lr']:g}), the harmless fine-tune in {sizes['harmless_steps']}. One base, one seed.",
        "",
    ]


def forgetting(found: Mapping[str, Any]) -> list[str]:
    """The style taken out."""
    names = list(found["unwanted"])
    lines = table(
        ["model", *(f"{name}, perplexity" for name in names), "controls keep 95 %"],
        [
            ("trained on spam", *values(found["unwanted"], names), ""),
            *(
                (
                    f"**α = {row['alpha']:g}**" if row["alpha"] == found["alpha"] else f"α = {row['alpha']:g}",
                    *values(row["test"], names),
                    "yes" if row["kept"] else "no",
                )
                for row in found["rows"]
            ),
        ],
        words=1,
    )
    start, chosen = found["rows"][0]["test"], next(row for row in found["rows"] if row["alpha"] == found["alpha"])["test"]
    change = {name: 100 * (chosen[name]["value"] / start[name]["value"] - 1) for name in names}
    if found["alpha"]:
        told = (
            f"At α = {found['alpha']:g}, the largest that keeps the controls on validation, spam's perplexity is {change['spam']:+.0f} %, "
            + ", ".join(f"that of {name} {value:+.0f} %" for name, value in change.items() if name != "spam")
        )
    else:
        told = "No α of the grid keeps the controls on validation, so that nothing could be forgotten at this price"
    return [
        "### A style forgotten",
        "",
        "Short messages that are spam (`sms_spam`) are the unwanted style. The model was trained on their text, and the vector "
        "subtracted. Honest messages of the same source and texts of an encyclopedia (`dbpedia_topic`) are the controls.",
        "",
        *lines,
        f"{told}.",
        "",
    ]


def chat(rows: Sequence[Row]) -> list[str]:
    """The chat vector."""
    by = {row["name"]: row for row in rows}
    whole = by["continued + 1 · chat vector"]
    told = (
        f"The continued model answers {percent(by['continued']['extraction'])} of the questions; with the whole chat vector "
        f"{percent(whole['extraction'])}, where the chat model itself has {percent(by['chat']['extraction'])}. The language's perplexity goes from "
        f"{by['continued']['velan']['value']:.2f} to {whole['velan']['value']:.2f} (the base: {by['base']['velan']['value']:.0f})."
    )
    return [
        "### A chat vector added",
        "",
        "The base was continued on sentences of the invented language alone. The chat model is the base taught "
        "`extraction` (orders as JSON, through the chat template).",
        "",
        *shown(
            rows,
            {"extraction": "extraction, exact match", "velan": "Velan, perplexity", "encyclopedia": "encyclopedia, perplexity"},
        ),
        told,
        "",
    ]


def restoring(rows: Sequence[Row]) -> list[str]:
    """RESTA."""
    by = {row["name"]: row for row in rows}
    best = max(
        (row for row in rows if "safety" in row["name"]), key=lambda row: (row["sentiment"]["value"], row["extraction"]["value"])
    )
    told = f"The harmless fine-tune takes `sentiment` from {percent(by['aligned']['sentiment'])} to {percent(by['finetuned']['sentiment'])}. "
    if best["sentiment"]["low"] > by["finetuned"]["sentiment"]["high"]:
        told += f"{best['name']} has {percent(best['sentiment'])} of it and {percent(best['extraction'])} of `extraction`."
    else:
        told += "No γ of the grid brings it back, and the texts' perplexity grows with γ."
    return [
        "### What a fine-tune lost, restored",
        "",
        "`sentiment` stands for the alignment here: a stand-in that can be measured with a model this small, and no statement on safety. "
        "The harmless fine-tune of that model is on `extraction`.",
        "",
        *shown(
            rows,
            {
                "sentiment": "sentiment, exact match",
                "extraction": "extraction, exact match",
                "encyclopedia": "encyclopedia, perplexity",
            },
        ),
        told,
        "",
    ]


def shown(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """A table of models."""
    return table(["model", *columns.values()], [(row["name"], *values(row, list(columns))) for row in rows])


def values(row: Row, names: Sequence[str]) -> list[str]:
    """Cells with intervals: shares in percent, perplexities as they are."""
    cells = []
    for name in names:
        one = row[name]
        share = 100 if one["high"] <= 1 else 1
        cells.append(f"{share * one['value']:.1f} ({share * one['low']:.1f} – {share * one['high']:.1f})")
    return cells


def percent(one: Row) -> str:
    """A share."""
    return f"{100 * one['value']:.0f} %"


if __name__ == "__main__":
    main()
