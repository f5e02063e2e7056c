"""Draw docs/bases.md and its figures from experiments/bases/text.json and vision.json, the verdicts included.

python -m experiments.bases.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from experiments import common, leads
from experiments.common import DOCS, EXPERIMENTS, IMAGES
from experiments.leads import led
from thetau.bases.cluster import Spectrum
from thetau.plots.bases import draw_clusters, sizes_chart
from thetau.studies.arithmetic import CONTROL as SHARE
from thetau.studies.verdicts import CONTROL, Verdict, at_control, at_end, few_examples, judge

RESULTS = EXPERIMENTS / "bases"
PAGE = DOCS / "bases.md"
INTRODUCTION = RESULTS / "intro.md"
SUITES = ("text", "vision")
LIKENESS = EXPERIMENTS / "similarity" / "results.json"
Content = Mapping[str, Any]


def points(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as one text."""
    return "\n".join(common.table(head, rows)[:-1])


def partition_text(groups: Mapping[str, Sequence[str]]) -> str:
    """`{a, b}, c`."""
    return ", ".join("{" + ", ".join(m) + "}" if len(m) > 1 else m[0] for m in groups.values())


def tasks_part(content: Content) -> str:
    rows = [
        [
            row["task"],
            points(row["majority"]),
            points(row["pretrained"]["value"]),
            points(row["own"]["value"]),
            str(row["own"]["n"]),
            f"{content['tasks']['norms'][row['task']]:.2f}",
            f"{100 * content['tasks']['ratios'][row['task']]:.2f}",
            "yes" if row["learnt"] else "no",
        ]
        for row in content["tasks"]["rows"]
    ]
    count = sum(row["learnt"] for row in content["tasks"]["rows"])
    head = ["task", "majority", "base", "own model", "n", "‖τ‖", "‖τ‖/‖θ₀‖, %", "learnt"]
    return (
        f"{count} of {len(rows)} tasks are learnt, that is at least {100 * content['margin']:.0f} points above the majority class on validation; "
        f"the others take no part below. Norms are those of the paper's Table 9.\n\n{table(head, rows)}"
    )


def clusters_part(content: Content, name: str) -> str:
    made = content["clusters"]
    found = made["found"]
    draw_clusters(
        made["tasks"],
        torch.tensor(made["cosine"], dtype=torch.float64),
        {key: tuple(value) for key, value in found["groups"].items()},
        Spectrum(
            **{
                **found["spectrum"],
                "eigenvalues": tuple(found["spectrum"]["eigenvalues"]),
                "gaps": tuple(found["spectrum"]["gaps"]),
            }
        ),
        IMAGES / f"bases-{name}-clusters.png",
    )
    off = [abs(value) for i, row in enumerate(made["cosine"]) for value in row[:i]]
    finer = "\n".join(f"- k = {k}: {partition_text(groups)}" for k, groups in made["by_k"].items())
    natural = "finds" if made["four_is_natural"] else "does not find"
    return (
        f"![Clusters](images/bases-{name}-clusters.png)\n\n"
        f"The eigengap says k = {found['k']}: {partition_text(found['groups'])}. Mean |cosine| of two tasks is {mean(off):.3f}, the largest "
        f"{max(off):.3f}. On the four tasks of the partitions below, the eigengap {natural} the natural pairs by itself "
        f"({partition_text(made['four']['groups'])}).\n\n{finer}"
    )


def steps_part(content: Content) -> str:
    made = content["steps"]["rows"]
    sizes = list(made[0]["agreement_by_k"])
    rows = [
        [
            str(row["step"]),
            f"{row['mean_norm']:.3g}",
            str(len(row["groups"])),
            *(f"{row['agreement_by_k'][k]:.2f}" for k in sizes),
            f"{mean(row['agreement_by_k'].values()):.2f}",
        ]
        for row in made
    ]
    first = mean(made[0]["agreement_by_k"].values())
    return (
        "Clusters of the vectors as they were after some steps, against those at the end, for each k (adjusted Rand index: 1 the same, 0 what "
        f"chance gives). One step already gives {first:.2f} on average.\n\n"
        + table(["step", "mean ‖τ‖", "k by eigengap", *(f"k = {k}" for k in sizes), "mean"], rows)
    )


def studies_part(content: Content, key: str, column: str) -> str:
    """Tables 4 and 11."""
    studies = content[key]
    rows, verdicts = [], []
    for name, one in studies.items():
        by_k = {k: [v["absolute"] for v in one["values"] if v["k"] == k] for k in (1, 3, 4)}
        rows.append(
            [
                name,
                points(one["natural"]),
                points(one["average_k2"]),
                points(one["average_all"]),
                f"{one['rank']} of 7",
                *(points(mean(by_k[k])) for k in (1, 3, 4)),
            ]
        )
        ahead = 100 * (one["natural"] - one["average_k2"])
        verdicts.append(f"{name} {ahead:+.1f}")
    better = sum(one["natural"] > one["average_k2"] and one["natural"] > one["average_all"] for one in studies.values())
    lowest = min(value["lambda"] for one in studies.values() for value in one["values"])
    edge = [value for one in studies.values() for value in one["values"] if value["lambda"] == lowest]
    text = (
        f"In {better} of {len(studies)} cases the natural partition is above both averages; its lead over the average of k = 2, in points: "
        f"{', '.join(verdicts)}; the four methods share the four tasks, so these are no four independent cases. "
        f"Under linear methods every partition into two pairs is the same vector, so there the lead is one of balance, not of likeness. λ = {lowest:g}, "
        f"the lowest tried, was chosen in {len(edge)} of {sum(len(one['values']) for one in studies.values())} cases, most of them with k = 3 or 4: a smaller "
        "one might be better there."
    )
    head = [column, "natural pairs", "average of k = 2", "average of all 15", "rank among k = 2", "k = 1", "k = 3", "k = 4"]
    return f"{text}\n\n{table(head, rows)}"


def savings_part(content: Content) -> str:
    rows = []
    orders = 0
    for name, found in content["savings"].items():
        ways = [found[key] for key in ("save-one", "bases", "save-all")]
        orders += ways[0]["absolute"] < ways[1]["absolute"]
        rows.append([name, *(points(one["absolute"]) for one in ways)])
    size = next(iter(content["savings"].values()))
    cost = ", ".join(
        f"{key} {size[key]['vectors']} ({size[key]['bytes'] / 1e6:.0f} MB)" for key in ("save-one", "bases", "save-all")
    )
    return f"Vectors in store: {cost}. Bases are above Save-One in {orders} of {len(rows)} cases.\n\n" + table(
        ["inner = outer", "Save-One", "bases", "Save-All"], rows
    )


def sizes_part(content: Content, name: str) -> str:
    made = content["sizes"]
    inner = [row for row in made["rows"] if row["random"]]
    above = [row for row in inner if row["bases"] > mean(row["random"])]
    best = max(made["rows"], key=lambda row: row["bases"])
    one = made["rows"][0]["bases"]
    chosen = next((row["bases"] for row in made["rows"] if row["k"] == made["eigengap"]), None)
    sizes_chart(made, IMAGES / f"bases-{name}-sizes.png")
    return (
        f"![Bases against random partitions](images/bases-{name}-sizes.png)\n\n"
        f"Mean inside and outside, nothing tuned, {len(made['tasks'])} tasks: the bases are above the mean of five random partitions for "
        f"{len(above)} of {len(inner)} values of k. The best k is {best['k']} ({points(best['bases'])}); the eigengap's k = {made['eigengap']} gives "
        f"{points(chosen)}, one merge of all (k = 1) {points(one)}, the base {points(made['pretrained'])}, own models "
        f"{points(made['individual'])}."
    )


def negation_part(content: Content) -> str:
    rows = [
        [
            name,
            row["task"],
            points(row["own"]["pretrained"]["value"]),
            *(
                f"{points(row[how]['target']['value'])} / {points(row[how]['control']['value'])}"
                for how in ("basis", "merged", "own")
            ),
        ]
        for name, found in content["negation"].items()
        for row in found
    ]
    every = [(row, how) for found in content["negation"].values() for row in found for how in ("basis", "merged", "own")]
    below = sum(row[how]["control"]["value"] < SHARE * row[how]["pretrained_control"]["value"] for row, how in every)
    return (
        f"Target / control accuracy at the α of validation (control: {content['setting']['control']}). On test {below} of {len(every)} have the control "
        f"below {100 * SHARE:.0f} % of the base's, and the others keep it by different amounts, so the columns are not at equal control.\n\n"
        + table(["inner", "task", "base", "its basis", "all four merged", "its own vector"], rows)
    )


def ood_part(content: Content) -> str:
    parts = []
    for target, made in content["ood"].items():
        rows = []
        for name, found in made.items():
            if name in ("near", "pretrained"):
                continue
            rate = "–" if found[0]["right"] is None else f"{sum(row['right'] for row in found)} of {len(found)}"
            pick = {k: next(row for row in found if row["partition"].count("|") == k - 1) for k in (1, 4)}
            natural = next(row for row in found if row["partition"] == content["natural_label"])
            rows.append(
                [
                    name,
                    rate,
                    *(points(mean(row[key]["value"] for row in found)) for key in ("one_shot", "tuned")),
                    *(
                        f"{points(one['one_shot']['value'])} / {points(one['tuned']['value'])}"
                        for one in (natural, pick[4], pick[1])
                    ),
                ]
            )
        near = f"near to {' and '.join(made['near'])}" if made["near"] else "near to none of the four"
        head = [
            "inner",
            "finds a related basis",
            "average, α = 1",
            "average, tuned",
            "natural pairs, α = 1 / tuned",
            "k = 4",
            "k = 1",
        ]
        parts.append(f"**{target}** ({near}); the base has {points(made['pretrained']['value'])}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def sparse_part(content: Content) -> str:
    made = content["sparse"]
    rows = [
        [
            row["name"] + ("" if row["density_kept"] is None else f", {100 * row['density_kept']:g} %"),
            str(row["storage"]["masks"]),
            f"{100 * row['storage']['density']:.2f}",
            f"{row['storage']['values'] / 1e6:.0f}",
            f"{(row['storage']['on_disk'] or row['storage']['nbytes']) / 1e6:.0f}",
            points(row["one_shot"]),
            f"{points(row['tuned'])} (λ = {row['lambda']:g})",
        ]
        for row in made["rows"]
    ]
    head = ["way", "masks", "density, %", "masks × density × size, MB", "in our files, MB", "λ = 1", "tuned"]
    return f"{len(made['tasks'])} tasks in {len(made['groups'])} clusters.\n\n{table(head, rows)}"


def mixed_part(content: Content) -> str:
    made = content["mixed"]
    norms = made["norms"]
    largest = max(*norms["first"].values(), *norms["second"].values())
    rows = []
    for key, words in (
        ("used", "foreign vectors from the base in use (the paper's)"),
        ("own", "foreign vectors from their own base"),
    ):
        cells = {(cell["base"], cell["row"]): cell for cell in made[key]["cells"]}
        order = list(dict.fromkeys(cell["row"] for cell in made[key]["cells"]))
        rows += [
            [
                f"{row}, {words}" if row != order[0] else row,
                *(points(cells[base, row]["absolute"]) for base in ("first", "second")),
            ]
            for row in order
            if row != order[0] or key == "used"
        ]
    return (
        f"The bases are {norms['bases_apart']:.2f} apart, their vectors at most {largest:.2f} long; α = {made['alpha']:g}, tasks: "
        f"{', '.join(content['setting']['mixed'])}.\n\n" + table(["vectors", "over the first base", "over the second base"], rows)
    )


def online_part(content: Content) -> str:
    made = content["online"]
    rows = [
        [
            str(row["budget"]),
            points(row["online"]),
            points(row["offline"]),
            points(row["online_tuned"]),
            points(row["offline_tuned"]),
            f"{row['drift']['partition']:.2f}",
            f"{max(row['drift']['same_members'].values()):.1e}",
            f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in made["rows"]
    ]
    head = [
        "budget",
        "online",
        "offline",
        "online, λ tuned",
        "offline, λ tuned",
        "partitions agree",
        "largest ‖B − B*‖/‖B*‖",
        "MB",
    ]
    low = made["save_all"] < made["save_all_untuned"]
    caution = (
        " Tuned is below untuned here: the smallest λ tried is too large for a sum of so many vectors; read the untuned columns."
        if low
        else ""
    )
    return (
        "Vectors inserted one by one in the order of their names, against one offline build in as many bases; Save-All gives "
        f"{points(made['save_all_untuned'])}, and {points(made['save_all'])} with λ tuned.{caution}\n\n{table(head, rows)}"
    )


def by_task(cases: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, list[float]]:
    """Task → lead in points of the first of each case over its second, averaged over the cases: they share the tasks, and are no units."""
    tasks = [task for task in cases[0][0] if all(task in first and task in second for first, second in cases)] if cases else []
    return {task: [100 * mean(first[task] - second[task] for first, second in cases)] for task in tasks}


def chosen_from(content: Content, cases: Sequence[tuple[float, Sequence[float]]]) -> list[str]:
    """What the rules hold against coefficients that were chosen on validation, each with the values that were tried."""
    setting = content["setting"]
    counts = content.get("available", {})
    few = (
        [
            one
            for count in counts.values()
            for one in few_examples(min(setting["validation"], count["validation"]), count["validation"])
        ]
        if counts
        else few_examples(setting["validation"])
    )
    return [*dict.fromkeys(few), *at_end(cases)]


def claim_partitions(content: Content) -> Verdict:
    cases, chosen = [], []
    for one in content["partitions"].values():
        two = [value for value in one["values"] if value["k"] == 2]
        natural = next(value for value in two if value["partition"] == content["natural_label"])
        average = {task: mean(value["accuracy"][task] for value in two) for task in natural["accuracy"]}
        cases.append((natural["accuracy"], average))
        chosen += [(value["lambda"], value.get("grid", content["setting"]["lambdas"])) for value in two]
    return judge(by_task(cases), reasons=chosen_from(content, chosen))


def claim_savings(content: Content) -> Verdict:
    cases, chosen = [], []
    for one in content["savings"].values():
        if "accuracy" not in one["bases"]:
            return Verdict(word="no verdict", reasons=("the file has no values by task", *chosen_from(content, [])))
        cases.append((one["bases"]["accuracy"], one["save-one"]["accuracy"]))
        chosen += [(scale, grid) for key in ("bases", "save-one") for scale, grid in one[key]["scales"]]
    return judge(by_task(cases), reasons=chosen_from(content, chosen))


def claim_random(content: Content) -> Verdict:
    cases = []
    for row in content["sizes"]["rows"]:
        if not row["random"]:
            continue
        if "accuracy" not in row:
            return Verdict(word="no verdict", reasons=("the file has no values by task",))
        drawn = row["random_accuracy"]
        cases.append((row["accuracy"], {task: mean(one[task] for one in drawn) for task in row["accuracy"]}))
    return judge(by_task(cases))


def claim_eigengap(content: Content) -> Verdict:
    made = content["sizes"]
    tasks = len(made["tasks"])
    if not 1 < made["eigengap"] < tasks - 1:
        return Verdict(word="no verdict", reasons=(f"k = {made['eigengap']} of {tasks} tasks: no clusters of three",))
    if any("accuracy" not in row for row in made["rows"]):
        return Verdict(word="no verdict", reasons=("the file has no values by task",))
    values = {row["k"]: row["accuracy"] for row in made["rows"] if 1 < row["k"] < tasks}
    others = [one for k, one in values.items() if k != made["eigengap"]]
    average = {task: mean(one[task] for one in others) for task in made["tasks"]}
    return judge(by_task([(values[made["eigengap"]], average)]))


def claim_steps(content: Content) -> Verdict:
    first = content["steps"]["rows"][0]["agreement_by_k"].values()
    return Verdict(word="no verdict", reasons=(f"one seed; agreement {mean(first):.2f} after one step of a small batch",))


def claim_negation(content: Content) -> Verdict:
    leads: dict[str, list[float]] = {}
    for found in content["negation"].values():
        for row in found:
            if "curve" not in row["basis"]:
                return Verdict(word="no verdict", reasons=("the file has no curves, so nothing at equal control",))
            reached = {how: at_control(row[how]["curve"], SHARE * row[how]["curve"][0][2]) for how in ("basis", "merged")}
            leads.setdefault(row["task"], []).append(100 * (reached["basis"].target - reached["merged"].target))
    size, most = content["negation_control"]["n"], content["negation_control"]["available"]
    few = few_examples(size, most, least=CONTROL, split="control")
    return judge({task: [mean(values)] for task, values in leads.items()}, lower=True, reasons=few)


def claim_ood(content: Content, *, near: bool) -> Verdict:
    leads: dict[str, list[float]] = {}
    chosen = []
    for target, made in content["ood"].items():
        if bool(made["near"]) != near:
            continue
        rows = [row for key, found in made.items() if key not in ("near", "pretrained") for row in found]
        leads[target] = [100 * (mean(row["tuned"]["value"] for row in rows) - made["pretrained"]["value"])]
        chosen += [(row["alpha"], row.get("grid", (0.0, 1.0))) for row in rows]
    return judge(leads, lower=not near, reasons=chosen_from(content, chosen))


def claim_twice(content: Content) -> Verdict:
    made = content["sparse"]
    ways = {row["name"]: row for row in made["rows"] if row["density_kept"] is not None}
    twice, plain = ways["stitch_twice"], ways["localize_stitch"]
    reasons = []
    if max(len(members) for members in made["groups"].values()) < 3:
        reasons.append("no cluster has three members, where the two ways are the same")
    reasons += chosen_from(content, [(row["lambda"], row.get("grid", (1.0, 3.0, 6.0))) for row in (twice, plain)])
    return judge(by_task([(twice["accuracy"], plain["accuracy"])]), reasons=reasons)


def claim_twice_smaller(content: Content) -> Verdict:
    """A size is known exactly: no interval, and an equality is no win."""
    sizes = {row["name"]: row["storage"]["values"] for row in content["sparse"]["rows"] if row["density_kept"] is not None}
    twice, plain = sizes["stitch_twice"], sizes["localize_stitch"]
    return Verdict(
        word="holds" if twice < plain else "does not hold", reasons=(f"{twice / 1e6:.1f} MB against {plain / 1e6:.1f} MB",)
    )


def claim_mixed(content: Content, *, base: str) -> Verdict:
    cells = {
        (cell["base"], cell["row"]): {task: one["value"] for task, one in cell["accuracy"].items()}
        for cell in content["mixed"]["used"]["cells"]
    }
    rows = list(dict.fromkeys(row for _, row in cells))
    return judge(by_task([(cells[base, rows[0]], cells[base, row]) for row in rows[1:]]))


CLAIMS = (
    ("partitions", "natural pairs above the average of k = 2 (Table 4)", claim_partitions),
    ("savings", "bases above Save-One (Table 5)", claim_savings),
    ("sizes", "bases above random partitions (Fig. 8)", claim_random),
    ("sizes", "the eigengap's k above the average of the others (Fig. 8)", claim_eigengap),
    ("steps", "one step shows the clusters (Fig. 9)", claim_steps),
    ("negation", "a basis forgets more than everything merged (Table 6)", claim_negation),
    ("ood", "the basis of its kind helps a new task, α tuned (Table 13)", lambda content: claim_ood(content, near=True)),
    ("ood", "no basis helps a task unlike all (Table 14)", lambda content: claim_ood(content, near=False)),
    ("sparse", "Stitch Twice above Localize-and-Stitch (Table 8)", claim_twice),
    ("sparse", "Stitch Twice takes less room than Localize-and-Stitch (Table 8)", claim_twice_smaller),
    (
        "mixed",
        "over the first base, own vectors above another base's (Table 2)",
        lambda content: claim_mixed(content, base="first"),
    ),
    (
        "mixed",
        "over the second base, own vectors above another base's (Table 2)",
        lambda content: claim_mixed(content, base="second"),
    ),
)


def claims_part(contents: Mapping[str, Content]) -> str:
    """The paper's claims in one table."""
    rows = [
        [words, *(str(claim(one)) if key in one else "not measured" for one in contents.values())] for key, words, claim in CLAIMS
    ]
    return (
        "What holds here, by [rules](verdicts.md) that were written down first: leads in points with a 95 % interval over tasks, methods and partitions "
        "averaged within the task. Most figures are from a run before these rules, and carry no verdict: a longer one is needed, with 500 "
        "validation examples, 1,000 of the control, wider grids, values by task and more seeds.\n\n"
        + "\n".join(common.table(["the paper's claim", *contents], rows, words=1 + len(contents))[:-1])
    )


PARTS = (
    ("tasks", "The tasks", lambda content, name: tasks_part(content)),
    ("clusters", "Clusters (Fig. 7)", clusters_part),
    ("steps", "How clusters form (Fig. 9)", lambda content, name: steps_part(content)),
    (
        "partitions",
        "All partitions of four tasks (Tables 4, 10)",
        lambda content, name: studies_part(content, "partitions", "inner; outer: sum, λ tuned"),
    ),
    ("outer", "Outer methods (Table 11)", lambda content, name: studies_part(content, "outer", "outer, λ tuned; inner: mean")),
    ("savings", "Save-One, bases, Save-All (Table 5)", lambda content, name: savings_part(content)),
    ("sizes", "Bases against random partitions (Fig. 8)", sizes_part),
    ("negation", "Negation (Table 6)", lambda content, name: negation_part(content)),
    ("ood", "Tasks that no basis was made of (Tables 7, 13, 14)", lambda content, name: ood_part(content)),
    ("sparse", "Sparse storage (Table 8)", lambda content, name: sparse_part(content)),
    ("mixed", "Vectors of two bases (Table 2)", lambda content, name: mixed_part(content)),
    ("online", "One by one, under a budget (Fig. 2)", lambda content, name: online_part(content)),
)


def likeness_part(content: Content) -> str:
    """Which likeness of vectors gives clusters that mean something, and clusters that help."""
    setting = content["setting"]
    rows = [
        [
            f"{row['kind']}{', around the mean' if row['centred'] else ''}{', normalised Laplacian' if row['laplacian'] == 'normalised' else ''}",
            f"{row['cosine_of_seeds']:.2f}",
            f"{row['cosine_of_tasks']:.3f}",
            f"{row['k_of_pairs']} of {2 * len(setting['tasks'])}",
            f"{row['found']:.2f}",
            ", ".join(map(str, row["k"])),
            f"{row['stable']:.2f}",
            f"{row['natural']:.2f}",
            row["helps"],
        ]
        for row in content["rows"]
    ]
    best = max(content["rows"], key=lambda row: row["natural"])
    around, plain = (mean(row["natural"] for row in content["rows"] if row["centred"] is which) for which in (True, False))
    right = sum(row["k_of_pairs"] == len(setting["tasks"]) for row in content["rows"])
    said = (
        f"One run, so an early look: the families are best met by {best['kind']} tensors ({best['natural']:.2f}); around the mean they are met "
        f"{'better' if around > plain else 'worse'} ({around:.2f} against {plain:.2f} on average). The largest gap says k = T for the pairs in {right} of "
        f"{len(rows)} rows, so k itself is not to be read off these spectra; the paper's |cosine| over all tensors stays the default."
    )
    head = [
        *("tensors", "cos of two seeds", "mean abs. cos of two tasks", "k by the gap, two seeds", "pairs found"),
        *("k by the gap, each seed", "same clusters", "families", "helps"),
    ]
    return (
        f"`make similarity DATA=…`: {len(setting['tasks'])} text tasks ({', '.join(setting['tasks'])}), each learnt twice, with two seeds, "
        f"{setting['steps']} steps of {setting['batch_size']}. The two seeds of a task are two vectors of one thing: *pairs found* says whether T "
        "clusters of the 2T vectors put them together, *same clusters* whether both seeds cluster the tasks alike (mean over k), *families* the "
        "agreement with families that were named beforehand; all three are adjusted Rand indices, 1 the same, 0 chance. *Helps*: mean inside and "
        f"outside, nothing tuned, the lead in points over {setting['random partitions']} random partitions with as many clusters (k = "
        f"{', '.join(map(str, setting['sizes']))}), judged by [the rules](verdicts.md). The "
        f"Laplacian changes only k.\n\n{said}\n\n" + table(head, rows)
    )


def load(name: str) -> dict[str, Any] | None:
    """A suite's results, with what several parts need."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pairs = sorted(sorted(pair) for pair in content["setting"]["four"])
    content["natural_label"] = " | ".join("+".join(pair) for pair in pairs)
    return content


def page() -> str:
    file = RESULTS / "text.json"
    text = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return led(body(), leads.bases(text)) if {"sizes", "savings"} <= set(text) else body()


def body() -> str:
    """The page as it should stand."""
    parts = [INTRODUCTION.read_text(encoding="utf-8").rstrip()]
    contents = {name: content for name in SUITES if (content := load(name)) is not None}
    parts.append(claims_part(contents))
    if LIKENESS.is_file():
        parts += ["## Which likeness of vectors", likeness_part(json.loads(LIKENESS.read_text(encoding="utf-8")))]
    for name, content in contents.items():
        parts.append(f"## {'Text' if name == 'text' else 'Images'}: {content['setting']['backbone']}")
        if content.get("remarks"):  # of a run whose sections were not all made with the settings that it records
            parts.append("\n".join(f"- {remark}" for remark in content["remarks"]))
        for key, title, draw in PARTS:
            if key in content:
                parts += [f"### {title}", draw(content, name)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
