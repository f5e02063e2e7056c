"""`thetau export gguf`: what is written, read back by our own reader, by transformers, and as the format is defined."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from commands import run
from thetau.checkpoint import open_source
from thetau.errors import CheckpointError, OutputError
from thetau.export import TYPES, to_gguf
from thetau.export.architecture import llama3_factors
from thetau.export.vocabulary import LLAMA3, QWEN2

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
TEXTS = [
    "The vector of a task is what fine-tuning moved: 12345 weights, or 3.5 % of them.",
    "I've been told it's  there,\n\n  isn't it?\tYes — naïve façades, 東京 and 🙂.",
    "<|im_start|>user\nadd 2 and 2<|im_end|>\n",
]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
RULES: dict[str, Any] = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in (("llama-bpe", LLAMA3), ("qwen2", QWEN2))
    },
}


def bytewise(folder: Path, rule: str = "smollm", **settings: Any) -> int:
    """A byte-level tokenizer in a model's folder; how many tokens it has."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = RULES[rule], tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 20, trainer)
    made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML, **settings}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **settings).save_pretrained(folder)
    return len(made.get_vocab())


def charwise(folder: Path) -> int:
    """A tokenizer as Llama 2's: BPE on characters, with bytes to fall back on."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghiklmnorstuvwy"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("a", "s"), ("s", "k"), ("o", "r"), ("▁", "a")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges), *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(vocabulary)


def model_in(folder: Path, family: str = "Llama", *, tied: bool = False, rule: str = "smollm", **settings: Any) -> Path:
    """A small model with its tokenizer; its values are drawn from a seed."""
    rows = bytewise(folder, rule) + 3  # a few rows that no token has
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": rows,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "head_dim": 16,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def wanted(value: torch.Tensor, kind: str) -> torch.Tensor:
    """What a file of this kind holds of a value, computed by torch and by the format's definition."""
    if value.ndim < 2 or kind == "f32":
        return value.float()
    if kind != "q8_0":
        return value.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()
    blocks = value.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0)
    codes = codes.sign() * (codes.abs() + 0.5).floor()
    return (codes * scale.half().float()).reshape(value.shape)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_back(tmp_path: Path, family: str, kind: str) -> None:
    folder = model_in(tmp_path / "model", family)
    written = to_gguf(open_source(folder), tmp_path / "m.gguf", kind=kind)
    values = load_file(folder / "model.safetensors")
    assert written.tensors == len(values) and written.nbytes == (tmp_path / "m.gguf").stat().st_size
    source = open_source(tmp_path / "m.gguf")
    assert sorted(source.specs) == sorted(values)
    for name, value in values.items():
        want, got = wanted(value, kind), source.read(name).float()
        if kind == "q8_0" and value.ndim > 1:  # a tie in rounding may go either way: one code
            step = value.float().reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert bool(((got - want).reshape(-1, 32).abs() <= step * (1 + 2**-10)).all()), name
            assert bool(((got - value).reshape(-1, 32).abs() <= 0.5 * step + 127 * 2**-11 * step + 1e-7).all()), name
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_says_the_same(tmp_path: Path, family: str, tied: bool) -> None:
    width = 128 if family == "Qwen3" else 16  # transformers reads no other of Qwen3's
    theta = 1e4 if family == "Llama" else 1e6
    folder = model_in(tmp_path / "model", family, tied=tied, rope_theta=theta, head_dim=width)
    to_gguf(open_source(folder), tmp_path / "gguf" / "m.gguf", kind="f32")
    tokens = torch.tensor([[3, 50, 7, 22, 4, 80, 9]])
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="m.gguf")(tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", list(RULES))
def test_tokens(tmp_path: Path, rule: str) -> None:
    folder = model_in(tmp_path / "model", "Qwen2" if rule == "qwen2" else "Llama", rule=rule)
    to_gguf(open_source(folder), tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    own = transformers.AutoTokenizer.from_pretrained(folder)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", rule)
    assert [
        t for t, kind in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True) if kind != 5
    ] == [own.convert_ids_to_tokens(i) for i in range(len(own))]
    table = json.loads((folder / "tokenizer.json").read_text())
    assert [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]] == [
        tuple(pair) for pair in table["model"]["merges"]
    ]
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<tool>"], kinds["a"], kinds[f"[PAD{len(own)}]"]) == (3, 4, 1, 5)
    assert fields["tokenizer.ggml.bos_token_id"] == own.bos_token_id and fields["tokenizer.ggml.eos_token_id"] == own.eos_token_id
    assert fields["tokenizer.chat_template"] == CHATML


def test_tokens_of_characters(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model", vocab_size=400)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    charwise(folder)
    to_gguf(open_source(folder), tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    own = transformers.AutoTokenizer.from_pretrained(folder)
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    for text in ("the task vectors", "a thin x", "sky é"):
        # llama.cpp: of all neighbouring pairs that are tokens, the one of the highest score is merged, the left one where two are equal.
        parts = list("▁" + text.replace(" ", "▁"))
        while pairs := [(scores[tokens.index(a + b)], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in tokens]:
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        pieces = [p for part in parts for p in ([part] if part in tokens else [f"<0x{byte:02X}>" for byte in part.encode()])]
        assert pieces == own.convert_ids_to_tokens(own.encode(text, add_special_tokens=False))
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-1] == 5


def test_ends_of_answers(tmp_path: Path) -> None:
    """The end token of texts stays; that of turns, which only the template tells, goes along."""
    folder = model_in(tmp_path / "model")
    bytewise(folder, eos_token="<|endoftext|>")
    written = to_gguf(open_source(folder), tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    own = transformers.AutoTokenizer.from_pretrained(folder)
    assert fields["tokenizer.ggml.eos_token_id"] == own.convert_tokens_to_ids("<|endoftext|>")
    assert fields["tokenizer.ggml.eot_token_id"] == own.convert_tokens_to_ids("<|im_end|>")
    assert not written.notes
    bytewise(folder, chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    written = to_gguf(open_source(folder), tmp_path / "plain.gguf")
    assert written.notes == ("the chat template puts no token after an answer, so only the end token ends one.",)
    bytewise(folder, chat_template="{{ raise_exception('no system') }}")
    written = to_gguf(open_source(folder), tmp_path / "failing.gguf")
    assert written.notes == ("the chat template goes along, but fails on a plain talk (no system).",)


def test_long_positions(tmp_path: Path) -> None:
    """Llama 3.1's frequencies: what transformers computes is the plain frequencies divided by the file's factors."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = model_in(tmp_path / "model", rope_parameters=rope)
    written = to_gguf(open_source(folder), tmp_path / "m.gguf")
    config = transformers.AutoConfig.from_pretrained(folder)
    want, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    factors = next(torch.from_numpy(one.data.copy()) for one in reader.tensors if one.name == "rope_freqs.weight")
    torch.testing.assert_close(plain / factors, want, rtol=1e-5, atol=0)
    assert (
        torch.equal(factors, llama3_factors(rope, 16))
        and bool((factors > 1).any())
        and written.tensors == len(reader.tensors) - 1
    )


def changed(folder: Path, file: str, **values: Any) -> None:
    table = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**table, **values}))


def test_refuses(tmp_path: Path) -> None:
    folder, out = model_in(tmp_path / "model"), tmp_path / "m.gguf"

    def fails(match: str, **options: Any) -> None:
        with pytest.raises((CheckpointError, OutputError), match=match):
            to_gguf(open_source(folder), out, **options)
        assert not out.exists() and not list(tmp_path.glob(".*partial")), "nothing that looks whole"

    fails("`kind` must be one of f16, bf16, q8_0, f32. Got 'q4_k'", kind="q4_k")
    before = (folder / "config.json").read_bytes()
    for entry, match in (
        ({"model_type": "t5"}, "models of type 't5' cannot be written as GGUF; llama, mistral"),
        ({"hidden_act": "gelu"}, "its config says hidden_act = 'gelu'"),
        ({"num_hidden_layers": 3}, r"has no tensor for 'blk.2.attn_norm.weight', which its config.json says"),
        ({"num_hidden_layers": 1}, "has a layer 1, and by its config.json 1 layers"),
        ({"num_key_value_heads": 4}, r"k_proj.weight' has shape \[32, 64\], and by its config.json \[64, 64\]"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary positions by 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "must say 'factor' and 'original_max_position_embeddings'",
        ),
        ({"tie_word_embeddings": True}, "says that the head is the embedding, but 'lm_head.weight' differs"),
    ):
        changed(folder, "config.json", **entry)
        fails(match)
        (folder / "config.json").write_bytes(before)
    tensors = load_file(folder / "model.safetensors")

    def with_tensors(**values: torch.Tensor) -> None:
        save_file({**tensors, **{name.replace("__", "."): value for name, value in values.items()}}, folder / "model.safetensors")

    spoilt = tensors["lm_head.weight"].clone()
    spoilt[5, 5] = 7e4
    with_tensors(lm_head__weight=spoilt)
    fails("'lm_head.weight' reaches 7e\\+04, which f16 cannot hold. Write it with `--type bf16`")
    spoilt[5, 5] = torch.nan
    with_tensors(lm_head__weight=spoilt)
    fails("'lm_head.weight' holds NaN or infinite values")
    with_tensors(score__weight=torch.ones(2, 64))
    fails("'score.weight' is no tensor that a GGUF file of the architecture 'llama' holds")
    with_tensors()
    said = (folder / "tokenizer_config.json").read_bytes()
    table = json.loads(said)
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in table.items() if k not in ("eos_token",)}))
    changed(folder, "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    fails("names no end token, so that what the model says would never stop")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    to_gguf(open_source(folder), out)  # told there, it is found
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2 and fields["tokenizer.ggml.eot_token_id"].contents() == 0
    with pytest.raises(OutputError, match="exists"):
        to_gguf(open_source(folder), out)
    out.unlink()
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    fails(r"cuts texts into words by a rule that is not known here .* `--pre NAME`")
    to_gguf(open_source(folder), out, pre="gpt-2")
    out.unlink()
    (folder / "tokenizer.json").unlink()
    fails(r"has no 'tokenizer.json' beside its weights.*save_pretrained")


def test_too_many_tokens(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model", vocab_size=100)
    with pytest.raises(CheckpointError, match=r"but the embedding has 100 rows\. Give the model its own tokenizer"):
        to_gguf(open_source(folder), tmp_path / "m.gguf")


def test_short_rows_stay_in_f16(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model", intermediate_size=80)
    written = to_gguf(open_source(folder), tmp_path / "m.gguf", kind="q8_0")
    assert any("2 matrices stay in f16, since their rows are no multiple of 32 long" in note for note in written.notes)
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (
        kinds["blk.0.ffn_down.weight"] == "F16"
        and kinds["blk.0.ffn_up.weight"] == "Q8_0"
        and kinds["output_norm.weight"] == "F32"
    )


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_in(tmp_path / "model")
    out = tmp_path / "m.gguf"
    code, printed = run(capsys, "export", "gguf", str(tmp_path / "model"), "--type", "bf16", "--name", "small", "-o", str(out))
    assert code == 0 and f"{out}: 21 tensors" in printed
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "small"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "match"), [("{", "not valid JSON"), ("[]", "must hold a table. Got list")])
def test_damaged_side_files(tmp_path: Path, file: str, content: str, match: str) -> None:
    folder = model_in(tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file}: {match}"):
        to_gguf(open_source(folder), tmp_path / "m.gguf")
