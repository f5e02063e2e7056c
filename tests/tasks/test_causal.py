"""Tasks of causal models: their descriptions, what is put to the model, how what it says is judged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from thetau.errors import DataError
from thetau.models import Encoder, load_encoder
from thetau.tasks import load_task
from thetau.tasks.causal.answers import before_stop, extracted, normalised
from thetau.tasks.causal.encode import CausalInputs, windows
from thetau.tasks.encoding import encode, encode_causal
from tiny import make_model, make_task
from tiny_causal import ROWS, causal_task, hugging_face, talker


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(talker(tmp_path_factory.mktemp("model") / "m"))


def inputs(encoder: Encoder, folder: Path, **options: Any) -> CausalInputs:
    return encode_causal(encoder, load_task(folder), "test", **{"max_length": 64, **options})


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("He has 3 + 4 = 7 left.\n#### 7", "gsm8k", "7"),
        ("#### 1,234.50 dollars, not 5", "gsm8k", "1234.5"),
        ("#### $-18", "gsm8k", "-18"),
        ("That makes 12 and then 0.50", "gsm8k", "0.5"),
        ("so $1,000,000.", "last_number", "1000000"),
        ("from 3 to -4.0!", "last_number", "-4"),
        ("no number here", "last_number", None),
        ("#### none", "gsm8k", None),
        ("The answer is (C), not (D).", r"\(([A-D])\)", "C"),
        ("yes\nno", "y.*o", "yes\nno"),
        ("maybe", r"(yes|no)", None),
        (" all of it ", None, " all of it "),
        ("007", "last_number", "7"),
    ],
)
def test_extraction(text: str, how: str | None, answer: str | None) -> None:
    assert extracted(text, how) == answer


def test_stops_and_normalisation() -> None:
    assert before_stop("a. b! c", ["!", "."]) == "a"
    assert before_stop("abc", ["x"]) == "abc"
    assert normalised("  The  Cat, an Apple. ", []) == "The Cat, an Apple."
    assert normalised("  The  Cat, an Apple. ", ["case", "punctuation", "articles"]) == "cat apple"


def test_what_is_put_to_the_model(encoder: Encoder, tmp_path: Path) -> None:
    _, words = hugging_face(encoder.folder)
    plain = inputs(encoder, causal_task(tmp_path, name="plain"))
    assert plain.taught[0] == (
        tuple(words("the cat is")["input_ids"]),
        tuple(words("meow purr")["input_ids"] + [words.eos_token_id]),
    )
    few = inputs(encoder, causal_task(tmp_path, name="few", shots=2, separator=" . ", joint=" about "))
    prompt = "the cat is about meow purr . the dog is about bark . the rain is"
    assert few.taught[3][0] == tuple(words(prompt)["input_ids"])
    chat = inputs(encoder, causal_task(tmp_path, name="chat", chat=True, system="same", shots=1))
    turns = [
        *({"role": "system", "content": "same"}, {"role": "user", "content": "the cat is"}),
        *({"role": "assistant", "content": "meow purr"}, {"role": "user", "content": "the dog is"}),
    ]
    expected = words.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert chat.taught[1] == (tuple(expected), (*words("bark")["input_ids"], words.eos_token_id)), (
        "an answer ends as the template ends it"
    )


def test_what_is_generated_from_does_not_know_the_answer(encoder: Encoder, tmp_path: Path) -> None:
    """Where a tokenizer joins the prompt's end with the answer, what is scored begins earlier; what is generated from does not."""
    _, words = hugging_face(encoder.folder)
    found = inputs(encoder, causal_task(tmp_path, joint=""))
    assert found.prompts[1] == tuple(words("the dog is")["input_ids"])
    assert found.taught[1] == (tuple(words("the dog")["input_ids"]), (words.unk_token_id, words.eos_token_id)), "'isbark'"


def test_talks(encoder: Encoder, tmp_path: Path) -> None:
    _, words = hugging_face(encoder.folder)
    talk = [("system", "same"), ("user", "the cat"), ("assistant", "meow"), ("user", "the dog"), ("assistant", "bark .")]
    turns = [{"role": role, "content": content} for role, content in talk]
    found = inputs(
        encoder, causal_task(tmp_path, [{"messages": turns}], prompt=None, turns="messages", chat=True, system="other")
    )
    assert len(found) == 2
    for example, end in ((0, 2), (1, 4)):
        prompt = words.apply_chat_template(turns[:end], add_generation_prompt=True)["input_ids"]
        assert found.taught[example] == (tuple(prompt), (*words(turns[end]["content"])["input_ids"], words.eos_token_id))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "`messages` must be a list of turns with a `role` and a `content` that is not blank. Got 'hello'."),
        ([{"role": "user", "content": " "}], "must be a list of turns with a `role` and a `content`"),
        ([{"role": "assistant", "content": "a"}], "turn 1 is the assistant's and must follow one of the user's"),
        ([{"role": "user", "content": "a"}], "`messages` has no turn of the assistant's"),
    ],
)
def test_bad_talks(encoder: Encoder, tmp_path: Path, turns: Any, message: str) -> None:
    folder = causal_task(tmp_path, [{"messages": turns}], prompt=None, turns="messages", chat=True)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        inputs(encoder, folder)
    assert "test.jsonl: line 1" in str(caught.value)


def test_choices(encoder: Encoder, tmp_path: Path) -> None:
    rows = [
        {"word": "cat", "options": ["bark", "meow purr"], "right": 1},
        {"word": "dog", "options": ["bark", "wet", "dry"], "right": "bark"},
    ]
    found = inputs(encoder, causal_task(tmp_path, rows, kind="choices", choices="options", label="right", length="bytes"))
    assert [len(pieces) for pieces in found.pieces] == [2, 3]
    assert found.labels == (1, 0)
    assert found.units == ((4, 9), (4, 3, 3))
    fixed = [{"word": word, "label": number} for number, word in enumerate(("cat", "dog"))]
    found = inputs(encoder, causal_task(tmp_path, fixed, name="fixed", kind="choices", choices=["meow {word}", "bark"]))
    assert found.questions[0].answers == ("meow cat", "bark")
    assert found.labels == (0, 1)


def test_windows_score_each_token_once() -> None:
    tokens = tuple(range(10, 21))
    made = windows((1,), tokens, 4)
    assert [token for _, answer in made for token in answer] == list(tokens)
    assert all(len(before) + len(after) <= 4 for before, after in made)
    assert made[0] == ((1,), (10, 11, 12))
    assert made[1] == ((12,), (13, 14, 15))
    assert windows((1,), (5,), 4) == (((1,), (5,)),)


def test_what_does_not_fit_is_counted(encoder: Encoder, tmp_path: Path) -> None:
    rows = [*ROWS, {"word": "cat " * 70, "answer": "meow"}]
    assert inputs(encoder, causal_task(tmp_path, rows)).too_long == (False,) * 4 + (True,)
    with pytest.raises(
        DataError, match=r"a prompt of 72 tokens leaves nothing of `max_length` for its answer: 'the cat .*Got 64; raise it"
    ):
        _ = inputs(encoder, tmp_path / "sounds").truncated
    assert inputs(encoder, causal_task(tmp_path, name="short"), max_length=4).truncated == 4


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"prompt": None}, "`prompt` is needed: a template"),
        ({"promt": "x"}, "unknown key 'promt' for kind generation. Did you mean 'prompt'?"),
        ({"kind": "choices"}, "`choices` must be a list of at least two answers, or the column that lists them. Got None."),
        ({"kind": "choices", "choices": ["a", "a"]}, "`choices` must be different. Got ['a', 'a']."),
        ({"extract": "("}, "`extract` must be last_number, gsm8k or a regular expression. Got '('"),
        ({"stop": "x"}, "`stop` must be a list of texts that are not empty. Got 'x'."),
        ({"normalise": ["spaces"]}, "`normalise` must be a list of case, punctuation, articles. Got ['spaces']."),
        ({"system": "x"}, "`system` is said in chats: set `chat` to true, or write it into `prompt`."),
        ({"shots": -1}, "`shots` must be an integer of at least 0. Got -1."),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1. Got 0."),
        ({"chat": "yes"}, "`chat` must be true or false. Got 'yes'."),
        ({"kind": "perplexity", "prompt": None, "unit": "line"}, "`unit` must be one of token, word, byte. Got 'line'."),
        ({"answer": 3}, "`answer` must be a text. Got 3."),
        ({"hub": {"name": "x", "columns": {"text": "y"}}}, "`hub` needs no `columns` and `class_names` here"),
        (
            {"turns": "messages", "prompt": None, "chat": True, "shots": 2},
            "`shots` has no place beside `turns`: leave one of them out.",
        ),
        (
            {"turns": "messages"},
            "`turns` are those of a chat: set `chat` to true. `prompt` has no place beside `turns`: leave one of them out.",
        ),
    ],
)
def test_bad_descriptions(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_task(causal_task(tmp_path, **meta))
    assert "meta.json" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "meta", "message"),
    [
        ({"wrod": "cat", "answer": "x"}, {}, "line 1: has no column 'word'. It has wrod, answer. Did you mean 'wrod'?"),
        (
            {"word": None, "answer": "x"},
            {},
            "line 1: `word` must be a text or a number for the template 'the {word} is'. Got None.",
        ),
        ({"word": "cat", "answer": " "}, {}, "line 1: '{answer}' gives a blank text. Correct the row or drop it."),
        (
            {"word": "cat", "label": 2},
            {"kind": "choices", "choices": ["a", "b"]},
            "line 1: `label` must be the number of the right choice, in 0..1, or its text. Got 2; correct the row.",
        ),
        (
            {"word": "cat", "label": 0, "options": ["a"]},
            {"kind": "choices", "choices": "options"},
            "`options` must be a list of at least two texts. Got ['a']; correct the row.",
        ),
    ],
)
def test_bad_rows(encoder: Encoder, tmp_path: Path, row: dict[str, Any], meta: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        inputs(encoder, causal_task(tmp_path, [row], **meta))
    assert "test.jsonl" in str(caught.value)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    """Where a tokenizer has no token for what it does not know, nothing would be left to score."""
    folder = talker(tmp_path / "m")
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["normalizer"] = {"type": "Replace", "pattern": {"String": "☃"}, "content": ""}
    file.write_text(json.dumps(stored))
    task = load_task(causal_task(tmp_path, [{"text": "the cat"}, {"text": "☃"}], kind="perplexity", prompt=None))
    with pytest.raises(DataError, match=r"task 'sounds', split test: the text '☃' gives no token\. Drop the row"):
        encode(load_encoder(folder), task, "test", max_length=64)


def test_files_without_rows(encoder: Encoder, tmp_path: Path) -> None:
    folder = causal_task(tmp_path, [])
    with pytest.raises(DataError, match=r"test\.jsonl: a split must hold at least one row"):
        inputs(encoder, folder)
    (folder / "test.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"test\.jsonl: line 1: a row must be one JSON object"):
        inputs(encoder, folder)


def test_solved_examples_are_never_those_that_are_asked(encoder: Encoder, tmp_path: Path) -> None:
    task = load_task(causal_task(tmp_path, shots=2))
    with pytest.raises(DataError, match="its solved examples come from 'train' itself, whose answers would be given away"):
        encode(encoder, task, "train", max_length=64)
    many = load_task(causal_task(tmp_path, name="many", shots=9))
    with pytest.raises(DataError, match=r"split 'train' must hold the 9 solved examples\. Got 4"):
        encode(encoder, many, "test", max_length=64)


def test_a_template_that_is_not_there_or_not_fit(tmp_path: Path) -> None:
    task = load_task(causal_task(tmp_path, chat=True, system="same"))
    without = load_encoder(talker(tmp_path / "without", template=None))
    with pytest.raises(
        DataError,
        match=r"task 'sounds', split test: asks for the chat template \(`chat: true`\), and the model's tokenizer has none",
    ):
        encode(without, task, "test", max_length=64)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    refusing = load_encoder(talker(tmp_path / "refusing", template=strict))
    with pytest.raises(
        DataError, match=r"the model's chat template cannot take these turns \(no system here\). Leave `system` out"
    ):
        encode(refusing, task, "test", max_length=64)


def test_kinds_of_models_and_tasks_that_do_not_fit(encoder: Encoder, tmp_path: Path) -> None:
    classes = load_task(make_task(tmp_path, "animals"))
    with pytest.raises(
        DataError, match=r"is a causal language model, which is not understood as an encoder of sentences\..*--kind sentence"
    ):
        encode(encoder, classes, "test", max_length=64)
    bert = load_encoder(make_model(tmp_path / "bert"))
    with pytest.raises(
        DataError, match=r"task 'sounds' is of kind generation, for causal language models, and .*bert is read as sentence"
    ):
        encode(bert, load_task(causal_task(tmp_path)), "test", max_length=64)
    with pytest.raises(DataError, match="of which a causal model is not asked"):
        classes.asked("test")


def test_a_task_is_its_folder_or_its_description_and_hashes_what_it_asks(encoder: Encoder, tmp_path: Path) -> None:
    folder = causal_task(tmp_path)
    assert load_task(folder / "meta.json").form == load_task(folder).form
    first = inputs(encoder, folder)
    assert first.hash == inputs(encoder, folder).hash
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"stop": ["."]}))
    assert inputs(encoder, folder).hash != first.hash, "another way to judge is another result"
    assert inputs(encoder, folder).unlabelled == first.unlabelled
    assert len(inputs(encoder, folder, limit=2)) == 2


def test_parquet_and_data_sets(encoder: Encoder, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = causal_task(tmp_path)
    expected = inputs(encoder, folder)
    (folder / "test.jsonl").unlink()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "test.parquet")
    assert inputs(encoder, folder).taught == expected.taught
    data = causal_task(tmp_path, name="set")
    (data / "meta.json").unlink()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").rename(data / f"{split}.json")
    hub = causal_task(tmp_path, name="hub", hub={"name": str(data), "splits": {"train": "train", "test": "test"}})
    assert sorted(inputs(encoder, hub).taught) == sorted(expected.taught)
