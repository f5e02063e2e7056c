r"""How far each eigenvector of A moves from the start towards the minimum: the filters of SWUDI.

Along an eigenvector of eigenvalue λ the minimum of a quadratic is R/λ away from the start, R being its residual there. A filter goes the
share f(λ) of that way. SWUDI and SWUDI-A (2026, <https://arxiv.org/abs/2606.07289>) cut besides: only the k largest eigenvalues count,
and all other directions keep the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Annotated, Literal

from thetau._lazy import torch
from thetau.linalg.rounding import Spectrum, eps
from thetau.methods.fields import AtLeast, NotNegative, Portion, Positive, Within
from thetau.methods.quadratic import Quadratic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LANDWEBER = 0.9  # the step in units of 1 / largest eigenvalue
Rule = Literal["share", "variance", "participation_sqrt", "participation", "entropy", "stable_rank", "gavish_donoho"]
Filter = Annotated[
    Literal["flow", "cut", "tikhonov", "landweber"],
    "f(λ): `flow` 1 − e^{−Tλ}, `cut` 1, `tikhonov` λ/(λ + α), `landweber` 1 − (1 − 0.9 λ/λ₁)^steps.",
]
Ruled = Annotated[
    Rule,
    "how many of A's eigenvectors move: `share` takes ⌈keep · d_in⌉; `variance` the fewest with that share of Σλ; the others are effective "
    "ranks, at most `keep` · d_in: `participation_sqrt` (Σ√λ)²/Σλ, `participation` (Σλ)²/Σλ², `entropy` exp H(λ/Σλ), `stable_rank` Σλ²/λ₁², "
    "`gavish_donoho` the √λ above Gavish and Donoho's multiple of their median.",
]
Kept = Annotated[Portion, "share of A's d_in eigenvectors that move, of Σλ under `variance`; the others keep the start."]
Horizon = Annotated[float | None, Within("(0, inf)", none="for `time`"), "T of the flow as SWUDI has it: 2 · time · d_in / tr A."]
Alpha = Annotated[Positive, "α of `tikhonov`."]


@dataclass(frozen=True, kw_only=True)
class SpectralFilter:
    """f(λ)/λ for every eigenvalue that counts, 0 for the others. Fields as `Wudi` explains them."""

    filter: Filter = "flow"
    time: NotNegative = 1.0
    exp_time: Horizon = None
    alpha: Alpha = 1e-2
    steps: Annotated[int, AtLeast(0), "steps of `landweber`."] = 300
    rank: Ruled = "share"
    keep: Kept = 1.0

    def moved(self, total: Quadratic, start: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """τ₀ + R Q (f(Λ)/Λ) Qᵀ with A = QΛQᵀ, from a start τ₀.

        With B = τ₀A + R this is τ₀ − τ₀ Q f Qᵀ + B Q (f/Λ) Qᵀ. In a direction whose λ is no more than A's own rounding R has only rounding
        too, and nothing moves.
        """
        d_out, d_in = start.shape
        trace = total.trace()
        return total.relaxed(start, lambda spectrum: self.gains(spectrum, d_out, d_in, trace)).to(start.dtype)

    def gains(self, spectrum: Spectrum, d_out: int, d_in: int, trace: float) -> Float[Tensor, " side"]:
        """What a residual along each eigenvector is multiplied by.

        `spectrum` is that of A, or of FFᵀ, which leaves out zeros; `trace` is tr A, the mean eigenvalue of whose d_in is trace / d_in.
        """
        largest = float(spectrum.values[-1])
        match self.filter:
            case "flow":
                gains = spectrum.flow(self.time * d_in / trace if self.exp_time is None else self.exp_time / 2)
            case "tikhonov":
                gains = spectrum.inverse(self.alpha)
            case "cut":
                gains = spectrum.inverse()
            case "landweber":
                left = (1 - LANDWEBER * spectrum.values / largest).clamp(0, 1)
                gains = (1 - left**self.steps) * spectrum.inverse()
        kept = self.kept(torch.where(spectrum.seen, spectrum.values, 0).double().flip(0), d_out, d_in)
        gains[: max(0, len(gains) - kept)] = 0
        return gains

    def kept(self, values: Float[Tensor, " side"], d_out: int, d_in: int) -> int:
        """How many eigenvectors move, given the eigenvalues in falling order; further ones up to d_in are zero."""
        share = max(1, _ceil(self.keep * d_in, d_in))
        if self.rank == "share":
            return share
        if self.rank == "variance":
            reached = values.cumsum(0) >= self.keep * (1 - sqrt(d_in) * eps(torch.float32)) * values.sum()
            return 1 + int((~reached).sum())
        return max(1, min(share, _effective(self.rank, values, d_out, d_in)))


def _effective(rule: Rule, values: Float[Tensor, " side"], d_out: int, d_in: int) -> int:
    """The rank that a spectrum has by a rule; nothing of it is more than zero only where all is zero."""
    total, squares = float(values.sum()), float(values.square().sum())
    if total == 0:
        return 1
    match rule:
        case "participation_sqrt":
            return _ceil(float(values.sqrt().sum()) ** 2 / total, d_in)
        case "participation":
            return _ceil(total**2 / squares, d_in)
        case "entropy":
            return _ceil(float(torch.special.entr(values / total).sum().exp()), d_in)
        case "stable_rank":
            return _ceil(squares / float(values[0]) ** 2, d_in)
        case _:
            middle = d_in // 2
            median = float(values[middle].sqrt()) if middle < len(values) else 0.0
            return int((values.sqrt() > gavish_donoho(d_out, d_in) * median).sum())


def gavish_donoho(d_out: int, d_in: int) -> float:
    """The authors' multiple of the median singular value above which one is no noise.

    λ*(β)/μ with λ* of Gavish and Donoho (2014) and β the ratio of the sides. Their μ is the median of the Marchenko–Pastur law; SWUDI's
    code puts √((1 − β)² + β) for it, and √(2 + √3) for square matrices.
    """
    beta = min(d_out, d_in) / max(d_out, d_in)
    star = 2 * (beta + 1) + 8 * beta / (beta + 1 + sqrt(beta**2 + 14 * beta + 1))
    middle = 2 + sqrt(3) if beta >= 0.9999 else (1 - beta) ** 2 + beta
    return sqrt(star / middle)


def _ceil(value: float, d_in: int) -> int:
    """⌈value⌉, where what is above an integer by rounding alone is that integer: eigenvalues are float32."""
    return ceil(value * (1 - sqrt(d_in) * eps(torch.float32)))
