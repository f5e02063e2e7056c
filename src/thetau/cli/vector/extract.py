"""`thetau vector extract`: a model minus its base."""

from __future__ import annotations

from thetau.cli.common import BaseOption, Machine, Out, Writing
from thetau.cli.options import with_options
from thetau.cli.vector.common import Model, operands, write


@with_options
def extract(base: BaseOption, model: Model, out: Out, writing: Writing, machine: Machine) -> None:
    """Write τ = model − base, in float32 unless --dtype says otherwise.

    thetau vector extract --base base --model sst2 -o sst2-vector.safetensors
    """
    _, vectors = operands(base, [model])
    write(vectors[0], out, writing, machine)
