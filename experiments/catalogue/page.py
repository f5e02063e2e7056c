"""Draw docs/methods.md, a page for each method in docs/methods/, and docs/catalogue.md, from docstrings, plans and results.

Called by `python -m experiments.pages`. What stands in experiments/catalogue/results.json and costs.json is drawn as it is.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from experiments import leads
from experiments.catalogue.names import APART, NAMES, Name
from experiments.catalogue.run import ours
from experiments.common import DOCS, table
from experiments.leads import led
from thetau.engine.work import gigabytes
from thetau.methods import registry
from thetau.methods.traits import PURPOSES, Traits, traits, use
from thetau.parts import Method

HERE = Path(__file__).parent
RESULTS, COSTS = HERE / "results.json", HERE / "costs.json"
FOLDER = DOCS / "methods"
KINDS: Mapping[str, tuple[str, ...]] = {
    "Entry by entry": (
        "average",
        "linear",
        "task_arithmetic",
        "inverse_norm",
        "magmax",
        "model_stock",
        "nearswap",
        "passthrough",
        "ram",
        "ramplus_tl",
        "sce",
    ),
    "Sparse": (
        "arcee_fusion",
        "breadcrumbs",
        "breadcrumbs_ties",
        "consensus_ta",
        "consensus_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "localize_stitch",
        "pcb",
        "ties",
        "topk",
    ),
    "On the sphere": ("karcher", "multislerp", "nuslerp", "slerp"),
    "Spectral": ("cart", "dc_merge", "iso_c", "iso_cts", "star", "tsv_m"),
    "Matrix methods without data": ("ace", "actmat", "bilateral", "doge_ta", "optmerge", "swudi", "swudi_a", "wudi"),
    "A vector for each task": ("emr", "tall_masks", "twin"),
    "Around another method": ("awd", "consensus", "larv", "svc"),
    "With data": ("adamerging", "esm", "fisher", "kfac", "regmean"),
}
READS = {
    "block": "any block of rows, so that a few hundred megabytes are enough for any model",
    "stream": "a matrix of one task after the other",
    "whole": "the matrices of all tasks at once",
}
NAMES_OF_MODELS = ("a", "b", "sst2", "mnli")
BAR = 40


def main() -> None:
    """Write every page."""
    results, costs = read(RESULTS), read(COSTS)
    for path, text in pages(results, costs).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    leads.catalogue_chart(results, ranking(results, "one")).draw("catalogue.png")
    stale = {path for path in FOLDER.glob("*.md") if path.stem not in ours()}
    for path in stale:
        path.unlink()
    sys.stdout.write("docs/methods.md, docs/methods/, docs/catalogue.md\n")


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def pages(results: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[Path, str]:
    """Every page by where it lies."""
    best = ranking(results, "one")
    whole = led(catalogue_page(results), leads.catalogue(results, best, margin(results)))
    made = {DOCS / "methods.md": index_page(), DOCS / "catalogue.md": whole}
    return made | {FOLDER / f"{name}.md": method_page(name, results, costs) for name in ours()}


# The index


def index_page() -> str:
    """The methods by kind, and what they are called elsewhere."""
    placed = [name for names in KINDS.values() for name in names]
    if sorted(placed) != ours():
        wrong = sorted(set(placed) ^ set(ours())) or sorted(name for name in placed if placed.count(name) > 1)
        raise SystemExit(f"Each method stands once in `KINDS` of experiments/catalogue/page.py. Look at {', '.join(wrong)}.")
    lines = [
        "# Methods",
        "",
        "```",
        "thetau methods                                # the list, by need and cost",
        "thetau methods wudi                           # fields, ranges, defaults, paper",
        "thetau methods --for data-free --for one-pass # those that fit; --json for other programs",
        "```",
        "",
        f"{len(placed)} methods. `thetau methods` lists them, `thetau methods NAME` shows one, and `--for` filters: "
        + "; ".join(f"`{key}` {meaning}" for key, (meaning, _) in PURPOSES.items())
        + ". [All of them on the same models](catalogue.md) has what each one gives.",
        "",
        "`passes` counts walks over the inputs. `reads` says what of a tensor is in memory: any `block` of its rows, a `stream` of one task after the "
        "other, or the `whole` of all tasks.",
        "",
    ]
    for kind, names in KINDS.items():
        lines += [f"## {kind}", "", "| method | what it does | passes | reads | needs |", "|---|---|---:|---|---|"]
        for name in names:
            its = known(name)
            lines.append(
                f"| [`{name}`](methods/{name}.md) | {cell(summary(name))} | {its.passes} | {its.access} | {its.needs or '—'} |"
            )
        lines.append("")
    lines += [
        "## The same method elsewhere",
        "",
        "Ours with the settings named gives what mergekit 0.1.5, FusionBench 0.2.33 and PEFT 0.21.2 give under their names, as we read their sources "
        "and up to what a method's page says of departures; random methods agree in distribution. A recipe of mergekit's needs no translation, and "
        "[was compared tensor by tensor](mergekit-parity.md). A field that is not named has its default. PEFT's names are those of "
        f"`add_weighted_adapter`; its {', '.join(f'`{name}`' for name in APART)} merge the two factors of an adapter apart, which is no merge of the task "
        "vectors, and have no equal here.",
        "",
        "| ours | settings | mergekit | FusionBench | PEFT | paper |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(NAMES, key=lambda row: row.method):
        cells = (
            f"[`{row.method}`](methods/{row.method}.md)",
            settings(row) or "—",
            *(name or "—" for name in (row.mergekit, row.fusion_bench, row.peft)),
            paper(row.method),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def settings(row: Name) -> str:
    """The fields of a row, as a recipe spells them."""
    return ", ".join(f"`{key}: {yaml.safe_dump(value).splitlines()[0]}`" for key, value in row.settings.items())


def paper(name: str) -> str:
    """A method's source, its address a link."""
    text = registry.paper(name)
    title, _, address = text.rpartition(", ")
    return f"[{title}]({address})" if title and address.startswith("https://") else text


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def known(name: str) -> Traits:
    """A method's traits, which each of ours has."""
    its = traits(name)
    assert its is not None, f"{name} cannot be made without values for its fields"
    return its


# A method's page


def paragraphs(text: str | None) -> list[str]:
    """A docstring's paragraphs."""
    return inspect.cleandoc(text or "").split("\n\n")


def summary(name: str) -> str:
    """The first line of a method's file."""
    module = inspect.getmodule(registry.get(name))
    return paragraphs(module.__doc__ if module else None)[0]


def method_page(name: str, results: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """A method's page."""
    cls = registry.get(name)
    module = inspect.getmodule(cls)
    told = [text for text in paragraphs(module.__doc__ if module else None)[1:] if not text.startswith("Use it ")]
    formula = [text for text in paragraphs(cls.__doc__) if not text.startswith(("Use it ", "- `"))]
    first = use(name)
    if first is None:
        raise SystemExit(
            f"{name} does not say when to use it: its file, or its class, needs a paragraph that begins with `Use it `."
        )
    lines = [f"# {name}", "", summary(name), "", first, "", *formula_lines(formula)]
    lines += [f"`thetau.methods.{cls.__name__}` · {paper(name)}", ""]
    lines += needs_lines(name) + cost_lines(name, costs) + recipe_lines(name) + figure_lines(name, results) + field_lines(name)
    lines += ["## What it is", "", *(line for text in told for line in (text, ""))] if told else []
    lines += elsewhere_lines(name)
    return "\n".join(lines).rstrip() + "\n"


def formula_lines(texts: Sequence[str]) -> list[str]:
    """What the class says first, a paragraph each."""
    return [line for text in texts for line in (text, "")]


def needs_lines(name: str) -> list[str]:
    """Base, models, evidence."""
    its = known(name)
    base = "the model that the others were fine-tuned from" if its.needs_base else "none; models are merged as they are"
    lines = [
        "## What it needs",
        "",
        f"- Base: {base}.",
        f"- Models{' besides the base' if its.needs_base else ''}: {its.models}.",
    ]
    if its.evidence:
        lines.append(
            f"- Data: {', '.join(its.evidence)}, collected of each task beforehand (`thetau evidence {its.evidence[0]}`)."
        )
    else:
        lines.append("- Data: none.")
    if "lora" in its.suits:
        lines.append("- LoRA: its authors made it for adapters, or showed it on them.")
    if its.by_task:
        lines.append(
            "- At inference: which task an input is of, for each task has a vector of its own (`thetau.outputs`). A recipe writes the merged one."
        )
    return [*lines, ""]


def cost_lines(name: str, costs: Mapping[str, Any]) -> list[str]:
    """Passes, and the plans of one matrix and of a model."""
    its, row = known(name), costs["rows"][name]
    tasks = its.takes[1] or costs["tasks"]
    head = ("", "passes", "reads", "operations of solvers", "memory in flight")
    called = {"matrix": "one matrix, 4096 × 4096", "7B": "Llama 2 7B"}
    cells = [
        (
            called[size],
            str(one["passes"]),
            gigabytes(one["read"]),
            f"{one['flops']:.1e}" if one["flops"] else "—",
            gigabytes(one["memory"]),
        )
        for size, one in row.items()
    ]
    return [
        "## What it costs",
        "",
        f"It reads {READS[its.access]}. What `thetau merge --dry-run` says for {tasks} model{'s' if tasks != 1 else ''} and a base in bfloat16, "
        "one worker, at the defaults:",
        "",
        *table(head, cells),
    ]


def recipe(name: str) -> dict[str, Any]:
    """A recipe with the method and some of its fields, whose models are those of the pages' examples."""
    its = known(name)
    fewest, most = its.takes
    models = list(NAMES_OF_MODELS[:most] if most is not None else NAMES_OF_MODELS[: max(fewest, 3)])
    content: dict[str, Any] = {"base": "base"} if its.needs_base else {}
    content["models"] = models
    content["method"] = {"name": name, **shown(name)}
    if its.evidence:
        content["evidence"] = {kind: {model: f"{model}-{kind}.safetensors" for model in models} for kind in its.evidence}
    return content


def shown(name: str) -> dict[str, Any]:
    """The fields that a recipe shows: at most three, λ among them, at their defaults."""
    fields = registry.describe(name)
    plain = [
        one
        for one in fields
        if isinstance(one.default, str | int | float) and one.name not in ("tensors", "elsewhere", "split_fused")
    ]
    inner = [one for one in fields if isinstance(one.default, Method)]
    chosen = [*inner, *(one for one in plain if one.name == "scale"), *(one for one in plain if one.name != "scale")][:3]
    return {
        one.name: registry.name_of(one.default) if isinstance(one.default, Method) else one.default
        for one in fields
        if one in chosen
    }


def recipe_lines(name: str) -> list[str]:
    """The recipe, and how it is run."""
    text = yaml.safe_dump(recipe(name), sort_keys=False, default_flow_style=None, width=120).rstrip()
    return ["## A recipe", "", "```yaml", text, "```", "", "`thetau merge recipe.yaml -o merged`", ""]


def field_lines(name: str) -> list[str]:
    """The table of fields."""
    lines = ["## Fields", "", "| field | range | default | meaning |", "|---|---|---|---|"]
    for field in registry.describe(name):
        if not field.meaning:
            cls = registry.get(name).__name__
            raise SystemExit(f"{name}.{field.name} has no meaning, neither in the docstring of {cls} nor on the field.")
        lines.append(f"| `{field.name}` | {cell(field.range)} | `{field.default}` | {cell(field.meaning)} |")
    return [*lines, ""] if len(lines) > 4 else ["## Fields", "", "None.", ""]


def elsewhere_lines(name: str) -> list[str]:
    """What others call it."""
    rows = [row for row in NAMES if row.method == name and (row.mergekit or row.fusion_bench or row.peft)]
    if not rows:
        return []
    cells = [tuple(text or "—" for text in (settings(row), row.mergekit, row.fusion_bench, row.peft)) for row in rows]
    head = ("settings", "mergekit 0.1.5", "FusionBench 0.2.33", "PEFT 0.21.2")
    return ["## Elsewhere", "", f"| {' | '.join(head)} |", "|---|---|---|---|", *(f"| {' | '.join(one)} |" for one in cells), ""]


# Figures


def group(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Which methods a row can be compared with."""
    if row["tasks"] != results["tasks"]:
        return "pair"
    return "own" if row.get("outputs") == "each task's own" else "one"


def ranking(results: Mapping[str, Any], of: str) -> list[str]:
    """The methods of a group that gave a result, the best at its defaults first."""
    rows = results["rows"]
    alike = [name for name in sorted(rows) if group(rows[name], results) == of and "default" in rows[name]]
    return sorted(alike, key=lambda name: -rows[name]["default"]["average"])


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def figure_lines(name: str, results: Mapping[str, Any]) -> list[str]:
    """The method among the others, as bars and by task."""
    row = results["rows"][name]
    if "failed" in row:
        return ["## Measured", "", f"It failed on the models of [the catalogue](../catalogue.md): {row['failed']}", ""]
    of = group(row, results)
    ranked, references = ranking(results, of), results["references"]
    pair = ", pair" if of == "pair" else ""
    n = sum(results["test"][task] for task in row["tasks"])
    what = {
        "one": f"One model for the {len(row['tasks'])} tasks of [the catalogue](../catalogue.md)",
        "own": f"Each of the {len(row['tasks'])} tasks of [the catalogue](../catalogue.md) with its own vector",
        "pair": f"The models of {' and '.join(row['tasks'])} from [the catalogue](../catalogue.md)",
    }[of]
    place = ranked.index(name) + 1
    equal = [
        other for other in ranked if results["rows"][other]["default"]["average"] == row["default"]["average"] and other != name
    ]
    first = next(index for index, other in enumerate(ranked, 1) if other in (*equal, name))
    place = first if equal else place
    lines = [
        "## Measured",
        "",
        f"{what}: average test accuracy in percent, n = {n}, at the defaults{' and with λ tuned on validation' if 'tuned' in row else ''}. "
        f"Rank {place} of {len(ranked)} such methods at their defaults{', with others' if equal else ''}. The bars go from the pre-trained model to each "
        "task's own.",
        "",
        "```text",
    ]
    bars = [("pre-trained", references[f"pre-trained{pair}"])]
    if of == "one" and name != "average":
        bars.append(("average", results["rows"]["average"]["default"]))
    bars.append((name, row["default"]))
    if "tuned" in row:
        bars.append((f"{name}, λ = {row['tuned']['scale']:g}", row["tuned"]))
    if ranked[0] != name:
        bars.append((f"best: {ranked[0]}", results["rows"][ranked[0]]["default"]))
    bars.append(("each task's own model", references[f"individual{pair}"]))
    lines += [*drawn(bars), "```", ""]
    lines += by_task([(called, one) for called, one in bars if called.startswith(name)], row["tasks"])
    lines += [
        f"The merge took {row['seconds']:.1f} s of one processor; its process held {row['peak_megabytes']:.0f} MB at its peak, mapped input files among them.",
        "",
    ]
    return lines


def drawn(bars: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Averages as bars of text, between the first and the last."""
    low, high = bars[0][1]["average"], bars[-1][1]["average"]
    width = max(len(called) for called, _ in bars)
    for called, one in bars:
        length = round(BAR * (one["average"] - low) / (high - low))
        yield f"{called:<{width}}  {percent(one['average']):>5}  {'█' * length if length >= 0 else '◀ below'}".rstrip()


def by_task(rows: Sequence[tuple[str, Mapping[str, Any]]], tasks: Sequence[str]) -> list[str]:
    """Accuracies by task."""
    cells = [
        (called, *(percent(one["accuracy"][task]) for task in tasks), percent(one["average"]), percent(one["normalised"]))
        for called, one in rows
    ]
    return table(("", *tasks, "average", "normalised"), cells)


def catalogue_page(results: Mapping[str, Any]) -> str:
    """All methods, sorted."""
    n = sum(results["test"].values())
    some = next(iter(results["validation"].values()))
    lines = [
        "# All methods on the same models",
        "",
        f"`{results['command']}` merges the demo's {len(results['tasks'])} fine-tuned models of {results['backbone']} "
        f"({', '.join(results['tasks'])}) with every method at its defaults, and measures the result on {n} test examples. Where a method has a λ "
        f"it is measured again with the λ that was best on {some} validation examples of each task, of {len(results['factors'])}: the default "
        f"times {', '.join(f'{factor:g}' for factor in results['factors'])}; where the last of them won, more might give more. Sorted by what the "
        "defaults give.",
        "",
        "What this can say: whether a method's defaults are fit to use, what tuning λ is worth, and what a merge costs beside others. An average "
        f"is sure to about ± {percent(margin(results))} points (95 %), and neighbours in the table closer than that are not told apart. What it "
        "cannot say: which method is best on other models. These are small encoders, fine-tuned for 110 steps, six tasks, one seed; methods whose "
        "authors tuned them for CLIP, for language models or for adapters are at those defaults here, and some are far from what suits these "
        "vectors. Bad rows stay as they came out.",
        "",
    ]
    about = {
        "one": ("One model for all tasks", ""),
        "own": (
            "A vector for each task",
            "Each task is measured with its own vector, so these rows compare with the tasks' own models and not with the table above.",
        ),
        "pair": (
            "Two models",
            f"Methods that take one or two models get those of {' and '.join(results['pair'])}: the second over the first, or both over their base. "
            "`passthrough` gives the second as it is.",
        ),
    }
    for of, (title, text) in about.items():
        lines += [f"## {title}", "", *([text, ""] if text else []), *rows_of(results, of)]
    failed = {name: row["failed"] for name, row in results["rows"].items() if "failed" in row}
    if failed:
        lines += ["## Failed", "", *(f"- `{name}`: {reason}" for name, reason in failed.items()), ""]
    lines += [
        "Seconds are those of one processor for the merge alone, megabytes the peak of its whole process, of which about "
        f"{start(results):.0f} are Python and torch and as much as the input files take is mapped from them. A λ is the default's multiple; around "
        "another method it is that one's.",
        "",
    ]
    return "\n".join(lines)


def rows_of(results: Mapping[str, Any], of: str) -> list[str]:
    """A group's table, its references first."""
    head = ("method", "at its defaults", "normalised", "λ tuned", "at that λ", "normalised", "seconds", "MB")
    suffix = ", pair" if of == "pair" else ""
    cells = [
        (called.removesuffix(", pair"), percent(one["average"]), percent(one["normalised"]), "", "", "", "", "")
        for called, one in results["references"].items()
        if called.endswith(", pair") == bool(suffix)
    ]
    for name in ranking(results, of):
        row = results["rows"][name]
        tuned = row.get("tuned")
        after = (f"{tuned['scale']:g}", percent(tuned["average"]), percent(tuned["normalised"])) if tuned else ("", "", "")
        default = row["default"]
        cells.append(
            (
                f"[`{name}`](methods/{name}.md)",
                percent(default["average"]),
                percent(default["normalised"]),
                *after,
                f"{row['seconds']:.1f}",
                f"{row['peak_megabytes']:.0f}",
            )
        )
    return table(head, cells)


def margin(results: Mapping[str, Any]) -> float:
    """Half of the widest 95 % interval of an average over all tasks, from the binomial of each."""
    rows = [row["default"]["accuracy"] for row in results["rows"].values() if group(row, results) == "one" and "default" in row]
    n = results["test"]
    return max(1.96 * sqrt(sum(value * (1 - value) / n[task] for task, value in row.items())) / len(row) for row in rows)


def start(results: Mapping[str, Any]) -> float:
    """Megabytes of a process before it merges, the most of any."""
    return max(row["start_megabytes"] for row in results["rows"].values() if "default" in row)
