"""AWD before any method: disentangle the task vectors, then merge them.

Adaptive Weight Disentanglement, Xiong et al. 2024, <https://arxiv.org/abs/2411.18729>. As in the paper, it acts on the linear weights of
the blocks, and every other tensor gets no task vector. The mathematics is in `thetau.transforms.disentangle`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from thetau.methods.checks import choice, flag, number, whole
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Chain, Method, Selection, check_selection
from thetau.transforms import Disentangle


@register("awd", paper="Xiong et al. 2024, https://arxiv.org/abs/2411.18729")
@dataclass(frozen=True, kw_only=True)
class Awd(Method):
    r"""Merge $\hat\tau_t = \tau_t - \delta$, δ minimising $\mathrm{mean}_{i \neq j} |\cos(\hat\tau_i, \hat\tau_j)| + \alpha\|\delta\|$.

    - `then`: the method that merges the disentangled vectors.
    - `alpha`: α; the paper tunes it in 1e-2 … 1e-6.
    - `scope`: one δ for the whole `vector` (the paper), or one objective for each `tensor` or output `row`.
    - `solver`: `gram`: exact, in K numbers; `adam`: in full dimension, all vectors in memory, for comparison.
    - `reverse`: make the vectors less orthogonal instead (Tables 6 and 7).
    - `steps`: steps of `adam`.
    - `lr`: step size of `adam`, in units of the entries' rms.
    - `tensors`: what it acts on: `linear` (weight matrices of the blocks), `all`, or patterns of names.
    - `elsewhere`: what other tensors get: `base` (no task vector), `mean` or `sum` of the task vectors.
    """

    then: Method = field(default_factory=TaskArithmetic)
    alpha: float = 1e-3
    scope: Literal["vector", "tensor", "row"] = "vector"
    solver: Literal["gram", "adam"] = "gram"
    reverse: bool = False
    steps: int = 200
    lr: float = 0.01
    tensors: str | tuple[str, ...] = "linear"
    elsewhere: Literal["base", "mean", "sum"] = "base"

    def __post_init__(self) -> None:
        if not isinstance(self.then, Method):
            raise ValueError(f"`Awd(then=...)` must be a method. Got {self.then!r}.")
        inner, usual = self.then.chain().selection, type(self.then)().chain().selection
        fields = {"tensors": (inner.tensors, usual.tensors), "elsewhere": (inner.elsewhere, usual.elsewhere)}
        changed = {name: value for name, (value, default) in fields.items() if value != default}
        if changed:
            names = " and ".join(f"`{name}`" for name in changed)
            got = " and ".join(f"{name}={value!r}" for name, value in changed.items())
            raise ValueError(f"`Awd(then=...)` must leave {names} to awd, whose own count for both. Got {got} in `then`.")
        number("Awd", "alpha", self.alpha, "a number of at least 0", low=0)
        choice("Awd", "scope", self.scope, ("vector", "tensor", "row"))
        choice("Awd", "solver", self.solver, ("gram", "adam"))
        flag("Awd", "reverse", self.reverse)
        whole("Awd", "steps", self.steps, low=1)
        number("Awd", "lr", self.lr, "a positive number", low=0, open_low=True)
        check_selection("Awd", self.tensors, self.elsewhere)

    def chain(self) -> Chain:
        """Disentangle, then the other method's chain on the same tensors."""
        inner = self.then.chain()
        part = Disentangle(
            alpha=self.alpha, scope=self.scope, solver=self.solver, reverse=self.reverse, steps=self.steps, lr=self.lr
        )
        return replace(
            inner, transforms=(part, *inner.transforms), selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere)
        )
