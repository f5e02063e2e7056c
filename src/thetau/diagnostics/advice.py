"""From figures to advice: what to leave out, who gets in whose way, with which method and λ to begin, what it costs, what to check.

Each piece says what it is told from and what may make it wrong. Where such advice was tried, its hit rate stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from thetau.diagnostics.doctor import Advice, Finding, Harm, Pair, Subject
from thetau.diagnostics.predictions import measured
from thetau.engine.executor import Engine
from thetau.engine.planning import plan, reading_rate
from thetau.engine.work import gigabytes
from thetau.errors import AlignmentError, RecipeError
from thetau.facade import Expression, merge
from thetau.methods import build

LOUD = 0.5  # ‖τ_j τ_iᵀ‖/‖τ_i τ_iᵀ‖ from which one task is named as another's trouble
WRITING = 5e8  # bytes a second that a disk keeps up when it is asked to sync
NAMED = 3  # pairs that are named
CHANCE = 0.5  # how often a coin would name the worse of two models
BY_WEIGHTS = (
    "Told from weights alone: a task's own rows stand for the inputs of its layers; those of adapters do not (docs/adapters.md)."
)


def advise(
    base: Subject,
    models: Sequence[Subject],
    vectors: Mapping[str, Expression],
    pairs: Sequence[Pair],
    harms: Sequence[Harm],
    scale: float | None,
    first: Sequence[Advice],
    staying: Sequence[str],
    *,
    engine: Engine,
    exclude: Sequence[str] = (),
) -> tuple[Advice, ...]:
    """Everything, in the order in which it is to be done: `first` what is left out, then what to do with those that stay."""
    out = {name for one in first if one.topic == "leave out" for name in one.models}
    adapters = [one.name for one in models if one.form == "adapter" and one.name in staying]
    advice = [*first, *_conflicts(pairs, staying)]
    if len(staying) > 1:
        whole = len(adapters) == len(staying)
        advice += _method(staying, harms, whole, len(adapters))
        if scale is not None and not whole:
            advice.append(_scale(staying, scale))
        if not whole:
            advice += _cost([vectors[name] for name in staying], staying, bool(harms), engine, exclude)
    elif len(staying) == 1:
        advice.append(
            Advice(
                topic="method",
                models=tuple(staying),
                sentence=f"Nothing is to be merged: {staying[0]} is the only model that stays. Use it as it is.",
                evidence=f"{len(models)} models were given.",
                uncertainty="",
            )
        )
    return (*advice, *_checks(base, [one for one in models if one.name not in out], staying))


REMEDIES: Mapping[str, tuple[str, str]] = {  # finding → what to do, and what may make it wrong
    "wrong base": (
        "Leave out {last}, or merge it over its own base; `thetau doctor --candidate OTHER` says which of several that is.",
        "A very long fine-tuning goes as far as another base does.",
    ),
    "does not fit": ("Leave out {last}, or exclude the tensors that do not fit (`--exclude`).", ""),
    "other vocabulary": (
        "Give {last} a common vocabulary: `tokenizer: {{source: union}}` in the recipe merges rows by their token.",
        "Where only unused rows differ, nothing is lost without it.",
    ),
    "duplicate": ("Give only one of {first} and {last}: the same model twice counts double.", ""),
    "rescaled": ("Give only one of {first} and {last}, or set their weights on purpose.", ""),
    "opposed": (
        "Do not merge {last} with {first} unless one is meant to undo the other; then `thetau vector add` says so with a sign.",
        "Where both have a part in common that was trained away in one, the rest may still be worth merging.",
    ),
    "continuation": (
        "Take {first} alone where it was trained on what {last} knows; merged with it, the common part counts double.",
        "Two runs on one data set that differ in length look the same.",
    ),
    "alike": (
        "Count {first} and {last} as one: average the two before they are merged with others.",
        "The same data with two seeds looks like this, too.",
    ),
    "no change": ("Leave out {last}: it adds nothing.", ""),
}


SOFT = ("other vocabulary", "alike")  # what can be merged all the same, with care


def left_out(found: Sequence[Finding]) -> list[Advice]:
    """What to do about each finding; those that stay in spite of it are told as to be checked."""
    advice: list[Advice] = []
    gone: set[str] = set()
    for one in found:
        if set(one.models) & gone:
            continue  # what is left out already needs no second word
        first, last = one.models[0], one.models[-1]
        sentence, uncertainty = REMEDIES[one.kind]
        soft = one.kind in SOFT
        if not soft:
            gone.add(last)
        advice.append(
            Advice(
                topic="check" if soft else "leave out",
                models=(first, last) if soft and first != last else (last,),
                sentence=sentence.format(first=first, last=last),
                evidence=one.sentence,
                uncertainty=uncertainty,
            )
        )
    known = {name for one in advice if one.topic == "leave out" for name in one.models}
    return [one for one in advice if one.topic == "leave out" or not set(one.models) & known]


def _conflicts(pairs: Sequence[Pair], staying: Sequence[str]) -> list[Advice]:
    """The pairs of which one does most to what the other was trained on."""
    rows = [
        (does, doer, done)
        for pair in pairs
        if pair.a in staying and pair.b in staying
        for does, doer, done in ((pair.a_on_b, pair.a, pair.b), (pair.b_on_a, pair.b, pair.a))
        if does is not None
    ]
    rows.sort(key=lambda row: -row[0])
    loud = [row for row in rows if row[0] >= LOUD][:NAMED]
    if not rows:
        return []
    if not loud:
        return [
            Advice(
                topic="conflict",
                models=(),
                sentence="No two of the models get in each other's way much.",
                evidence=f"The most that one does to the inputs of another is {rows[0][0]:.2f} of what that does itself ({rows[0][1]} to {rows[0][2]}).",
                uncertainty=_conflict_doubt(),
                measured=measured("conflict"),
            )
        ]
    named = ", ".join(f"{done} by {doer} ({does:.2f})" for does, doer, done in loud)
    return [
        Advice(
            topic="conflict",
            models=tuple(dict.fromkeys(name for _, doer, done in loud for name in (done, doer))),
            sentence=f"Look first at what is most in danger in a plain sum: {named}.",
            evidence=(
                "‖τ_j τ_iᵀ‖/‖τ_i τ_iᵀ‖ over the blocks' matrices: what the other does to the inputs that a task was trained on, relative to what its "
                "own vector does."
            ),
            uncertainty=_conflict_doubt(),
            measured=measured("conflict"),
        )
    ]


def _conflict_doubt() -> str:
    """What may make it wrong, with what came of trying it."""
    rate = measured("conflict")
    if rate is None or rate.low > CHANCE:
        return BY_WEIGHTS
    return f"{BY_WEIGHTS} Where it was tried it did no better than a coin: a place to look, no reason to leave a model out."


def _method(staying: Sequence[str], harms: Sequence[Harm], adapters: bool, count: int) -> list[Advice]:
    if adapters:
        return [
            Advice(
                topic="method",
                models=tuple(staying),
                sentence="Begin with `thetau adapter merge` (`clear`): one adapter out of all, with nothing to tune.",
                evidence=(
                    f"All {len(staying)} are adapters, whose rows are no sample of their inputs, so that WUDI and bilateral merging fail "
                    "(docs/adapters.md)."
                ),
                uncertainty="Measured on three text tasks (docs/adapters.md).",
            )
        ]
    if not harms:
        return [
            Advice(
                topic="method",
                models=tuple(staying),
                sentence="Begin with `task_arithmetic` and choose λ on validation data.",
                evidence=(
                    "No matrix of these models stands in a block that is known, on which WUDI and bilateral merging act. "
                    "`thetau inspect --roles` shows what is."
                ),
                uncertainty="",
            )
        ]
    least = {one.method: math.fsum(one.whole) / len(one.whole) for one in harms if one.scale is None or one.scale != 1.0}
    told = ", ".join(f"{method} {value:.2f}" for method, value in sorted(least.items(), key=lambda pair: pair[1]))
    return [
        Advice(
            topic="method",
            models=tuple(staying),
            sentence="Begin with `bilateral`, and with `wudi` (`solver: gradient_flow`) beside it: no data, nothing to tune.",
            evidence=f"Eq. 21's root, mean over tasks (0 as each model alone, 1 as the base): {told}.",
            uncertainty=(
                "WUDI minimises that very figure and bilateral another one, so it does not choose between them: evaluate both."
                + (f" {count} of the models are adapters, whose rows are no sample of their inputs." if count else "")
            ),
            measured=measured("method"),
        )
    ]


def _scale(staying: Sequence[str], scale: float) -> Advice:
    return Advice(
        topic="scale",
        models=tuple(staying),
        sentence=f"For `task_arithmetic` begin with λ = {scale:.2f}.",
        evidence="That makes Eq. 21 least among all multiples of the sum.",
        uncertainty=f"{BY_WEIGHTS} Try {0.75 * scale:.2f} and {1.35 * scale:.2f} too.",
        measured=measured("scale"),
    )


def _cost(
    vectors: Sequence[Expression], staying: Sequence[str], matrices: bool, engine: Engine, exclude: Sequence[str]
) -> list[Advice]:
    """What the first method would take here, by the plan that a merge would run."""
    name = "bilateral" if matrices else "task_arithmetic"
    try:
        merged = merge(list(vectors), build(name, {}), names=list(staying), exclude=exclude, engine=engine)
        assert merged.reference is not None
        model = Expression(((1.0, merged.reference),), reference=merged.reference) + merged
        found = plan(model, engine=engine)
        rate = reading_rate(model)
    except (AlignmentError, RecipeError):
        return []  # nothing of it can be merged so; the other advice says what is wrong
    seconds = "" if rate is None else f", about {_time(found.duration(rate, min(rate, WRITING)))}"
    held = gigabytes(found.memory)
    return [
        Advice(
            topic="cost",
            models=tuple(staying),
            sentence=f"`{name}` over {len(staying)} models takes{seconds.removeprefix(',')}{' and' if seconds else ''} {held} of memory here.",
            evidence=f"Its plan: reads {gigabytes(found.read)}, writes {gigabytes(found.written)}, {found.flops:.2g} operations of solvers.",
            uncertainty="Reading was timed on what the system may hold in memory; a cold disk is slower.",
        )
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _checks(base: Subject, models: Sequence[Subject], staying: Sequence[str]) -> list[Advice]:
    said = [line for one in models if one.name in staying for line in one.beside if "tokenizer differs" not in line]
    advice = (
        [
            Advice(
                topic="check",
                models=(),
                sentence="Choose whose config and template the output takes (`config: NAME`).",
                evidence=" ".join(said[:3]) + (f" And {len(said) - 3} more." if len(said) > 3 else ""),
                uncertainty="",
            )
        ]
        if said
        else []
    )
    mixed = sorted({name for one in (base, *models) for name in one.dtypes if name.startswith(("float", "bfloat"))})
    if len(mixed) > 1:
        advice.append(
            Advice(
                topic="check",
                models=(),
                sentence=f"Choose the output's dtype (`dtype:`): the files hold {', '.join(mixed)}.",
                evidence=f"By default the output has {base.name}'s.",
                uncertainty="",
            )
        )
    if len(staying) > 1:
        advice.append(
            Advice(
                topic="check",
                models=tuple(staying),
                sentence="Evaluate the merge on each task beside the task's own model, and `thetau verify` the files.",
                evidence="No figure of weights alone stands in for an accuracy.",
                uncertainty="",
            )
        )
    return advice
