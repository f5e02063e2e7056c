"""Big checkpoints: plans of 7B-shaped ones from headers alone, and merges of 280M-shaped ones within 512 MB.

    python -m experiments.big_checkpoints.run --folder runs/big [--quick]

Each merge is a process of its own, `thetau merge --max-memory 512MB`; its peak is the operating system's own, mapped files included. This
process holds nothing large, since a child's peak begins at its parent's: what needs a library is done in other processes. Task arithmetic is
checked against values that are worked out from the files without thetau. What is in the result file
already is not run again: remove it to begin anew. Written to experiments/big_checkpoints/results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.common import EXPERIMENTS, machine, timed, write_result

RESULTS = EXPERIMENTS / "big_checkpoints" / "results.json"
BUDGET = 512_000_000
FORMS = ("mixture", "int8", "nf4")
TOOL = [sys.executable, "-m", "experiments.big_checkpoints.checkpoints"]
MATRICES = ["tensors=linear", "elsewhere=mean"]
PLAIN: dict[str, list[str]] = {"task_arithmetic": ["scale=0.3"], "ties": []}
METHODS = PLAIN | {"tsv_m": [*MATRICES, "rank=16"]}  # what is merged
PLANNED = PLAIN | {"tsv_m": MATRICES, "iso_c": MATRICES, "wudi": ["solver=gradient_flow"], "bilateral": []}  # what is planned


def build(folder: Path, form: str, size: str) -> None:
    """A base and two models, once."""
    subprocess.run([*TOOL, "make", str(folder), form, size], check=True)


def merge(folder: Path, form: str, size: str, method: str) -> dict[str, Any]:
    """One merge: its peak and seconds, and how task arithmetic compares."""
    out = folder / "out"
    words = [sys.executable, "-m", "thetau", "merge", "--method", method, "--base", str(folder / "base"), "-o", str(out)]
    words += [word for model in ("a", "b") for word in ("--model", str(folder / model))]
    words += [word for field in METHODS[method] for word in ("--set", field)]
    words += ["--max-memory", f"{BUDGET // 10**6}MB", "--quiet"]
    seconds, _, peak, _ = timed(words, out)
    subprocess.run([sys.executable, "-m", "thetau", "verify", str(out)], check=True, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = {"form": form, "method": method, "fields": METHODS[method], "peak_mb": round(peak * 1000)}
    row |= {"budget_mb": BUDGET // 10**6, "seconds": round(seconds, 1)}
    if method == "task_arithmetic":
        done = subprocess.run([*TOOL, "check", str(folder), form, size, str(out)], check=True, capture_output=True, text=True)
        row["roundings_off"] = round(float(done.stdout), 3)
    shutil.rmtree(out, ignore_errors=True)
    return row


def plans(size: str, forms: list[str]) -> list[dict[str, Any]]:
    """What the same merges would take at another size, from headers alone; one worker, so that what is in flight is one matrix's."""
    import thetau
    from experiments.big_checkpoints.checkpoints import FORMS as KNOWN
    from experiments.big_checkpoints.checkpoints import MODELS, write
    from thetau.engine.planning import plan

    rows = []
    engine = thetau.Engine(workers=1, max_memory=16_000_000_000)
    with tempfile.TemporaryDirectory() as temporary:
        for form in (one for one in KNOWN if one in forms):
            folder = Path(temporary) / form
            for number, model in enumerate(MODELS):
                write(folder / model, form, size, number, hollow=True)
            base, *models = (thetau.open(folder / model) for model in MODELS)
            parameters = sum(spec.elements for spec in base.specs().values())
            for method, fields in PLANNED.items():
                values = {key: _value(value) for key, value in (field.split("=") for field in fields)}
                built = thetau.methods.build(method, values)
                merge = thetau.merge([model - base for model in models], built, names=MODELS[1:], engine=engine)
                told = [note for _, source in merge.terms for note in source.notes if "expert by expert" in note]
                found = plan(base + merge, engine=engine)
                rows.append(
                    {
                        "form": form,
                        "parameters": parameters,
                        "method": method,
                        "fields": fields,
                        "passes": sum(one.share == 1 for one in found.passes),
                        "reads_gb": round(found.read / 1e9, 2),
                        "writes_gb": round(found.written / 1e9, 2),
                        "in_flight_mb": round(found.memory / 1e6),
                        "operations": found.flops,
                        "said": told[0].partition(":")[0] if told else "",
                    }
                )
    return rows


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(words: list[str] | None = None) -> None:
    """Merge, plan, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/big"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="tiny shapes throughout")
    given = parser.parse_args(words)
    small, large = ("tiny", "tiny") if given.quick else ("280m", "7b")
    result: dict[str, Any] = {
        "command": "make big-checkpoints",
        "machine": machine(),
        "merged": small,
        "planned": large,
        "runs": [],
        "plans": [],
    }
    if given.out.exists() and (before := json.loads(given.out.read_text(encoding="utf-8")))["merged"] == small:
        result["runs"] = before["runs"]
    for form in FORMS:
        build(given.folder / small / form, form, small)
        for method in METHODS:
            if not any((row["form"], row["method"]) == (form, method) for row in result["runs"]):
                result["runs"].append(merge(given.folder / small / form, form, small, method))
                write_result(given.out, result)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json; from experiments.big_checkpoints.run import plans; print(json.dumps(plans({large!r}, {FORMS!r})))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    result["plans"] = json.loads(done.stdout)
    write_result(given.out, result)


if __name__ == "__main__":
    main()
