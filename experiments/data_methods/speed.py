"""What looking at data costs beside a plain pass over the same examples: ratios of the processor's seconds in one run.

    make demo
    python -m experiments.data_methods.speed [--run runs/demo]

Gram matrices against a forward pass, output gradients and Fisher diagonals against a gradient of the mean loss (Fisher by the data's own labels, one
backward pass an example, as a loop of such passes has it), a step of AdaMerging against one forward and backward pass a task.
Each is repeated and the least time counts. Writes experiments/data_methods/speed.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import thetau
from experiments.common import machine, write_result
from experiments.fisher.run import tuned_models
from thetau.evidence import CoefficientConfig, FisherConfig, MomentConfig, fisher_sums
from thetau.evidence.adamerging import Learner
from thetau.evidence.collecting import stored_names
from thetau.evidence.layers import batched
from thetau.evidence.moments import Run
from thetau.finetune.lesson import Lesson
from thetau.models import load_encoder
from thetau.tasks import encode, load_task, make_head
from thetau.tasks.inputs import label_tensor
from thetau.tasks.suite import load_suite

OUT = Path(__file__).parent / "speed.json"
EXAMPLES, TIMES, TASKS = 32, 3, 3


def least(work: Callable[[], object]) -> float:
    """The processor's seconds, the least of several."""
    found = []
    for _ in range(TIMES):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def main(run: Path) -> None:
    """All of it."""
    torch.set_num_threads(1)
    suite = load_suite("demo")
    encoder = load_encoder(suite.backbone)
    names = suite.tasks[:TASKS]
    lessons = []
    for name in names:
        task = load_task(name)
        inputs = encode(encoder, task, "validation", max_length=suite.limits.max_length, limit=EXAMPLES)
        lessons.append(Lesson(name=name, inputs=inputs, head=make_head(encoder, task)))
    first, module = lessons[0], encoder.module.eval()
    batches = batched(first.inputs.lengths, EXAMPLES)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                module(**first.inputs.batch(batch))

    def backward(lesson: Lesson, indices: list[int]) -> None:
        module.zero_grad()
        labels = label_tensor([lesson.inputs.labels[index] for index in indices])
        lesson.head.loss(module(**lesson.inputs.batch(indices)), labels).backward()  # type: ignore[no-untyped-call]

    def one_by_one() -> None:
        for index in range(EXAMPLES):
            backward(first, [index])

    config = MomentConfig(examples=EXAMPLES, batch=EXAMPLES)
    live = list(stored_names(encoder))
    rows = {}
    plain = {"forward": least(forward), "gradients one by one": least(one_by_one)}
    gram = Run(encoder, first.inputs, config)
    fisher = FisherConfig(examples=EXAMPLES, labels="empirical")
    taken = {
        "gram": least(lambda: gram.finish(None, None)),
        "fisher, empirical": least(lambda: fisher_sums(module, first.inputs, first.head, live, fisher)),
    }
    for name, beside in (("gram", "forward"), ("fisher, empirical", "gradients one by one")):
        rows[name] = {
            "beside": beside,
            "seconds": taken[name],
            "plain seconds": plain[beside],
            "ratio": taken[name] / plain[beside],
        }
    base = thetau.open(encoder.folder)
    models = tuned_models(run, suite.tasks)
    stored = {known: live for live, all_names in stored_names(encoder).items() for known in all_names}
    vectors = {
        name: {stored[key]: tau for key, tau in (thetau.open(models[name]) - base).state_dict().items() if key in stored}
        for name in names
    }
    learner = Learner(module, lessons, vectors, CoefficientConfig(batch=EXAMPLES, steps=1))
    step = least(learner.advance)
    both = least(lambda: [backward(lesson, list(range(EXAMPLES))) for lesson in lessons])
    rows["adamerging, a step"] = {"beside": "forward and backward", "seconds": step, "plain seconds": both, "ratio": step / both}
    about = {"examples": EXAMPLES, "tasks": TASKS, "times": TIMES, "machine": machine(), "rows": rows}
    write_result(OUT, {"command": "python -m experiments.data_methods.speed", **about})
    for name, row in rows.items():
        sys.stdout.write(f"{name}: {row['ratio']:.2f} of {row['beside']}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    main(parser.parse_args().run)
