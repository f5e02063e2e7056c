"""A model as one GGUF file, which llama.cpp loads: weights in f32, f16, bf16 or q8_0, with sizes, tokenizer, template and end tokens.

Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, written with the `gguf` package. Rows are read and written a few at a
time, so that a model larger than memory goes through. As llama.cpp's own conversion does, tensors of one axis stay in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thetau.checkpoint.config import config_for
from thetau.checkpoint.disk.failure import failed
from thetau.checkpoint.disk.folders import Place
from thetau.checkpoint.source import Source, Spec
from thetau.errors import CheckpointError
from thetau.export.architecture import FREQUENCIES, Architecture, architecture_of
from thetau.export.vocabulary import Vocabulary, vocabulary_of

TYPES = ("f16", "bf16", "q8_0", "f32")
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers of what most tensors are
BLOCK = 32  # values that share a scale in q8_0
CHUNK = 1 << 22  # elements that are in memory at once


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that was written: tensors and bytes, and what a user should know."""

    path: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A tensor of the file: its name there, what it is made of, and how it is stored."""

    name: str
    spec: Spec
    kind: str
    heads: int = 0


def to_gguf(source: Source, path: Path, *, kind: str = "f16", pre: str | None = None, name: str | None = None) -> Written:
    """Write a model as a GGUF file; `path` is new.

    - `kind`: how matrices are stored, one of `TYPES`. Rows that are no multiple of 32 long stay in f16 under q8_0.
    - `pre`: llama.cpp's name of the rule by which texts are cut into words, where the tokenizer's is not known here.
    - `name`: the model's name; that of its folder otherwise.

    Raises:
        CheckpointError: the model cannot be said in such a file, a value is not finite or too large for f16, or the `gguf` package is missing.
        OutputError: the file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("GGUF files are written with the `gguf` package: `pip install thetau[gguf]`.") from error
    if kind not in TYPES:
        raise CheckpointError(f"`kind` must be one of {', '.join(TYPES)}. Got {kind!r}.")
    if source.degree != 1 or source.partial:
        raise CheckpointError(
            f"{source.label}: is a task vector or an adapter, and only a model can be run. Add it to its base first."
        )
    architecture = architecture_of(config_for(source), source.label)
    tensors = list(_tensors(source, architecture, kind))
    _check_shapes(tensors, architecture, source.label)
    rows = next(one.spec.rows for one in tensors if one.name == "token_embd.weight")
    vocabulary = vocabulary_of(source.folder, source.label, rows, pre=pre)
    place = Place(path)
    try:
        place.begin()
        writer = gguf.GGUFWriter(str(place.partial / path.name), architecture.name)
        try:
            _say(writer, architecture, vocabulary, kind, name or Path(source.label).name)
            _write(writer, source, architecture, tensors)
        finally:
            writer.close()
        nbytes = (place.partial / path.name).stat().st_size
        place.commit_file(path.name)
    except OSError as error:
        raise failed(path, error) from error
    finally:
        place.clear()
        place.leave()
    short = [one.spec.name for one in tensors if kind == "q8_0" and one.kind == "f16"]
    notes = [*architecture.notes, *vocabulary.notes]
    if source.quantised:
        notes.append(f"the model is stored in {source.quantised}, which is dequantised before it is written.")
    if short:
        notes.append(f"{len(short)} matrices stay in f16, since their rows are no multiple of {BLOCK} long ({short[0]!r}).")
    return Written(path=path, tensors=len(tensors), nbytes=nbytes, notes=tuple(notes))


def _tensors(source: Source, architecture: Architecture, kind: str) -> Iterator[_Stored]:
    """The tensors of the file, in the order in which the model's lie."""
    for name, spec in source.specs.items():
        try:
            stored = architecture.stored(name)
        except CheckpointError as error:
            raise CheckpointError(f"{source.label}: {error}") from error
        if stored is None:
            continue
        if not spec.dtype.is_floating_point:
            raise CheckpointError(f"{spec.file}: {name!r} holds {spec.dtype}, which is no weight.")
        how = "f32" if len(spec.shape) < 2 else "f16" if kind == "q8_0" and spec.row_elements % BLOCK else kind
        yield _Stored(name=stored, spec=spec, kind=how, heads=architecture.in_pairs(name))


def _check_shapes(tensors: list[_Stored], architecture: Architecture, label: str) -> None:
    """Refuse a model that lacks a part, or that its config does not describe: llama.cpp would say so, but only where it is to run."""
    there = {one.name: one.spec for one in tensors}
    fields = architecture.fields
    hidden, inner, width = (int(fields[key]) for key in ("embedding_length", "feed_forward_length", "attention.key_length"))
    q, kv = architecture.heads * width, architecture.kv_heads * width
    wanted: dict[str, tuple[int, ...]] = {"token_embd": (int(fields["vocab_size"]), hidden), "output_norm": (hidden,)}
    if not architecture.tied:
        wanted["output"] = wanted["token_embd"]
    for layer in range(int(fields["block_count"])):
        parts: tuple[tuple[str, tuple[int, ...]], ...] = (
            ("attn_norm", (hidden,)),
            ("attn_q", (q, hidden)),
            ("attn_k", (kv, hidden)),
            ("attn_v", (kv, hidden)),
            ("attn_output", (hidden, q)),
            ("ffn_norm", (hidden,)),
            ("ffn_gate", (inner, hidden)),
            ("ffn_up", (inner, hidden)),
            ("ffn_down", (hidden, inner)),
        )
        wanted |= {f"blk.{layer}.{part}": shape for part, shape in parts}
    for part, shape in wanted.items():
        spec = there.get(f"{part}.weight")
        if spec is None:
            raise CheckpointError(
                f"{label}: has no tensor for {part + '.weight'!r}, which its config.json says it has. Mend the config, or the model."
            )
        if spec.shape != shape:
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} has shape {list(spec.shape)}, and by its config.json {list(shape)}. Mend the config."
            )
    extra = {int(match[1]) for name in there if (match := re.match(r"blk\.(\d+)\.", name))} - set(
        range(int(fields["block_count"]))
    )
    if extra:
        raise CheckpointError(
            f"{label}: has a layer {max(extra)}, and by its config.json {fields['block_count']} layers. Mend the config."
        )


def _say(writer: Any, architecture: Architecture, vocabulary: Vocabulary, kind: str, name: str) -> None:
    """Everything but the tensors."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    for key, value in architecture.fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture.name}.{key}", value)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for what, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_SPELLED.get(what, what)}_token_id", number)
    for what, on in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{what}", on)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


_SPELLED = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as the format spells them


def _write(writer: Any, source: Source, architecture: Architecture, tensors: list[_Stored]) -> None:
    from gguf import GGMLQuantizationType as Type

    if architecture.frequencies is not None:
        writer.add_tensor_info(FREQUENCIES, architecture.frequencies.shape, np.dtype("float32"), architecture.frequencies.nbytes)
    for one in tensors:
        writer.add_tensor_info(one.name, one.spec.shape, np.dtype("float32"), _nbytes(one), Type[one.kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    if architecture.frequencies is not None:
        out.write(architecture.frequencies.numpy().tobytes())
        writer.write_padding(out, architecture.frequencies.nbytes)
    twin = "lm_head.weight" if architecture.tied and "lm_head.weight" in source.specs else None
    for one in tensors:
        for rows, start, stop in _rows(source, one):
            if (
                twin is not None
                and one.name == "token_embd.weight"
                and not torch.equal(rows, source.read(twin, start, stop).float())
            ):
                raise CheckpointError(
                    f"{source.label}: its config.json says that the head is the embedding, but 'lm_head.weight' differs from it. Set "
                    "'tie_word_embeddings' to false, or take the head out."
                )
            out.write(_encoded(rows, one))
        writer.write_padding(out, _nbytes(one))


def _nbytes(one: _Stored) -> int:
    elements = prod(one.spec.shape)
    return {"f32": 4 * elements, "f16": 2 * elements, "bf16": 2 * elements, "q8_0": elements // BLOCK * (BLOCK + 2)}[one.kind]


def _rows(source: Source, one: _Stored) -> Iterator[tuple[Tensor, int, int]]:
    """A tensor a few rows at a time, in the file's order, in float32."""
    spec = one.spec
    step = max(1, CHUNK // max(1, spec.row_elements))
    size = spec.rows // one.heads if one.heads else 1
    step = max(1, step // size) * size  # whole heads
    for start in range(0, spec.rows, step):
        stop = min(start + step, spec.rows)
        rows = source.read(spec.name, start, stop).float()
        if one.heads:  # row t · h/2 + j of a head of h rows goes to 2 · j + t
            rows = rows.reshape(-1, 2, size // 2, *spec.shape[1:]).transpose(1, 2).reshape(stop - start, *spec.shape[1:])
        if not rows.isfinite().all():
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} holds NaN or infinite values. Find out which model brought them: `thetau inspect`."
            )
        yield rows, start, stop


def _encoded(rows: Tensor, one: _Stored) -> bytes:
    if one.kind == "q8_0":
        from gguf import GGMLQuantizationType, quants

        return bytes(quants.quantize(rows.contiguous().numpy(), GGMLQuantizationType.Q8_0).tobytes())
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[one.kind]
    values = rows.to(dtype).contiguous()
    if one.kind != "f32" and not values.isfinite().all():
        raise CheckpointError(
            f"{one.spec.file}: {one.spec.name!r} reaches {float(rows.abs().max()):.3g}, which {one.kind} cannot hold. Write it with `--type bf16`."
        )
    return values.view(torch.uint8).numpy().tobytes()
