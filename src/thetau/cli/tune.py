"""`thetau tune`: coefficients chosen on validation, numbers reported on test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thetau.cli.common import Json, TunedModels
from thetau.cli.options import with_options
from thetau.cli.tables import percent, show, table
from thetau.evaluate.options import Backbone, Limits, Reading
from thetau.studies.options import Tune

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.studies.arithmetic import Addition, Analogy, Negation, OutOfDistribution
    from thetau.studies.tuning import Tuned


@with_options
def tune(models: TunedModels, backbone: Backbone, options: Tune, reading: Reading, limits: Limits, json: Json) -> None:
    """Choose α on validation and report on test: addition (or any method's λ), negation, an analogy, tasks left out.

    Vectors of the tangent space are evaluated in the linear form, where every α is free.

    thetau tune runs/demo/finetuned/sms_spam/* runs/demo/finetuned/qnli/* --method ties
    """
    from thetau.evaluate.session import Session
    from thetau.evaluate.tuned import open_tuned
    from thetau.studies import tuning

    json.check()
    tasks = tuning.tasks_to_tune([open_tuned(model).task for model in models], options)
    session = Session.open(models, base=backbone.base, tasks=tasks, limits=limits.by_split(), reading=reading)
    found = tuning.tune(session, options)
    json.save(found)
    show(_table(found))


def _table(found: Tuned) -> Table:
    from thetau.studies.arithmetic import Addition, Analogy, Negation, OutOfDistribution

    match found.result:
        case Addition():
            return _addition(found.result, found.method)
        case Analogy():
            return _analogy(found.result)
    negations = [one for one in found.result if isinstance(one, Negation)]
    return _negations(negations) if negations else _left_out([one for one in found.result if isinstance(one, OutOfDistribution)])


def _addition(found: Addition, method: str) -> Table:
    what = "the sum" if method == "sum" else method
    made = table(
        f"{what} on test, in percent; α is the best of {len(found.trials)} by average normalised validation accuracy",
        *("task", "n", "individual", "α = 1", f"α = {found.tuned.alpha:g}", "95 % interval"),
    )
    for name, one in found.tuned.accuracy.items():
        interval = f"{percent(one.low)} – {percent(one.high)}"
        alone, at_one = found.individual[name].value, found.one_shot.accuracy[name].value
        made.add_row(name, str(one.n), percent(alone), percent(at_one), percent(one.value), interval)
    made.add_section()
    mean = sum(one.value for one in found.individual.values()) / len(found.individual)
    made.add_row("average", "", percent(mean), percent(found.one_shot.absolute), percent(found.tuned.absolute), "")
    made.add_row("normalised", "", "", percent(found.one_shot.normalised), percent(found.tuned.normalised), "")
    return made


def _negations(found: Sequence[Negation]) -> Table:
    made = table(
        "in percent, on test; α has the lowest validation value of the task that keeps 95 % of the control's. "
        "α = 0: nothing above it does",
        *("task", "α", "target", "before", "control", "before"),
    )
    for one in found:
        kept = (one.tuned.target.value, one.pretrained_target.value, one.tuned.control.value, one.pretrained_control.value)
        made.add_row(one.task, f"{one.tuned.alpha:g}", *map(percent, kept))
    return made


def _analogy(found: Analogy) -> Table:
    made = table(
        f"{found.a} is to {found.b} as {found.c} is to {found.d}; on test, in percent, n = {found.base.n}",
        *("", "pre-trained", "α = 1", f"α = {found.alpha:g}"),
    )
    made.add_row(found.d, *map(percent, (found.base.value, found.one_shot.value, found.tuned.value)))
    return made


def _left_out(found: Sequence[OutOfDistribution]) -> Table:
    made = table("the sum of the other tasks' vectors, on test, in percent", "task left out", "α", "pre-trained", "merged")
    for one in found:
        made.add_row(one.task, f"{one.alpha:g}", percent(one.base.value), percent(one.merged.value))
    return made
