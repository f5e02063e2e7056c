"""Data sets of the hub as they lie there: GLUE's eight configurations as parquet files, written from its card and not from thetau's descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("sun", "rain", "cat", "dog", "bright", "wet", "fluffy", "dry", "day", "street")
TWO = ("train", "validation", "test")
MNLI = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")

# configuration: columns of text, class names (None for a number), splits
GLUE: dict[str, tuple[tuple[str, ...], list[str] | None, tuple[str, ...]]] = {
    "cola": (("sentence",), ["unacceptable", "acceptable"], TWO),
    "sst2": (("sentence",), ["negative", "positive"], TWO),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"], TWO),
    "stsb": (("sentence1", "sentence2"), None, TWO),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"], TWO),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"], MNLI),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"], TWO),
    "rte": (("sentence1", "sentence2"), ["entailment", "not_entailment"], TWO),
}
COUNTS = {"train": 40}


def sentence(config: str, column: str, split: str, row: int) -> str:
    """A text that tells where it stands, in a few words."""
    seed = sum(map(ord, config + column + split)) + 7 * row
    return " ".join(WORDS[(seed * (place + 3)) % len(WORDS)] for place in range(3 + row % 3))


def labels_of(config: str, split: str, count: int) -> list[float] | list[int]:
    """Those of the test splits are not public: −1."""
    names = GLUE[config][1]
    if split.startswith("test"):
        return [-1] * count
    return [row % 6 * 0.9 for row in range(count)] if names is None else [row % len(names) for row in range(count)]


def write_glue(root: Path) -> Path:
    """`nyu-mll/glue` under `root`, each split of each configuration one parquet file, as its README.md lists them."""
    import datasets

    folder = root / "nyu-mll" / "glue"
    listing = []
    for config, (columns, names, splits) in GLUE.items():
        label: Any = datasets.Value("float32") if names is None else datasets.ClassLabel(names=names)
        kinds = {**dict.fromkeys(columns, datasets.Value("string")), "label": label, "idx": datasets.Value("int32")}
        listing.append(f"- config_name: {config}\n  data_files:")
        (folder / config).mkdir(parents=True)
        for split in splits:
            count = COUNTS.get(split, 12)
            content: dict[str, Any] = {
                column: [sentence(config, column, split, row) for row in range(count)] for column in columns
            }
            content |= {"label": labels_of(config, split, count), "idx": list(range(count))}
            datasets.Dataset.from_dict(content, features=datasets.Features(kinds)).to_parquet(
                folder / config / f"{split}-00000-of-00001.parquet"
            )
            listing.append(f"  - split: {split}\n    path: {config}/{split}-*")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(listing) + "\n---\n", encoding="utf-8")
    return root
