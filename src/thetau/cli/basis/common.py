"""What the verbs of `thetau basis` share: a bank and its options, and the models that they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

import typer

from thetau.cli.common import Json, Machine, check_folder, save
from thetau.errors import OutputError, RecipeError
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.bases import Bank
    from thetau.engine.executor import Engine
    from thetau.facade import Expression
    from thetau.studies.options import Outer

BankFolder = Annotated[Path, typer.Argument(help="The bank's folder.", metavar="BANK")]
AllowFar = Annotated[bool, typer.Option("--allow-far", help="Take vectors that are too long for fine-tuning of this base.")]


@final
@dataclass(frozen=True, kw_only=True)
class Moved:
    """Where the bank's base lies."""

    base: Annotated[str | None, Option("Where the bank's base lies now, if it was moved.", flags=("--base", "-b"))] = None

    def open(self, path: Path) -> Bank:
        """The bank, over that base where one is given. Raises `BankError`."""
        from thetau.bases import open_bank
        from thetau.facade import open_base

        bank = open_bank(path)
        return bank if self.base is None else bank.use_base(open_base(self.base))


@final
@dataclass(frozen=True, kw_only=True)
class Given:
    """Vectors of tasks that a change needs."""

    vector: Annotated[
        tuple[str, ...],
        Option("A fine-tuned model, adapter or saved task vector; NAME=PATH names its task. Repeat.", flags=("--vector", "-v")),
    ] = ()

    def of(self, bank: Bank) -> dict[str, Expression]:
        """Task of the bank → vector. Raises `RecipeError`: a task is there twice; `BankError`: it is not of the bank."""
        from thetau.evaluate.tuned import task_vectors

        if not self.vector:
            return {}
        names, vectors = task_vectors(self.vector, bank.base())
        if len(set(names)) != len(names):
            raise RecipeError([f"each task's vector can be given once. Got {', '.join(names)}."], "--vector")
        for name in names:
            bank.basis_of(name)
        return dict(zip(names, vectors, strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the inner method must know of the tasks' data."""

    evidence: Annotated[
        tuple[str, ...],
        Option(
            "KIND:TASK=FILE, as fisher:sst2=sst2.safetensors: what the inner method must know of a task's data. Repeat.",
            flags=("--evidence",),
        ),
    ] = ()

    def by_kind(self) -> dict[str, dict[str, str]]:
        """Kind → task → file. Raises `RecipeError`."""
        from thetau.recipes.schema import parse_evidence

        return parse_evidence(self.evidence)


@final
@dataclass(frozen=True, kw_only=True)
class Clusters:
    """How many clusters there are."""

    k: Annotated[
        int | Literal["auto"],
        Option("Clusters: a number, or auto for the largest gap of the spectrum.", flags=("-k",)),
    ] = "auto"
    k_min: Annotated[int | None, Option("auto: at least so many; by default 2 of three or more tasks.", flags=("--k-min",))] = (
        None
    )
    k_max: Annotated[int | None, Option("auto: at most so many; by default one less than the tasks.", flags=("--k-max",))] = None


@final
@dataclass(frozen=True, kw_only=True)
class Changing:
    """How a bank is changed."""

    drift: Annotated[
        bool,
        Option("Measure how far the bank is from one built offline; reads every original vector again.", flags=("--drift",)),
    ] = False
    wait: Annotated[float, Option("Seconds to wait while another process changes the bank.", flags=("--wait",), least=0)] = 600


@final
@dataclass(frozen=True, kw_only=True)
class Output:
    """The model that arithmetic on a bank makes."""

    out: Annotated[Path | None, Option("Write the resulting model here: a new folder.", flags=("--out", "-o"))] = None

    def check(self, json: Json) -> None:
        """Refuse outputs that cannot be, before the work. Raises `OutputError`."""
        json.check()
        check_folder(self.out)
        if self.out is not None and self.out.exists():
            raise OutputError(
                f"{self.out}: exists. Models are never written over older files: give a new name, or remove it first."
            )

    def write(
        self, bank: Bank, coefficients: Mapping[str, float], outer: Outer | None, *, engine: Engine, machine: Machine
    ) -> None:
        """The model, where one is wanted and there are coefficients; streamed. Raises `OutputError`."""
        from thetau.studies.banks import bank_model, bank_recipe

        if self.out is None or not coefficients:
            return
        made = bank_model(bank, coefficients, outer, engine=engine)
        provenance = {"recipe": bank_recipe(bank, coefficients, outer), "seed": 0}
        save(made, self.out, quiet=machine.quiet, provenance=provenance, engine=engine)


@final
@dataclass(frozen=True, kw_only=True)
class Known:
    """A coefficient that is known, so that nothing is measured."""

    scale: Annotated[
        float | None, Option("Take this coefficient as it is, without any data; needs --out.", flags=("--scale", "-s"))
    ] = None

    def check(self, output: Output, json: Json, alphas: Sequence[float] | None, tasks: Sequence[str] = ()) -> float | None:
        """The coefficient that was given, if nothing is measured beside it. Raises `RecipeError`."""
        if self.scale is None:
            return None
        problems = []
        if not isfinite(self.scale):
            problems.append(f"--scale must be a finite number. Got {self.scale:g}.")
        if output.out is None:
            problems.append("--scale writes a model and measures nothing: say where, with --out.")
        if json.json is not None or alphas is not None or tasks:
            problems.append("--scale takes no data, so leave --task, --alphas and --json out.")
        if problems:
            raise RecipeError(problems, "options")
        return self.scale
