"""What each method costs at its defaults, as `thetau merge --dry-run` works it out: one matrix, and a model of 7 billion parameters.

    python -m experiments.catalogue.costs

The plans are of `TASKS` models (or as many as a method takes) and their base in bfloat16, with one worker: a single 4096 × 4096 matrix of
attention, and Llama 2 7B's real shapes. The files hold headers and no data. Writes experiments/catalogue/costs.json: passes, bytes read,
floating-point operations of matrix solvers, and bytes of memory in flight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import thetau
from experiments.catalogue.run import ours
from experiments.common import write_result
from experiments.plans.page import MODELS, checkpoint, hollow
from thetau.checkpoint.naming import Kind, kind_of
from thetau.engine.planning import plan
from thetau.methods import registry
from thetau.parts import Form, evidence_shape

OUT = Path(__file__).parent / "costs.json"
TASKS = 8
MATRIX = {"model.layers.0.self_attn.q_proj.weight": (4096, 4096)}
MEMORY = 64_000_000_000


def planned(name: str, folder: Path) -> dict[str, Any]:
    """The plan of a method on the models of a folder, in four numbers."""
    engine = thetau.Engine(workers=1, max_memory=MEMORY)
    method = registry.build(name, {})
    most = method.takes[1] or TASKS
    base = thetau.open(folder / "base")
    vectors = [(thetau.open(folder / f"m{index}") - base).named(f"m{index}") for index in range(most)]
    evidence = {
        kind: {f"m{index}": told(folder, f"m{index}", form) for index in range(most)}
        for kind, form in method.chain().forms.items()
    }
    if method.chain().emit is not None:
        merged = thetau.outputs(vectors, method, engine=engine, evidence=evidence)["m0"]
    else:
        merged = thetau.merge(vectors, method, engine=engine, evidence=evidence)
    made = plan(base + merged, engine=engine)
    return {"passes": sum(one.share == 1 for one in made.passes), "read": made.read, "flops": made.flops, "memory": made.memory}


def told(folder: Path, name: str, form: Form) -> Path:
    """Hollow evidence of a form for a model: itself where evidence is like the model, of its linear layers where it is a matrix a layer."""
    if form == "entries":
        return folder / name
    place = folder / f"{name}-{form}"
    if not place.exists():
        specs = thetau.open(folder / name).terms[0][1].specs.items()
        tables = (Kind.EMBEDDING, Kind.HEAD) if form in ("inputs", "outputs") else ()  # which are not measured
        shapes = {key: evidence_shape(form, spec.shape) for key, spec in specs if kind_of(key, spec.shape) not in tables}
        hollow(place, {key: shape for key, shape in shapes.items() if shape is not None}, "F32")
    return place


def models(folder: Path, size: str) -> Path:
    """A base and as many models as there are tasks: `matrix`, or one of `MODELS`."""
    for name in ("base", *(f"m{index}" for index in range(TASKS))):
        place = folder / size / name
        if size == "matrix":
            hollow(place, MATRIX)
        else:
            checkpoint(place, MODELS[size])
    return folder / size


def costs(sizes: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    """The plans of methods, by size (as it is called: what it is) and name."""
    with tempfile.TemporaryDirectory() as folder:
        places = {called: models(Path(folder), size) for called, size in sizes.items()}
        return {name: {called: planned(name, place) for called, place in places.items()} for name in names}


def main() -> None:
    """Write the file."""
    made = costs({"matrix": "matrix", "7B": "7B"}, ours())
    write_result(OUT, {"command": "python -m experiments.catalogue.costs", "tasks": TASKS, "workers": 1, "rows": made})


if __name__ == "__main__":
    main()
