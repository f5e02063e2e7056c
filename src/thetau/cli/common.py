"""What several verbs share: their groups of options, the engine, the summary of what was written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import typer

from thetau.errors import RecipeError
from thetau.options import Option
from thetau.pace import silence

if TYPE_CHECKING:
    from thetau.diagnostics.results import Result
    from thetau.engine.executor import Engine
    from thetau.engine.save import Report
    from thetau.facade import Expression

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
THREADS = 48_000_000  # bytes: stacks, arenas and small things of the workers, beside the tensors

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes: a new folder.")]
File = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes: a new file, NAME.safetensors.")]
Charts = Annotated[Path, typer.Option("--out", "-o", help="Folder of the JSON and the chart.")]
BaseOption = Annotated[
    str, typer.Option("--base", "-b", help="The model that the others were fine-tuned from: folder, file or hub id.")
]
TunedModels = Annotated[
    list[str], typer.Argument(help="Fine-tuned models, whose records name their tasks, or TASK=MODEL; folders or files.")
]


@final
@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the engine may take, and whether it says what it does."""

    workers: Annotated[
        int | None,
        Option("Threads; by default one a core. No number changes a bit of the result.", flags=("--workers",)),
    ] = None
    max_memory: Annotated[
        str | None,
        Option(
            "Memory that the whole process may take, such as 4GB; by default tensors take half of what there is.",
            flags=("--max-memory",),
        ),
    ] = None
    quiet: Annotated[bool, Option("No progress bar, no summary.", flags=("--quiet", "-q"))] = False

    def engine(self, *, bar: bool = True, **others: Any) -> Engine:
        """The engine that the options ask for; without a progress bar where a table follows. Raises `RecipeError`."""
        from thetau.cli.progress import bar as progress_bar
        from thetau.engine.executor import Engine
        from thetau.recipes.schema import parse_size

        _give_back_memory()
        if self.quiet:
            silence()
        given: dict[str, Any] = dict(others)
        if self.workers is not None:
            given["workers"] = self.workers
        if self.max_memory is not None:
            try:
                budget = parse_size(self.max_memory)
            except ValueError as error:
                raise RecipeError([str(error)], "--max-memory") from error
            own = _own_memory()
            if budget <= own:
                raise RecipeError(
                    [f"thetau itself takes {own / 1e6:.0f} MB before it reads anything. Got {self.max_memory}."], "--max-memory"
                )
            given["max_memory"] = budget - own
        if bar and not self.quiet:
            given["progress"] = progress_bar()
        try:
            return Engine(**given)
        except ValueError as error:
            raise RecipeError([str(error)], "options") from error


@final
@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the engine's work is done."""

    device: Annotated[str, Option("Of matrix solvers: auto (the GPU where there is one), cpu, cuda:1.", flags=("--device",))] = (
        "auto"
    )
    tf32: Annotated[
        bool, Option("A GPU rounds the factors of float32 products to 10 bits: faster, less exact.", flags=("--tf32",))
    ] = False
    executor: Annotated[str, Option("`local` threads, or a `ray` cluster over shared storage.", flags=("--executor",))] = "local"
    address: Annotated[
        str | None, Option("Of the Ray cluster; by default RAY_ADDRESS, or one started here.", flags=("--address",))
    ] = None


@final
@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Which tensors are not looked at."""

    exclude: Annotated[
        tuple[str, ...],
        Option("Pattern of tensors that are left out (task heads); may be repeated.", flags=("--exclude",)),
    ] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Writing:
    """Which tensors are written, and how."""

    left_out: LeftOut = field(default_factory=LeftOut)
    dtype: Annotated[str | None, Option("Of the output, such as bfloat16; by default the base's.", flags=("--dtype",))] = None
    quantise: Annotated[
        Literal["fp8-tensor", "fp8-row", "fp8-block"] | None,
        Option(
            "Matrices in fp8 with scales: fp8-block (128 × 128, as transformers' FineGrainedFP8), fp8-row or fp8-tensor (compressed-tensors).",
            flags=("--quantise",),
        ),
    ] = None


@final
@dataclass(frozen=True, kw_only=True)
class Json:
    """A result as JSON, beside what is printed."""

    json: Annotated[Path | None, Option("Write the result here as JSON too.", flags=("--json",))] = None

    def check(self) -> None:
        """Refuse a file that could not be written, before the work. Raises `OutputError`."""
        if self.json is not None:
            from thetau.checkpoint.disk import check_file

            check_file(self.json)

    def save(self, result: Result) -> None:
        """A result, where that was asked. Raises `OutputError`."""
        if self.json is not None:
            result.save(self.json)

    def copy(self, path: Path) -> None:
        """A result that was written to `path` already, where that was asked. Raises `OutputError`."""
        if self.json is not None:
            from thetau.checkpoint.disk import write_bytes

            write_bytes(self.json, path.read_bytes())

    def write(self, content: Mapping[str, Any]) -> None:
        """Plain values, where that was asked. Raises `OutputError`."""
        if self.json is not None:
            from pydantic import TypeAdapter

            from thetau.checkpoint.disk import write_bytes

            write_bytes(self.json, TypeAdapter(Any).dump_json(content, indent=1) + b"\n")


def _give_back_memory() -> None:
    """Have glibc return every buffer of a megabyte or more when it is freed, so that a budget is kept over a long run."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _own_memory() -> int:
    """Bytes that this process holds with its libraries loaded, and a little for its threads."""
    import torch  # noqa: F401

    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident + THREADS


def save(expression: Expression, out: Path | str, *, quiet: bool, **options: Any) -> Report:
    """Write, and say what was done."""
    import warnings

    from thetau.facade import ThetauWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThetauWarning)  # the summary shows them
        report = expression.save(out, **options)
    summary(report, quiet=quiet)
    return report


def summary(report: Report, *, quiet: bool) -> None:
    """Notes and warnings of a run; warnings are printed even where quiet."""
    from rich.console import Console
    from rich.text import Text

    from thetau.engine.work import gigabytes

    console = Console(stderr=True, soft_wrap=True)
    for warning in report.warnings:
        console.print(Text("warning: ", style="bold magenta") + Text(warning, style="default"))
    if quiet:
        return
    for note in report.notes:
        console.print(Text("· " + note))
    console.print(Text(f"{report.path}: {report.tensors} tensors, {gigabytes(report.nbytes)}", style="bold"))


def check_folder(path: Path | None) -> None:
    """Refuse an output that could not be written, before the work and not after it; folders that are missing above it are no fault.

    Raises:
        OutputError: a folder above it is a file, or may not be written to.
    """
    if path is not None:
        from thetau.checkpoint.disk import check_place

        check_place(path)
