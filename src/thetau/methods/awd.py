"""AWD before any method: disentangle the task vectors, then merge them.

Adaptive Weight Disentanglement, Xiong et al. 2024, <https://arxiv.org/abs/2411.18729>. As in the paper, it acts on the linear weights of
the blocks, and every other tensor gets no task vector. The mathematics is in `thetau.transforms.disentangle`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from thetau.methods.fields import AtLeast, Elsewhere, NotNegative, Positive, Tensors, part_of
from thetau.methods.over import usual
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Chain, Method, Selection
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
    """

    then: Method = field(default_factory=TaskArithmetic)
    alpha: NotNegative = 1e-3
    scope: Literal["vector", "tensor", "row"] = "vector"
    solver: Literal["gram", "adam"] = "gram"
    reverse: bool = False
    steps: Annotated[int, AtLeast(1)] = 200
    lr: Positive = 0.01
    tensors: Tensors = "linear"
    elsewhere: Elsewhere = "base"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, default = self.then.chain().selection, usual(self.then).chain().selection
        fields = {"tensors": (inner.tensors, default.tensors), "elsewhere": (inner.elsewhere, default.elsewhere)}
        changed = {name: value for name, (value, usually) in fields.items() if value != usually}
        if changed:
            names = " and ".join(f"`{name}`" for name in changed)
            got = " and ".join(f"{name}={value!r}" for name, value in changed.items())
            raise ValueError(f"`Awd(then=...)` must leave {names} to awd, whose own count for both. Got {got} in `then`.")

    def chain(self) -> Chain:
        """Disentangle, then the other method's chain on the same tensors."""
        inner = self.then.chain()
        part = Disentangle(**part_of(Disentangle, self))
        return replace(
            inner, transforms=(part, *inner.transforms), selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere)
        )
