"""Labels read off a masked language model and a text-to-text model, against transformers' own forward."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.finetune.lesson import Inputs
from thetau.models import Encoder
from thetau.models.language import MaskEncoder, TextToText, frozen_names, load_mask_encoder, load_text_to_text
from thetau.tasks.head import AnyHead
from thetau.tasks.language_heads import TextToTextHead, expected_value, soft_targets, verbaliser_head
from thetau.tasks.prompted import fitted, label_ids, label_inputs, mask_inputs, word_ids
from thetau.tasks.templates import Prompt, read_prompt
from tiny import one_thread as one_thread
from tiny_language import folder_of, tokenizer_of

MOOD = Prompt(template="{text} is {mask} .", labels=("dry", "wet"), words=("dry", "wet"))
PAIR = Prompt(template="{text} ? {mask} , {text2}", labels=("a", "b", "c"), words=("same", "other", "warm"))
ANSWER = Prompt(template="about {text} :", labels=("dog", "cat"), words=("the dog", "a cat question"))
TEXTS = ("sun rain", "bark", "puddle cloud wet rain wet")


@pytest.fixture(scope="module", params=["bert", "roberta"])
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_mask_encoder(folder_of(tmp_path_factory.mktemp("masked"), request.param))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_text_to_text(folder_of(tmp_path_factory.mktemp("t5"), "t5"))


def edit(folder: Path, change: Any) -> Path:
    """Change the weights of a saved model."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Masked language models


def test_logits_are_the_rows_of_transformers_own(masked: Encoder) -> None:
    own = transformers.AutoModelForMaskedLM.from_pretrained(masked.folder).eval()
    inputs = mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 1, 1], 32)
    columns = inputs.batch([0, 1, 2])
    head = verbaliser_head(masked.module, masked.tokenizer, MOOD)
    with torch.no_grad():
        every = own(input_ids=columns["input_ids"], attention_mask=columns["attention_mask"]).logits
        logits = head.logits(masked.module(**columns))
    at_mask = every[columns["input_ids"] == masked.tokenizer.mask_token_id]
    torch.testing.assert_close(logits, at_mask[:, word_ids(masked.tokenizer, MOOD)])
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(head.loss(masked.module(**columns), torch.tensor([0, 1, 1])), expected)


def test_pairs_fill_both_places(masked: Encoder) -> None:
    inputs = mask_inputs(masked.tokenizer, PAIR, ["sun", "rain"], ["dog", "cat bone"], [0, 2], 32)
    words = masked.tokenizer.convert_ids_to_tokens(list(inputs.ids[1]))[1:-1]
    assert words == ["rain", "?", masked.tokenizer.mask_token, ",", "cat", "bone"]
    assert inputs.positions == (3, 3)
    assert inputs.lengths == (7, 8)
    assert inputs.batch([0, 1])["attention_mask"].tolist() == [[1] * 7 + [0], [1] * 8]


def test_padding_does_not_change_features(masked: Encoder) -> None:
    inputs = mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 0, 0], 32)
    with torch.no_grad():
        together = masked.module(**inputs.batch([0, 1, 2]))
        for index in range(3):
            torch.testing.assert_close(together[index], masked.module(**inputs.batch([index]))[0])


def test_only_the_layers_between_are_trained(masked: Encoder) -> None:
    names = frozen_names(masked.module)
    assert set(masked.frozen) == names
    trained = [name for name, _ in masked.module.named_parameters() if name not in names]
    assert len(trained) == 2 * 16
    assert all(".encoder.layer." in name for name in trained)
    assert any(name.endswith("word_embeddings.weight") for name in names)
    assert any("LayerNorm" in name or "layer_norm" in name for name in names if "embeddings" not in name), "the head's norm"


def test_the_head_is_a_frozen_copy_with_the_rows_only(masked: Encoder) -> None:
    head = verbaliser_head(masked.module, masked.tokenizer, MOOD)
    assert isinstance(head, AnyHead)
    assert not any(parameter.requires_grad for parameter in head.reader.parameters())
    assert max(parameter.numel() for parameter in head.reader.parameters()) == 16 * 16
    before, features = head.hash(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    logits = head.logits(features)
    weights = {name: tensor.clone() for name, tensor in masked.module.state_dict().items()}
    with torch.no_grad():
        for parameter in masked.module.parameters():
            parameter.mul_(2)
    assert head.hash() == before
    assert torch.equal(head.logits(features), logits)
    assert verbaliser_head(masked.module, masked.tokenizer, MOOD).hash() != before
    masked.module.load_state_dict(weights)
    assert verbaliser_head(masked.module, masked.tokenizer, MOOD).hash() == before
    assert head.to(torch.device("cpu")).hash() == before
    assert replace(head, values=(0.0, 1.0)).hash() != before
    with pytest.raises(DataError, match="not linear in the features"):
        head.linear(features)


def test_gradients_reach_the_layers_through_the_head(masked: Encoder) -> None:
    inputs = mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 1, 1], 32)
    head = verbaliser_head(masked.module, masked.tokenizer, MOOD)
    head.loss(masked.module(**inputs.batch([0, 1, 2])), torch.tensor([0, 1, 1])).backward()
    grads = {name: parameter.grad for name, parameter in masked.module.named_parameters()}
    masked.module.zero_grad()
    # The key's bias moves no softmax, but its gradient is a tensor still.
    assert all(grad is not None for name, grad in grads.items() if name not in masked.frozen)


def linear_error(model: Encoder, columns: dict[str, torch.Tensor]) -> float:
    """How far the linear form's change is from a central difference, as a share of it."""
    from thetau.models.linear import LinearModel

    module = model.module.eval()
    parameters = {name: value for name, value in module.named_parameters() if name not in model.frozen}
    tau = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) for name, value in parameters.items()}
    change = LinearModel(module, tau).change(columns).detach()

    def moved(step: float) -> torch.Tensor:
        pairs = {name: value.detach() + step * tau[name] for name, value in parameters.items()}
        with torch.no_grad():
            out: torch.Tensor = torch.func.functional_call(module, pairs, (), columns)
        return out

    difference = (moved(1e-3) - moved(-1e-3)) / 2e-3
    return float((change - difference).norm() / difference.norm())


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's own, on its first forward mode
def test_the_linear_form_runs(masked: Encoder, t5: Encoder) -> None:
    assert linear_error(masked, mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 1, 1], 32).batch([0, 1, 2])) < 0.02
    assert linear_error(t5, label_inputs(t5.tokenizer, ANSWER, TEXTS, None, [0, 1, 1], 32).batch([0, 1, 2])) < 0.02


def test_inputs_are_hashed_and_cut(masked: Encoder) -> None:
    inputs = mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 1, 1], 32)
    other = mask_inputs(masked.tokenizer, MOOD, TEXTS, None, [0, 1, 0], 32)
    assert isinstance(inputs, Inputs)
    assert (inputs.hash != other.hash, inputs.unlabelled == other.unlabelled, inputs.truncated, len(inputs)) == (True, True, 0, 3)
    cut = mask_inputs(masked.tokenizer, PAIR, ["sun " * 50, "sun"], ["rain dog", "rain " * 3], [0, 1], 12)
    assert cut.truncated == 1
    words = masked.tokenizer.convert_ids_to_tokens(list(cut.ids[0]))
    assert len(words) == 12
    assert words[1:-1] == ["sun"] * 5 + ["?", masked.tokenizer.mask_token, ",", "rain", "dog"], "the longer text is cut"


def test_errors_of_prompted_inputs(masked: Encoder) -> None:
    tokenizer = masked.tokenizer
    with pytest.raises(DataError, match=r"takes two texts\. Got one"):
        mask_inputs(tokenizer, PAIR, ["sun"], None, [0], 32)
    with pytest.raises(DataError, match=r"takes one text\. Got two"):
        mask_inputs(tokenizer, MOOD, ["sun"], ["rain"], [0], 32)
    with pytest.raises(DataError, match=r"as many\. Got 1 texts and 2 labels"):
        mask_inputs(tokenizer, MOOD, ["sun"], None, [0, 1], 32)
    with pytest.raises(DataError, match=r"integers in 0\.\.1, the prompt has 2\. Got 2"):
        mask_inputs(tokenizer, MOOD, ["sun"], None, [2], 32)
    with pytest.raises(DataError, match=r"the template alone has 5 tokens, more than `max_length`\. Got 4"):
        mask_inputs(tokenizer, MOOD, ["sun"], None, [0], 4)
    with pytest.raises(DataError, match=r"example 1: a prompt must hold one mask token\. Got 2; take .* out of the text"):
        mask_inputs(tokenizer, MOOD, ["sun", f"sun {tokenizer.mask_token} dog"], None, [0, 0], 32)
    with pytest.raises(DataError, match="needs a tokenizer with a mask token"):
        mask_inputs(tokenizer_of("t5"), MOOD, ["sun"], None, [0], 32)
    with pytest.raises(DataError, match=r"`mask_position` must be among the columns\. Got input_ids"):
        masked.module(input_ids=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dry", "very wet"), r"must be one token of the tokenizer\. 'very wet' gives \[.*, 'wet'\]; choose another word"),
        (("dry", "splendid"), r"'splendid' gives \['.UNK.'\]"),
    ],
)
def test_a_label_is_one_token(words: tuple[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        word_ids(tokenizer_of("bert"), replace(MOOD, words=words))


def test_words_are_spelt_as_they_stand_in_the_template() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "great": 1, "Ġgreat": 2, "Ġbad": 3, "bad": 4}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    prompt = replace(MOOD, words=("bad", "great"))
    assert word_ids(tokenizer, replace(prompt, template="{text} It was {mask}.")) == [3, 2]
    assert word_ids(tokenizer, replace(prompt, template="{mask}: {text}")) == [4, 1]
    with pytest.raises(DataError, match="'great' and 'great' are the same"):
        word_ids(tokenizer, replace(prompt, words=("great", "great")))


# Loading


def test_names_lead_back_to_the_checkpoint(masked: Encoder) -> None:
    from thetau.models import read_weights, weights_hash

    weights = read_weights(masked.folder)
    assert set(masked.names.values()) | set(masked.carried) == set(weights)
    assert masked.base_hash == weights_hash(weights)
    live = masked.module.backbone.state_dict()
    for name, stored in masked.names.items():
        assert torch.equal(live[name], weights[stored])
    assert masked.max_length == 32


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert")
    edit(folder, lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith("cls.")})
    with pytest.raises(CheckpointError, match=r"must hold the language-model head \(cls\.predictions\.bias, …\)"):
        load_mask_encoder(folder)


def test_weights_must_be_those_of_the_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert")
    edit(folder, lambda weights: weights | {"cls.predictions.bias": torch.zeros(3)})
    with pytest.raises(AlignmentError, match=r"cls\.predictions\.bias must have shape \[36\], got \[3\]"):
        load_mask_encoder(folder)


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"DistilBertForMaskedLM: the language-model head must be one module"):
        load_mask_encoder(folder_of(tmp_path, "distilbert"))
    folder = folder_of(tmp_path, "t5")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"t5"', '"vit"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="AutoModelForMaskedLM of transformers cannot open it"):
        load_mask_encoder(folder)
    tokenizer = tokenizer_of("bert")
    tokenizer.mask_token = None
    with pytest.raises(CheckpointError, match="the tokenizer must have a mask token; it has none"):
        load_mask_encoder(folder_of(tmp_path, "bert", tokenizer))
    tokenizer.pad_token = None
    with pytest.raises(CheckpointError, match="the tokenizer must have a padding token"):
        load_mask_encoder(folder_of(tmp_path, "roberta", tokenizer))


# Text to text


def test_scores_are_minus_the_loss_of_transformers_own(t5: Encoder) -> None:
    own = transformers.T5ForConditionalGeneration.from_pretrained(t5.folder).eval()
    inputs = label_inputs(t5.tokenizer, ANSWER, TEXTS, None, [0, 1, 1], 32)
    assert [len(row) for row in inputs.label_ids] == [3, 4], "of different lengths, with the end"
    columns = inputs.batch([0, 1, 2])
    with torch.no_grad():
        scores = t5.module(**columns)
        for example in range(3):
            row = {
                name: columns[name][example : example + 1, : inputs.lengths[example]] for name in ("input_ids", "attention_mask")
            }
            for number, ids in enumerate(inputs.label_ids):
                loss = own(**row, labels=torch.tensor([ids])).loss
                torch.testing.assert_close(scores[example, number], -loss * len(ids))


def test_the_loss_is_that_of_the_right_text_alone(t5: Encoder) -> None:
    own = transformers.T5ForConditionalGeneration.from_pretrained(t5.folder).eval()
    inputs = label_inputs(t5.tokenizer, ANSWER, TEXTS, None, [0, 1, 1], 32)
    columns, head = inputs.batch([0, 1, 2]), TextToTextHead()
    labels = torch.tensor(inputs.labels)
    scores = t5.module(**columns)
    gold = columns["label_ids"][labels]
    loss = own(input_ids=columns["input_ids"], attention_mask=columns["attention_mask"], labels=gold).loss
    torch.testing.assert_close(head.loss(scores, labels), loss * (gold != -100).sum() / 3)
    assert torch.equal(head.logits(scores), scores)
    assert torch.equal(head.linear(scores), scores)


def test_the_head_is_only_a_rule(t5: Encoder) -> None:
    head = TextToTextHead()
    assert isinstance(head, AnyHead)
    assert head.to(torch.device("cpu")).hash() == TextToTextHead().hash()
    assert head.hash() != TextToTextHead(values=(0.0, 1.0)).hash()
    assert isinstance(t5.module, TextToText)
    assert t5.frozen == ()


def test_prompts_for_text_to_text_are_hashed_and_cut(t5: Encoder) -> None:
    inputs = label_inputs(t5.tokenizer, ANSWER, ["sun " * 40, "rain"], None, [0, 1], 10)
    assert isinstance(inputs, Inputs)
    assert inputs.truncated == 1
    assert inputs.lengths == (10, 4)
    assert t5.tokenizer.convert_ids_to_tokens(list(inputs.ids[0])) == ["about", *["sun"] * 7, ":", "</s>"]
    swapped = label_inputs(t5.tokenizer, replace(ANSWER, words=ANSWER.words[::-1]), ["sun " * 40, "rain"], None, [0, 1], 10)
    assert inputs.unlabelled != swapped.unlabelled
    assert inputs.hash != label_inputs(t5.tokenizer, ANSWER, ["sun " * 40, "rain"], None, [1, 1], 10).hash


def test_an_output_that_is_tied_in_the_code_and_not_in_the_file(tmp_path: Path) -> None:
    """Flan-T5's case."""
    folder = folder_of(tmp_path, "t5")
    size = len(tokenizer_of("t5"))
    other = torch.randn(size, 16, generator=torch.Generator().manual_seed(1))
    edit(folder, lambda weights: weights | {"lm_head.weight": other})
    text = (
        (folder / "config.json")
        .read_text(encoding="utf-8")
        .replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    (folder / "config.json").write_text(text, encoding="utf-8")
    model = load_text_to_text(folder)
    own = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    backbone: Any = model.module.backbone
    assert torch.equal(backbone.lm_head.weight, other)
    assert torch.equal(own.lm_head.weight, other)
    assert torch.equal(backbone.shared.weight, own.shared.weight)
    assert backbone.encoder.embed_tokens.weight is backbone.shared.weight
    columns = label_inputs(model.tokenizer, ANSWER, TEXTS[:1], None, [0], 32).batch([0])
    with torch.no_grad():
        loss = own(input_ids=columns["input_ids"], labels=columns["label_ids"][1:]).loss
        torch.testing.assert_close(model.module(**columns)[0, 1], -loss * 4)


def test_errors_of_label_texts(t5: Encoder) -> None:
    with pytest.raises(DataError, match=r"must be in the vocabulary of the tokenizer\. 'the fox' gives \['the', '<unk>'\]"):
        label_ids(t5.tokenizer, replace(ANSWER, words=("a cat", "the fox")))
    with pytest.raises(DataError, match=r"must be different tokens\. 'a cat' and 'a  cat' are the same"):
        label_ids(t5.tokenizer, replace(ANSWER, words=("a cat", "a  cat")))
    with pytest.raises(DataError, match="must have a token that ends a text"):
        label_ids(tokenizer_of("bert"), ANSWER)
    with pytest.raises(DataError, match=r"Got none for attention_mask, label_ids; make them with `label_inputs`"):
        t5.module(input_ids=torch.zeros(1, 3, dtype=torch.int64))


def test_a_text_to_text_model_needs_an_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("t5")
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="must have a token that ends a text; it has none"):
        load_text_to_text(folder_of(tmp_path, "t5", tokenizer))


# Regressions


def test_targets_lie_on_the_two_nearest_values() -> None:
    values = (0.0, 1.0, 5.0)
    found = soft_targets(torch.tensor([0.0, 0.25, 1.0, 3.0, 5.0]), values, 3)
    expected = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0, 1.0, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ torch.tensor(values), torch.tensor([0.0, 0.25, 1.0, 3.0, 5.0]))
    torch.testing.assert_close(expected_value(found.clamp(min=1e-9).log(), values), torch.tensor([0.0, 0.25, 1.0, 3.0, 5.0]))
    assert soft_targets(torch.tensor([2, 0]), None, 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(DataError, match=r"must be in 0\.0\.\.5\.0, the range of the prompt's `values`\. Got 1\.0\.\.6\.0"):
        soft_targets(torch.tensor([1.0, 6.0]), values, 3)


def test_regressions_are_learnt_through_both_heads(masked: Encoder, t5: Encoder) -> None:
    prompt = Prompt(template="{text} {mask}", labels=("0.0", "5.0"), words=("0.0", "5.0"), values=(0.0, 5.0))
    inputs = mask_inputs(masked.tokenizer, prompt, ["sun", "rain"], None, [2.5, 5.0], 32)
    head = verbaliser_head(masked.module, masked.tokenizer, prompt)
    with torch.no_grad():
        features = masked.module(**inputs.batch([0, 1]))
        log = head.logits(features).log_softmax(-1)
        expected = -(log[0].mean() + log[1, 1]) / 2
        torch.testing.assert_close(head.loss(features, torch.tensor(inputs.labels)), expected)
    scores = torch.tensor([[-1.0, -3.0], [-2.0, -4.0]])
    assert TextToTextHead(values=(0.0, 5.0)).loss(scores, torch.tensor([2.5, 5.0])).item() == pytest.approx((2 + 4) / 2)
    texts = label_inputs(t5.tokenizer, replace(prompt, template="{text}"), ["sun"], None, [2.5], 32)
    assert texts.labels == (2.5,)


# Prompts


def test_shipped_prompts_are_whole() -> None:
    root = Path(str(files("thetau.tasks").joinpath("prompts")))
    tasks = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
    for family in ("text_to_text", "mask"):
        assert sorted(path.stem for path in (root / family).glob("*.yaml")) == tasks
        for task in tasks:
            prompt = read_prompt(root / family / f"{task}.yaml", masked=family == "mask")
            assert prompt.pair == (task not in ("cola", "sst2")), task
            assert (prompt.values is not None) == (task == "stsb"), task
            assert len(prompt.words) == {"mnli": 3, "stsb": 26 if family == "text_to_text" else 2}.get(task, 2), task
    answers = {task: read_prompt(root / "text_to_text" / f"{task}.yaml", masked=False).words for task in tasks[:-1]}
    assert answers == {
        "cola": ("unacceptable", "acceptable"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "mrpc": ("no", "yes"),
        "qnli": ("yes", "no"),
        "qqp": ("no", "yes"),
        "rte": ("yes", "no"),
        "sst2": ("negative", "positive"),
    }
    for task in tasks:
        one, other = (read_prompt(root / family / f"{task}.yaml", masked=family == "mask") for family in ("text_to_text", "mask"))
        assert task == "stsb" or one.labels == other.labels, task


def test_filling_leaves_braces_in_texts_alone() -> None:
    assert PAIR.fill("{mask} {x}", "{text}", "<mask>") == "{mask} {x} ? <mask> , {text}"


@pytest.mark.parametrize(
    ("content", "masked", "message"),
    [
        ("- a", True, r"must be a mapping with `template` and `labels`\. Got list"),
        ("a: [", True, "cannot be read as YAML"),
        ("template: '{text} {mask}'\nlabel: {a: b, c: d}", True, r"unknown key 'label'\. Did you mean 'labels'\?"),
        ("template: '{text}'\nlabels: {a: b, c: d}", True, r"at most one \{text2\} and exactly one \{mask\}\. Got '\{text\}'"),
        ("template: '{text} {mask}'\nlabels: {a: b, c: d}", False, r"and no \{mask\}\. Got"),
        ("template: '{text} {title}'\nlabels: {a: b, c: d}", False, r"must have one \{text\}"),
        (
            "template: '{text}'\nlabels: {a: b, c: d}\nvalues: {a: 1, b: 2}",
            False,
            r"exactly one of .* Got \['labels', 'values'\]",
        ),
        ("template: '{text}'", False, r"with at least two entries\. Got none"),
        ("template: '{text}'\nlabels: {a: b}", False, r"with at least two entries\. Got \['labels'\]"),
        ("template: '{text}'\nlabels: {a: yes, b: no}", False, r"quote them\. Got 'a': True"),
        ("template: '{text}'\nlabels: {a: b, c: b}", False, r"must have different words\. Got \['b', 'b'\]"),
        ("template: '{text}'\nvalues: {a: 1, c: x}", False, r"map words to finite numbers\. Got \[1, 'x'\]"),
        ("template: '{text}'\nvalues: {a: 2, c: 1}", False, r"must be increasing\. Got \[2, 1\]"),
    ],
)
def test_a_prompt_file_is_checked(tmp_path: Path, content: str, masked: bool, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_prompt(path, masked=masked)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: cannot be read"):
        read_prompt(tmp_path / "none.yaml", masked=True)


def test_fitting_keeps_as_much_as_fits() -> None:
    def encode(text: str, text2: str | None) -> list[int]:
        return [*map(ord, text), 0, *map(ord, text2 or "")]

    assert fitted(encode, "abc", None, 4) == ([97, 98, 99, 0], False)
    assert fitted(encode, "abcdef", "xy", 6) == ([*map(ord, "abc"), 0, *map(ord, "xy")], True)


def test_models_come_in_evaluation_mode(masked: Encoder, t5: Encoder) -> None:
    assert isinstance(masked.module, MaskEncoder)
    assert not masked.module.training
    assert not t5.module.training
