"""A plan, printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thetau.plan import Plan


WRITING = 5e8  # bytes a second that a disk keeps up when it is asked to sync


def show(plan: Plan, *, reading: float | None = None, to_stderr: bool = False) -> None:
    """Print passes, bytes, memory, operations, time, and what the other solvers of a method would cost."""
    from rich.console import Console
    from rich.table import Table

    from thetau.engine.work import gigabytes

    console = Console(soft_wrap=True, stderr=to_stderr)
    table = Table("pass", "reads", "memory in flight", "by", box=None, pad_edge=False)
    for index, (one, memory) in enumerate(zip(plan.passes, plan.in_flight(), strict=True), 1):
        by = ", ".join(sorted({step.by for step in one.steps}))
        look = f", a look at one entry in {one.share}" if one.share > 1 else ""
        table.add_row(f"{index}. {one.what}{look}", gigabytes(one.read), gigabytes(memory), by)
    console.print(table)
    console.print(f"reads {gigabytes(plan.read)}, writes {gigabytes(plan.written)} in {plan.tensors} tensors", highlight=False)
    if plan.download:
        console.print(f"downloads {gigabytes(plan.download)} first, into the hub's cache", highlight=False)
    if reading is not None:
        whole = duration(plan.duration(reading, min(reading, WRITING)))
        console.print(
            f"{whole} in all, reading at {gigabytes(reading)}/s as just tried, writing at {gigabytes(min(reading, WRITING))}/s",
            highlight=False,
        )
    if plan.flops:
        console.print(f"matrix solvers: {plan.flops:.2g} operations, {duration(plan.seconds)} on this machine", highlight=False)
        for name, flops in plan.alternatives:
            console.print(f"  {name}: {flops:.2g} operations, {duration(flops / plan.rate)}", highlight=False, markup=False)


def described(plan: Plan, *, reading: float | None) -> dict[str, Any]:
    """A plan as plain values: bytes, operations, seconds on this machine."""
    return {
        "passes": [
            {
                "what": one.what,
                "share": one.share,
                "read": one.read,
                "memory": memory,
                "by": sorted({step.by for step in one.steps}),
            }
            for one, memory in zip(plan.passes, plan.in_flight(), strict=True)
        ],
        "read": plan.read,
        "written": plan.written,
        "tensors": plan.tensors,
        "memory": plan.memory,
        "download": plan.download,
        "operations": plan.flops,
        "solver_seconds": plan.seconds,
        "reading_rate": reading,
        "seconds": None if reading is None else plan.duration(reading, min(reading, WRITING)),
        "alternatives": {name: {"operations": flops, "solver_seconds": flops / plan.rate} for name, flops in plan.alternatives},
    }


def duration(seconds: float) -> str:
    """`"about 3 min"`."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s" if seconds >= 1 else "less than 1 s"
