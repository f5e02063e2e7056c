"""Does a vector act on its own task alone? Four kinds of vectors, each pair of three tasks, at the classifier and at the representation.

    make disentanglement       # python -m experiments.disentanglement.run [--steps 80] [--examples 64] [--points 9]

all-MiniLM-L6-v2 is fine-tuned on each task in four ways: standard, attention-only, linearised, linearised with the τJp penalty. Features are not brought
to unit length, as in the papers' code (Ortiz-Jimenez et al., <https://arxiv.org/abs/2305.12827>, Eq. 2 of the τJp paper, Fig. 6 of the attention-only
one): the head normalises. Then ξ of each pair over a grid of coefficients in [−2, 2], in the space where the vectors belong. Models stay in
runs/disentanglement and are not trained again. Writes experiments/disentanglement/results.json after each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, final

from torch import Tensor

from experiments.common import machine, write_result
from thetau.diagnostics.disentanglement import disentanglement
from thetau.evaluate import Reading, Session
from thetau.evaluate.measures import Loss, Measure
from thetau.evaluate.spaces import Reader, Space
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.tasks import load_task

OUT = Path(__file__).parent / "results.json"
BASE, TASKS, LENGTH = "all-MiniLM-L6-v2", ("clinc_domain", "hwu64_scenario", "sms_spam"), 24
KINDS: dict[str, dict[str, Any]] = {  # learning rates: those that validation chose for docs/paradigms.md
    "standard": {"paradigm": "standard", "lr": 1e-4},
    "attention-only": {"paradigm": "attention", "lr": 2e-4},
    "linear": {"paradigm": "linear", "lr": 1e-4},
    "τJp": {"paradigm": "taujp", "lr": 1e-4, "strength": 0.1},
}


@final
class Remembered:
    """A space that runs a model once for what is asked of it twice: both distances are of the same features."""

    def __init__(self, space: Space) -> None:
        self._space, self._kept = space, dict[tuple[Any, ...], Tensor]()

    def features(self, coefficients: Mapping[str, float], task: str, split: str) -> Tensor:
        """Of θ₀ + Σ α_t τ_t."""
        key = (task, split, *sorted((name, value) for name, value in coefficients.items() if value))
        if key not in self._kept:
            self._kept[key] = self._space.features(coefficients, task, split)
        return self._kept[key]

    def accuracy(self, coefficients: Mapping[str, float], task: str, split: str) -> Measure:
        """As the space has it."""
        return self._space.accuracy(coefficients, task, split)

    def accuracies(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Measure]:
        """As the space has it."""
        return self._space.accuracies(coefficients, tasks, split)

    def losses(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Loss]:
        """As the space has it."""
        return self._space.losses(coefficients, tasks, split)

    def loaded(self, coefficients: Mapping[str, float]) -> Reader:
        """As the space has it."""
        return self._space.loaded(coefficients)


def tuned(kind: str, steps: int, folder: Path) -> dict[str, Path]:
    """Task → its model of a kind, trained where it is not there yet."""
    encoder = load_encoder(BASE, raw=True)
    tasks = [load_task(name) for name in TASKS]
    config = FinetuneConfig(steps=steps, max_length=LENGTH, **KINDS[kind])
    against = tasks if config.how.penalty else []
    found = {task.name: folder / f"{kind}-{steps}" / task.name for task in tasks}
    for task in tasks:
        done = finetune(encoder, task, found[task.name], config, base=BASE, against=against)
        sys.stdout.write(f"{kind}, {task.name}: loss {done.first_loss:.3f} to {done.last_loss:.3f}, {done.seconds:.0f} s\n")
        sys.stdout.flush()
    return found


def measured(models: Mapping[str, Path], examples: int, points: int) -> dict[str, Any]:
    """ξ of each pair, both ways, and what the models and their sum can do."""
    session = Session.open(
        [str(path) for path in models.values()],
        limits={"test": examples},
        reading=Reading(max_length=LENGTH, features="raw"),
        exact=True,
    )
    grid = [round(-2 + 4 * i / (points - 1), 12) for i in range(points)]
    space = Remembered(session.space)
    pairs: dict[str, Any] = {}
    for pair in combinations(TASKS, 2):
        both: dict[str, Any] = {}
        for distance in ("disagreement", "kl"):
            found = disentanglement(space, session.evaluator, pair, grid=grid, distance=distance)
            both[distance] = {
                "inside": sum(found.inside) / len(found.inside),
                "all": sum(found.cells) / len(found.cells),
                "error": [[round(value, 5) for value in row] for row in found.error],
            }
        pairs[" and ".join(pair)] = both
    every = dict.fromkeys(TASKS, 1.0)
    return {
        "space": "tangent" if session.tangent else "weights",
        "accuracy": {
            task: {
                "base": space.accuracy({}, task, "test").value,
                "own": space.accuracy({task: 1.0}, task, "test").value,
                "sum": space.accuracy(every, task, "test").value,
            }
            for task in TASKS
        },
        "pairs": pairs,
    }


def main(steps: int, examples: int, points: int, folder: Path) -> None:
    """Each kind that the result file has not."""
    told = {"steps": steps, "examples": examples, "points": points}
    kept = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    kinds = kept["kinds"] if kept.get("settings") == told else {}
    for kind in KINDS:
        if kind in kinds:
            continue
        begun = time.perf_counter()
        models = tuned(kind, steps, folder)
        kinds[kind] = {**measured(models, examples, points), "seconds": round(time.perf_counter() - begun, 1)}
        sys.stdout.write(f"{kind}: {kinds[kind]['seconds']:.0f} s\n")
        sys.stdout.flush()
        write_result(
            OUT,
            {
                "command": "make disentanglement",
                "machine": machine(),
                "base": BASE,
                "tasks": list(TASKS),
                "features": "raw",
                "settings": told,
                "batch": FinetuneConfig().batch_size,
                "tuning": KINDS,
                "grid": [round(-2 + 4 * i / (points - 1), 12) for i in range(points)],
                "kinds": kinds,
            },
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--examples", type=int, default=64, help="of each task's test split")
    parser.add_argument("--points", type=int, default=9, help="values of each coefficient in [−2, 2]")
    parser.add_argument("--work", type=Path, default=Path("runs/disentanglement"))
    given = parser.parse_args()
    main(given.steps, given.examples, given.points, given.work)
