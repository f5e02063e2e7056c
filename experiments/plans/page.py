"""How large merges would run: docs/large.md, from `thetau merge --dry-run`'s own arithmetic.

    python -m experiments.plans.page

Writes checkpoints of the real shapes of Llama 2 7B, Mixtral 8x7B, Llama 3 70B and Llama 3.1 405B that hold no data (files with a hole where
it would be), plans merges of them, and works out the time at given bandwidths and speeds of the solvers. Beside them stand the plan's times
for the checkpoints of experiments/engine/run.py against what that measured, from its result files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import thetau
from experiments.common import DOCS, EXPERIMENTS
from experiments.engine.run import METHODS as MEASURED
from experiments.engine.run import MODELS as FINE_TUNED
from experiments.engine.run import SHAPES
from experiments.engine.run import shapes as bench_shapes
from thetau.engine.planning import plan
from thetau.engine.work import gigabytes
from thetau.plan import Plan

# hidden, intermediate, layers, vocabulary, width of keys and values, experts
MODELS = {
    "7B": (4096, 11008, 32, 32000, 4096, 0),
    "8×7B, a mixture": (4096, 14336, 32, 32000, 1024, 8),
    "70B": (8192, 28672, 80, 128256, 1024, 0),
    "405B": (16384, 53248, 126, 128256, 1024, 0),
}
METHODS: dict[str, Any] = {
    "task_arithmetic": thetau.methods.TaskArithmetic(),
    "ties": thetau.methods.Ties(),
    "awd": thetau.methods.Awd(tensors="all"),
    "della": thetau.methods.Della(),
    "tsv_m": thetau.methods.TsvM(),
    "tsv_m (rank=full)": thetau.methods.TsvM(rank="full"),
    "iso_c": thetau.methods.IsoC(),
    "wudi (gradient flow)": thetau.methods.Wudi(solver="gradient_flow"),
    "bilateral": thetau.methods.Bilateral(),
}
DISKS = {"SATA SSD, 0.5 GB/s": 0.5e9, "NVMe, 3 GB/s": 3e9, "parallel file system, 10 GB/s": 10e9}
WORKERS, MEMORY, TASKS = 16, 64_000_000_000, 3
CORE, GPU = (
    100e9,
    20e12,
)  # operations a second in float32: of a core, as measured on the machine of `make bench`, and of a graphics card, assumed
ON_GPU = "NVMe, 3 GB/s"


def checkpoint(path: Path, shape: tuple[int, int, int, int, int, int]) -> Path:
    """A safetensors file whose header is real and whose data is a hole."""
    hidden, inner, layers, vocabulary, narrow, experts = shape
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (narrow, hidden) for part in "kv"}
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        if experts:
            shapes[f"{at}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for mlp in (f"{at}.block_sparse_moe.experts.{number}" for number in range(experts)):
            shapes |= {
                f"{mlp}.w1.weight": (inner, hidden),
                f"{mlp}.w2.weight": (hidden, inner),
                f"{mlp}.w3.weight": (inner, hidden),
            }
        if not experts:
            shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    return hollow(path, shapes)


def hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """The file, given its tensors' names and shapes; every entry takes two bytes, or four in `F32`."""
    entry = {"BF16": 2, "F32": 4}[dtype]
    header, at_byte = {}, 0
    for name, dims in shapes.items():
        size = entry * prod(dims)
        header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [at_byte, at_byte + size]}
        at_byte += size
    raw = json.dumps(header).encode()
    path.mkdir(parents=True)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at_byte)
    return path


def planned(folder: Path, shape: tuple[int, int, int, int, int, int], method: Any, engine: thetau.Engine) -> Plan:
    base = thetau.open(folder / "base")
    vectors = [thetau.open(folder / f"m{index}") - base for index in range(TASKS)]
    return plan(base + thetau.merge(vectors, method, engine=engine), engine=engine)


def main() -> None:
    engine = thetau.Engine(workers=WORKERS, max_memory=MEMORY)
    lines = [
        "# Merging 70B and 405B",
        "",
        "```",
        "thetau merge --method tsv_m --base base --model a --model b --model c -o merged --max-memory 64GB --dry-run",
        "```",
        "",
        f"What `thetau merge --dry-run` works out for a base and {TASKS} fine-tuned models in bfloat16, {WORKERS} workers and "
        f"`--max-memory {MEMORY // 10**9}GB`; drawn by `python -m experiments.plans.page`. Times count reading, arithmetic and writing at the same "
        f"bandwidth, with solvers at {CORE / 1e9:.0f} billion operations a second and core, as on the machine of the next table. They are estimates; passes "
        f"and bytes are exact, operations are the solvers' own count. The last column has the solvers on a graphics card that makes {GPU / 1e12:.0f} trillion "
        "operations a second in float32. That number is assumed, nothing of the column was measured, and cards do worse at eigendecompositions "
        "(`iso_c`, `rank=full`) than at products.",
        "",
        "| model | method | passes | reads | writes | in flight | operations | " + " | ".join(DISKS) + f" | {ON_GPU}, a GPU |",
        "|---|---|---:|---:|---:|---:|---:|" + "---:|" * (len(DISKS) + 1),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for model, shape in MODELS.items():
            folder = Path(temporary) / model
            for name in ("base", *(f"m{index}" for index in range(TASKS))):
                checkpoint(folder / name, shape)
            for name, method in METHODS.items():
                one = replace(planned(folder, shape, method, engine), rate=WORKERS * CORE)
                guesses = [one.duration(rate, rate) for rate in DISKS.values()]
                guesses.append(replace(one, rate=GPU).duration(DISKS[ON_GPU], DISKS[ON_GPU]))
                times = " | ".join(map(duration, guesses)) + " |"
                if one.memory > MEMORY:
                    times = "refused: it needs more than the budget |" + " |" * len(DISKS)
                cells = [model, name, str(len(one.passes)), *map(gigabytes, (one.read, one.written, one.memory))]
                lines.append(f"| {' | '.join(cells)} | {f'{one.flops:.0e}' if one.flops else '–'} | {times}")
        lines += ["", *checked(Path(temporary) / "bench"), *advice()]
    (DOCS / "large.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def checked(hollows: Path) -> list[str]:
    """The plan against the benchmark's measurements."""
    found = []
    for file in sorted((EXPERIMENTS / "engine").glob("*.json")):
        if file.stem not in SHAPES:
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        folder = hollows / file.stem
        base, *models = (thetau.open(hollow(folder / str(number), bench_shapes(file.stem))) for number in range(FINE_TUNED + 1))
        engine = thetau.Engine(workers=result["machine"]["cores"])
        size = sum(spec.nbytes for spec in base.specs().values())
        rate = size * (len(models) + 2) / result["floor_seconds"]  # of the floor: it reads all inputs and writes one output
        for name, row in result["methods"].items():
            method, *fields = MEASURED[name][0]
            values = dict(field.split("=") for field in fields)
            built = thetau.methods.build(method, {key: _value(value) for key, value in values.items()})
            merged = base + thetau.merge([model - base for model in models], built, engine=engine)
            guess = plan(merged, engine=engine).duration(rate, rate)
            took = row["seconds"] - row.get("start_seconds", result["start_seconds"])
            found.append(f"| {result['size']} | {name} | {guess:.1f} | {took:.1f} | {guess / took:.2f} |")
    if not found:
        return []
    head = [
        "## Checked against measured runs",
        "",
        "The same arithmetic for the checkpoints of `experiments/engine/run.py` (a base and five models), at the bandwidth that its floor had, beside the "
        "seconds that it measured without start-up (`make bench`).",
        "",
        "| size | method | planned s | measured s | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    return [*head, *found, ""]


def advice() -> list[str]:
    return [
        "## Running it",
        "",
        "```",
        "thetau merge recipe.yaml --dry-run                          # the table above, for your models and this machine",
        "thetau merge recipe.yaml -o merged --resume --max-memory 64GB   # begin; after a crash, the same line continues",
        "thetau verify merged                                        # every tensor against its checksum",
        "```",
        "",
        "- Elementwise methods need a few hundred megabytes whatever the model; matrix methods need a few copies of the largest matrix a worker. `in flight` "
        "is that sum, and fewer workers run where it would pass the budget.",
        "- `--resume` keeps every finished tensor. Statistics passes are made again: for `ties` that is all but the last.",
        "- On a Ray cluster (`--executor ray`) the workers are the cluster's cores and the bandwidth that of the storage they share. Statistics fold on the "
        "workers; the only thing that comes to the driver of each tensor is a checksum.",
    ]


def duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
