"""Draw docs/big-checkpoints.md from experiments/big_checkpoints/results.json.

python -m experiments.big_checkpoints.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from experiments.common import DOCS, EXPERIMENTS, table

RESULTS = EXPERIMENTS / "big_checkpoints" / "results.json"
PAGE = DOCS / "big-checkpoints.md"
CALLED = {"mixture": "mixture of experts, fused, bfloat16", "int8": "Llama, bitsandbytes int8", "nf4": "Llama, bitsandbytes NF4"}


def drawn(result: Mapping[str, Any]) -> str:
    """The page."""
    plans, runs, about = result["plans"], result["runs"], result["machine"]
    whole = {row["form"]: row["parameters"] for row in plans}
    told = next((row["said"] for row in plans if row["said"]), "")
    sizes = "; ".join(f"{CALLED[form]}: {count / 1e9:.2f} billion parameters" for form, count in whole.items())
    off = max(row["roundings_off"] for row in runs if "roundings_off" in row)
    lines = [
        "# Mixtures and quantised models of 7B",
        "",
        "A mixture of experts whose experts lie in one tensor, and models in int8 and NF4, are merged as any other model is. Nothing is unpacked first:",
        "",
        "```",
        "thetau merge --method tsv_m --set tensors=linear --base olmoe --model a --model b -o merged --dry-run",
        "thetau merge --method ties --base int8-base --model int8-a --model int8-b -o merged --max-memory 512MB",
        "```",
        "",
        f"The figures are those of `{result['command']}`, which writes `experiments/big_checkpoints/results.json`.",
        "",
        "## Planned at 7B",
        "",
        "What `--dry-run` works out from headers alone, for a base and two models. The shapes are those of OLMoE-1B-7B (16 layers of 64 experts) and of "
        f"Llama 2 7B. {sizes}. One worker, so that `in flight` is what one matrix takes.",
        "",
        *table(
            ["model", "method", "passes", "reads, GB", "writes, GB", "in flight, MB", "operations"],
            [
                [
                    CALLED[row["form"]],
                    _method(row),
                    str(row["passes"]),
                    f"{row['reads_gb']:.2f}",
                    f"{row['writes_gb']:.2f}",
                    str(row["in_flight_mb"]),
                    f"{row['operations']:.2g}" if row["operations"] else "",
                ]
                for row in plans
            ],
            words=2,
        ),
        f"Of the mixture, the matrix methods say: *{told}*. `in flight` is one expert's matrix, not 64.",
        "",
        "A quantised model is read in its own few bits and written in bfloat16.",
        "",
        "## Run at 280M",
        "",
        f"The same forms with some 280 million parameters, each merge a process of its own with `--max-memory 512MB`, on {about['cores']} cores. `peak` is the "
        "operating system's own figure for the whole process, with Python, torch and mapped files.",
        "",
        *table(
            ["model", "method", "peak, MB", "budget, MB"],
            [[CALLED[row["form"]], _method(row), str(row["peak_mb"]), str(row["budget_mb"])] for row in runs],
            words=2,
        ),
        "Every output passes `thetau verify`. Those of `task_arithmetic` were compared with θ₀ + 0.3 Σ τ, worked out in float64 from the files without "
        f"thetau. The largest difference is {off:.2f} of what rounding to bfloat16 may make, so that nothing was lost but that one rounding.",
    ]
    return "\n".join(lines)


def _method(row: Mapping[str, Any]) -> str:
    fields = ", ".join(row["fields"])
    return f"`{row['method']}`" + (f" ({fields})" if fields else "")


def main() -> None:
    """Write the page."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(drawn(result) + "\n", encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(DOCS.parent)}\n")


if __name__ == "__main__":
    main()
