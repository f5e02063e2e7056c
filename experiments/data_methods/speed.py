"""What looking at data costs beside a plain pass over the same examples: ratios of the processor's seconds in one run.

    make demo
    python -m experiments.data_methods.speed [--run runs/demo]

Gram matrices against a forward pass, output gradients against a gradient of the mean loss (by one label an example, drawn from the model), Fisher
diagonals against gradients one by one (by the data's own labels), a step of AdaMerging against one forward and backward pass a task. Each is repeated
and the least time counts. AdaMerging's memory is that of a process of its own, with few tasks and with many: the most that it held at once, without
what the system maps from files. Writes experiments/data_methods/speed.json, which `page` shows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from torch import Tensor, nn

import thetau
from experiments.common import machine, timed, write_result
from experiments.fisher.run import tuned_models
from thetau.evidence import CoefficientConfig, FisherConfig, MomentConfig, fisher_sums, learn_coefficients
from thetau.evidence.adamerging import Learner
from thetau.evidence.collecting import stored_names
from thetau.evidence.layers import batched
from thetau.evidence.moments import Run
from thetau.finetune.lesson import Lesson
from thetau.models import Encoder, load_encoder
from thetau.tasks import encode, load_task, make_head
from thetau.tasks.inputs import label_tensor
from thetau.tasks.suite import load_suite

OUT = Path(__file__).parent / "speed.json"
EXAMPLES, TIMES, TASKS = 32, 3, 3
MANY = MomentConfig().examples
MOST = {"gram": 2.0, "gradients": 2.0, "fisher": 2.0, "adamerging": 1.5}  # the aims


def least(work: Callable[[], object]) -> float:
    """The processor's seconds, the least of several."""
    found = []
    for _ in range(TIMES):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """The demo's encoder, and what its first tasks bring."""

    encoder: Encoder
    lessons: list[Lesson]
    long: Lesson  # the first task, with more examples

    @property
    def module(self) -> nn.Module:
        """In evaluation mode."""
        return self.encoder.module.eval()

    def forward(self) -> None:
        """Over the first task's examples."""
        with torch.no_grad():
            for batch in self.batches():
                self.module(**self.long.inputs.batch(batch))

    def gradients(self, lessons: Sequence[tuple[Lesson, list[int]]]) -> None:
        """A gradient of the mean loss of each of some examples of a task."""
        for lesson, indices in lessons:
            self.module.zero_grad()
            labels = label_tensor([lesson.inputs.labels[index] for index in indices])
            lesson.head.loss(self.module(**lesson.inputs.batch(indices)), labels).backward()  # type: ignore[no-untyped-call]

    def batches(self) -> list[list[int]]:
        """As a collection has them."""
        return batched(self.long.inputs.lengths, EXAMPLES)

    def collected(self) -> dict[str, tuple[str, float, float]]:
        """Row → what it stands beside, its seconds, and those of the other."""
        few, live = self.lessons[0], list(stored_names(self.encoder))
        gram = MomentConfig(examples=MANY, batch=EXAMPLES)
        drawn = MomentConfig(examples=MANY, batch=EXAMPLES, labels="sampled")
        fisher = FisherConfig(examples=EXAMPLES, labels="empirical")
        plain = {
            f"a forward pass, {MANY} examples": least(self.forward),
            f"a gradient, {MANY} examples": least(lambda: self.gradients([(self.long, batch) for batch in self.batches()])),
            f"gradients one by one, {EXAMPLES} examples": least(
                lambda: self.gradients([(few, [index]) for index in range(EXAMPLES)])
            ),
        }
        taken = {
            "gram": least(lambda: Run(self.encoder, self.long.inputs, gram).finish(None, None)),
            "gradients": least(lambda: Run(self.encoder, self.long.inputs, drawn, head=self.long.head).finish(None, None)),
            "fisher": least(lambda: fisher_sums(self.module, few.inputs, few.head, live, fisher)),
        }
        return {name: (beside, seconds, plain[beside]) for (name, seconds), beside in zip(taken.items(), plain, strict=True)}

    def step(self, vectors: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, float, float]:
        """AdaMerging's."""
        learner = Learner(self.module, self.lessons, vectors, CoefficientConfig(batch=EXAMPLES, steps=1))
        taken = least(learner.advance)
        plain = least(lambda: self.gradients([(lesson, list(range(EXAMPLES))) for lesson in self.lessons]))
        return f"a forward and a backward pass a task, {TASKS} tasks of {EXAMPLES} examples", taken, plain


def held(run: Path, count: int) -> float:
    """The anonymous memory, in MB, of a process that learns the coefficients of so many tasks."""
    with TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "experiments.data_methods.speed", "--run", str(run), "--learn", str(count)]
        return round(1000 * timed(words, Path(folder) / "out")[1], 1)


def learn(run: Path, count: int) -> None:
    """Two steps of AdaMerging on so many tasks."""
    torch.set_num_threads(1)
    suite = load_suite("demo")
    encoder, names = load_encoder(suite.backbone), suite.tasks[:count]
    base = thetau.open(encoder.folder)
    models = tuned_models(run, suite.tasks)
    vectors = {name: (thetau.open(models[name]) - base).named(name) for name in names}
    config = CoefficientConfig(steps=2, batch=8, examples=8, max_length=suite.limits.max_length)
    with TemporaryDirectory() as folder:
        tasks = {name: load_task(name) for name in names}
        learn_coefficients(encoder, tasks, vectors, Path(folder) / "out", config, engine=thetau.Engine(workers=1))


def main(run: Path) -> None:
    """All of it."""
    torch.set_num_threads(1)
    suite = load_suite("demo")
    encoder = load_encoder(suite.backbone)

    def lesson(name: str, examples: int) -> Lesson:
        task = load_task(name)
        inputs = encode(encoder, task, "train", max_length=suite.limits.max_length, limit=examples)
        return Lesson(name=name, inputs=inputs, head=make_head(encoder, task))

    names = suite.tasks[:TASKS]
    bench = Bench(encoder=encoder, lessons=[lesson(name, EXAMPLES) for name in names], long=lesson(names[0], MANY))
    found = bench.collected()
    base = thetau.open(encoder.folder)
    models = tuned_models(run, suite.tasks)
    stored = {known: live for live, all_names in stored_names(encoder).items() for known in all_names}
    vectors = {
        name: {stored[key]: tau for key, tau in (thetau.open(models[name]) - base).state_dict().items() if key in stored}
        for name in names
    }
    found["adamerging"] = bench.step(vectors)
    rows = {
        name: {"beside": beside, "seconds": taken, "plain seconds": plain, "ratio": taken / plain, "most": MOST[name]}
        for name, (beside, taken, plain) in found.items()
    }
    memory = {str(count): held(run, count) for count in (2, len(suite.tasks))}
    about = {"task": names[0], "backbone": suite.backbone, "times": TIMES, "machine": machine(), "memory": memory, "rows": rows}
    write_result(OUT, {"command": "python -m experiments.data_methods.speed", **about})
    for name, row in rows.items():
        sys.stdout.write(f"{name}: {row['ratio']:.2f} of {row['beside']}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--learn", type=int)
    given = parser.parse_args()
    if given.learn:
        learn(given.run, given.learn)
    else:
        main(given.run)
