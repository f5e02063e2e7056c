"""`thetau evidence`: what is collected with a live model and data before a merge."""

from __future__ import annotations

import typer

from thetau.cli.evidence.adamerging import adamerging
from thetau.cli.evidence.fisher import fisher
from thetau.cli.evidence.layerwise import gram_merged
from thetau.cli.evidence.moments import gradients, gram
from thetau.cli.evidence.routers import routers
from thetau.cli.evidence.surgery import surgery
from thetau.cli.evidence.twin import twin
from thetau.cli.evidence.wemoe import wemoe

evidence_app = typer.Typer(
    help="Collect with a live model and data what a merge needs: adamerging, fisher, gram, gradients, gram-merged; "
    "or what follows: surgery, twin, wemoe, routers.",
    no_args_is_help=True,
)


@evidence_app.callback()
def group() -> None:
    """Collect with a live model and data what a merge needs."""


evidence_app.command()(adamerging)
evidence_app.command()(fisher)
evidence_app.command()(gram)
evidence_app.command()(gradients)
evidence_app.command("gram-merged")(gram_merged)
evidence_app.command()(surgery)
evidence_app.command()(twin)
evidence_app.command()(wemoe)
evidence_app.command()(routers)
