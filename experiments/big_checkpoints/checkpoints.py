"""Checkpoints of real shapes: a mixture of experts with fused experts, and a Llama in bitsandbytes int8 and NF4; whole, or headers alone.

    python -m experiments.big_checkpoints.checkpoints make FOLDER FORM SIZE      # a base and two models that were moved a little from it
    python -m experiments.big_checkpoints.checkpoints check FOLDER FORM SIZE OUT # task arithmetic, worked out here, against what was written

Values come from a seed. Headers alone are files with a hole where the large tensors would be; the small ones, which say how the codes are read,
are there. Written and read without thetau.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Form = Literal["mixture", "int8", "nf4"]
FORMS: tuple[Form, ...] = ("mixture", "int8", "nf4")
MODELS = ("base", "a", "b")
SCALE = 0.3
BLOCK = 64  # entries of an NF4 scale
CHUNK = 1 << 20
NF4 = (  # the sixteen values of QLoRA's appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What shapes a decoder: OLMoE where it has experts, Llama where it has none."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    heads: int
    experts: int = 0


SHAPES: dict[str, dict[Form, Shape]] = {
    "7b": {
        "mixture": Shape(hidden=2048, inner=1024, layers=16, vocabulary=50304, heads=16, experts=64),  # OLMoE-1B-7B
        "int8": Shape(hidden=4096, inner=11008, layers=32, vocabulary=32000, heads=32),  # Llama 2 7B
        "nf4": Shape(hidden=4096, inner=11008, layers=32, vocabulary=32000, heads=32),
    },
    "280m": {
        "mixture": Shape(hidden=1024, inner=512, layers=8, vocabulary=24000, heads=8, experts=16),
        "int8": Shape(hidden=1024, inner=2816, layers=17, vocabulary=32000, heads=16),
        "nf4": Shape(hidden=1024, inner=2816, layers=17, vocabulary=32000, heads=16),
    },
    "tiny": {
        "mixture": Shape(hidden=32, inner=16, layers=2, vocabulary=64, heads=4, experts=4),
        "int8": Shape(hidden=32, inner=64, layers=2, vocabulary=64, heads=4),
        "nf4": Shape(hidden=32, inner=64, layers=2, vocabulary=64, heads=4),
    },
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its dtype as safetensors says it, its shape, and its bytes in pieces, given the model's number."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[int], Iterator[bytes]]
    small: bool = False  # needed to read the others: there in a file of headers too

    @property
    def nbytes(self) -> int:
        width = {"BF16": 2, "F32": 4, "I8": 1, "U8": 1}[self.dtype]
        return width * int(np.prod(self.shape))


def tensors(form: Form, shape: Shape) -> dict[str, Stored]:
    """The file's tensors by name."""
    wide = (shape.vocabulary, shape.hidden)
    found = {"model.embed_tokens.weight": _plain("embed", wide), "lm_head.weight": _plain("head", wide)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        linear = {f"{at}.self_attn.{part}_proj.weight": (shape.hidden, shape.hidden) for part in "qkvo"}
        if form == "mixture":
            found[f"{at}.mlp.gate.weight"] = _plain(f"{layer}.gate", (shape.experts, shape.hidden))
            both, back = (shape.experts, 2 * shape.inner, shape.hidden), (shape.experts, shape.hidden, shape.inner)
            found[f"{at}.mlp.experts.gate_up_proj"] = _plain(f"{layer}.experts", both)
            found[f"{at}.mlp.experts.down_proj"] = _plain(f"{layer}.down", back)
        else:
            linear |= {f"{at}.mlp.{part}_proj.weight": (shape.inner, shape.hidden) for part in ("gate", "up")}
            linear[f"{at}.mlp.down_proj.weight"] = (shape.hidden, shape.inner)
        for name, dims in linear.items():
            found |= {"mixture": _one, "int8": _int8, "nf4": _nf4}[form](name, dims)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = _plain(f"{layer}.{norm}", (shape.hidden,))
    return found | {"model.norm.weight": _plain("norm", (shape.hidden,))}


def config(form: Form, shape: Shape) -> dict[str, Any]:
    """The config.json beside them."""
    said: dict[str, Any] = {
        "model_type": "olmoe" if form == "mixture" else "llama",
        "architectures": ["OlmoeForCausalLM" if form == "mixture" else "LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if form == "mixture":
        said |= {"num_experts": shape.experts}
    else:
        said["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit" if form == "int8" else "load_in_4bit": True}
    return said


def write(folder: Path, form: Form, size: str, number: int, *, hollow: bool = False) -> Path:
    """One model's folder; `hollow` leaves the large tensors out, as a hole in the file."""
    shape = SHAPES[size][form]
    stored = tensors(form, shape)
    header, at = {}, 0
    for name, tensor in stored.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in stored.values():
            if hollow and not tensor.small:
                file.seek(tensor.nbytes, 1)
            else:
                for piece in tensor.pieces(number):
                    file.write(piece)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(json.dumps(config(form, shape)), encoding="utf-8")
    return folder


def _draws(name: str, number: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Standard normal values of the base and of what a model adds, in pieces: the same base whatever the model.

    Runs of one pool, each from a place that the tensor, the model and the piece give: as fast as memory is copied.
    """
    pool = _pool()
    for first in range(0, count, CHUNK):
        some = min(CHUNK, count - first)
        base, own = (_place(f"{name}:{first}:{seed}") for seed in (0, number))
        yield pool[base : base + some], pool[own : own + some] if number else np.zeros(some, np.float32)


@cache
def _pool() -> np.ndarray:
    return np.random.Generator(np.random.SFC64(0)).standard_normal(4 * CHUNK, np.float32)


def _place(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) % (3 * CHUNK)


def _bfloat16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") + 0x8000 >> 16).astype("<u2").tobytes()


def _plain(name: str, shape: tuple[int, ...]) -> Stored:
    """A tensor in bfloat16: 0.02 a value, and a twentieth of that moved."""

    def pieces(number: int) -> Iterator[bytes]:
        for base, own in _draws(name, number, int(np.prod(shape))):
            yield _bfloat16(0.02 * base + 0.001 * own)

    return Stored("BF16", shape, pieces)


def _one(name: str, shape: tuple[int, int]) -> dict[str, Stored]:
    return {name: _plain(name, shape)}


def _int8(name: str, shape: tuple[int, int]) -> dict[str, Stored]:
    """Codes and a scale a row, as bitsandbytes keeps them."""

    def codes(number: int) -> Iterator[bytes]:
        for base, own in _draws(name, number, shape[0] * shape[1]):
            yield np.clip(np.rint(32 * base + own), -127, 127).astype(np.int8).tobytes()

    def scales(number: int) -> Iterator[bytes]:
        for base, own in _draws(f"{name}.SCB", number, shape[0]):
            yield (0.08 + 0.001 * np.abs(base) + 0.0001 * np.abs(own)).astype("<f4").tobytes()

    return {name: Stored("I8", shape, codes), f"{name.removesuffix('.weight')}.SCB": Stored("F32", (shape[0],), scales)}


def _nf4(name: str, shape: tuple[int, int]) -> dict[str, Stored]:
    """Codes, two a byte, and a scale for each 64 entries, as bitsandbytes keeps them."""
    count = shape[0] * shape[1]
    state = json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}).encode()

    def codes(number: int) -> Iterator[bytes]:
        for base, own in _draws(name, number, count):
            found = np.clip(np.rint(7.5 + 3 * base + 0.2 * own), 0, 15).astype(np.uint8)
            yield (found[::2] << 4 | found[1::2]).tobytes()

    def scales(number: int) -> Iterator[bytes]:
        for base, own in _draws(f"{name}.absmax", number, count // BLOCK):
            yield (0.06 + 0.001 * np.abs(base) + 0.0001 * np.abs(own)).astype("<f4").tobytes()

    return {
        name: Stored("U8", (count // 2, 1), codes),
        f"{name}.absmax": Stored("F32", (count // BLOCK,), scales),
        f"{name}.quant_map": Stored("F32", (16,), lambda _: iter([np.array(NF4, "<f4").tobytes()]), small=True),
        f"{name}.quant_state.bitsandbytes__nf4": Stored("U8", (len(state),), lambda _: iter([state]), small=True),
    }


# What comes out, worked out here.


def values(folder: Path, form: Form, name: str, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """The first rows of a weight in float64."""
    if form == "int8":
        codes, scale = _read(folder, name), _read(folder, f"{name.removesuffix('.weight')}.SCB")
        return (codes.reshape(shape)[:rows] * scale[:rows, None].astype(np.float64)) / 127
    if form == "nf4":
        packed, scale, table = (_read(folder, f"{name}{end}") for end in ("", ".absmax", ".quant_map"))
        count = rows * shape[1]
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:count]
        return (table[codes].astype(np.float64) * scale[np.arange(count) // BLOCK]).reshape(rows, shape[1])
    return _read(folder, name).reshape(shape)[:rows].astype(np.float64)


def _read(folder: Path, name: str) -> np.ndarray:
    with open(folder / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        first, last = entry["data_offsets"]
        file.seek(8 + size + first)
        raw = file.read(last - first)
    if entry["dtype"] == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "I8": np.int8, "U8": np.uint8}[entry["dtype"]])


def checked(folder: Path, form: Form, size: str, out: Path) -> float:
    """The largest difference of task arithmetic's output from θ₀ + 0.3 Σ τ, in units of bfloat16's rounding of the value."""
    shape = SHAPES[size][form]
    names: dict[str, tuple[int, ...]] = {"model.layers.1.self_attn.o_proj.weight": (shape.hidden, shape.hidden)}
    if form == "mixture":
        names["model.layers.1.mlp.experts.gate_up_proj"] = (shape.experts, 2 * shape.inner, shape.hidden)
    else:
        names["model.layers.1.mlp.down_proj.weight"] = (shape.hidden, shape.inner)
    worst = 0.0
    for name, dims in names.items():
        rows = min(4, dims[0])
        base, *models = (values(folder / model, form, name, dims, rows) for model in MODELS)
        want = base + SCALE * sum(model - base for model in models)
        got = values(out, "mixture", name, dims, rows)
        worst = max(worst, float((np.abs(got - want) / np.maximum(np.abs(want) * 2.0**-8, 1e-9)).max()))
    return worst


def main(words: list[str] | None = None) -> None:
    """Make, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("out", type=Path, nargs="?")
    given = parser.parse_args(words)
    if given.what == "check":
        sys.stdout.write(f"{checked(given.folder, given.form, given.size, given.out)}\n")
        return
    for number, model in enumerate(MODELS):
        if not (given.folder / model / "config.json").exists():  # written last
            write(given.folder / model, given.form, given.size, number)


if __name__ == "__main__":
    main()
