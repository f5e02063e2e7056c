"""What the run of a suite found; everything that its tables and charts are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import BeforeValidator, TypeAdapter

from thetau.checkpoint.disk import write_bytes
from thetau.diagnostics.results import load_result
from thetau.evaluate.measures import Loss, Measure
from thetau.evaluate.search import ScaleTrial

# JSON has no NaN: it is written as null, and read as what it was.
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


@final
@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task as the run saw it: examples of each split, how many test inputs were cut, and the fine-tuning on it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    licence: str
    source: str
    train: int
    validation: int
    test: int
    truncated_test: int
    config: dict[str, Any]
    finetune_key: str
    finetune_seconds: float
    first_loss: Number
    last_loss: Number


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, measured on the test splits.

    - `role`: the base as it is, each task's own fine-tuned model, one model trained on all tasks (`joint`), each task's own vector after a method's
      transforms (`each`: AWD's reconstructed individuals) or what the method makes for it (EMR, Twin), or a merge.
    - `loss`: the mean loss of each task's head, on test too. `peak_gigabytes`: the most resident memory of a process of its own that makes the
      merge, whose seconds `merge_seconds` are then; None where that was not asked.
    - `method`: the method with all its fields, as text. `scale`: the λ chosen on validation (1 where there was no grid).
    - `trials`: every λ that was tried; `at_end`: the chosen one lies at their end. `absolute`, `normalised`: means over tasks, in 0..1.
    """

    name: str
    role: Literal["pretrained", "individual", "joint", "each", "merged"]
    accuracy: dict[str, Measure]
    absolute: Number
    normalised: Number
    method: str | None = None
    scale: float | None = None
    trials: tuple[ScaleTrial, ...] = ()
    at_end: bool = False
    merge_seconds: float | None = None
    loss: dict[str, Loss] = field(default_factory=dict)
    peak_gigabytes: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """The whole run. `limits` are those of the evaluation; `seconds` is the wall time of the run that wrote it, caches
    included.
    """

    suite: str
    description: str
    backbone: str
    base_hash: str
    tasks: tuple[TaskFacts, ...]
    rows: tuple[Row, ...]
    limits: dict[str, int | None]
    quick: bool
    versions: dict[str, str]
    seconds: float
    format: int = 1

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_bytes(path, TypeAdapter(SuiteResults).dump_json(self, indent=1) + b"\n")


def load_results(path: Path) -> SuiteResults:
    """Read what `SuiteResults.save` wrote. Raises `DataError`."""
    return load_result(SuiteResults, path, "the results of a suite", "Give the results.json that `thetau suite run` writes.")
