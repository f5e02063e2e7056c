"""`thetau vector`: the arithmetic of task vectors on files."""

from __future__ import annotations

import typer

from thetau.cli.vector.add import add
from thetau.cli.vector.analogy import analogy
from thetau.cli.vector.apply import apply
from thetau.cli.vector.compress import compress
from thetau.cli.vector.disentangle import disentangle
from thetau.cli.vector.extract import extract
from thetau.cli.vector.info import info
from thetau.cli.vector.localize import localize
from thetau.cli.vector.negate import negate
from thetau.cli.vector.stitch import stitch
from thetau.cli.vector.storage import storage

vector_app = typer.Typer(
    help="Task vectors as files: extract, add, negate, analogy, apply, info, disentangle; compress, localize, stitch, storage.",
    no_args_is_help=True,
)
for verb in (extract, add, negate, analogy, apply, info, disentangle, compress, localize, stitch, storage):
    vector_app.command()(verb)
