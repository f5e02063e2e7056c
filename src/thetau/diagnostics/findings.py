"""What stands out among task vectors: duplicates, continuations, opposed ones, a base that is none. Pure functions of figures.

Every rule is a number that is named here. They are told from the weights alone, and each finding says what it was told from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from thetau._lazy import torch
from thetau.checkpoint import FLOATS
from thetau.diagnostics.candidates import Candidates
from thetau.diagnostics.doctor import Finding, Likeness, Subject
from thetau.engine.guard import FAR

ONE_LINE = 0.999  # |cosine| above which two vectors are one direction
OPPOSED = -0.3  # cosine below which two vectors undo each other; those of unrelated tasks lie within a few hundredths of 0
RELATED = 0.3  # cosine above which two vectors have a part in common that chance does not give
ALIKE = 0.5  # cosine above which a sum counts a direction twice
WHOLE = (0.8, 1.25)  # ⟨a, b⟩/‖a‖² between which b holds all of a
STEADY = 0.8  # share of tensors in which that is so, for b to come from a
ROUNDED = 0.25  # of a dtype's ε: a little more than what rounding to it moves weights by, relative to their length
EXACT = 1e-7  # of the length: what the figures themselves are known to
COPIED = 0.05  # |⟨a, b⟩/‖a‖² − 1| up to which b is a copy of a
OUTLYING = 5.0  # times the others' median length, from which a vector is told as an outlier


def findings(
    base: Subject,
    models: Sequence[Subject],
    pairs: Sequence[Likeness],
    candidates: Candidates | None,
    other_vocabulary: Mapping[str, str],
) -> tuple[Finding, ...]:
    """Everything that stands out, the gravest first. `other_vocabulary`: model → what its vocabulary is told from."""
    known = {one.name: one for one in models}
    found = [_misfit(one, other_vocabulary.get(one.name)) for one in models if one.problems]
    found += [
        Finding(kind="other vocabulary", models=(name,), sentence=why, figures={})
        for name, why in other_vocabulary.items()
        if not known[name].problems
    ]
    fitting = [one for one in models if not one.problems]
    lost = [wrong for one in fitting if (wrong := wrong_base(one, base, fitting, candidates)) is not None]
    found += lost
    still = {one.name for one in fitting if unchanged(one, base)}
    found += [
        Finding(
            kind="no change",
            models=(name,),
            sentence=f"{name}: has the weights of {base.name}; its task vector is no more than rounding.",
            figures={"norm": known[name].norm or 0.0},
        )
        for name in sorted(still)
    ]
    strangers = {one.models[0] for one in lost}
    for pair in pairs:
        if not {pair.a, pair.b} & (still | strangers):
            told = related(pair, known[pair.a], known[pair.b], base)
            found += [] if told is None else [told]
    order: dict[str, int] = {
        "wrong base": 0,
        "does not fit": 1,
        "other vocabulary": 2,
        "duplicate": 3,
        "opposed": 4,
        "continuation": 5,
    }
    return tuple(sorted(found, key=lambda one: order.get(one.kind, 9)))


def _misfit(one: Subject, vocabulary: str | None) -> Finding:
    return Finding(
        kind="other vocabulary" if vocabulary else "does not fit",
        models=(one.name,),
        sentence=vocabulary or f"{one.name}: does not fit the base: {one.problems[0]}",
        figures={"problems": float(len(one.problems))},
    )


def wrong_base(one: Subject, base: Subject, fitting: Sequence[Subject], candidates: Candidates | None) -> Finding | None:
    """Whether a model was fine-tuned from something else: by the candidates, by its distance, or by the others' lengths."""
    judged = next((judge for judge in candidates.models if judge.model == one.name), None) if candidates is not None else None
    if judged is not None and judged.verdict == "from" and judged.nearest != base.name:
        figures = {"distance": judged.distance[judged.nearest], "from base": judged.distance.get(base.name, math.nan)}
        return Finding(kind="wrong base", models=(one.name,), sentence=judged.sentence(), figures=figures)
    shift = one.shift or 0.0
    if shift > FAR:
        return Finding(
            kind="wrong base",
            models=(one.name,),
            sentence=(
                f"{one.name}: lies {shift:.2f} of the base's norm away from {base.name}; fine-tuning gives less than {FAR:g}. "
                f"{base.name} is probably not its base."
            ),
            figures={"shift": shift},
        )
    others = sorted(other.norm or 0.0 for other in fitting if other.name != one.name)
    if judged is None and len(others) >= 2 and one.norm:
        median = others[len(others) // 2] if len(others) % 2 else (others[len(others) // 2 - 1] + others[len(others) // 2]) / 2
        if median > 0 and one.norm > OUTLYING * median:
            return Finding(
                kind="wrong base",
                models=(one.name,),
                sentence=(
                    f"{one.name}: its vector is {one.norm / median:.1f} times as long as those of the others. It was trained much longer, or from "
                    f"another base near {base.name}: name that with --candidate to know."
                ),
                figures={"norm": one.norm, "others": median},
            )
    return None


def unchanged(one: Subject, base: Subject) -> bool:
    """Whether a vector is no more than what storing a model in another dtype than the base's leaves."""
    return (one.norm or 0.0) <= slack(one, base, base)


def slack(one: Subject, other: Subject, base: Subject) -> float:
    """How far two copies of one model lie apart where their dtypes differ; next to nothing where they do not.

    To round to the nearest number of a dtype moves an entry by ε/√12 of its binade at the mean, which is ε/5 of ‖θ‖ over all, much the same
    whatever the weights. What is a difference to the base by itself (an adapter, a saved vector) is rounded relative to its own length.
    """
    whole = one.form == other.form == "model"
    length = (base.norm if whole else max(one.norm or 0.0, (other.norm or 0.0) if other is not base else 0.0)) or 0.0
    steps = {_step(one), _step(other)}
    return (ROUNDED * max(steps) if len(steps) > 1 and (whole or other is not base) else EXACT) * length


def _step(one: Subject) -> float:
    """ε of the dtype that most of a model's tensors have."""
    known = {name: count for name, count in one.dtypes.items() if name in FLOATS}
    return torch.finfo(FLOATS[max(known, key=lambda name: known[name])].torch).eps if known else 0.0


def related(pair: Likeness, a: Subject, b: Subject, base: Subject) -> Finding | None:
    """How two vectors hang together, if they do."""
    whole = min(abs(pair.projection - 1), abs(pair.back - 1)) <= COPIED  # rounding takes nothing away from the finer one
    apart = whole and pair.distance <= slack(a, b, base)
    figures = {"cosine": pair.cosine, "projection": pair.projection, "back": pair.back, "distance": pair.distance}
    if apart:
        said = f"{pair.a} and {pair.b} are the same model: their weights differ by {pair.distance:.3g}, no more than rounding."
        return Finding(kind="duplicate", models=(pair.a, pair.b), sentence=said, figures=figures)
    if pair.cosine <= OPPOSED:
        said = (
            f"{pair.b} undoes {pair.a}: their vectors point against each other (cosine {pair.cosine:+.2f}; unrelated tasks have about 0). "
            "One may be a negated vector, or was trained to unlearn what the other knows."
        )
        return Finding(kind="opposed", models=(pair.a, pair.b), sentence=said, figures=figures)
    if pair.cosine >= ONE_LINE:
        said = f"{pair.a} and {pair.b} are one direction at two lengths (cosine {pair.cosine:.4f}, {pair.back:.2f} to 1)."
        return Finding(kind="rescaled", models=(pair.a, pair.b), sentence=said, figures=figures)
    ways = [
        (first, second, share, steady)
        for first, second, share, steady in (
            (pair.a, pair.b, pair.projection, pair.steady),
            (pair.b, pair.a, pair.back, pair.steady_back),
        )
        if WHOLE[0] <= share <= WHOLE[1] and steady >= STEADY
    ]
    if pair.cosine >= RELATED and ways:
        first, second, share, steady = min(ways, key=lambda way: abs(way[2] - 1))
        said = (
            f"{second} was probably trained from {first}, not from {base.name}: it holds {share:.2f} of {first}'s vector, in {100 * steady:.0f} % "
            f"of the tensors alike (cosine {pair.cosine:.2f})."
        )
        return Finding(kind="continuation", models=(second, first), sentence=said, figures={**figures, "steady": steady})
    if pair.cosine >= ALIKE:
        said = f"{pair.a} and {pair.b} share a direction (cosine {pair.cosine:.2f}): a sum counts it twice. Were they trained on the same data?"
        return Finding(kind="alike", models=(pair.a, pair.b), sentence=said, figures=figures)
    return None
