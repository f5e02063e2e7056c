"""One checkpoint measured on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import final

from thetau.diagnostics.results import Result
from thetau.errors import RecipeError
from thetau.evaluate.harness import Harnessed, run_harness
from thetau.evaluate.options import BASE
from thetau.evaluate.tuned import check_linear
from thetau.models import load_encoder, read_weights
from thetau.models.causal import check_tokenizer
from thetau.studies.checkpoints import base_for, in_tangent_space
from thetau.studies.options import Evaluate


@final
@dataclass(frozen=True, kw_only=True)
class HarnessMeasured(Result):
    """What `evaluate_harness` found, by task; `version` is the harness'."""

    model: str
    base: str
    version: str
    limit: int | None
    tasks: dict[str, tuple[Harnessed, ...]]


def evaluate_harness(
    model: str | Path,
    tasks: Sequence[str],
    options: Evaluate | None = None,
    *,
    base: str = BASE,
    folder: Path | None = None,
    cache: Path | None = None,
) -> HarnessMeasured:
    """Measure a causal checkpoint (folder or hub id; an adapter or a file of weights with its `base`) on tasks of the harness.

    `folder` has task files of one's own; `cache` keeps what was answered to each request.
    Of the options, `limit` counts, the first so many examples, and `space`. Raises `CheckpointError`, `DataError`, and
    `RecipeError` for a split, which the harness' tasks name themselves, and for heads and corrections, which they do not have.
    """
    given = options or Evaluate()
    if given.split != "test":
        raise RecipeError(
            [f"tasks of the harness name their split themselves. Got --split {given.split}; leave it out."], "thetau evaluate"
        )
    unused = [one.name for one in fields(given) if one.name not in ("limit", "space") and getattr(given, one.name) != one.default]
    if unused:
        raise RecipeError(
            [f"the harness measures a model by its own rules, in which these have no part: {', '.join(unused)}. Leave them out."],
            "thetau evaluate",
        )
    start, path = base_for(model, base), Path(model)
    encoder = load_encoder(start)
    if in_tangent_space(path, given):
        check_linear(encoder)
    if str(model) != start:
        if path.is_dir():
            check_tokenizer(encoder, path)
        encoder.load(read_weights(model, base=encoder.folder), str(model))
    found = run_harness(encoder, tasks, folder=folder, limit=given.limit, cache=cache)
    return HarnessMeasured(model=str(model), base=start, version=version("lm_eval"), limit=given.limit, tasks=found)
