"""Vocabularies of merges: rows by value, tokenizers reloaded, every error before a weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fixtures import write_model
from thetau.checkpoint import Source, open_source
from thetau.checkpoint.arranged import Arranged
from thetau.errors import AlignmentError, CheckpointError, RecipeError
from thetau.recipes.mergekit.templates import NAMED, chosen_template
from thetau.recipes.mergekit.tokens import (
    Speaker,
    TokenizerSettings,
    TokenSource,
    Vocabulary,
    differing,
    is_vocabulary,
    templated,
    unequal,
    vocabulary,
    vocabulary_size,
)

KINDS = ("BPE", "WordPiece", "Unigram")
WORDS = ["the cat sat on the mat", "a hat and a cat", "that rat ran at night"]
OTHER_WORDS = ["zebra zoo zig zag zone", "zebra zones zoom", "quiz quick queue", "the cat sat"]
TEXTS = [*WORDS, "the hat sat at a mat", "a rat on that night"]


def make_tokenizer(kind: str, corpus: Sequence[str], special: Sequence[str], size: int = 60) -> Tokenizer:
    """A tiny tokenizer of a kind, trained, its special tokens first."""
    first = ["<unk>", *special]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False))
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(
            corpus, trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=first, unk_token="<unk>", show_progress=False)
        tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make_model(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    rows: int | None = None,
    seed: int = 0,
    added: Sequence[str | AddedToken] = (),
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    **named: str,
) -> Path:
    """A model with an embedding, a head and a tokenizer; row i of the embedding holds 100 · seed + i."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    for token in added:
        tokenizer.add_tokens([token])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
    count = len(fast) if rows is None else rows
    values = (100.0 * seed + torch.arange(float(count)))[:, None].repeat(1, 3)
    weights = {"model.embed_tokens.weight": values.to(dtype), "lm_head.weight": (values + 0.5).to(dtype)}
    weights["model.norm.weight"] = torch.ones(3, dtype=dtype)
    return write_model(folder, weights, {"model_type": "llama", "vocab_size": count, "bos_token_id": 1, "eos_token_id": [1, 2]})


def speaker(folder: Path, label: str | None = None, merged: bool = True) -> Speaker:
    return Speaker(label=label or folder.name, folder=folder, source=open_source(folder), merged=merged)


def tensors(speakers: Sequence[Speaker], name: str = "model.embed_tokens.weight") -> Callable[[str], tuple[Source, str] | None]:
    sources = {one.label: one.source for one in speakers}
    return lambda label: (sources[label], name) if name in sources[label].specs else None


def rows_of(made: Vocabulary, speakers: Sequence[Speaker], label: str, name: str = "model.embed_tokens.weight") -> Tensor:
    """One model's tensor in the output's order, as the engine reads it."""
    arranged = Arranged({name: made.piece(label, name, tensors(speakers, name))}, label=label)
    whole = arranged.read(name)
    parts = torch.cat([arranged.read(name, at, min(at + 7, len(whole))) for at in range(0, len(whole), 7)])
    assert torch.equal(whole, parts)
    return whole


def reload(made: Vocabulary, folder: Path) -> Any:
    """The output's tokenizer, as a user loads it."""
    folder.mkdir()
    for name, content in made.files.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(str(folder))


def own(folder: Path, token: str) -> int:
    return int(AutoTokenizer.from_pretrained(str(folder)).get_vocab()[token])


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one vocabulary with other added tokens, in another order."""
    tokenizer = make_tokenizer(request.param, WORDS, ["<s>", "</s>"])
    first = make_model(
        tmp_path / "first", tokenizer, seed=1, added=[AddedToken("<a>", special=True), AddedToken("<b>", special=True)]
    )
    second = make_model(
        tmp_path / "second",
        tokenizer,
        seed=2,
        added=[AddedToken("<c>", special=True), AddedToken("<b>", special=True), AddedToken("<d>", special=True)],
    )
    return first, second


def test_union_takes_every_token_and_each_models_own_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    speakers = [speaker(folder) for folder in pair]
    made = vocabulary(speakers, "first", TokenizerSettings(source="union"))
    loaded = reload(made, tmp_path / "out")
    assert loaded.get_vocab() == dict(made.tokens)
    assert made.rows == len(loaded) == len(AutoTokenizer.from_pretrained(str(pair[0]))) + 2
    parents = {folder.name: AutoTokenizer.from_pretrained(str(folder)) for folder in pair}
    for text in TEXTS:
        assert loaded.encode(text) == parents["first"].encode(text)  # the base's ids stay
    for folder in pair:
        rows, ids = rows_of(made, speakers, folder.name), parents[folder.name].get_vocab()
        other = next(one for one in pair if one != folder)
        theirs = parents[other.name].get_vocab()
        for token, index in made.tokens.items():
            seed = 1 if folder.name == "first" else 2
            expected = 100.0 * seed + ids[token] if token in ids else 100.0 * (3 - seed) + theirs[token]
            assert rows[index].tolist() == [expected] * 3, token
    for token in ("<a>", "<b>", "<c>", "<d>"):
        assert loaded.encode(f"the{token}cat").count(made.tokens[token]) == 1
    assert (rows_of(made, speakers, "second", "lm_head.weight") == rows_of(made, speakers, "second") + 0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_union_of_other_vocabularies_keeps_the_bases_texts(kind: str, tmp_path: Path) -> None:
    first = make_model(tmp_path / "first", make_tokenizer(kind, WORDS, ["<s>"]), seed=1, added=["<x>"])
    second = make_model(tmp_path / "second", make_tokenizer(kind, OTHER_WORDS, ["<s>"]), seed=2, added=["<x>", "<y>"])
    speakers = [speaker(first), speaker(second)]
    made = vocabulary(speakers, None, TokenizerSettings())
    loaded, parents = reload(made, tmp_path / "out"), [AutoTokenizer.from_pretrained(str(folder)) for folder in (first, second)]
    assert loaded.get_vocab() == dict(made.tokens)
    assert set(made.tokens) == {*parents[0].get_vocab(), *parents[1].get_vocab()}
    assert sorted(made.tokens.values()) == list(range(made.rows))
    for token, index in parents[0].get_vocab().items():
        assert made.tokens[token] == index
    text = "zebra quick"
    assert loaded.tokenize(text) == parents[1].tokenize(text)  # what the base does not know is split as its own model does
    assert loaded.convert_tokens_to_ids(["<x>", "<y>"]) == [made.tokens["<x>"], made.tokens["<y>"]]
    assert loaded.tokenize("the<y>cat").count("<y>") == 1
    if kind == "BPE":
        assert [loaded.tokenize(word) for word in WORDS] == [parents[0].tokenize(word) for word in WORDS]


def test_union_of_other_kinds_says_so(tmp_path: Path) -> None:
    folders = [make_model(tmp_path / kind, make_tokenizer(kind, WORDS, []), seed=at) for at, kind in enumerate(KINDS)]
    for order in (folders, folders[::-1], [folders[1], folders[2], folders[0]]):
        made = vocabulary([speaker(folder) for folder in order], None, TokenizerSettings())
        assert any("of another kind" in note for note in made.notes)
        assert reload(made, tmp_path / f"out-{order[0].name}").get_vocab() == dict(made.tokens)


def test_base_keeps_its_files_to_the_byte_and_its_rows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, ["<s>"])
    first = make_model(tmp_path / "first", tokenizer, seed=1, rows=80)
    second = make_model(tmp_path / "second", tokenizer, seed=2, added=["<c>"])
    speakers = [speaker(first), speaker(second)]
    made = vocabulary(speakers, "first", TokenizerSettings(source="base"))
    assert made.rows == 80  # mergekit #425: cut to the tokenizer's length
    assert made.files["tokenizer.json"] == (first / "tokenizer.json").read_bytes()
    assert made.piece("first", "w", tensors(speakers)).rows is None
    rows, count = rows_of(made, speakers, "second"), len(made.tokens)
    assert rows[:count, 0].tolist() == [200.0 + index for index in range(count)]
    assert rows[count, 0] == 100.0 + count  # spare in the first, <c> in the second
    assert rows[count + 1 :, 0].tolist() == [100.0 + index for index in range(count + 1, 80)]


def test_spare_rows_of_both_stay_their_own(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, [])
    folders = [make_model(tmp_path / name, tokenizer, seed=seed, rows=90) for name, seed in (("first", 1), ("second", 2))]
    speakers = [speaker(folder) for folder in folders]
    made = vocabulary(speakers, "first", TokenizerSettings(source="union"))
    assert made.rows == 90
    assert all(made.piece(one.label, "w", tensors(speakers)).rows is None for one in speakers)


def test_union_of_equal_tokenizers_changes_nothing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("Unigram", WORDS, [])
    folders = [make_model(tmp_path / name, tokenizer, added=["<x>"]) for name in ("first", "second")]
    made = vocabulary([speaker(folder) for folder in folders], None, TokenizerSettings())
    assert made.files["tokenizer.json"] == (folders[0] / "tokenizer.json").read_bytes()
    assert made.notes == ()


def test_a_models_tokenizer_reorders_the_others_rows(tmp_path: Path) -> None:
    first = make_model(tmp_path / "first", make_tokenizer("WordPiece", WORDS, ["<s>", "</s>"]), seed=1, bos_token="<s>")
    second = make_model(tmp_path / "second", make_tokenizer("WordPiece", WORDS, ["</s>", "<s>", "<m>"]), seed=2, bos_token="<s>")
    speakers = [speaker(first), speaker(second)]
    made = vocabulary(speakers, "first", TokenizerSettings(source="second"))
    assert made.files["tokenizer.json"] == (second / "tokenizer.json").read_bytes()
    rows = rows_of(made, speakers, "first")
    assert rows[made.tokens["<s>"], 0] == 100.0 + own(first, "<s>")
    assert rows[made.tokens["<m>"], 0] == 200.0 + own(second, "<m>")
    config = made.config(
        {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": [2], "text_config": {"vocab_size": 60, "pad_token_id": None}},
        "first",
    )
    assert config["bos_token_id"] == made.tokens["<s>"] == 2
    assert config["eos_token_id"] == [made.tokens["</s>"]]
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == made.rows
    assert config["text_config"]["pad_token_id"] is None


def three(tmp_path: Path) -> list[Speaker]:
    """Three models; <p> is in two, <q> in one, each at another id."""
    tokenizer = make_tokenizer("BPE", WORDS, [])
    said = {"first": [], "second": ["<q>", "<p>"], "third": ["<p>"]}
    folders = [make_model(tmp_path / name, tokenizer, seed=at + 1, added=added) for at, (name, added) in enumerate(said.items())]
    return [speaker(folder) for folder in folders]


def test_mean_where_several_know_a_token_and_the_base_does_not(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    made = vocabulary(speakers, "first", TokenizerSettings())
    second, third = (own(tmp_path / name, "<p>") for name in ("second", "third"))
    rows = rows_of(made, speakers, "first")
    assert rows[made.tokens["<p>"], 0] == (200.0 + second + 300.0 + third) / 2
    assert rows[made.tokens["<q>"], 0] == 200.0 + own(tmp_path / "second", "<q>")
    assert rows_of(made, speakers, "second")[made.tokens["<p>"], 0] == 200.0 + second
    based = vocabulary(speakers, "third", TokenizerSettings())
    assert rows_of(based, speakers, "first")[based.tokens["<p>"], 0] == 300.0 + third  # the base knows it


def test_among_says_who_gives(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    made = vocabulary(speakers, "first", TokenizerSettings())
    name = "model.embed_tokens.weight"
    arranged = Arranged({name: made.piece("first", name, tensors(speakers), among=["first", "third"])}, label="first")
    rows = arranged.read(name)
    assert rows[made.tokens["<p>"], 0] == 300.0 + own(tmp_path / "third", "<p>")
    assert rows[made.tokens["<q>"], 0] == 0.0


def test_sources_of_tokens(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    settings = TokenizerSettings.read(
        {
            "source": "union",
            "tokens": {
                "<p>": {"source": "third", "force": True},
                "<q>": {"source": {"kind": "zero"}},
                "<new>": {"source": {"kind": "model_token", "model": "second", "token": "<unk>"}},
                "<id>": {"source": {"kind": "model_token", "model": "first", "token_id": 5}},
                "the": {"source": {"kind": "zero"}, "force": False},
                "<unk>": {"source": {"kind": "zero"}, "force": True},
            },
        }
    )
    made = vocabulary(speakers, "first", settings)
    at, third = made.tokens, own(tmp_path / "third", "<p>")
    for seed, one in enumerate(speakers, 1):
        rows = rows_of(made, speakers, one.label)
        assert rows[at["<p>"], 0] == 300.0 + third
        assert rows[at["<new>"], 0] == 200.0 + own(tmp_path / "second", "<unk>")
        assert rows[at["<id>"], 0] == 105.0
        assert rows[at["<unk>"], 0] == 0.0
        assert rows[at["<q>"], 0] == (200.0 + own(tmp_path / "second", "<q>") if seed == 2 else 0.0)
    assert reload(made, tmp_path / "out").convert_tokens_to_ids("<new>") == at["<new>"]


def test_padding_is_the_mean_of_the_rows(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    made = vocabulary(speakers, "first", TokenizerSettings(pad_to_multiple_of=16))
    assert made.rows % 16 == 0 and made.rows - 16 < made.real < made.rows
    rows = rows_of(made, speakers, "second")
    expected = rows[: made.real].double().mean(0)
    assert torch.allclose(rows[made.real :].double(), expected.expand(made.rows - made.real, 3), rtol=1e-6)


def test_half_precision_rows_are_moved_to_the_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(pair[0] / "tokenizer.json"))
    folders = [
        make_model(tmp_path / f"half{seed}", tokenizer, seed=seed, dtype=torch.bfloat16, added=[f"<{seed}>"]) for seed in (1, 2)
    ]
    speakers = [speaker(folder) for folder in folders]
    made = vocabulary(speakers, None, TokenizerSettings())
    rows = rows_of(made, speakers, "half2")
    assert rows.dtype == torch.bfloat16
    assert rows[made.tokens["<2>"], 0] == speakers[1].source.read("model.embed_tokens.weight")[own(folders[1], "<2>"), 0]


def test_tokens_beyond_the_rows_are_left_out_and_said(tmp_path: Path) -> None:
    for kind in KINDS:
        tokenizer = make_tokenizer(kind, WORDS, ["<s>"])
        count = tokenizer.get_vocab_size()
        first = make_model(tmp_path / f"{kind}1", tokenizer, rows=count, added=["<far>"], pad_token="<far>")
        second = make_model(tmp_path / f"{kind}2", tokenizer, rows=count - 3)
        made = vocabulary([speaker(first), speaker(second)], first.name, TokenizerSettings(source="base"))
        assert "<far>" not in made.tokens and made.rows == count
        assert any("1 tokens have ids beyond" in note and "'<far>'" in note for note in made.notes)
        loaded = reload(made, tmp_path / f"{kind}-out")
        assert loaded.get_vocab() == dict(made.tokens) and loaded.pad_token is None
        cut = vocabulary([speaker(second), speaker(first)], second.name, TokenizerSettings(source="base"))
        assert cut.rows == count - 3 == len(reload(cut, tmp_path / f"{kind}-cut"))


def test_a_token_beyond_the_rows_that_is_put_around_texts_is_an_error(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, [])
    tokenizer.add_special_tokens(["<end>"])
    index = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", index)])
    folder = make_model(tmp_path / "first", tokenizer, rows=index)
    with pytest.raises(
        CheckpointError, match=rf"first: its tokenizer puts '<end>' \(id {index}\) around texts, .* only {index} embedding rows"
    ):
        vocabulary([speaker(folder)], None, TokenizerSettings(source="base"))


def test_tokens_that_only_the_config_adds_count(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "first", make_tokenizer("BPE", WORDS, []), rows=80)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    loaded = AutoTokenizer.from_pretrained(str(folder))
    made = vocabulary([speaker(folder)], None, TokenizerSettings(source="union"))
    assert dict(made.tokens) == loaded.get_vocab()
    assert made.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_conflicting_settings_are_said_and_the_first_stands(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, [])
    first = make_model(tmp_path / "first", tokenizer, added=[AddedToken("<x>", lstrip=True), "<y>"])
    second = make_model(tmp_path / "second", tokenizer, added=["<y>", AddedToken("<x>", special=True)])
    made = vocabulary([speaker(first), speaker(second)], None, TokenizerSettings())
    assert any("1 tokens are added with other settings" in note and "'<x>'" in note for note in made.notes)
    entries = {entry["content"]: entry for entry in json.loads(made.files["tokenizer.json"] or b"")["added_tokens"]}
    assert entries["<x>"]["lstrip"] and not entries["<x>"]["special"]


def test_a_new_document_leaves_no_stale_file(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, [])
    first, second = make_model(tmp_path / "first", tokenizer), make_model(tmp_path / "second", tokenizer, added=["<x>"])
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "model.tiktoken"):
        (first / name).write_text("{}")
    (second / "vocab.txt").write_text("x")
    made = vocabulary([speaker(first), speaker(second)], None, TokenizerSettings())
    assert [name for name, content in made.files.items() if content is None] == [
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "model.tiktoken",
    ]
    kept = vocabulary([speaker(first), speaker(second)], None, TokenizerSettings(source="base"))
    assert kept.files["merges.txt"] == b"{}" and kept.files["vocab.txt"] is None


def test_older_files_are_converted(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "hat", "##s"]
    folders = []
    for name, vocabulary_file in (("first", words), ("second", [*words[:5], "rat", *words[5:]])):
        folder = tmp_path / name
        weights = {"bert.embeddings.word_embeddings.weight": torch.arange(float(len(vocabulary_file)))[:, None].repeat(1, 2)}
        write_model(folder, weights, {"model_type": "bert", "vocab_size": len(vocabulary_file)})
        (folder / "vocab.txt").write_text("\n".join(vocabulary_file) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        folders.append(folder)
    made = vocabulary([speaker(folder) for folder in folders], None, TokenizerSettings())
    loaded = reload(made, tmp_path / "out")
    assert loaded.get_vocab() == dict(made.tokens) and made.files["vocab.txt"] is None
    assert loaded.tokenize("rat cats") == ["rat", "cat", "##s"]


def test_the_same_bytes_from_any_hash_seed(pair: tuple[Path, Path]) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from thetau.checkpoint import open_source\n"
        "from thetau.recipes.mergekit.tokens import *\n"
        "m = [Speaker(label=p, folder=Path(p), source=open_source(Path(p))) for p in sys.argv[1:]]\n"
        "v = vocabulary(m, None, TokenizerSettings())\n"
        "print(hashlib.sha256(repr((sorted(v.files.items()), list(v.tokens.items()), v.rows)).encode()).hexdigest())\n"
        "assert 'transformers' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, *map(str, pair)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(said) == 1


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    with pytest.raises(
        RecipeError, match=r"source: no model of the recipe is 'secnd'\. Did you mean 'second'\? Models: first, second, third"
    ):
        vocabulary(speakers, None, TokenizerSettings(source="secnd"))
    tokens = {
        "<n>": TokenSource(model="third"),
        "<o>": TokenSource(),
        "<r>": TokenSource(model="second", token_id=999),
        "<t>": TokenSource(model="second", token="<pp>"),
    }
    with pytest.raises(RecipeError) as caught:
        vocabulary(speakers, None, TokenizerSettings(tokens=tokens))
    rows = speakers[1].rows
    assert caught.value.problems == [
        "token '<n>': third has no token '<n>'. Did you mean '<unk>'?",
        "token '<o>': no model knows it. Say its `source`, such as `{kind: zero}`.",
        f"token '<r>': token_id must be less than {rows}, the rows of second. Got 999.",
        "token '<t>': second has no token '<pp>'. Did you mean '<p>'?",
    ]
    (tmp_path / "second" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"second: has no tokenizer: tokenizer.json is missing in .*second"):
        vocabulary(speakers, None, TokenizerSettings())
    (tmp_path / "second" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"second/tokenizer.json: not valid JSON"):
        vocabulary(speakers, None, TokenizerSettings())
    (tmp_path / "second" / "tokenizer.json").unlink()
    (tmp_path / "second" / "tokenizer.model").write_text("no")
    with pytest.raises(CheckpointError, match=r"second: .*older files .* could not be read|second: .* no fast tokenizer"):
        vocabulary(speakers, None, TokenizerSettings())


def test_a_model_without_an_embedding_is_an_error(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "first", make_tokenizer("BPE", WORDS, []))
    write_model(folder, {"vision.weight": torch.ones(2, 2)}, {"model_type": "vit"})
    with pytest.raises(AlignmentError, match="first: has no token embedding"):
        vocabulary([speaker(folder)], None, TokenizerSettings())


def test_settings_are_read_and_every_problem_said() -> None:
    read = TokenizerSettings.read(
        {"source": {"model": "m"}, "pad_to_multiple_of": 8}, label=lambda said: said["model"], chat_template="auto"
    )
    assert read == TokenizerSettings(source="m", pad_to_multiple_of=8, chat_template="auto")
    assert TokenizerSettings.read("base").source == "base" and TokenizerSettings.read("org/model").source == "org/model"
    with pytest.raises(RecipeError) as caught:
        TokenizerSettings.read(
            {
                "sauce": "union",
                "pad_to_multiple_of": 0,
                "tokens": {
                    "a": {"source": {"kind": "model_token", "model": "m"}},
                    "b": {"source": {"kind": "nil"}},
                    "c": {"force": 1},
                    "d": "m",
                    "e": {"source": {"kind": "model_token", "model": "m", "token_id": -1}},
                },
            }
        )
    assert caught.value.problems == [
        "unknown key 'sauce'. Did you mean 'source'? Known: source, tokens, pad_to_multiple_of.",
        "pad_to_multiple_of: must be a whole number of at least 1. Got 0.",
        "tokens.a: source: a `model_token` has a `model` and either `token` or `token_id`. Got {'kind': 'model_token', 'model': 'm'}.",
        "tokens.b: source: its kind must be `model_token` or `zero`. Got 'nil'.",
        "tokens.c: force: must be true or false. Got 1.",
        "tokens.d: must be a table with `source` and, where wanted, `force`. Got 'm'.",
        "tokens.e: source: token_id must be a whole number of at least 0. Got -1.",
    ]


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi \n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\nHi  [/INST] Hello</s> [INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_is_its_format(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, ["<s>", "</s>"])
    folder = make_model(tmp_path / "first", tokenizer, bos_token="<s>", eos_token="</s>")
    made = vocabulary([speaker(folder)], None, TokenizerSettings(source="base", chat_template=name))
    loaded = reload(made, tmp_path / "out")
    assert loaded.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED[name]


def test_auto_takes_the_template_of_most(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("BPE", WORDS, [])
    said = [None, "{{ messages[0].content }} b", "{{ messages[0].content }} c", "{{ messages[0].content }} c\n"]
    folders = [make_model(tmp_path / f"m{at}", tokenizer, template=template) for at, template in enumerate(said)]
    speakers = [speaker(folder) for folder in folders]
    made = vocabulary(speakers, None, TokenizerSettings(source="base", chat_template="auto"))
    loaded = reload(made, tmp_path / "out")
    assert loaded.chat_template == "{{ messages[0].content }} c"
    files = templated(speakers, "m0", "auto")
    assert files["chat_template.jinja"] == b"{{ messages[0].content }} c"
    assert templated(speakers[:1], "m0", "auto") == {}
    assert chosen_template("auto", ["x", "y"]) == "x"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("chatmk", "'chatml'"),
        ("a text that is long enough", "which is none"),
        ("{{ messages[0] }} {% for %}", "is not valid Jinja"),
    ],
)
def test_what_is_no_template(said: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chosen_template(said, [])


def test_a_literal_template_may_have_transformers_own_tag() -> None:
    said = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert chosen_template(said, []) == said


def test_differing_tokenizers_are_told(tmp_path: Path) -> None:
    speakers = three(tmp_path)
    told = differing(speakers)
    assert [line.split(":")[0] for line in told] == ["second", "third"]
    assert "second: its tokenizer differs from first's: 2 tokens are new ('<q>', '<p>')." in told[0]
    assert differing(speakers[:1]) == () == differing([speakers[0], speaker(tmp_path / "first", "again")])
    assert "50 rows in a, 52 in b" in unequal("lm_head.weight", {"a": 50, "b": 52})


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.embed_tokens_per_layer.weight",
        "transformer.wte.weight",
        "roberta.embeddings.word_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "backbone.embeddings.weight",
        "model.tok_embeddings.weight",
        "transformer.embd.wte.weight",
        "transformer.embedding.word_embeddings.weight",
        "text_model.embeddings.token_embedding.weight",
        "shared.weight",
        "decoder.embed_tokens.weight",
        "layers.0.wte.weight",
        "layers.5.linear.weight",
        "layers.5.linear.bias",
        "lm_head.weight",
        "language_model.lm_head.weight",
        "lm_head.bias",
        "lm_head.linear.weight",
        "lm_head.decoder.bias",
        "embed_out.weight",
        "output.weight",
        "transformer.output_layer.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "vocab_projector.bias",
        "proj_out.weight",
        "decoder.bias",
    ],
)
def test_tensors_of_the_vocabulary(name: str) -> None:
    assert is_vocabulary(name, (48,) if name.endswith("bias") else (48, 16), 48)
    assert not is_vocabulary(name, (47,) if name.endswith("bias") else (47, 16), (48, 64))


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "transformer.wpe.weight",
        "model.decoder.embed_positions.weight",
        "visual.pos_embed.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "model.layers.0.mlp.up_proj.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "lm_head.dense.weight",
        "lm_head.layer_norm.bias",
        "cls.predictions.transform.dense.weight",
        "classifier.weight",
        "model.norm.weight",
    ],
)
def test_tensors_of_no_vocabulary(name: str) -> None:
    assert not is_vocabulary(name, (48,) if "norm" in name else (48, 16), 48)


def test_the_size_of_a_text_model_inside() -> None:
    assert vocabulary_size({"vision_config": {"a": 1}, "text_config": {"vocab_size": 7}, "audio_config": {"vocab_size": 9}}) == 7
    assert vocabulary_size({"hidden_size": 7}) is None
