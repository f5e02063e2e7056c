"""Which likeness of task vectors gives clusters that mean something, and clusters that help.

    python -m experiments.similarity.run --data DATA/text --run runs/similarity

Every task of the folder is learnt twice, with two seeds. Asked of each likeness (|cosine| as in the paper, cosine around the mean; over all tensors, or of
one kind alone; the gaps of the unnormalised or the normalised Laplacian):

- `found`: the two seeds of a task are two vectors of one thing. Does the spectrum say k = T, and do T clusters put the pairs together (adjusted Rand)?
- `stable`: do the two seeds give the same clusters of tasks, for each k (adjusted Rand, mean over k)?
- `natural`: how far the clusters of one seed agree with families named beforehand.
- `helps`: mean inside and outside, nothing tuned: the lead of its k clusters over five random partitions of equal k, by task, in points.

Models, and each likeness's figures, are kept in the run's folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import thetau
from experiments.common import EXPERIMENTS, machine, write_result
from thetau import methods
from thetau.bases import Similarity, cluster, random_partition, similarities, spectrum
from thetau.bases.cluster import Laplacian, agreement
from thetau.evaluate.evaluator import Evaluator
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.studies.partitions import Bench, value_of_partition
from thetau.studies.verdicts import judge
from thetau.tasks import load_task

RESULTS = EXPERIMENTS / "similarity" / "results.json"
FAMILIES = {
    "sentiment": ("cr", "mr", "sst2"),
    "pairs": ("mrpc", "qnli", "rte"),
    "intent": ("banking77", "clinc_domain", "hwu64_scenario"),
    "topic": ("ag_news", "dbpedia_topic"),
    "tweets": ("tweet_emotion", "tweet_offensive"),
    "others": ("sms_spam", "subj", "trec"),
}
KINDS: dict[str, tuple[str, ...]] = {  # what is left out
    "all": (),
    "attention": ("embeddings.*", "*.intermediate.*", "encoder.layer.*.output.dense.*", "*LayerNorm*"),
    "mlp": ("embeddings.*", "*.attention.*", "*LayerNorm*"),
    "embeddings": ("encoder.*",),
    "norms and biases": ("*.dense.weight", "*.query.weight", "*.key.weight", "*.value.weight", "*_embeddings.weight"),
}
DRAWN = 5


def trained(
    tasks: Sequence[str], seeds: Sequence[int], data: Path | None, run: Path, config: Mapping[str, Any]
) -> tuple[Any, Any, dict[tuple[str, int], Path]]:
    """The encoder, an evaluator of the tasks, and (task, seed) → its model."""
    encoder = load_encoder("all-MiniLM-L6-v2")
    loaded = [load_task(name, data) for name in tasks]
    evaluator = Evaluator(
        encoder, loaded, limits={"validation": 20, "test": 100}, max_length=config["max_length"], cache=run / "cache"
    )
    models = {}
    for seed in seeds:
        for task in loaded:
            out = run / "finetuned" / task.name / str(seed)
            evaluator.load_base()
            made = FinetuneConfig.of({**config, "seed": seed}, task.name)
            finetune(encoder, task, out, made, base="all-MiniLM-L6-v2", heads=evaluator.heads)
            models[task.name, seed] = out
            print(task.name, seed, flush=True)
    return encoder, evaluator, models


def labels(similarity: Similarity, k: int, centred: bool) -> dict[str, str]:
    """Task → cluster, opposed vectors left together, so that there are k."""
    return cluster(similarity, k, opposed=None, centred=centred).label()


def of_seed(whole: Similarity, tasks: Sequence[str], seed: int) -> Similarity:
    """The part of one seed, under the tasks' own names."""
    names = sorted(tasks)
    part = whole.of([f"{task}@{seed}" for task in names])
    return Similarity(names=tuple(names), gram=part.gram)


def row(
    whole: Similarity, tasks: Sequence[str], seeds: Sequence[int], *, kind: str, centred: bool, laplacian: Laplacian
) -> dict[str, Any]:
    """What a likeness gives."""
    count = len(tasks)
    pairs = {f"{task}@{seed}": task for task in tasks for seed in seeds}
    families = {task: family for family, members in FAMILIES.items() for task in members if task in tasks}
    gaps = spectrum(whole, centred=centred, laplacian=laplacian).gaps
    halves = [of_seed(whole, tasks, seed) for seed in seeds]
    sizes = range(2, count - 1)
    cosine = (whole.centred() if centred else whole).cosine
    same = [float(cosine[whole.names.index(f"{task}@{seeds[0]}"), whole.names.index(f"{task}@{seeds[1]}")]) for task in tasks]
    other = [float(cosine[i, j]) for i, a in enumerate(whole.names) for j, b in enumerate(whole.names) if pairs[a] < pairs[b]]
    return {
        "kind": kind,
        "centred": centred,
        "laplacian": laplacian,
        "cosine_of_seeds": mean(same),
        "cosine_of_tasks": mean(map(abs, other)),
        "k_of_pairs": 1 + max(range(len(gaps)), key=lambda i: gaps[i]),
        "found": agreement(labels(whole, count, centred), pairs),
        "k": [cluster(half, opposed=None, centred=centred, laplacian=laplacian).k for half in halves],
        "stable": mean(agreement(*(labels(half, k, centred) for half in halves)) for k in sizes),
        "natural": mean(agreement(labels(half, len(set(families.values())), centred), families) for half in halves),
    }


def helps(
    bench: Bench, half: Similarity, sizes: Sequence[int], centred: bool, random: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """The lead of its clusters over random ones, averaged over k within the task."""
    leads: dict[str, list[float]] = {task: [] for task in half.names}
    for k in sizes:
        found = value_of_partition(bench, cluster(half, k, opposed=None, centred=centred).groups).addition.one_shot.accuracy
        for task, one in found.items():
            leads[task].append(100 * (one.value - random[k][task]))
    return {
        "verdict": str(judge({task: [mean(values)] for task, values in leads.items()})),
        "by_task": {t: mean(v) for t, v in leads.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/similarity"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sizes", default="5", help="k whose clusters are evaluated")
    parser.add_argument("--tasks", default=",".join(task for members in FAMILIES.values() for task in members))
    parser.add_argument("--no-accuracy", action="store_true", help="leave `helps` out: no model is evaluated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks, seeds, sizes = sorted(given.tasks.split(",")), (0, 1), [int(k) for k in given.sizes.split(",")]
    config = {"steps": given.steps, "batch_size": given.batch_size, "lr": 1e-4, "max_length": 32}
    encoder, evaluator, models = trained(tasks, seeds, given.data, given.run, config)
    base = thetau.open(encoder.folder)
    vectors = {f"{task}@{seed}": (thetau.open(path) - base).named(f"{task}@{seed}") for (task, seed), path in models.items()}
    first = {task: (thetau.open(models[task, 0]) - base).named(task) for task in tasks}
    bench = Bench(
        evaluator,
        encoder.weights(),
        first,
        inner=methods.Average(),
        outer=methods.Average(),
        grid=(1.0,),
        run=given.run / "bench",
    )
    random: dict[int, dict[str, float]] = {}
    for k in [] if given.no_accuracy else sizes:
        drawn = [
            value_of_partition(bench, random_partition(tasks, k, seed).groups).addition.one_shot.accuracy for seed in range(DRAWN)
        ]
        random[k] = {task: mean(one[task].value for one in drawn) for task in tasks}
        print("random", k, mean(random[k].values()), flush=True)
    rows = []
    for kind, exclude in KINDS.items():
        whole = similarities(vectors, exclude=exclude)
        for centred in (False, True):
            help_of = (
                {"verdict": "no verdict: not measured", "by_task": {}}
                if given.no_accuracy
                else helps(bench, of_seed(whole, tasks, 0), sizes, centred, random)
            )
            for laplacian in ("unnormalised", "normalised"):
                found = row(whole, tasks, seeds, kind=kind, centred=centred, laplacian=laplacian)  # type: ignore[arg-type]
                rows.append({**found, "helps": help_of["verdict"], "helps_by_task": help_of["by_task"]})
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    write_result(
        given.out,
        {
            "command": "make similarity DATA=…",
            "machine": machine(),
            "setting": {**config, "tasks": tasks, "seeds": list(seeds), "sizes": sizes, "random partitions": DRAWN, "test": 100},
            "random": {str(k): mean(values.values()) for k, values in random.items()},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
