"""What `thetau basis add | negate | ood | compare` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau.cli.tables import percent, table

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.studies.bases import BasesAddition, BasisNegation, BasisOutOfDistribution
    from thetau.studies.partitions import PartitionStudy, Savings


def added_table(found: BasesAddition, outer: str) -> Table:
    """Each task, and the means."""
    what = "the sum of the bases" if outer == "sum" else f"{outer} of the bases"
    effort, over = found.effort, found.effort_over_tasks
    coefficients = "coefficient" if effort.coefficients == 1 else "coefficients"
    own = ["own λ"] if found.own else []
    made = table(
        f"{what} on test, in percent; λ by average {'normalised ' if found.individual else ''}validation accuracy.\n"
        f"{effort.coefficients} {coefficients} over {effort.vectors} bases, {effort.evaluations} models evaluated; "
        f"over the {over.vectors} task vectors {over.coefficients} and {over.evaluations}",
        *("task", "n", "individual", "λ = 1", f"λ = {found.scale:g}", *own, "95 % interval"),
    )
    for name, one in found.best.accuracy.items():
        alone = percent(found.individual[name].value) if found.individual else "–"
        at = [found.one_shot.accuracy[name].value, found.tuned.accuracy[name].value, *([one.value] if found.own else [])]
        made.add_row(name, str(one.n), alone, *map(percent, at), f"{percent(one.low)} – {percent(one.high)}")
    made.add_section()
    outcomes = [found.one_shot, found.tuned, *([found.own] if found.own else [])]
    alone = percent(sum(one.value for one in found.individual.values()) / len(found.individual)) if found.individual else "–"
    made.add_row("average", "", alone, *(percent(one.absolute) for one in outcomes), "")
    if found.individual:
        made.add_row("normalised", "", "", *(percent(one.normalised or 0.0) for one in outcomes), "")
    return made


def negated_table(found: BasisNegation, keep: float) -> Table:
    """The task and the control task."""
    one = found.negation
    ways = {"own": "its own cluster's", "similar": "the most similar one", "given": "given by hand"}
    cosine = (
        ""
        if found.similarity is None or not found.similarity.cosines
        else f", cosine {found.similarity.cosines[found.basis]:.3f}"
    )
    made = table(
        f"θ₀ − α·{found.basis} ({', '.join(found.members)}): {ways[found.how]}{cosine}. On test, in percent; α has the lowest validation "
        f"value of {one.task} that keeps {percent(keep)} % of {one.control}'s; 0: nothing above it does",
        *("", "n", "pre-trained", "α = 1", f"α = {one.tuned.alpha:g}", "95 % interval"),
    )
    for name, before, at_one, after in (
        (one.task, one.pretrained_target, one.one_shot.target, one.tuned.target),
        (f"{one.control} (control)", one.pretrained_control, one.one_shot.control, one.tuned.control),
    ):
        values = map(percent, (before.value, at_one.value, after.value))
        made.add_row(name, str(after.n), *values, f"{percent(after.low)} – {percent(after.high)}")
    return made


def served_table(found: BasisOutOfDistribution, outer: str) -> Table:
    """The new task."""
    cosines = ", ".join(f"{name} {found.similarity.cosines[name]:.3f}" for name in found.similarity.ranked())
    ways = {
        "vector": "by its vector",
        "steps": f"after {found.similarity.steps} step{'' if found.similarity.steps == 1 else 's'}",
        "given": "given by hand",
    }
    how = ways.get(found.similarity.how, f"after {found.similarity.steps} steps of whole epochs")
    used = f"{' + '.join(found.bases)}{f' by {outer}' if len(found.bases) > 1 else ''}" if found.bases else "none"
    made = table(
        f"bases used: {used}; {how}{f': cosines {cosines}' if cosines else ''}. On test, in percent; α by validation",
        *("task", "n", "pre-trained", "α = 1", "α tuned", "α", "95 % interval"),
    )
    best = found.tuned or found.pretrained
    tuned = [percent(one.value) if one is not None else "–" for one in (found.one_shot, found.tuned)]
    alpha = "–" if found.alpha is None else f"{found.alpha:g}"
    interval = f"{percent(best.low)} – {percent(best.high)}"
    made.add_row(found.task, str(best.n), percent(found.pretrained.value), *tuned, alpha, interval)
    return made


def compared_table(found: Savings, inner: str, outer: str) -> Table:
    """Save-One, bases, Save-All."""
    from thetau.engine.work import gigabytes

    made = table(
        f"bases {found.bases.partitions[0].label}; within a cluster {inner}, then {outer}, λ by validation. On test, in percent; "
        f"Save-One: the mean over the {len(found.one.partitions)} partitions that merge all tasks but one",
        *("", "vectors", "bytes", "coefficients", "average", "normalised"),
    )
    for one in (found.one, found.bases, found.all):
        relative = "–" if one.normalised is None else percent(one.normalised)
        numbers = (str(one.vectors), gigabytes(one.nbytes), str(one.coefficients))
        made.add_row(one.name, *numbers, percent(one.absolute), relative)
    return made


def partitions_table(study: PartitionStudy) -> Table:
    """Every partition, and the means over those of a size."""
    assert study.natural is not None
    made = table(
        f"all {study.overall.count} partitions, on test, in percent; the clusters' own is {study.rank} of those with as many clusters",
        *("partition", "k", "λ", "average", "normalised"),
    )
    for value in study.values:
        relative = "–" if value.normalised is None else percent(value.normalised)
        mark = " ←" if value.label == study.natural.label else ""
        made.add_row(value.label + mark, str(len(value.groups)), f"{value.addition.scale:g}", percent(value.absolute), relative)
    made.add_section()
    for size, one in [*study.by_size.items(), ("all", study.overall)]:
        made.add_row("mean", str(size), "", percent(one.absolute), "–" if one.normalised is None else percent(one.normalised))
    return made
