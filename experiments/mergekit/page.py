"""Draw docs/mergekit-parity.md from the result files of experiments/mergekit.

python -m experiments.mergekit.page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from experiments.common import DOCS, EXPERIMENTS, table

HERE = EXPERIMENTS / "mergekit"
PAGE = DOCS / "mergekit-parity.md"
SOURCE = "https://github.com/arcee-ai/mergekit"
Result = Mapping[str, Any]


def page(result: Result, timings: Mapping[str, Result]) -> str:
    """The page of a comparison, with what was measured of time and memory by size."""
    rows = result["recipes"]
    verdicts = [row["verdict"] for row in rows]
    agree = verdicts.count("agrees")
    lines = [
        "# Beside mergekit",
        "",
        f"{len(rows)} recipes in [mergekit]({SOURCE})'s format, each run by mergekit {result['mergekit']} and by `thetau merge` on the "
        f"same tiny Llama, Qwen2, GPT-2 and Mistral models in float32. {agree} agree, {verdicts.count('ours is right')} differ where "
        f"mergekit is at fault{_others(verdicts)}. To run one, or to make this page again:",
        "",
        "```",
        "thetau merge RECIPE.yml -o merged",
        "make mergekit   # installs mergekit into .venv-mergekit, runs every recipe in both, draws this page",
        "```",
        "",
        f"A recipe *agrees* where names, shapes, depth and vocabulary are the same and no entry of any tensor differs by more than "
        f"{result['bound']:.0e}. Rows that belong to tokens are compared token by token. The recipes lie in "
        "`experiments/mergekit/recipes`, to be read as examples.",
        "",
        *table(
            ["recipe", "method", "what it has", "largest difference", "verdict"],
            [_row(row) for row in rows if "ratios" not in row],
        ),
        "## Where they differ",
        "",
        *[_difference(row) for row in rows if row.get("reason")],
        "",
        "## Methods that draw",
        "",
        "Each draws numbers of its own, so that no entry need be the same. Compared are the share of entries that change, their mean and "
        "their mean square, in each of the tensors with 100,000 entries or more. The figure is the largest difference over its bound, five "
        "standard errors.",
        "",
        *table(
            ["recipe", "what it has", "verdict", "tensors", "share", "mean", "mean square"],
            [_drawn(row) for row in rows if "ratios" in row],
            words=3,
        ),
        "## Bad recipes",
        "",
        "What is wrong, what mergekit does with it, and what thetau says.",
        "",
        *table(["recipe", "mergekit", "thetau"], [_bad(row) for row in result["bad"]], words=3),
    ]
    for size, timing in timings.items():
        lines += _timing(size, timing)
    return "\n".join(lines).rstrip() + "\n"


def _others(verdicts: list[str]) -> str:
    other = [verdict for verdict in verdicts if verdict not in ("agrees", "ours is right")]
    return f", and {len(other)} do not agree" if other else ""


def _row(row: Result) -> list[str]:
    largest = f"{row['largest']:.1e}" if row.get("largest") else "0" if "largest" in row else ""
    return [f"`{row['recipe']}`", row["method"], row["about"], row["verdict"], largest]


def _drawn(row: Result) -> list[str]:
    figures = [f"{value:.2f}" for value in row["ratios"].values()]
    return [f"`{row['recipe']}`", row["about"], row["verdict"], str(row["tensors"]), *figures]


def _difference(row: Result) -> str:
    """Why one differs, and by how much where that is in one kind of tensor."""
    rest = f" All other tensors agree ({row['elsewhere']:.1e})." if "elsewhere" in row else ""
    return f"- `{row['recipe']}`: {row['reason']}.{rest}"


def _bad(row: Result) -> list[str]:
    if row["mergekit_code"] == 0:
        end = "runs" + (", writes NaN or infinite values" if row["mergekit_nonfinite"] else "")
        end += f", but logs: {_short(row['mergekit_says'])}" if row["mergekit_says"] else ", and says nothing"
    else:
        end = (
            f"ends in a traceback: {_short(row['mergekit_says'])}"
            if row["mergekit_code"] is None
            else _short(row["mergekit_says"])
        )
    said = " ".join(row["says"].split()).removeprefix("error: ").removeprefix(f"{row['recipe']}.yml: ")
    said = said.split("problem - ", 1)[-1].split("problems - ", 1)[-1]
    if row["code"] == 0:
        return [
            f"{row['about']} (`{row['recipe']}`)",
            end,
            f"runs, and says: {_short(said, 260)}" if said else "runs: the shards count",
        ]
    return [f"{row['about']} (`{row['recipe']}`)", end, _short(said, 260)]


def _short(text: str, most: int = 160) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _timing(size: str, timing: Result) -> list[str]:
    load = timing["load_when_measured"]
    return [
        f"## Time and memory, {size}",
        "",
        f"Whole commands, from start-up to the synced output, on the checkpoints of `experiments/engine` in bfloat16; medians of "
        f"{timing['runs']} alternating runs on {timing['machine']['cores']} cores, beside the time it takes to read the inputs and write the "
        f"output. Memory is anonymous memory; work is processors' seconds, which other programs change "
        f"little. Other work ran on the machine (load {load['least']:.1f} to {load['most']:.1f}).",
        "",
        *table(
            [
                "recipe",
                "thetau s",
                "× floor",
                "GB",
                "mergekit s",
                "GB",
                "times faster",
                "share of its memory",
                "GB within 512 MB",
            ],
            [
                [
                    name,
                    f"{row['seconds']:.1f}",
                    f"{row['ratio']:.1f}",
                    f"{row['anonymous_gb']:.2f}",
                    f"{row['mergekit_seconds']:.1f}",
                    f"{row['mergekit_anonymous_gb']:.2f}",
                    f"{row['times_faster']:.1f}",
                    f"{row['times_less_work']:.1f}",
                    f"{row['share_of_memory']:.2f}",
                    f"{row['bounded_anonymous_gb']:.2f}",
                ]
                for name, row in timing["methods"].items()
            ],
        ),
        f"Made by `{timing['command']}`.",
        "",
    ]


def drawn() -> str:
    """The page of the committed result files."""
    result = json.loads((HERE / "parity.json").read_text(encoding="utf-8"))
    sizes = [size for size in ("280m", "1.1b") if (HERE / f"{size}.json").exists()]
    return page(result, {size: json.loads((HERE / f"{size}.json").read_text(encoding="utf-8")) for size in sizes})


def main() -> None:
    """Write it."""
    PAGE.write_text(drawn(), encoding="utf-8")
    sys.stdout.write(f"docs/{PAGE.name}\n")


if __name__ == "__main__":
    main()
