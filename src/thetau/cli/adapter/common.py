"""What the verbs of `thetau adapter` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

import typer

from thetau.cli.common import Json
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.adapters import Cut, Made
    from thetau.checkpoint import Source

Adapters = Annotated[
    list[str], typer.Argument(help="LoRA adapters: PEFT folders (FOLDER#NAME where it holds several) or LoRA files.")
]
Base = Annotated[
    str | None, typer.Option("--base", "-b", help="The model; needed where adapters save heads, norms or embeddings whole.")
]
Values = Annotated[
    Literal["float32", "bfloat16", "float16"], Option("Of A and B: float32, bfloat16 or float16.", flags=("--dtype",))
]


@final
@dataclass(frozen=True, kw_only=True)
class Ranks:
    """To which rank a layer is cut."""

    rank: Annotated[int | None, Option("The most that a layer keeps.", flags=("--rank", "-r"))] = None
    error: Annotated[
        float | None,
        Option("The largest share of a layer's norm that may be lost; the rank follows, layer by layer.", flags=("--error",)),
    ] = None

    def cut(self) -> Cut | None:
        """The cut that is asked for, if one is. Raises `RecipeError`."""
        from thetau.adapters import Cut

        return None if self.rank is None and self.error is None else Cut(rank=self.rank, error=self.error)


@final
@dataclass(frozen=True, kw_only=True)
class Output:
    """What is said of the new adapter."""

    dtype: Values = "float32"
    layers: Annotated[bool, Option("Print rank and error of every layer.", flags=("--layers",))] = False

    def write(self, made: Made, out: Path, json: Json, *, quiet: bool) -> None:
        """Write it, and say how much was kept. Raises `OutputError`."""
        from thetau.checkpoint import FLOATS

        made.save(out, dtype=FLOATS[self.dtype].torch)
        json.write(made.to_json())
        if quiet:
            return
        for note in made.notes:
            typer.echo(f"· {note}", err=True)
        if self.layers:
            for fit in made.fits:
                typer.echo(f"{fit.layer}: rank {fit.rank}, error {fit.error:.2e}")
        ranks = sorted(fit.rank for fit in made.fits)
        typer.echo(f"{out}: {len(made.modules)} layers, rank {ranks[0]} to {ranks[-1]}")
        typer.echo(f"relative error ‖Δ − BA‖ / ‖Δ‖ = {made.error:.2e}")


def source_of(base: str | None) -> Source | None:
    """The model, where one is given."""
    from thetau.facade import open_base

    return open_base(base).terms[0][1] if base is not None else None
