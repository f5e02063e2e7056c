"""`thetau diagnose`: what the papers measure, each as a JSON, a chart and a table."""

from __future__ import annotations

import typer

from thetau.cli.diagnose.alpha import alpha
from thetau.cli.diagnose.bounds import bounds
from thetau.cli.diagnose.cosine import cosine
from thetau.cli.diagnose.cost import cost
from thetau.cli.diagnose.disentanglement import disentanglement
from thetau.cli.diagnose.kernel import kernel
from thetau.cli.diagnose.landscape import landscape
from thetau.cli.diagnose.layers import layers
from thetau.cli.diagnose.single import single
from thetau.cli.diagnose.tau_jp import tau_jp

diagnose_app = typer.Typer(
    help="Measure what the papers measure: τJp, disentanglement, kernel behaviour, cosines, α, cost, layers, landscapes.",
    no_args_is_help=True,
)
diagnose_app.command("tau-jp")(tau_jp)
for verb in (disentanglement, kernel, cosine, alpha, single, cost, bounds, layers, landscape):
    diagnose_app.command()(verb)
