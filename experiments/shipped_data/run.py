"""Make the small tasks that ship with thetau from larger folders of the same format.

    python -m experiments.shipped_data.run SOURCE [TASK...] [--out src/thetau/tasks/data]

Keeps the share of each class, picks by the digest of the text (no generator, so any machine makes the same files), keeps the
order of the source and writes gzip without a time stamp. Only tasks listed in `NOTICES` are taken: their licence allows it, and
the notice that it asks for goes beside the data.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.common import ROOT

SIZES = {"train": 2000, "validation": 200, "test": 500}
CHANGES = "Changes: cut to a small stratified extract, converted to JSON lines, duplicates removed (see meta.json)."
NOTICES = {
    "banking77": """BANKING77: customers' questions to a bank, by intent.
Iñigo Casanueva, Tadas Temčinas, Daniela Gerz, Matthew Henderson, Ivan Vulić: Efficient Intent Detection with Dual Sentence Encoders.
NLP4ConvAI 2020. https://github.com/PolyAI-LDN/task-specific-datasets
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/legalcode
""",
    "hwu64_scenario": """NLU Evaluation Data (HWU64): requests to a home assistant, by scenario.
Xingkun Liu, Arash Eshghi, Pawel Swietojanski, Verena Rieser: Benchmarking Natural Language Understanding Services for building
Conversational Agents. IWSDS 2019. https://github.com/xliuhw/NLU-Evaluation-Data
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/legalcode
Changes to the labels: an intent's label is replaced by the scenario that it belongs to.
""",
    "dbpedia_topic": """Abstracts of Wikipedia articles, through DBpedia, by the kind of thing that they describe.
The contributors of Wikipedia and DBpedia. https://www.dbpedia.org
Licence: Creative Commons Attribution-ShareAlike 3.0 Unported (CC BY-SA 3.0), https://creativecommons.org/licenses/by-sa/3.0/legalcode
This extract is under the same licence. Changes to the labels: classes of the ontology are grouped in twelve topics; texts are cut to 60 words.
""",
    "clinc_domain": """CLINC150 (oos-eval), the domains of its in-scope queries.
Stefan Larson, Anish Mahendran, Joseph J. Peper, Christopher Clarke, Andrew Lee, Parker Hill, Jonathan K. Kummerfeld, Kevin Leach,
Michael A. Laurenzano, Lingjia Tang, Jason Mars:
An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction. EMNLP 2019. https://github.com/clinc/oos-eval
Licence: Creative Commons Attribution 3.0 Unported (CC BY 3.0), https://creativecommons.org/licenses/by/3.0/legalcode
Changes to the labels: an intent's label is replaced by the domain that it belongs to.
""",
    "sms_spam": """SMS Spam Collection v.1.
Tiago A. Almeida, José María Gómez Hidalgo: SMS Spam Collection. UCI Machine Learning Repository, 2011. https://doi.org/10.24432/C5CC84
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/legalcode
""",
    "qnli": """Question NLI of the GLUE benchmark, derived from the Stanford Question Answering Dataset (SQuAD 1.1),
whose passages are from Wikipedia.
Alex Wang, Amanpreet Singh, Julian Michael, Felix Hill, Omer Levy, Samuel R. Bowman: GLUE. ICLR 2019. https://gluebenchmark.com
Pranav Rajpurkar, Jian Zhang, Konstantin Lopyrev, Percy Liang: SQuAD. EMNLP 2016. https://rajpurkar.github.io/SQuAD-explorer/
Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0), https://creativecommons.org/licenses/by-sa/4.0/legalcode
This extract is under the same licence.
""",
}


def quotas(counts: dict[int, int], size: int) -> dict[int, int]:
    """How many examples of each class to keep: proportional, largest remainders first, `size` in all when there are as many."""
    total = sum(counts.values())
    size = min(size, total)
    exact = {label: size * count / total for label, count in counts.items()}
    kept = {label: int(share) for label, share in exact.items()}
    for label in sorted(counts, key=lambda label: (kept[label] - exact[label], label))[: size - sum(kept.values())]:
        kept[label] += 1
    return kept


def extract(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """A stratified part of `rows`, in their order."""
    by_label: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_label[row["label"]].append(index)
    keep: set[int] = set()
    for label, quota in quotas({label: len(indices) for label, indices in by_label.items()}, size).items():
        ranked = sorted(by_label[label], key=lambda i: hashlib.sha256(json.dumps(rows[i], sort_keys=True).encode()).digest())
        keep.update(ranked[:quota])
    return [rows[i] for i in sorted(keep)]


def ship(source: Path, out: Path) -> None:
    """Write the extract of one task with its `meta.json` and `LICENSE`."""
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, size in SIZES.items():
        with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = extract([json.loads(line) for line in file], size)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        splits[split] = {
            "examples": len(rows),
            "per_label": [sum(r["label"] == i for r in rows) for i in range(len(meta["labels"]))],
        }
    kept = {key: meta[key] for key in ("task", "kind", "labels", "source", "files", "protocol", "licence") if key in meta}
    extent = ", ".join(f"{split} {facts['examples']}" for split, facts in splits.items())
    kept |= {"splits": splits, "extract": f"stratified extract by experiments/shipped_data/run.py: {extent}"}
    (out / "meta.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "LICENSE").write_text(NOTICES[meta["task"]] + CHANGES + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and ship each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that holds the task folders")
    parser.add_argument("tasks", nargs="*", default=sorted(NOTICES), help="names, all of NOTICES by default")
    parser.add_argument("--out", type=Path, default=ROOT / "src/thetau/tasks/data")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        if task not in NOTICES:
            parser.error(
                f"{task}: no notice in NOTICES; add its attribution and licence first. Known: {', '.join(sorted(NOTICES))}"
            )
        ship(arguments.source / task, arguments.out / task)
        size = sum(path.stat().st_size for path in (arguments.out / task).iterdir())
        print(f"{task}: {size / 1024:.0f} KiB in {arguments.out / task}")


if __name__ == "__main__":
    main()
