"""What several verbs share: options of the engine, the progress bar, the summary."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.engine.executor import Engine
    from thetau.engine.save import Report
    from thetau.facade import Expression

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes: a new folder.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Threads; by default one a core. No number changes a bit of the result.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", help="Memory that the whole process may take, such as 4GB; by default tensors take half of what there is."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Pattern of tensors that are left out (task heads); may be repeated.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Of the output, such as bfloat16; by default the base's.")]
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
THREADS = 48_000_000  # bytes: stacks, arenas and small things of the workers, beside the tensors
BaseOption = Annotated[
    str, typer.Option("--base", "-b", help="The model that the others were fine-tuned from: folder, file or hub id.")
]


def engine(workers: int | None, max_memory: str | None, quiet: bool, **others: Any) -> Engine:
    """The engine that the options ask for."""
    from thetau.cli.progress import bar
    from thetau.engine.executor import Engine
    from thetau.recipes.schema import parse_size

    _give_back_memory()
    given: dict[str, Any] = dict(others)
    if workers is not None:
        given["workers"] = workers
    if max_memory is not None:
        try:
            budget = parse_size(max_memory)
        except ValueError as error:
            raise RecipeError([str(error)], "--max-memory") from error
        own = _own_memory()
        if budget <= own:
            raise RecipeError(
                [f"thetau itself takes {own / 1e6:.0f} MB before it reads anything. Got {max_memory}."], "--max-memory"
            )
        given["max_memory"] = budget - own
    if not quiet:
        given["progress"] = bar()
    try:
        return Engine(**given)
    except ValueError as error:
        raise RecipeError([str(error)], "options") from error


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


def save(expression: Expression, out: Path | str, *, quiet: bool, **options: Any) -> None:
    """Write, and say what was done."""
    import warnings

    from thetau.facade import ThetauWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThetauWarning)  # the summary shows them
        report = expression.save(out, **options)
    summary(report, quiet=quiet)


def summary(report: Report, *, quiet: bool) -> None:
    """Notes and warnings of a run; warnings are printed even where quiet."""
    from rich.console import Console
    from rich.text import Text

    from thetau.engine.work import gigabytes

    console = Console(stderr=True, soft_wrap=True)
    for warning in report.warnings:
        console.print(Text("warning: ", style="bold yellow") + Text(warning, style="default"))
    if quiet:
        return
    for note in report.notes:
        console.print(Text("· " + note, style="dim"))
    console.print(Text(f"{report.path}: {report.tensors} tensors, {gigabytes(report.nbytes)}", style="bold"))


def check_folder(path: Path | None) -> None:
    """Refuse an output that could not be written, before the work and not after it; folders that are missing above it are no fault.

    Raises:
        OutputError: a folder above it is a file, or may not be written to.
    """
    if path is not None:
        from thetau.checkpoint.disk import check_place

        check_place(path)


def check_file(path: Path | None) -> None:
    """The same for a single file, which may be none. Raises `OutputError`: it is a folder, too."""
    if path is not None:
        from thetau.checkpoint.disk import check_file as check

        check(path)


def write_json(path: Path | None, content: Any) -> None:
    """Write a result as JSON, whole or not at all, where that was asked. Raises `OutputError`."""
    if path is not None:
        from pydantic import TypeAdapter

        from thetau.checkpoint.disk import write_bytes

        write_bytes(path, TypeAdapter(Any).dump_json(content, indent=1) + b"\n")


def parse_fields(given: Sequence[str]) -> dict[str, Any]:
    """`["density=0.1", "then.density=0.2"]` → nested mapping; values are YAML.

    Raises:
        RecipeError: an entry has no `=`, or its value is not YAML.
    """
    import yaml

    from thetau.recipes.reading import parse_yaml

    out: dict[str, Any] = {}
    problems = []
    for entry in given:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            problems.append(f"{entry!r} is not of the form field=value.")
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            problems.append(f"{entry!r}: {' '.join(str(error).split())}")
            continue
        place = out
        *path, last = key.split(".")
        for part in path:
            inner = place.get(part)
            if not isinstance(inner, dict):  # `then=ties` before `then.density=…`
                inner = {"name": inner} if isinstance(inner, str) else {}
                place[part] = inner
            place = inner
        if isinstance(place.get(last), dict) and isinstance(value, str):
            place[last]["name"] = value  # `then.density=…` before `then=ties`
        else:
            place[last] = value
    if problems:
        raise RecipeError(problems, "--set")
    return out
