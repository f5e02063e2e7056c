r"""Which of several candidate bases the models were fine-tuned from.

Zeng et al., 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>, Fig. 5 and Table 2: a model lies
near the base that it was fine-tuned from ($\lVert\tau\rVert \approx 2$ there) and far from another (about 314), and vectors taken from the
wrong one share the long way between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from thetau.engine.guard import FAR

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EQUAL = 0.95  # nearest distance over second nearest, above which neither is nearer in any way that counts
ROUNDING = 1e-6  # of the candidate's norm: what is left between equal weights when a third is subtracted from both


@final
@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible base. `cosine`: the mean over pairs of models of cos(θ_i − θ_c, θ_j − θ_c), near 1 where it is the wrong one.

    `same_as`: an earlier candidate with the same values, in whose place it is not counted. `problems` say why it could not be compared.
    """

    name: str
    norm: float | None = None
    cosine: float | None = None
    same_as: str | None = None
    problems: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One model. `distance`: ‖θ_i − θ_c‖ by candidate; `ratio`: the same over ‖θ_c‖.

    - `verdict`: `from`: fine-tuned from `nearest`; `itself`: it has `nearest`'s weights; `ambiguous`: two are equally near; `none`: the
      nearest is farther than fine-tuning goes.
    - `second`: the next nearest. `clear`: the distance of the nearest over that of the second, near 0 where all is clear, 1 where
      nothing is. None where there is but one.
    - `between`: where the model lies along the line from the nearest (0) to the second (1). Fine-tuning hardly moves it along that
      line, so that this tells more than the distances where the two candidates are near each other.
    """

    model: str
    distance: Mapping[str, float]
    ratio: Mapping[str, float]
    nearest: str
    second: str | None
    clear: float | None
    between: float | None
    verdict: Literal["from", "itself", "ambiguous", "none"]

    def sentence(self) -> str:
        """The verdict in words."""
        here, share = self.distance[self.nearest], self.ratio[self.nearest]
        away = f"‖θ − θ₀‖ = {here:.4g}, {share:.2g} of its norm"
        if self.verdict == "itself":
            return f"{self.model}: has the weights of {self.nearest}."
        if self.verdict == "none":
            return (
                f"{self.model}: fine-tuned from none of the candidates. The nearest, {self.nearest}, is still far "
                f"({away}; fine-tuning gives less than {FAR:g})."
            )
        if self.second is None:
            return f"{self.model}: may be fine-tuned from {self.nearest} ({away}); there is no other candidate to compare with."
        other = self.distance[self.second]
        if self.verdict == "ambiguous":
            return (
                f"{self.model}: {self.nearest} and {self.second} are equally near (‖θ − θ₀‖ = {here:.4g} and {other:.4g}), so that either "
                f"may be its base; it lies {self.between or 0.0:.2f} of the way from the first to the second."
            )
        return (
            f"{self.model}: fine-tuned from {self.nearest} ({away}); the next, {self.second}, is {other / here:.3g} times as far."
        )


@final
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All of them. `apart[i][j]`: ‖θ_c − θ_c'‖ between those of `compared`, in that order. `not_judged`: model → why."""

    candidates: tuple[Candidate, ...]
    compared: tuple[str, ...]
    apart: tuple[tuple[float, ...], ...]
    models: tuple[Judgement, ...]
    not_judged: Mapping[str, str]

    def sentences(self) -> list[str]:
        """What was found, in words."""
        said = [f"{one.name}: has the same weights as {one.same_as}, and counts once." for one in self.candidates if one.same_as]
        return [*said, *(model.sentence() for model in self.models), *(f"{name}: {why}" for name, why in self.not_judged.items())]


def judge(
    names: Sequence[str],
    models: Sequence[str],
    squared: Float[Tensor, "point point"],
    norms: Sequence[float],
    *,
    problems: Mapping[str, Sequence[str]],
    not_judged: Mapping[str, str],
) -> Candidates:
    """From squared distances between all points, the candidates `names` first and then `models`, in float64.

    `norms`: ‖θ_c‖ by candidate. `problems`: those of candidates that could not be compared, by name.
    """
    count = len(names)
    apart = squared.clamp(min=0).sqrt().tolist()
    same: dict[str, str] = {}
    for j in range(count):
        twin = next((i for i in range(j) if apart[i][j] == 0 and names[i] not in same), None)
        if twin is not None:
            same[names[j]] = names[twin]
    distinct = [i for i in range(count) if names[i] not in same]
    described = [
        Candidate(name=name, norm=norms[i], cosine=_mean_cosine(squared, i, count), same_as=same.get(name))
        for i, name in enumerate(names)
    ]
    described += [Candidate(name=name, problems=tuple(why)) for name, why in problems.items()]
    return Candidates(
        candidates=tuple(described),
        compared=tuple(names),
        apart=tuple(tuple(row[:count]) for row in apart[:count]),
        models=tuple(_judge(model, apart[count + k], names, norms, distinct, apart) for k, model in enumerate(models)),
        not_judged=not_judged,
    )


def _judge(
    model: str,
    away: Sequence[float],
    names: Sequence[str],
    norms: Sequence[float],
    distinct: Sequence[int],
    apart: Sequence[Sequence[float]],
) -> Judgement:
    ratios = [far / norm if norm else math.inf for far, norm in zip(away, norms, strict=False)]
    first, *others = sorted(distinct, key=lambda i: away[i])
    second = others[0] if others else None
    clear = between = None
    if second is not None:
        clear = away[first] / away[second] if away[second] else 1.0
        between = (apart[first][second] ** 2 + away[first] ** 2 - away[second] ** 2) / (2 * apart[first][second] ** 2)
    verdict: Literal["from", "itself", "ambiguous", "none"] = "from"
    if away[first] <= ROUNDING * norms[first]:
        verdict = "itself"
    elif ratios[first] > FAR:
        verdict = "none"
    elif clear is not None and clear > EQUAL:
        verdict = "ambiguous"
    return Judgement(
        model=model,
        distance={name: away[i] for i, name in enumerate(names)},
        ratio={name: ratios[i] for i, name in enumerate(names)},
        nearest=names[first],
        second=None if second is None else names[second],
        clear=clear,
        between=between,
        verdict=verdict,
    )


def _mean_cosine(squared: Tensor, candidate: int, count: int) -> float | None:
    """Over pairs of models: ⟨θ_i − θ_c, θ_j − θ_c⟩ = (d_ic² + d_jc² − d_ij²)/2. A model that lies on the candidate has cosine 0."""
    found = []
    for i in range(count, len(squared)):
        for j in range(count, i):
            a, b = float(squared[i, candidate]), float(squared[j, candidate])
            inner = (a + b - float(squared[i, j])) / 2
            found.append(max(-1.0, min(1.0, inner / math.sqrt(a * b))) if a > 0 and b > 0 else 0.0)
    return sum(found) / len(found) if found else None
