"""What the verbs of `thetau basis` print of a bank and of a change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thetau.bases import Bank


def report(bank: Bank, *, quiet: bool) -> None:
    """What a change did, and the bank after it."""
    if quiet:
        return
    from rich.console import Console

    operation = bank.state.log[-1]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in operation.said:
        console.print(f"· {line}")
    table_of(bank)
    console.print(told(operation.kind, operation))
    if operation.drift is not None:
        drift_table(operation.drift)


def told(kind: str, operation: Any) -> str:
    """One line of a bank's history."""
    from thetau.engine.work import gigabytes

    drift = "" if operation.drift is None else f", drift {worst(operation.drift)}"
    return (
        f"{kind} {', '.join(operation.names) if len(operation.names) < 4 else f'of {len(operation.names)} tasks'}: read "
        f"{gigabytes(operation.read)}, wrote {gigabytes(operation.written)}, {operation.seconds:.1f} s{drift}"
    )


def worst(drift: dict[str, Any]) -> str:
    """A drift in a few words."""
    if "partition" not in drift:
        return "not measured"
    return f"{max(drift['same_members'].values(), default=0.0):.1e} (same members), partitions agree {drift['partition']:.2f}"


def drift_table(drift: dict[str, Any]) -> None:
    """How far a bank is from an offline build."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if "partition" not in drift:
        missing = ", ".join(drift["missing"]) or "two tasks"
        console.print(
            f"drift: not measured; the vectors of {missing} are needed (`thetau basis show --drift --vector NAME=PATH`)."
        )
        return
    table = Table("basis", "‖B − B*‖/‖B*‖, same members", "nearest offline basis", "cosine", box=None, pad_edge=False)
    for name, value in drift["same_members"].items():
        near = drift["nearest"].get(name)
        table.add_row(name, f"{value:.2e}", ", ".join(near["members"]) if near else "–", f"{near['cosine']:.4f}" if near else "–")
    console.print(f"against an offline build in as many bases: partitions agree {drift['partition']:.2f} (adjusted Rand index)")
    console.print(table)


def table_of(bank: Bank) -> None:
    """Bases, budget and spectrum."""
    from rich.console import Console
    from rich.table import Table

    from thetau.engine.work import gigabytes

    console = Console(soft_wrap=True, highlight=False, markup=False)
    cosine = bank.similarity.cosine
    order = bank.similarity.names
    table = Table("basis", "how", "tasks", "norm", "bytes", "error", "nearest", box=None, pad_edge=False)
    for name, basis in bank.bases.items():
        place = order.index(name)
        others = [(float(cosine[place, i]), other) for i, other in enumerate(order) if other != name]
        near = max(others, key=lambda pair: abs(pair[0]), default=None)
        table.add_row(
            name,
            basis.how,
            ", ".join(basis.members),
            f"{basis.norm:.4g}",
            gigabytes(basis.nbytes),
            f"{basis.error:.1e}" if basis.error else "0",
            "–" if near is None else f"{near[1]} ({near[0]:+.3f})",
        )
    console.print(table)
    settings = bank.state.settings
    budget = [
        *([] if settings.max_bases is None else [f"at most {settings.max_bases} bases"]),
        *([] if settings.max_bytes is None else [f"at most {gigabytes(settings.max_bytes)}"]),
    ]
    console.print(
        f"{bank.path}: {len(bank.members)} tasks in {len(bank.bases)} bases, {gigabytes(bank.nbytes)}"
        f"{'; ' + ', '.join(budget) if budget else ''}; base {bank.base_label}, {bank.space}"
    )
    if bank.bases:
        largest = max(len(basis.members) for basis in bank.bases.values())
        console.print(
            f"an offline build holds {bank.offline_vectors} whole vectors at once, max(max |C|, m): its largest cluster has {largest}, its bases are "
            f"{len(bank.bases)}; one merge of all would hold {len(bank.members)}"
        )
    spectrum = bank.state.spectrum
    if spectrum is not None:
        console.print("of the last clustering: eigenvalues " + " ".join(f"{value:.4f}" for value in spectrum.eigenvalues))
        console.print("                        gaps        " + " ".join(f"{value:.4f}" for value in spectrum.gaps))


def write_state(bank: Bank, path: Path) -> None:
    """All that is known of a bank, as JSON. Raises `OutputError`."""
    from pydantic import TypeAdapter

    from thetau.bases.bank import State
    from thetau.checkpoint.disk import write_bytes
    from thetau.cli.common import check_folder

    check_folder(path)
    write_bytes(path, TypeAdapter(State).dump_json(bank.state, indent=1) + b"\n")
