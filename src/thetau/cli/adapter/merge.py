"""`thetau adapter merge`: several adapters into one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from thetau.cli.adapter.common import Adapters, Base, Output, Ranks, source_of
from thetau.cli.common import Json, Machine, Out, check_folder
from thetau.cli.options import parse_fields, with_options
from thetau.errors import RecipeError
from thetau.options import Option

# Words for a method in a space; everything else is a method's own name.
SHORT: dict[str, tuple[str, Literal["product", "core", "knots"], dict[str, Any]]] = {
    "knots": ("ties", "knots", {"density": 0.2, "scale": 0.6}),
    "core_space": ("tsv_m", "core", {"rank": "full"}),
}


@with_options
def merge(
    adapters: Adapters,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="clear, which has nothing to tune; any method of task vectors; or concatenation, svd, knots (TIES there), "
            "core_space (TSV-M there), robustmerge.",
        ),
    ] = "clear",
    space: Annotated[
        Literal["product", "core", "knots"] | None,
        Option(
            "Where: the products B·A, one layer at a time; or core space or KnOTS, which make no matrix of the base's size.",
            flags=("--space",),
        ),
    ] = None,
    fields: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, name=value; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of randomised methods.")] = 0,
    base: Base = None,
    *,
    ranks: Ranks,
    output: Output,
    machine: Machine,
    json: Json,
) -> None:
    """Merge LoRA adapters into one adapter again, and say its error.

    thetau adapter merge sst2-lora cr-lora --method ties --space core --rank 16 -o both
    """
    from thetau.adapters import add, clear_merge, open_adapter, robust_merge
    from thetau.adapters import merge as run
    from thetau.methods import build

    json.check()
    check_folder(out)
    opened = [open_adapter(adapter) for adapter in adapters]
    values, source, cut = parse_fields(fields or []), source_of(base), ranks.cut()
    if method in ("concatenation", "svd"):
        given = values.pop("weights", None)
        if values or space not in (None, "product") or (method == "svd" and cut is None):
            raise RecipeError(
                [f"{method} takes `--set weights=[…]` alone{', and `--rank` or `--error`' if method == 'svd' else ''}."],
                "options",
            )
        made = add(opened, given, cut=cut, base=source)
    elif method == "clear":
        if not _numbers(values, "damping", "scale") or space is not None:
            raise RecipeError(["clear takes the fields damping and scale, which are numbers, and no `--space`."], "options")
        made = clear_merge(opened, **values, cut=cut, base=source)
    elif method == "robustmerge":
        if not _numbers(values, "density", "quantile", "scale") or cut is not None or space is not None:
            raise RecipeError(
                ["robustmerge takes the fields density, quantile and scale, which are numbers, and keeps the rank."], "options"
            )
        made = robust_merge(opened, **values, base=source)
    else:
        name, where, defaults = SHORT.get(method) or (method, "product", {})
        made = run(
            opened,
            build(name, defaults | values),
            space=space or where,
            cut=cut,
            base=source,
            seed=seed,
            engine=machine.engine(bar=False),
        )
    output.write(made, out, json, quiet=machine.quiet)


def _numbers(values: dict[str, Any], *names: str) -> bool:
    """Whether only fields of these names are given, and numbers for them."""
    return all(name in names and type(value) in (int, float) for name, value in values.items())
