"""F1, Matthews and Pearson against scikit-learn and scipy, and rows from local parquet and jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thetau.errors import DataError
from thetau.tasks.hub import read_dataset, read_parquet
from thetau.tasks.metrics import Score, f1, matthews, pearson
from thetau.tasks.rows import Split

sklearn_metrics = pytest.importorskip("sklearn.metrics")
COLUMNS = {"text": "sentence", "label": "label"}
PAIR = {"text": "question1", "text2": "question2", "label": "label"}


def drawn(n: int, classes: int, right: float = 0.7, seed: int = 0) -> tuple[list[int], list[int]]:
    """Predictions that are right as often as said, and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    guesses = np.where(random.random(n) < right, labels, random.integers(0, classes, n))
    return guesses.tolist(), labels.tolist()


# Metrics


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_scikit_learn(seed: int) -> None:
    guesses, labels = drawn(200, 2, seed=seed)
    assert f1(guesses, labels).value == sklearn_metrics.f1_score(labels, guesses)
    guesses, labels = drawn(200, 4, seed=seed)
    assert f1(guesses, labels, "macro").value == sklearn_metrics.f1_score(labels, guesses, average="macro")
    assert matthews(guesses, labels).value == sklearn_metrics.matthews_corrcoef(labels, guesses)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_formulas_of_the_resamples_are_those_of_scikit_learn(classes: int) -> None:
    from thetau.tasks.metrics import _binary_f1_of, _confusion, _f1_of, _matthews_of

    for seed in range(5):
        guesses, labels = drawn(30, classes, seed=seed)
        matrix = _confusion(guesses, labels)[None].astype(float)
        assert _f1_of(matrix)[0] == pytest.approx(sklearn_metrics.f1_score(labels, guesses, average="macro"))
        assert _matthews_of(matrix)[0] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, guesses))
        if classes == 2:
            assert _binary_f1_of(matrix)[0] == pytest.approx(sklearn_metrics.f1_score(labels, guesses))


def test_resampling_the_confusion_matrix_is_resampling_the_examples() -> None:
    guesses, labels = (np.array(numbers) for numbers in drawn(120, 2, seed=3))
    random = np.random.default_rng(1)
    values = []
    for _ in range(1000):
        chosen = random.integers(0, 120, 120)
        values.append(sklearn_metrics.f1_score(labels[chosen], guesses[chosen]))
    score = f1(guesses.tolist(), labels.tolist())
    assert (score.low, score.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=0.02)


def test_intervals_hold_the_value_repeat_and_shrink() -> None:
    few, many = f1(*drawn(50, 2)), f1(*drawn(5000, 2))
    assert few == f1(*drawn(50, 2))
    for score in (few, many):
        assert 0 <= score.low < score.value < score.high <= 1
    # About as 1 / √n, here a tenth.
    assert 6 < (few.high - few.low) / (many.high - many.low) < 16


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = matthews(*drawn(200_000, 2, seed=99)).value
    scores = [matthews(*drawn(200, 2, seed=seed)) for seed in range(200)]
    assert 0.90 <= sum(score.low <= truth <= score.high for score in scores) / 200 <= 0.99


def test_pearson_is_scipys_with_fishers_interval() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=60)
    y = x + random.normal(size=60)
    score = pearson(x.tolist(), y.tolist())
    r = np.corrcoef(x, y)[0, 1]
    half = 1.959963984540054 / math.sqrt(57)
    assert score.value == pytest.approx(r)
    assert (score.low, score.high) == pytest.approx((math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)))
    assert (score.name, score.n) == ("Pearson", 60)
    assert pearson([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]).value == pytest.approx(1)


def test_constant_predictions() -> None:
    assert matthews([0, 0, 0], [0, 1, 1]) == Score(name="Matthews", value=0.0, n=3, low=0.0, high=0.0)
    assert f1([0, 0, 0], [0, 1, 1]).value == 0
    nothing = Score(name="Pearson", value=0.0, n=4, low=0.0, high=0.0)
    assert pearson([2.5] * 4, [1.0, 2.0, 3.0, 4.0]) == nothing
    assert pearson([0.0] * 4, [1.0, 2.0, 3.0, 4.0]) == nothing
    with pytest.raises(DataError, match=r"not defined for constant labels\. Got 1\.0"):
        pearson([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert pearson([1.0, 1.0, 1.0, 1.0 + 2e-16 * 2], [1.0, 2.0, 3.0, 4.0]) == nothing, "constant up to rounding"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f1([0, 1], [0]), r"F1 needs as many predictions as labels, and at least one\. Got 2 and 1"),
        (lambda: matthews([], []), r"at least one\. Got 0 and 0"),
        (lambda: f1([0, 2], [0, 1]), r"binary F1 needs labels 0 and 1\. Got \[0, 1, 2\]; use average='macro'"),
        (lambda: f1([0, 1], [0, 0]), r"at least one example of class 1\. Got none of 2"),
        (lambda: f1([0, 1], [0, 1], "micro"), r"must be binary or macro\. Got 'micro'"),
        (lambda: matthews([0, 1], [1, 1]), r"at least two classes\. Got only 1"),
        (lambda: pearson([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), r"at least 4 examples\. Got 3"),
        (lambda: pearson([1.0, 2.0, 3.0, math.nan], [1.0, 2.0, 3.0, 4.0]), r"finite predictions\. Got NaN or Inf"),
    ],
)
def test_errors_of_metrics(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


# Rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `datasets` keeps its own copies."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.table(columns), path)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_parquet_file_is_read_by_either_function(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"sentence": ["one", "two"], "label": [1, 0], "idx": [0, 1]})
    expected = Split(texts=("one", "two"), texts2=None, labels=(1, 0))
    assert read_parquet(path, COLUMNS, ("no", "yes")) == expected
    assert read_dataset(path, None, "train", COLUMNS, labels=("no", "yes")) == expected


def test_label_names_become_numbers(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"sentence": ["one", "two"], "label": ["yes", "no"]})
    assert read_parquet(path, COLUMNS, ("no", "yes")).labels == (1, 0)


def test_regressions_keep_their_numbers(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"question1": ["a", "b", "c"], "question2": ["d", "e", "f"], "label": [0.5, 5.0, 2.2]})
    split = read_parquet(path, PAIR, None)
    assert split == Split(texts=("a", "b", "c"), texts2=("d", "e", "f"), labels=(0.5, 5.0, 2.2))
    assert len(split) == 3
    assert split.limited(3) is split
    assert split.limited(2).hash() != split.hash()
    with pytest.raises(DataError, match=r"must be at least 1\. Got 0"):
        split.limited(0)


def test_folders_of_parquet_and_of_jsonl_are_read(tmp_path: Path, cache: Path) -> None:
    expected = Split(texts=("one", "two", "three"), texts2=None, labels=(1, 0, 1))
    columns: dict[str, list[Any]] = {"sentence": ["one", "two", "three"], "label": [1, 0, 1]}
    parquet(tmp_path / "p" / "validation-00000-of-00001.parquet", columns)
    rows = [{"sentence": text, "label": label} for text, label in zip(columns["sentence"], columns["label"], strict=True)]
    file = jsonl(tmp_path / "j" / "validation.jsonl", rows)
    for source, split in ((tmp_path / "p", "validation"), (tmp_path / "j", "validation"), (file, "train")):
        assert read_dataset(source, None, split, COLUMNS, labels=("no", "yes")) == expected
    assert read_dataset(tmp_path / "p", None, "validation", COLUMNS, 2, labels=("no", "yes")) == expected.limited(2)


def test_names_of_the_data_set_must_be_those_given(tmp_path: Path, cache: Path) -> None:
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"sentence": ["one"], "label": [1]}, features=features)
    (tmp_path / "d").mkdir()
    table.to_parquet(str(tmp_path / "d" / "train.parquet"))
    assert read_dataset(tmp_path / "d", None, "train", COLUMNS, labels=("no", "yes")).labels == (1,)
    with pytest.raises(DataError, match=r"own names in its order, \['no', 'yes'\]\. Got \['yes', 'no'\]"):
        read_dataset(tmp_path / "d", None, "train", COLUMNS, labels=("yes", "no"))


def test_what_cannot_be_found_is_named(tmp_path: Path, cache: Path) -> None:
    file = jsonl(tmp_path / "j" / "train.jsonl", [{"sentence": "one", "label": 1}])
    with pytest.raises(DataError, match=r"split 'test': cannot be read .*test.*Check the name, the configuration and the split"):
        read_dataset(tmp_path / "j", None, "test", COLUMNS, labels=("no", "yes"))
    with pytest.raises(DataError, match="nobody/nothing, split 'train': cannot be read"):
        read_dataset("nobody/nothing", None, "train", COLUMNS, labels=("no", "yes"))
    with pytest.raises(DataError, match=r"nobody/nothing \(sst2\), split 'train'"):
        read_dataset("nobody/nothing", "sst2", "train", COLUMNS, labels=("no", "yes"))
    with pytest.raises(DataError, match=r"no column 'sentences'\. Known: sentence, label\. Did you mean 'sentence'"):
        read_dataset(file, None, "train", {**COLUMNS, "text": "sentences"}, labels=("no", "yes"))
    with pytest.raises(DataError, match=r"`columns` must map text, label and perhaps text2"):
        read_dataset(file, None, "train", {"sentence": "text", "label": "label"}, labels=("no", "yes"))
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read as parquet"):
        read_parquet(tmp_path / "none.parquet", COLUMNS, ("no", "yes"))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        read_parquet(tmp_path / "bad.parquet", COLUMNS, ("no", "yes"))


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("a", 2, r"row 1: the label must be an integer in 0\.\.1\. Got 2; correct the row or `labels`"),
        ("a", -1, r"Got -1; this split has no labels, choose another one"),
        ("a", None, r"Got None"),
        (" ", 1, r"row 1: texts must be given and not be blank\. Got ' '"),
        (None, 1, r"texts must be given and not be blank\. Got None"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: Any, label: Any, message: str) -> None:
    path = parquet(tmp_path / "a.parquet", {"sentence": ["good", text], "label": [0, label]})
    with pytest.raises(DataError, match=message) as caught:
        read_parquet(path, COLUMNS, ("no", "yes"))
    assert f"{path}: 1 row cannot be used" in str(caught.value)


def test_other_bad_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path / "names.parquet", {"sentence": ["a"] * 8, "label": ["yess"] * 8})
    with pytest.raises(DataError, match=r"one of no, yes\. Got 'yess'\. Did you mean 'yes'") as caught:
        read_parquet(path, COLUMNS, ("no", "yes"))
    assert "8 rows cannot be used" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    path = parquet(tmp_path / "nan.parquet", {"sentence": ["a"], "label": [math.nan]})
    with pytest.raises(DataError, match=r"must be a finite number\. Got nan"):
        read_parquet(path, COLUMNS, None)
    path = parquet(tmp_path / "empty.parquet", {"sentence": [], "label": []})
    with pytest.raises(DataError, match="at least one example"):
        read_parquet(path, COLUMNS, ("no", "yes"))
    path = parquet(tmp_path / "pair.parquet", {"question1": ["a", ""], "question2": ["", ""], "label": [0, 1]})
    with pytest.raises(DataError, match=r"1 row cannot be used\.\n  row 1"):
        read_parquet(path, PAIR, ("no", "yes"))


def test_packages_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("sklearn.metrics", "datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        f1([0, 1], [0, 1])
    with pytest.raises(
        DataError, match=r"glue \(sst2\), split 'train': reading it needs datasets\. Install it: pip install 'thetau\[data\]'"
    ):
        read_dataset("glue", "sst2", "train", COLUMNS, labels=("no", "yes"))
    with pytest.raises(DataError, match=r"a\.parquet: reading parquet needs pyarrow\. Install it: pip install 'thetau\[data\]'"):
        read_parquet(tmp_path / "a.parquet", COLUMNS, ("no", "yes"))
