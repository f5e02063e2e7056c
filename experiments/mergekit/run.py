"""Recipes in mergekit's format through both programs: the same models, float32, every tensor compared; bad recipes; time and memory.

    python -m experiments.mergekit.run --mergekit PYTHON [--only slerp,ties]
    python -m experiments.mergekit.run --mergekit PYTHON --timing 280m --folder runs/bench

The first form makes tiny models (`models.py`), runs every recipe of `recipes/` and `bad/` in both programs, and writes `parity.json` and
the fingerprints that the tests compare with, tests/parity/data/mergekit.npz. The second measures whole commands on the checkpoints of
experiments/engine and writes `280m.json`. `experiments.mergekit.page` draws docs/mergekit-parity.md from both. PYTHON has mergekit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from experiments.common import EXPERIMENTS, ROOT, machine, write_result

HERE = EXPERIMENTS / "mergekit"
RECIPES, BAD = HERE / "recipes", HERE / "bad"
PRINTS = ROOT / "tests" / "parity" / "data" / "mergekit.npz"
GATES = ("moe-hidden",)  # where the gates alone may differ
DRAWN = ("dare-linear", "dare-ties", "della-linear", "della")
FLAGS = ("--no-write-model-card", "--quiet", "--random-seed", "1")

# Where a difference is meant: why ours is right.
REASONS = {
    "chat-template": "mergekit's `llama3` writes a line break after `<|eot_id|>`, which Meta's format has not",
    "chat-template-alpaca": "mergekit's `alpaca` writes the last `### Response:` onto the end of the instruction, without the empty line",
    "chat-template-exaone": "mergekit's `exaone` lets the indentation of its template into the text: spaces before roles, empty lines",
    "filters-regular": "a filter that no name holds is a regular expression here; mergekit looks for its characters, finds none, and takes "
    "the next value without a word",
    "linear-tied-and-untied": "mergekit takes the config of a model in the order of hashes: in some runs it writes the merged head and "
    "leaves `tie_word_embeddings: true`, so that loaders drop it",
    "moe-hidden": "mergekit runs the base in bfloat16 for the gates; here it runs in float32",
    "moe-qwen": "transformers adds `<|endoftext|>` to whatever tokenizer a Qwen2 has",
    "spare-rows": "mergekit cuts the embeddings to the tokenizer's length (its issue 425), so that they no longer fit what was trained "
    "with the spare rows; the rows of all tokens agree",
    "union-padded": "mergekit cuts the spare rows, and has a token more: transformers adds `<|endoftext|>` to whatever tokenizer a Qwen2 "
    "has; the rows of all tokens agree",
    "tensors-unlisted": "mergekit drops tensors that its list of the architecture does not name (its pull request 696)",
}


def title(file: Path) -> str:
    """What a recipe is about: its first line."""
    return file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def documents(file: Path) -> list[dict[str, Any]]:
    """A recipe's documents."""
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def method(file: Path) -> str:
    """The method of a recipe, or of each of its documents."""
    return ", ".join(dict.fromkeys(one.get("merge_method", "mixture of experts") for one in documents(file)))


def ours(file: Path, out: Path) -> list[str]:
    """Our command."""
    return ["thetau", "merge", str(file), "-o", str(out / file.stem / "ours")]


def theirs(file: Path, out: Path) -> list[str]:
    """Their command: which of their programs reads this recipe."""
    found, to = documents(file), out / file.stem / "theirs"
    flags = [*FLAGS, "--lora-merge-cache", str(out / "lora")]
    if "experts" in found[0]:
        return ["mergekit-moe", str(file), str(to), *flags]
    if len(found) > 1:
        between = to if all("name" in one for one in found) else to.with_name("between")
        return ["mergekit-multi", str(file), "--out-path", str(to), "--intermediate-dir", str(between), *flags]
    if file.stem.startswith("raw"):
        return ["mergekit-pytorch", str(file), str(to), *flags]
    return ["mergekit-yaml", str(file), str(to), *flags]


def drive(python: str, jobs: Sequence[Sequence[str]], models: Path) -> list[dict[str, Any]]:
    """Exit codes and words of commands, run one after another in one process beside the models."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    done = subprocess.run(
        [python, str(HERE / "driver.py")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=models,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-5000:])
    return list(json.loads(done.stdout))


def last_output(file: Path, folder: Path) -> Path:
    """Where the result lies: among the intermediate ones, where every document has a name."""
    names = [one.get("name") for one in documents(file)]
    return folder / names[-1] if all(names) else folder


def parity(files: Sequence[Path], mergekit: str, models: Path, out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each recipe, and fingerprints of their outputs."""
    from experiments.mergekit import comparing

    mine = drive(sys.executable, [ours(file, out) for file in files], models)
    other = drive(mergekit, [theirs(file, out) for file in files], models)
    rows, prints = [], {}
    for file, here, there in zip(files, mine, other, strict=True):
        row: dict[str, Any] = {"recipe": file.stem, "method": method(file), "about": title(file)}
        rows.append(row)
        if here["code"] != 0 or there["code"] != 0:
            wrong = ("thetau", here) if here["code"] != 0 else ("mergekit", there)
            row |= {"verdict": "fails", "reason": f"{wrong[0]}: {last(wrong[1]['printed'])}"}
            print(f"{file.stem:28} {row['reason']}", flush=True)
            continue
        left = comparing.read(out / file.stem / "ours")
        right = comparing.read(last_output(file, out / file.stem / "theirs"))
        if file.stem in DRAWN:
            base = comparing.read(models / documents(file)[0]["base_model"])
            row |= comparing.drawn(left, right, base)
        else:
            if "experts" in documents(file)[0]:
                right = replace(right, tensors=comparing.unstacked(right.tensors, left.tensors))
            apart = ("gate.weight",) if file.stem == "moe-random" else ()
            found = comparing.compare(left, right, apart, templates="chat_template" in documents(file)[0])
            if file.stem in GATES:
                rest = comparing.compare(left, right, ("gate.weight",))
                row["elsewhere"] = rest.largest
            row |= {"largest": found.largest, "worst": found.worst, "tensors": found.tensors, "differences": found.differences}
            row["verdict"] = "agrees" if found.largest <= comparing.BOUND and not found.differences else "differs"
            if row["verdict"] == "agrees" and "experts" not in documents(file)[0]:
                prints[file.stem] = comparing.fingerprint(right)
        if file.stem in REASONS:
            row["reason"] = REASONS[file.stem]
            row["verdict"] = "ours is right" if row["verdict"] == "differs" else row["verdict"]
        print(
            f"{file.stem:28} {row['verdict']:14} {row.get('largest', row.get('ratio', 0)):.2e} {row.get('differences', '')}",
            flush=True,
        )
    return rows, prints


def last(printed: str) -> str:
    """What a program ended with: the last line that names an error, else the last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception)\b", line)]
    return (named or lines or [""])[-1]


def bad(files: Sequence[Path], mergekit: str, models: Path, out: Path) -> list[dict[str, Any]]:
    """What each bad recipe gives in both programs."""
    mine = drive(sys.executable, [ours(file, out) for file in files], models)
    other = drive(mergekit, [theirs(file, out) for file in files], models)
    rows = []
    for file, here, there in zip(files, mine, other, strict=True):
        said = [line for line in here["printed"].replace(f"{BAD}/", "").splitlines() if str(out) not in line]
        rows.append(
            {
                "recipe": file.stem,
                "about": title(file),
                "code": here["code"],
                "says": "\n".join(said).strip(),
                "mergekit_code": there["code"],
                "mergekit_says": last(there["printed"]) if there["code"] != 0 or "Error:" in last(there["printed"]) else "",
                "mergekit_nonfinite": nonfinite(out / file.stem / "theirs") if there["code"] == 0 else None,
            }
        )
        print(f"{file.stem:28} {here['code']} {there['code']}", flush=True)
    return rows


def nonfinite(folder: Path) -> bool:
    """Whether an output holds NaN or infinite values."""
    from experiments.mergekit import comparing

    return any(bool((~tensor.isfinite()).any()) for tensor in comparing.read(folder).tensors.values())


def version(python: str) -> str:
    """mergekit's version."""
    ask = "import importlib.metadata as m; print(m.version('mergekit'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def everything(options: argparse.Namespace) -> None:
    """The parity table, the bad recipes and the fingerprints."""
    import numpy as np

    from experiments.mergekit import comparing
    from experiments.mergekit.models import build, build_bad

    only = set(options.only.split(",")) if options.only else None
    chosen = [sorted(file for file in folder.glob("*.yml") if only is None or file.stem in only) for folder in (RECIPES, BAD)]
    with tempfile.TemporaryDirectory() as place:
        models, out = build_bad(build(Path(place) / "models")), Path(place) / "out"
        rows, prints = parity(chosen[0], options.mergekit, models, out)
        wrong = bad(chosen[1], options.mergekit, models, out)
    if only is not None:
        return
    said = version(options.mergekit)
    result = {
        "command": "make mergekit",
        "mergekit": said,
        "bound": comparing.BOUND,
        "machine": machine(),
        "recipes": rows,
        "bad": wrong,
    }
    write_result(HERE / "parity.json", result)
    PRINTS.parent.mkdir(exist_ok=True)
    arrays: Mapping[str, Any] = {f"{name}.{part}": array for name, pair in prints.items() for part, array in pair.items()}
    np.savez_compressed(PRINTS, mergekit=np.array(said), **arrays)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", required=True, help="a Python that has mergekit")
    parser.add_argument("--only", help="recipes by name, to look at; writes nothing")
    parser.add_argument("--timing", choices=("tiny", "280m", "1.1b"), help="measure time and memory instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of the checkpoints for --timing")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipes", help="with --timing: some of its recipes")
    options = parser.parse_args()
    options.mergekit = shutil.which(options.mergekit) or options.mergekit
    if not Path(options.mergekit).is_absolute():
        options.mergekit = str(ROOT / options.mergekit)
    if options.timing:
        from experiments.mergekit.timing import measure

        measure(options)
    else:
        everything(options)


if __name__ == "__main__":
    main()
