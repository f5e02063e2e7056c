"""The doctor on the demo's models, and on a family made on purpose out of three of them.

    make demo                                # the fine-tuned models, in runs/demo
    python -m experiments.doctor.run [--run runs/doctor] [--demo runs/demo] [--data DATA/text]

With `--data` the family's continuation is a real one: the second model, fine-tuned further on another task. Without it that member is made
by arithmetic. Fails where something of the family is not found, or something is found among the demo's own models. The whole results lie in
RUN; writes experiments/doctor/results.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import thetau
from experiments.common import EXPERIMENTS, ROOT, machine, write_result
from experiments.doctor.family import TRUTH, make_family
from experiments.fisher.run import tuned_models
from thetau.checkpoint.locate import locate
from thetau.diagnostics.doctor import Doctor
from thetau.diagnostics.examine import examine
from thetau.diagnostics.examples import open_examples, with_examples
from thetau.evaluate import Evaluator
from thetau.evaluate.options import Few, Reading
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.tasks import load_task
from thetau.tasks.suite import load_suite

OUT = EXPERIMENTS / "doctor" / "results.json"
BASE = "all-MiniLM-L6-v2"
THREE = ("qnli", "clinc_domain", "dbpedia_topic")  # alpha, beta, gamma
FURTHER, STEPS = "trec", 60


def examined(models: Mapping[str, Path], out: Path) -> tuple[Doctor, float]:
    """The doctor's result, kept whole in `out`, and the processor's seconds."""
    begun = time.process_time()
    found = examine(thetau.open(BASE), opened(models), engine=thetau.Engine(workers=1))
    seconds = time.process_time() - begun
    found.save(out)
    return found, seconds


def opened(models: Mapping[str, Path]) -> list[thetau.Expression]:
    """The models under their names."""
    return [thetau.open(path, name=name) for name, path in models.items()]


def on_examples(found: Doctor, models: Mapping[str, Path], out: Path) -> tuple[Doctor, float]:
    """The result with the tasks' own examples, and the processor's seconds that these took."""
    begun = time.process_time()
    given = opened(models)
    examples = open_examples(BASE, given, list(models), few=Few(), reading=Reading(max_length=40))
    told = with_examples(found, examples, thetau.open(BASE), given, engine=thetau.Engine(workers=1))
    seconds = time.process_time() - begun
    told.save(out)
    return told, seconds


def further(beta: Path, data: Path, out: Path) -> Path:
    """The second model, fine-tuned further."""
    if not (out / "model.safetensors").exists():
        encoder = load_encoder(BASE)
        task = load_task(FURTHER, data)
        evaluator = Evaluator(encoder, [task], max_length=40)
        encoder.load(read_weights(beta), str(beta))
        settings = {**load_suite("demo").finetune, "steps": STEPS}
        finetune(encoder, task, out, FinetuneConfig.of(settings, FURTHER), base=str(beta), heads=evaluator.heads)
    return out


def short(found: Doctor, seconds: float) -> dict[str, Any]:
    """What the page shows."""
    told = found.to_json()
    return {
        "seconds": seconds,
        **{key: told[key] for key in ("compared", "staying", "best_scale", "pairs", "harms", "findings", "advice", "notes")},
        "groups": [group for group in told["groups"] if group["by"] != "kind"],
    }


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "doctor")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.run.mkdir(parents=True, exist_ok=True)
    models = tuned_models(arguments.demo, load_suite("demo").tasks)
    clean, spent = examined(models, arguments.run / "doctor-demo.json")
    if clean.findings:
        raise SystemExit(f"among the demo's models nothing is to be found. Got: {[one.sentence for one in clean.findings]}")
    with_tasks, took = on_examples(clean, models, arguments.run / "doctor-tasks.json")
    folder = arguments.run / "family"
    shutil.rmtree(folder, ignore_errors=True)
    real = further(models["clinc_domain"], arguments.data, arguments.run / "continued") if arguments.data is not None else None
    family = make_family(locate(BASE), [models[name] for name in THREE], folder, further=real)
    found, seconds = examined(family, arguments.run / "doctor-family.json")
    got = {one.kind: frozenset(one.models) for one in found.findings}
    if got != TRUTH or len(found.findings) != len(TRUTH):
        raise SystemExit(f"the family has {dict(TRUTH)}. Found: {[(one.kind, one.models) for one in found.findings]}")
    write_result(
        OUT,
        {
            "command": "make doctor",
            "machine": machine(),
            "continuation": "fine-tuned further" if real is not None else "by arithmetic",
            "demo": short(clean, spent),
            "examples": {"seconds": took, "tasks": with_tasks.to_json()["tasks"], "advice": with_tasks.to_json()["advice"]},
            "family": short(found, seconds),
        },
    )
    sys.stdout.write(f"{OUT}: all {len(TRUTH)} of the family found, none among the demo's models\n")


if __name__ == "__main__":
    main()
