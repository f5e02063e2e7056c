"""Evidence on disk: one safetensors file whose metadata say what it is and what it was collected from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from thetau._version import __version__
from thetau.checkpoint.disk import write_tensors
from thetau.errors import CheckpointError


def save_evidence(path: Path, evidence: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors as evidence of a name (`fisher`, `kronecker`), whole or not at all; `facts` are put in the metadata.

    Raises `OutputError`: the file cannot be written.
    """
    metadata = {"thetau.kind": "evidence", "thetau.evidence": evidence, "thetau.version": __version__}
    metadata |= {f"thetau.{name}": value for name, value in facts.items()}
    write_tensors(path, tensors, metadata)


def read_facts(path: Path, evidence: str) -> dict[str, str]:
    """The metadata of a file of evidence, without the leading `thetau.`. Raises `CheckpointError`: it is not of that name."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as evidence ({error}). Collect it again.") from error
    if metadata.get("thetau.evidence") != evidence:
        got = metadata.get("thetau.evidence") or metadata.get("thetau.kind") or "a file of other tensors"
        raise CheckpointError(f"{path}: must hold evidence of the kind {evidence}. Got {got}.")
    return {name.removeprefix("thetau."): value for name, value in metadata.items()}
