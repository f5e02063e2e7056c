"""`thetau basis`: few vectors that stand for many."""

from __future__ import annotations

import typer

from thetau.cli.basis.add import add
from thetau.cli.basis.build import build
from thetau.cli.basis.compare import compare
from thetau.cli.basis.forget import forget
from thetau.cli.basis.insert import insert
from thetau.cli.basis.negate import negate
from thetau.cli.basis.ood import ood
from thetau.cli.basis.rebuild import rebuild
from thetau.cli.basis.show import show

basis_app = typer.Typer(
    help="A bank of task vector bases: cluster a library of task vectors, keep few, and still add, negate and generalise from them.",
    no_args_is_help=True,
)
for verb in (build, show, insert, forget, rebuild, add, negate, ood, compare):
    basis_app.command()(verb)
