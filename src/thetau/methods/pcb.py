r"""PCB-Merging: weigh every entry by how it competes with the others of its task and with the other tasks' at its place.

Du et al., NeurIPS 2024, <https://arxiv.org/abs/2410.02396>. Magnitudes are clipped to their c and 1 − c quantiles and brought to [0, 1], n;
an entry's score is $e^{K n_i^2}$ times a sum over the tasks; scores below the (1 − p) quantile of their task go, the rest is brought to
[0, 1] and is the weight of the entry in a mean over the tasks. Ranks are of the whole vector, biases and norms among the rest. Three
public variants differ in the sum: `vision/pcb_ES.py` has $\sum_j \tanh(\tilde n_i \tilde n_j)$, $\tilde n$ with its sign, which no scale of
the vectors changes and which is the default; `vision/pcb.py` has $\tanh(\tau_i \sum_j \tilde n_j)$; `pcb-merging.py` $\tanh(\tau_i \sum_j
\tau_j)$ and c = 10⁻⁴ in place of 10⁻². At the size of fine-tuning's changes those two are all but linear in τ. λ = 1.2 in all.
Departs from them where the largest and the smallest of what is brought to [0, 1] are equal, which is NaN there: magnitudes count as 0, and
scores that reach the quantile as 1, unless the entry is 0. Scores are divided by $e^K$, which their [0, 1] cancels, so that many tasks do not
overflow.

Use it where TIES would be tried, when five passes are no hindrance: it needs no data; of K tasks it keeps at most K p of the entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from thetau._lazy import torch
from thetau.fields import Within
from thetau.methods.fields import Coefficients, Density, Ranked
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Cost, Method, Site, Statistic
from thetau.statistics.quantile import Bin, kept_count, ranked_counts, ranked_finish
from thetau.sums import sum_in_order, weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Bounds = Float[Tensor, "task 2"]

Variant = Literal["products", "sum", "raw"]
CLIPS = {"products": 1e-2, "sum": 1e-2, "raw": 1e-4}


def bound_ranks(clip: float, count: int) -> tuple[int, int]:
    """Ranks from the top of the magnitudes to which the others are clipped: the smallest and the largest."""
    low = count - int(Fraction(str(clip)) * count)
    return low, min(low, kept_count(clip, count) + 1)


def normalised(magnitudes: Float[Tensor, "task *block"], bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Clipped magnitudes, and the same brought to [0, 1]; 0 where the bounds are equal."""
    low, high = (bounds[:, side].to(magnitudes.dtype).reshape(-1, *[1] * (magnitudes.ndim - 1)) for side in (0, 1))
    clipped = magnitudes.clamp(low, high)
    return clipped, torch.where(high > low, (clipped - low) / (high - low).clamp(min=torch.finfo(magnitudes.dtype).tiny), 0)


def scores(stack: Float[Tensor, "task *block"], bounds: Bounds, variant: Variant) -> tuple[Tensor, Tensor]:
    """The clipped stack, and each entry's score in float32, divided by e^K."""
    clipped, share = normalised(stack.abs(), bounds)
    sign, tasks = stack.sign(), len(stack)
    signed = sign * share
    if variant == "products":
        among = torch.stack([sum_in_order(torch.tanh(one * signed)) for one in signed])
    else:
        among = torch.tanh(stack * sum_in_order(signed if variant == "sum" else stack))
    return sign * clipped, (torch.exp(tasks * (share.square() - 1)) * among).float()


@dataclass(frozen=True)
class Seen:
    """What the passes know so far: the bounds of the magnitudes, and the bins of what is counted next."""

    bounds: Bounds | None = None
    bins: Bin | None = None


@dataclass(frozen=True, kw_only=True)
class Cuts(Statistic):
    """Each task's bounds, smallest and largest clipped magnitude, and its scores' quantile and largest: `[task, 4]`, in four rounds."""

    density: float
    clip: float
    variant: Variant
    per_tensor: bool = False

    @property
    def rounds(self) -> int:
        """Two for the magnitudes, two for the scores."""
        return 4

    def add(self, total: Tensor | None, stack: Float[Tensor, "task *block"], site: Site, seen: Seen | None) -> Tensor:
        """Count a block's magnitudes, or its scores."""
        seen = seen or Seen()
        values = stack.abs() if seen.bounds is None else scores(stack, seen.bounds, self.variant)[1]
        return ranked_counts(total, values, seen.bins)

    def fold(self, total: Tensor, other: Tensor) -> Tensor:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Tensor, seen: Seen | None) -> Any:
        """The next round's bins, the bounds, and at last all."""
        seen = seen or Seen()
        if seen.bounds is None:
            found = ranked_finish(total, seen.bins, lambda count: bound_ranks(self.clip, count))
            return Seen(bins=found) if isinstance(found, Bin) else Seen(bounds=found)
        found = ranked_finish(total, seen.bins, lambda count: (kept_count(self.density, count), 1))
        return Seen(seen.bounds, found) if isinstance(found, Bin) else torch.cat([seen.bounds, found], 1)

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by task and cut, and a copy for each tensor in flight."""
        return 8 * tasks * (1 << 16) * 3 * 2


@register("pcb", paper="Du et al., NeurIPS 2024, https://arxiv.org/abs/2410.02396")
@dataclass(frozen=True, kw_only=True)
class Pcb(Method, BlockReduction):
    r"""$\tau = \sum_t \lambda_t w_t \odot \tau_t / \sum_t w_t$ entrywise, $w_t$ from the scores of task $t$, 0 outside its largest.

    - `variant`: the sum in a score: over `products` of normalised entries (no scale changes it), `sum` of normalised entries times the raw
      one, or `raw` entries alone.
    - `density`: p, share of each task's entries that keep a weight.
    - `clip`: c, share of the entries at either end that are clipped; None for the variant's own (0.01, of `raw` 0.0001).
    - `scope`: what is ranked: the whole `vector`, or each `tensor`.
    """

    variant: Annotated[Variant, "the sum in a score."] = "products"
    density: Density = 0.05
    clip: Annotated[float | None, Within("[0, 0.5)", none="for the variant's own"), "share that is clipped."] = None
    scope: Ranked = "vector"
    scale: Coefficients = 1.2

    def chain(self) -> Chain:
        """The weighted mean; λ is within it."""
        return Chain(reduction=self)

    def requires(self) -> Cuts:
        """Bounds of the magnitudes, then of the scores."""
        clip = CLIPS[self.variant] if self.clip is None else self.clip
        return Cuts(density=self.density, clip=clip, variant=self.variant, per_tensor=self.scope == "tensor")

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """The cuts as they are: of the whole vector, or by tensor."""
        return result

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """An exponential for each entry and a tanh for each pair of tasks."""
        pairs = tasks if self.variant == "products" else 1
        return Cost(flops=20.0 * tasks * (1 + pairs) * torch.Size(shape).numel())

    def reduce(self, stack: Float[Tensor, "task *block"], state: Any, site: Site) -> Float[Tensor, "*block"]:
        """The weighted mean of a block."""
        cuts = state[site.name] if self.scope == "tensor" else state
        clipped, score = scores(stack, cuts[:, :2], self.variant)
        low, high = (cuts[:, side].reshape(-1, *[1] * (stack.ndim - 1)) for side in (2, 3))
        spread = (score.clamp(min=low) - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)
        weights = torch.where(high > low, spread, ((score >= low) & (clipped != 0)).to(score.dtype)).to(stack.dtype)
        return weighted_sum(clipped * weights, site.per_task(self.scale)) / sum_in_order(weights).clamp(min=1e-12)
