"""What a report is asked of: told from what lies there, and read into a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from thetau.bases import open_bank
from thetau.diagnostics.comparison import Comparison
from thetau.diagnostics.cosines import Cosines
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.doctor import Doctor
from thetau.diagnostics.interference import Interference
from thetau.diagnostics.landscape import Landscape
from thetau.diagnostics.layers import Layers
from thetau.diagnostics.results import load_result
from thetau.engine.executor import Engine
from thetau.errors import CheckpointError, DataError, RecipeError
from thetau.report.banks import bank_page
from thetau.report.blocks import Page
from thetau.report.comparisons import comparison_page
from thetau.report.doctors import doctor_page
from thetau.report.landscapes import landscape_page
from thetau.report.layers import layers_page
from thetau.report.models import model_page, read_merged
from thetau.report.paradigms import paradigms_page
from thetau.report.suites import Unfinished, suite_page, unfinished_page
from thetau.report.vectors import cosines_page, disentanglement_page, interference_page
from thetau.studies.paradigms import load_paradigm_results
from thetau.studies.suite import PLAN
from thetau.studies.suite_results import Row, load_results

Kind = Literal[
    "model",
    "suite",
    "unfinished",
    "bank",
    "doctor",
    "paradigms",
    "comparison",
    "layers",
    "landscape",
    "interference",
    "disentanglement",
    "cosines",
]
_FILES: dict[str, Kind] = {
    "thetau.json": "model",
    "bank.json": "bank",
    "results.json": "suite",
    "doctor.json": "doctor",
    "paradigms.json": "paradigms",
}
_ASK = (
    "Give an output of `thetau merge`, a run of `thetau suite run` (with `--paradigm` too), a bank, what `thetau doctor --json` or `thetau compare "
    "--json` wrote, or the JSON of `thetau diagnose` layers, landscape, tau-jp, disentanglement or cosine"
)
_TOLD: tuple[tuple[Kind, frozenset[str]], ...] = (  # kind ← the fields that it alone has
    ("paradigms", frozenset({"suite", "rows", "seeds", "pretrained"})),
    ("suite", frozenset({"suite", "rows"})),
    ("doctor", frozenset({"compared", "advice"})),
    ("comparison", frozenset({"parts", "misfits", "only_a"})),
    ("layers", frozenset({"merged", "shares", "rows"})),
    ("landscape", frozenset({"grid", "lines", "marks"})),
    ("interference", frozenset({"products", "pairs", "unit"})),
    ("disentanglement", frozenset({"grid", "parts", "error"})),
    ("cosines", frozenset({"groups"})),
)


def kind_of(path: Path) -> tuple[Kind, Path]:
    """The kind of thing that lies at a path, and the folder or file that it is read from.

    Raises:
        CheckpointError: nothing is there, or nothing that there is a report of.
    """
    if path.is_dir():
        known = [(name, kind) for name, kind in _FILES.items() if (path / name).is_file()]
        if known:
            name, kind = known[0]
            return kind, path if kind in ("model", "bank") else path / name
        if (path / PLAN).is_file() or (path / "finetuned").is_dir():
            return "unfinished", path
        raise CheckpointError(f"{path}: holds none of {', '.join(_FILES)}, so it is nothing that there is a report of. {_ASK}.")
    if not path.exists():
        raise CheckpointError(f"{path}: is not there. {_ASK}.")
    if path.name in ("thetau.json", "bank.json"):
        return _FILES[path.name], path.parent
    content = _json(path)
    if isinstance(content, dict):
        for kind, fields in _TOLD:
            if fields <= set(content):
                return kind, path
    raise CheckpointError(f"{path}: is JSON of a kind of which there is no report. {_ASK}.")


def page_of(
    path: Path, *, evaluations: Sequence[Path] = (), weights: bool = True, said: Sequence[str] = (), engine: Engine | None = None
) -> Page:
    """The page of whatever lies at a path.

    - `evaluations`: of a merged model, what `thetau evaluate --json` wrote. `weights`: whether weights are read, where there are some.
    - `said`: warnings of the run that made a model.

    Raises:
        ThetauError: it cannot be read, or there is no report of it.
    """
    kind, place = kind_of(path)
    if evaluations and kind != "model":
        raise RecipeError([f"`--evaluation` belongs to a merged model. {path} is none."], "options")
    match kind:
        case "model":
            return model_page(read_merged(place, evaluations=evaluations, weights=weights, said=said, engine=engine))
        case "bank":
            bank = open_bank(place)
            return bank_page(bank, problems=tuple(bank.verify()) if weights else None)
        case "doctor":
            return doctor_page(load_result(Doctor, place))
        case "paradigms":
            return paradigms_page(load_paradigm_results(place))
        case "comparison":
            return comparison_page(load_result(Comparison, place))
        case "layers":
            return layers_page(load_result(Layers, place))
        case "landscape":
            return landscape_page(load_result(Landscape, place))
        case "interference":
            return interference_page(load_result(Interference, place))
        case "disentanglement":
            return disentanglement_page(load_result(Disentanglement, place))
        case "cosines":
            return cosines_page(load_result(Cosines, place))
        case "suite":
            return suite_page(load_results(place), missing=_missing(place))
        case "unfinished":
            return unfinished_page(read_unfinished(place))


def _missing(results: Path) -> list[str]:
    """What the plan beside finished results has more than they have: a later, larger run that is not done yet."""
    folder = results.parent
    if not (folder / PLAN).is_file():
        return []
    plan = _json(folder / PLAN)
    planned = _words(plan, "methods") or ()
    done = {row.name for row in load_results(results).rows}
    return [f"the merge by {name}" for name in planned if name not in done]


def read_unfinished(folder: Path) -> Unfinished:
    """What a run has left so far. Raises `CheckpointError`: its plan is damaged."""
    plan = _json(folder / PLAN) if (folder / PLAN).is_file() else {}
    tuned = sorted(path.parent.parent.name for path in folder.glob("finetuned/*/*/thetau_finetune.json"))
    rows: dict[str, Row] = {}
    for path in sorted((folder / "cache").glob("row-*.json"), key=lambda path: path.stat().st_mtime):
        try:
            row: Row = TypeAdapter(Row).validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        rows[row.name] = row  # the newest of each name
    methods = _words(plan, "methods")
    order = {name: place for place, name in enumerate(methods or ())}
    kept = [row for row in rows.values() if methods is None or row.name in order]
    suite = plan.get("suite") if isinstance(plan, dict) else None
    return Unfinished(
        folder=folder,
        suite=suite if isinstance(suite, str) else None,
        tasks=_words(plan, "tasks"),
        methods=methods,
        tuned=tuple(dict.fromkeys(tuned)),
        rows=tuple(sorted(kept, key=lambda row: order.get(row.name, 0))),
    )


def _words(plan: Any, key: str) -> tuple[str, ...] | None:
    found = plan.get(key) if isinstance(plan, dict) else None
    return tuple(str(one) for one in found) if isinstance(found, list) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). {_ASK}.") from error
