"""Draw the section of docs/adapters.md on merges of LoRA adapters from experiments/adapters/lora.json, the verdicts included.

    python -m experiments.adapters.page

What the file lacks is said to be missing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from experiments import leads
from experiments.adapters.lora import DEFAULT, RESULTS, difference, merges
from experiments.common import DOCS, ROOT, table

PAGE = DOCS / "adapters.md"
Content = Mapping[str, Any]


def drawn(content: Content) -> str:
    """The section, from the first heading to the last table."""
    return "\n".join([*_head(content), *_why(content), *_choice(content), *_rows(content)]).strip()


def _head(content: Content) -> list[str]:
    s = content["settings"]
    whole = any("why" in group for group in content["groups"].values())  # a run of parts leads with nothing
    return [
        "## Which merge of adapters, and why",
        "",
        *(leads.section(leads.adapters(content)) if whole else []),
        f"Measured by `{content['command']}` on {len(s['tasks'])} tasks of the text suite ({', '.join(s['tasks'])}) with {s['backbone']}: one "
        f"adapter a task, of rank 8 on every matrix of the blocks. The fine-tunes are smaller than the suite's: {s['steps']} steps of "
        f"{s['batch_size']} examples, texts cut at {s['max_length']} tokens, learning rate {s['lr']:g}; {s['validation']} validation and {s['test']} "
        "test examples a task. Accuracies are relative to each task's own adapter, in percent, means over tasks.",
        "",
    ]


def _why(content: Content) -> list[str]:
    lines = ["### Rows of an adapter are no sample of inputs", ""]
    found = {name: group["why"] for name, group in content["groups"].items() if "why" in group}
    shared = next((why for name, why in found.items() if name.startswith("shared")), None)
    if shared is None:
        return [*lines, "Not measured yet.", ""]
    own = next((why for name, why in found.items() if name.startswith("own")), None)
    lines += [
        "WUDI, and `bilateral` on half of the matrices, take the rows of a task vector for a sample of the layer's inputs. The rows of B·A are those of A. "
        "A starts at random and moves little, while B starts at zero: all that B holds was learned. How far two tasks' adapters span the same space, "
        "‖QᵢᵀQⱼ‖² / r, and what share of a task's measured inputs and output gradients lies in its own adapter's span:",
        "",
    ]
    spans, share = shared["overlaps"], shared["captured"]
    head = ["", "rows of A, inputs", "columns of B, output gradients"]
    body = [["overlap of two tasks, adapters of one seed", _three(spans["rows of A"]), _three(spans["columns of B"])]]
    if own is not None:
        body += [
            [
                "overlap of two tasks, adapters of other seeds",
                _three(own["overlaps"]["rows of A"]),
                _three(own["overlaps"]["columns of B"]),
            ]
        ]
    body += [
        ["overlap of random spans", _three(spans["chance, rows"]), _three(spans["chance, columns"])],
        *(
            [label, _three(share[f"inputs, {key}"]), _three(share[f"gradients, {key}"])]
            for label, key in (
                ("share in the task's own span", "own"),
                ("share in another task's span", "other"),
                ("share in a random span", "chance"),
                ("share in the best span of that rank", "best"),
            )
        ),
    ]
    lines += table(head, body)
    ratio = {side: share[f"{side}, own"] / share[f"{side}, other"] for side in ("inputs", "gradients")}
    lines += [
        f"On the inputs' side a task's own span holds {ratio['inputs']:.2f} times what another task's holds; on the outputs' side, {ratio['gradients']:.2f} "
        "times. So outputs tell tasks apart, and inputs hardly do.",
        "",
        "The rest is algebra. Adapters have few directions together, K·r ≤ d. Where these are independent, WUDI's loss can be made 0: each task's matrix is "
        "kept exactly on its own rows, whatever the weights of the directions. The estimated Gram matrix then says nothing but which rows there are. If every "
        "task has rows of its own, orthogonal to the others', the minimum is the plain sum; if all share one A, it is their mean (a test has both). "
        "Rows that are nearly shared are worst, since small differences between nearly equal rows are divided by:",
        "",
    ]
    body = []
    for name, why in found.items():
        what = "one seed" if name.startswith("shared") else "seeds in turns"
        for side in ("inputs' side", "outputs' side"):
            body.append(
                [
                    f"WUDI's minimum by the {side}, {what}",
                    f"{why['sum'][f'{side}, cosine']:.2f}",
                    f"{why['sum'][f'{side}, multiple'] / why['sum'][f'{side}, cosine']:.1f}",
                ]
            )
    lines += table(["", "cosine with the sum", "length over the sum's"], body)
    gap = max(abs(why["sum"]["inputs' side, cosine"] - why["sum"]["inputs' side, isotropic, cosine"]) for why in found.values())
    lines += [
        f"With all seen directions weighed alike instead of by the Gram matrix, the cosine differs by {gap:.0e}: the Gram matrix had no say.",
        "",
    ]
    return lines


def _choice(content: Content) -> list[str]:
    lines = ["### How the default was chosen", ""]
    if "choice" not in content:
        return [*lines, "Not measured yet.", ""]
    choice = content["choice"]
    tried = sum(len(row) for row in choice["rows"].values())
    lines += [
        "`clear` keeps the outputs of different tasks apart (a damped dual basis of the B's), makes the inputs' directions orthogonal as TSV-M does, and "
        "sets the length from the adapters: rms ‖Δ_t‖ / √c, c being the merge's mean cosine with the tasks' vectors. It was chosen on validation data "
        f"of the first seed alone ({choice['validation']} examples a task, {len(choice['rows'])} kinds of merges, {tried} settings; neighbours differ by "
        "chance). The best λ of each kind; *full*: λ multiplies the length at which the merge holds every task's vector in full, on average; "
        "*said*: it multiplies `clear`'s length.",
        "",
    ]
    best = {name: max(row.items(), key=lambda pair: pair[1]["normalised"]) for name, row in choice["rows"].items() if row}
    ordered = sorted(best.items(), key=lambda pair: -pair[1][1]["normalised"])
    return [
        *lines,
        *table(
            ["merge", "normalised", "loss", "λ", "λ's tried"],
            [
                [name, f"{100 * one['normalised']:.1f}", f"{one['loss']:.3f}", scale, ", ".join(choice["rows"][name])]
                for name, (scale, one) in ordered
            ],
        ),
    ]


def _rows(content: Content) -> list[str]:
    groups = {name: group for name, group in content["groups"].items() if DEFAULT in group["rows"]}
    lines = ["### Against tuned merges", ""]
    if not groups:
        return [*lines, "Not measured yet.", ""]
    first = next(iter(groups))
    others = [name for name in groups if name != first]
    lines += [
        f"Test data. λ of the tuned rows was chosen on validation data of `{first}`, as the default was; so the other seeds are the test of both. The last two "
        "columns are `clear` minus the row, in points, with an interval of 95 % that draws tasks and seeds anew: over the other seeds, and over all. "
        "*better*: the interval lies above 0; *worse*: below; *level*: it holds 0.",
        "",
    ]
    names = list(dict.fromkeys(name for group in groups.values() for name in group["rows"]))
    cells = []
    for name in names:
        having = [one for one in groups if name in groups[one]["rows"]]
        value = mean(groups[one]["rows"][name]["normalised"] for one in having)
        scale = groups[first]["rows"].get(name, {}).get("scale")
        label = f"**{name}**" if name == DEFAULT else name
        by_group = [f"{100 * groups[one]['rows'][name]['normalised']:.1f}" if one in having else "" for one in groups]
        told = ["", ""] if name == DEFAULT else [_told(groups, name, others), _told(groups, name, list(groups))]
        cells.append((value, [label, f"{scale:g}" if "tuned" in name and scale else "", *by_group, *told]))
    cells.sort(key=lambda pair: -pair[0])
    lines += table(["merge", "λ", *(_named(name) for name in groups), "other seeds", "all seeds"], [row for _, row in cells])
    missing = [entry.name for entry in merges() if entry.name not in names]
    if not any(name.startswith("own") for name in groups):
        missing.append("adapters of mixed seeds")
    return [*lines, *_verdict(groups, names, others), *([f"Not measured yet: {', '.join(missing)}.", ""] if missing else [])]


def _verdict(groups: Mapping[str, Any], names: Sequence[str], others: Sequence[str]) -> list[str]:
    tuned = [name for name in names if "tuned" in name]
    judged = others or list(groups)
    found = {name: _compared(groups, name, judged) for name in tuned}
    told = {name: one for name, one in found.items() if one is not None}
    worse = [name for name, one in told.items() if one["high"] < 0]
    better = [name for name, one in told.items() if one["low"] > 0]
    level = [name for name in told if name not in worse and name not in better]
    where = "the other seeds" if others else "the first seed alone"
    said = [f"On {where} (seeds: {len(judged)}; with so few, mostly tasks are drawn), `clear`, with nothing tuned, is"]
    parts = []
    for word, listed in (("better than", better), ("not told apart from", level), ("worse than", worse)):
        if listed:
            parts.append(f"{word} {', '.join(listed)}")
    behind = min((one["mean"], name) for name, one in told.items()) if told else None
    said[0] += " " + "; ".join(parts) + "."
    if behind:
        said.append(
            f"Its mean lies {abs(behind[0]):.1f} points {'above' if behind[0] >= 0 else 'below'} that of the best of them, {behind[1]}."
        )
    missing = [name for name in tuned if found[name] is None]
    if missing:
        said.append(f"Not measured on {where}: {', '.join(missing)}.")
    return [" ".join(said), ""]


def _compared(groups: Mapping[str, Any], name: str, chosen: Sequence[str]) -> dict[str, Any] | None:
    both = [one for one in chosen if name in groups[one]["rows"]]
    if not both:
        return None
    mine, other, own = (
        [groups[one]["rows"][DEFAULT] for one in both],
        [groups[one]["rows"][name] for one in both],
        [groups[one]["individual"] for one in both],
    )
    return difference(mine, other, own)


def _told(groups: Mapping[str, Any], name: str, chosen: Sequence[str]) -> str:
    found = _compared(groups, name, chosen)
    if found is None:
        return ""
    word = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "level"
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f}), {word}"


def _named(group: str) -> str:
    start, seed = group.split()
    return f"seed {seed}" if start == "shared" else f"mixed seeds, {seed}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def page(content: Content) -> str:
    """docs/adapters.md with its section drawn anew, between `<!-- lora -->` and `<!-- /lora -->`."""
    new, count = re.subn(
        r"(<!-- lora -->\n).*?(\n<!-- /lora -->)",
        lambda match: match[1] + drawn(content) + match[2],
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} must hold one pair of markers <!-- lora --> and <!-- /lora -->.")
    return new


def main() -> None:
    """Write the section."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    leads.adapters_chart(content).draw("adapters.png")
    PAGE.write_text(page(content), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
