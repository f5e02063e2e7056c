"""`thetau vector negate`: forget what a model learnt."""

from __future__ import annotations

from thetau.cli.common import BaseOption, Machine, Out
from thetau.cli.options import with_options
from thetau.cli.vector.common import Model, Scale, Sum, operands


@with_options
def negate(base: BaseOption, model: Model, out: Out, scale: Scale = 1.0, *, result: Sum, machine: Machine) -> None:
    """Write base − λ·τ: forget what the model learnt.

    thetau vector negate --base base --model toxic --scale 0.5 -o detoxified
    """
    opened, vectors = operands(base, [model])
    result.write(opened, -(scale * vectors[0]), out, machine)
