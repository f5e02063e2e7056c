"""How every page of results begins: three sentences whose figures come from the result files, and a picture of them.

`led(page, lead)` puts a lead below a page's title; pages call it as they are drawn. Pictures are drawn by the project's own style, on a white ground, so that
they can be read in the light and the dark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, final

from experiments.common import IMAGES
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save
from thetau.studies.paradigms import ParadigmResults

Results = Mapping[str, Any]
COIN = 0.5
ENOUGH = 20  # trials from which a rate is called, as on the doctor's page


@final
@dataclass(frozen=True, kw_only=True)
class Lead:
    """The sentences, and a picture that lies in docs/images, with what it shows for those who do not see it."""

    sentences: tuple[str, ...]
    picture: str
    alt: str


def led(page: str, lead: Lead) -> str:
    """A page with its lead below the title. Raises `SystemExit`: the page does not begin with one."""
    title, end, rest = page.lstrip("\n").partition("\n")
    if not title.startswith("# ") or not end:
        raise SystemExit(f"A page begins with its title. Got {title[:60]!r}.")
    return f"{title}\n\n{' '.join(lead.sentences)}\n\n![{lead.alt}](images/{lead.picture})\n{rest if rest.startswith(chr(10)) else chr(10) + rest}"


def section(lead: Lead) -> list[str]:
    """The lines of a lead below a section's heading."""
    return [" ".join(lead.sentences), "", f"![{lead.alt}](images/{lead.picture})", ""]


@final
@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each name, the first on top, or a dot where not from `zero`; `spans` draws intervals, `lines` values across."""

    title: str
    rows: Mapping[str, float]
    lines: Mapping[str, float] = field(default_factory=dict)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    zero: bool = True
    marked: tuple[str, ...] = ()

    def draw(self, name: str) -> None:
        """Into docs/images."""
        made = figure(8, 1.1 + (0.26 if len(self.rows) <= 20 else 0.17) * len(self.rows))
        axes = made.add_subplot()
        places = range(len(self.rows))
        colours = [PALETTE[1] if row in self.marked else PALETTE[0] for row in self.rows]
        if self.zero:
            axes.barh(places, list(self.rows.values()), color=colours, height=0.66)
        else:  # a bar that does not begin at 0 would lie about proportions
            axes.scatter(list(self.rows.values()), places, color=colours, s=26, zorder=3)
        for place, (row, value) in enumerate(self.rows.items()):
            low, high = self.spans.get(row, (value, value))
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
        for place, (said, value) in enumerate(self.lines.items()):
            axes.axvline(value, color=PALETTE[2 + place], linewidth=1.4, label=said)
        axes.set_yticks(places, list(self.rows), fontsize=9 if len(self.rows) <= 20 else 7)
        axes.invert_yaxis()
        axes.set_title(self.title, loc="left", color=INK, fontsize=10)
        axes.tick_params(axis="x", colors=MUTED)
        if self.lines:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        plain(axes, "x" if self.zero else "both")
        save(made, IMAGES / name)


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def listed(names: Sequence[str]) -> str:
    """Words with commas, and `and` before the last.

    Examples:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Every method


def catalogue(results: Results, order: Sequence[str], margin: float) -> Lead:
    """`order`: the methods that make one model, best first. `margin`: half of an average's interval."""
    averages = {name: results["rows"][name]["default"]["average"] for name in order}
    best, own, base = order[0], results["references"]["individual"]["average"], results["references"]["pre-trained"]["average"]
    near = [name for name in order[1:] if averages[best] - averages[name] <= margin]
    lost = [name for name in order if averages[name] < base]
    tuned = {name: row["tuned"]["average"] for name in order if (row := results["rows"][name]).get("tuned")}
    gains = {name: value - averages[name] for name, value in tuned.items()}
    most = max(gains, key=lambda name: gains[name])
    return Lead(
        sentences=(
            f"Of {len(order)} methods at their defaults, {len(order) - len(lost)} make a model that is better than the base ({percent(base)} %), and "
            f"`{best}` comes nearest to the tasks' own models: {percent(averages[best])} of {percent(own)} %.",
            f"{len(near)} others lie within {percent(margin)} points of it and cannot be told from it.",
            f"To tune λ on validation gains {percent(mean(gains.values()))} points on average over the {len(gains)} methods that have one, most for "
            f"`{most}` ({percent(gains[most])}).",
        ),
        picture="catalogue.png",
        alt="Average test accuracy of every method at its defaults, with the base and the tasks' own models as lines",
    )


def catalogue_chart(results: Results, order: Sequence[str]) -> Bars:
    """Averages of all methods."""
    base, own = (100 * results["references"][name]["average"] for name in ("pre-trained", "individual"))
    values = {name: 100 * results["rows"][name]["default"]["average"] for name in order}
    return Bars(
        title="average test accuracy at the defaults, %",
        rows=values,
        lines={"the base": base, "the tasks' own models": own},
        zero=False,
    )


# With data


def data(results: Results, verdict: str) -> Lead:
    """`verdict`: what the page's rule makes of it."""
    rows = results["rows"]
    own, base = results["references"]["individual"]["average"], results["references"]["pre-trained"]["average"]
    best = max(rows, key=lambda name: rows[name]["average"])
    looks = {"none": "at no data", "unlabelled": "at unlabelled examples", "labelled": "at labelled examples"}[rows[best]["data"]]
    return Lead(
        sentences=(
            f"The best of {len(rows)} rows is *{best}*, which looks {looks}: {percent(rows[best]['average'])} % on average, where the base has "
            f"{percent(base)} and the tasks' own models {percent(own)}.",
            verdict,
        ),
        picture="data.png",
        alt="Accuracy over seconds of each row",
    )


# Paradigms


def paradigms(results: ParadigmResults) -> Lead | None:
    """Of sums at the α that validation prefers, and of forgetting; None where standard fine-tuning was not measured in both."""
    added = {
        name: mean(one)
        for name in results.names()
        if (one := [row.addition.tuned.absolute for row in results.of(name) if row.addition])
    }
    kept = {
        name: mean(one)
        for name in results.names()
        if (one := [row.addition.tuned.normalised for row in results.of(name) if row.addition])
    }
    forgot = {
        name: mean(one)
        for name in results.names()
        if (one := [cut.tuned.target.value for row in results.of(name) for cut in row.negation])
    }
    if "standard" not in added or "standard" not in forgot:
        return None
    best, least = max(added, key=lambda name: added[name]), min(forgot, key=lambda name: forgot[name])
    base = mean(results.pretrained[task].value for task in results.tasks)
    return Lead(
        sentences=(
            f"Vectors of *{best}* ({len(results.of(best))} seed{'s' if len(results.of(best)) != 1 else ''}) add up best: {percent(added[best])} % on average "
            f"over {len(results.tasks)} tasks, {percent(kept[best])} % of what the same models have alone (the base: {percent(base)} %).",
            f"Those of *standard* fine-tuning reach {percent(added['standard'])} %, {percent(kept['standard'])} % of theirs.",
            f"Subtracted, *{least}* forgets most: the target's accuracy falls to {percent(forgot[least])} % on average, and with *standard* to "
            f"{percent(forgot['standard'])} %.",
        ),
        picture="paradigms-alpha.png",
        alt="Normalised validation accuracy over α",
    )


# Bilateral merging


def bilateral(results: Results) -> Lead:
    """Of all comparisons with other methods."""
    counted = _against(results)
    whole = sum(counted.values(), Counter())
    wudi = sum((count for name, count in counted.items() if name.startswith("WUDI")), Counter())
    lost = [name for name, count in counted.items() if count["below"]]
    return Lead(
        sentences=(
            f"Beside {len(counted)} other methods, in {whole.total()} comparisons over suites, kinds of vectors and numbers of tasks, bilateral merging is "
            f"above in {whole['above']}, below in {whole['below']}, and not told apart in {whole['same']}.",
            f"Beside WUDI in its three forms it is above in {wudi['above']} of {wudi.total()} and below in {wudi['below']}.",
            f"It is below {listed(lost)} once each."
            if lost and whole["below"] == len(lost)
            else f"It is below in {whole['below']}.",
        ),
        picture="bilateral.png",
        alt="Comparisons of bilateral merging with each other method that it wins, loses or cannot tell",
    )


def _against(results: Results) -> dict[str, Counter[str]]:
    """Other method → comparisons whose 95 % interval is above 0, below 0, or holds it."""
    found: dict[str, Counter[str]] = {}
    for one in results["comparisons"]:
        if one["against"].startswith("bilateral"):
            continue
        lead = one["normalised"]
        word = "above" if lead["low"] > 0 else "below" if lead["high"] < 0 else "same"
        found.setdefault(one["against"], Counter())[word] += 1
    return found


def bilateral_chart(results: Results, name: str) -> None:
    """Stacked counts."""
    counted = _against(results)
    made = figure(8, 1.2 + 0.3 * len(counted))
    axes = made.add_subplot()
    before = [0] * len(counted)
    for word, said, colour in (
        ("above", "bilateral is better", PALETTE[2]),
        ("same", "not told apart", "#c8ccd2"),
        ("below", "the other is better", PALETTE[1]),
    ):
        counts = [count[word] for count in counted.values()]
        axes.barh(range(len(counted)), counts, left=before, color=colour, label=said, height=0.66)
        before = [left + count for left, count in zip(before, counts, strict=True)]
    axes.set_yticks(range(len(counted)), list(counted))
    axes.invert_yaxis()
    axes.set_title(
        "comparisons of normalised accuracy, by the 95 % interval of the mean difference", loc="left", color=INK, fontsize=10
    )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plain(axes, "x")
    save(made, IMAGES / name)


# Sketches


def sketches(timings: Mapping[str, Results], confirm: Results | None) -> Lead:
    """What they save on two sizes, and what they cost in accuracy."""
    said = []
    noise = [
        (size, label, row) for size, found in timings.items() for label, row in found["rows"].items() if "times_faster" in row
    ]
    fastest = max(noise, key=lambda one: one[2]["times_faster"])
    slowest = min(noise, key=lambda one: one[2]["times_faster"])
    said.append(
        f"With the leading directions alone, methods are {slowest[2]['times_faster']:.1f} (`{slowest[1]}`) to {fastest[2]['times_faster']:.1f} times "
        f"(`{fastest[1]}`) as fast as before, by the processors' time."
    )
    real = timings["280m"]["rows"]
    said.append(
        f"Of {timings['280m']['tasks']} models of 280 million parameters, "
        + listed([f"`{label}` takes {row['times_ties_processor']:.1f} times what TIES takes" for label, row in real.items()])
        + "."
    )
    if confirm is not None:
        told = confirm["lead of auto over full, points normalised"]
        said.append(
            "In accuracy, beside all directions: " + "; ".join(f"`{label}` {verdict}" for label, verdict in told.items()) + "."
        )
    return Lead(
        sentences=tuple(said),
        picture="sketches.png",
        alt="Processors' time of each method with leading directions, as multiples of TIES",
    )


def sketches_chart(timings: Mapping[str, Results], titles: Mapping[str, str]) -> Bars:
    """Multiples of TIES."""
    rows = {
        f"{label}: {size.removesuffix('-noise')}{', noise' * size.endswith('-noise')}": row["times_ties_processor"]
        for size in titles
        if size in timings
        for label, row in timings[size]["rows"].items()
    }
    return Bars(title="processors' time as multiples of TIES", rows=rows, lines={"TIES": 1.0})


# The doctor


def doctor(study: Results, intervals: Mapping[str, tuple[float, float]]) -> Lead:
    """What its advice is worth. `intervals`: of each hit rate."""
    hits = study["hits"]
    rates = listed([f"{one['hits']} of {one['n']} for {word}" for word, one in hits.items()])
    n = study["sets"]["held-out"]["conflict"]["predictors"]
    best = max(n, key=lambda word: n[word]["spearman_loss"])
    return Lead(
        sentences=(
            f"Tried on models that had no part in its rules, the doctor's advice was right in {rates}.",
            _above_a_coin(hits, intervals),
            f"Of all figures, *{CALLED.get(best, best)}* goes best with how much loss a partner costs: Spearman's correlation is "
            f"{n[best]['spearman_loss']:+.2f} on held-out tasks.",
        ),
        picture="doctor.png",
        alt="Hit rates of the doctor's advice with their 95 % intervals, and a coin's as a line",
    )


def _above_a_coin(hits: Mapping[str, Results], intervals: Mapping[str, tuple[float, float]]) -> str:
    """Which rates are above a coin's, of those that were tried often enough to call."""
    few = [word for word in hits if hits[word]["n"] < ENOUGH]
    better = [word for word in hits if word not in few and intervals[word][0] > COIN]
    called = (
        f"For {listed(better)} that is better than a coin" if better else "Nothing that was tried often is better than a coin"
    )
    return called + (f", and {listed(few)} were tried too few times to call." if few else ".")


CALLED = {"danger": "what j does to i", "examples": "√τJp on examples"}


def doctor_chart(study: Results, intervals: Mapping[str, tuple[float, float]]) -> Bars:
    """Hit rates."""
    return Bars(
        title="how often advice was right on held-out tasks, %",
        rows={word: 100 * one["hits"] / one["n"] for word, one in study["hits"].items()},
        spans={word: (100 * low, 100 * high) for word, (low, high) in intervals.items()},
        lines={"a coin": 100 * COIN},
    )


# Language models


def llm(results: Results, margins: Mapping[str, float]) -> Lead:
    """`margins`: half of the interval of each measured row's average."""
    rows = {name: row["average"] for name, row in results["rows"].items() if "average" in row}
    own, base = results["references"]["own"]["average"], results["references"]["base"]["average"]
    best = max(rows, key=lambda name: rows[name])
    near = [name for name in rows if name != best and rows[best] - rows[name] <= margins[best]]
    size = results["settings"]
    return Lead(
        sentences=(
            f"`{best}` keeps most of {len(results['examples'])} skills at its defaults: {percent(rows[best])} % exact match on average, where the base "
            f"has {percent(base)} and each skill's own model {percent(own)}.",
            f"With {size['test']} questions a skill that is known to ± {percent(margins[best])} points, so that {len(near)} of the {len(rows) - 1} other "
            "methods cannot be told from it.",
            f"Lowest of all: {listed([f'`{name}`' for name in rows if rows[name] == min(rows.values())])} with {percent(min(rows.values()))} %.",
        ),
        picture="llm.png",
        alt="Exact match of every merge at its defaults, averaged over the skills, with the base and the skills' own models as lines",
    )


def llm_chart(results: Results, margins: Mapping[str, float]) -> Bars:
    """Averages with intervals."""
    rows = {name: 100 * row["average"] for name, row in results["rows"].items() if "average" in row}
    order = sorted(rows, key=lambda name: -rows[name])
    return Bars(
        title="exact match at the defaults, average over the skills, %",
        rows={name: rows[name] for name in order},
        spans={name: (rows[name] - 100 * margins[name], rows[name] + 100 * margins[name]) for name in order},
        lines={
            "the base": 100 * results["references"]["base"]["average"],
            "each skill's own model": 100 * results["references"]["own"]["average"],
        },
    )


# Adapters


def adapters(content: Results) -> Lead:
    """Merges of adapters, relative to each task's own, means over tasks and seeds of groups of one start."""
    means = _adapter_means(content)
    best = max(means, key=lambda name: means[name])
    rivals = sorted(means, key=lambda name: -means[name])
    why = next(group["why"] for group in content["groups"].values() if "why" in group)
    return Lead(
        sentences=(
            f"Of {len(means)} ways to merge LoRA adapters of one seed, `{best}` keeps most: {means[best]:.1f} % of each task's own adapter, and *{rivals[1]}* "
            f"{means[rivals[1]]:.1f} %.",
            f"WUDI and bilateral merging take a vector's rows for a sample of inputs, and those of an adapter are none: two tasks' rows overlap by "
            f"{why['overlaps']['rows of A']:.2f}, their columns by {why['overlaps']['columns of B']:.2f}.",
            f"The lowest is *{rivals[-1]}* with {means[rivals[-1]]:.1f} %.",
        ),
        picture="adapters.png",
        alt="Share of the tasks' own adapters' accuracy that each merge of adapters keeps",
    )


def _adapter_means(content: Results) -> dict[str, float]:
    """Row → percent of the tasks' own adapters, over tasks and seeds with a shared start; rows that every seed has."""
    groups = [group for group in content["groups"].values() if group["start"] == "shared"]
    names = [name for name in groups[0]["rows"] if all(name in group["rows"] for group in groups)]
    return {
        name: mean(
            100 * value / group["individual"][task] for group in groups for task, value in group["rows"][name]["accuracy"].items()
        )
        for name in names
    }


def adapters_chart(content: Results) -> Bars:
    """The same means."""
    means = _adapter_means(content)
    order = sorted(means, key=lambda name: -means[name])
    return Bars(
        title="accuracy of the merge over that of each task's own adapter, %",
        rows={name: means[name] for name in order},
        zero=False,
    )


# Bases


def bases(text: Results) -> Lead:
    """What bases save, on the text suite."""
    sums = [row["bases"] for row in text["sizes"]["rows"]]
    most = max(row["k"] for row in text["sizes"]["rows"])
    tasks, own = len(text["sizes"]["tasks"]), text["sizes"]["individual"]
    methods = text["savings"]
    kept = [name for name, one in methods.items() if one["bases"]["absolute"] >= one["save-all"]["absolute"]]
    some = next(iter(methods.values()))
    return Lead(
        sentences=(
            f"{some['bases']['vectors']} bases in place of {some['save-all']['vectors']} vectors take "
            f"{100 * some['bases']['bytes'] / some['save-all']['bytes']:.0f} % of the room and lose nothing with {len(kept)} of {len(methods)} "
            f"methods ({', '.join(kept)}).",
            f"A sum of bases of {tasks} text tasks is worth about the same however many there are: {percent(min(sums))} to {percent(max(sums))} % on "
            f"average for 1 to {most} bases.",
            f"Each task's own model has {percent(own)} %, and the base {percent(text['sizes']['pretrained'])}.",
        ),
        picture="bases-text-sizes.png",
        alt="Accuracy over the number of bases, beside random partitions",
    )
