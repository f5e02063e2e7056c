r"""The test of kernel behaviour: is fine-tuning what its linearisation says?

Jin et al., ICLR 2025, "Fine-Tuning Attention Modules Only: Enhancing Weight Disentanglement in Task Arithmetic", 3.2 and Fig. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from thetau.diagnostics.results import Result
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import Measure, measure
from thetau.evaluate.spaces import TangentSpace, WeightSpace
from thetau.pace import each


@final
@dataclass(frozen=True, kw_only=True)
class KernelRow:
    r"""One task. `error`: the mean over `n` examples of $\lVert f(x;\theta_0+\tau) - f_0 - J\tau \rVert / \lVert f(x;\theta_0+\tau) - f_0 \rVert$.

    Examples that τ does not move are left out of it. 0: the model is its linearisation; 1: linearisation says nothing.
    """

    task: str
    pretrained: Measure
    nonlinear: Measure
    linearised: Measure
    error: float
    n: int


@final
@dataclass(frozen=True, kw_only=True)
class KernelTest(Result):
    """Each task's vector in the model and, post hoc, in the model's linear form."""

    split: str
    rows: tuple[KernelRow, ...]


def kernel_test(
    model: WeightSpace, linear: TangentSpace, evaluator: Evaluator, tasks: Sequence[str], *, split: str = "test"
) -> KernelTest:
    """Compare the two spaces, which hold the same vectors, on each task. Raises `DataError` when a vector changes nothing."""
    rows = []
    for task in each("task", tasks):
        head, inputs, metric = evaluator.heads[task], evaluator.inputs(task, split), evaluator.tasks[task].metric
        first, change = linear.terms(task, task, split)
        moved = model.features({task: 1.0}, task, split)
        told = [measure(metric, head.predict(one), inputs.labels) for one in (first, moved, first + change)]
        real = moved.double() - first.double()
        size = real.norm(dim=-1)
        counted = size > 0
        if not bool(counted.any()):
            raise DataError(f"task {task!r}: its vector changes no feature, so there is nothing to compare.")
        error = (real - change.double()).norm(dim=-1)[counted] / size[counted]
        rows.append(
            KernelRow(
                task=task,
                pretrained=told[0],
                nonlinear=told[1],
                linearised=told[2],
                error=float(error.mean()),
                n=int(counted.sum()),
            )
        )
    return KernelTest(split=split, rows=tuple(rows))
