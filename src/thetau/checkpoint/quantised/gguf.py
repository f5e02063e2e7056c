"""GGUF files of Llama-like families, through the `gguf` package: names as transformers has them, values as the package dequantises them.

Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; what llama.cpp changes when it converts a model:
<https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py>. The rows of Llama's and SmolLM3's queries and keys are stored head by head
in pairs, and are put back; Gemma's norms are stored plus one, which is taken off. A file of Llama, Qwen2 or Qwen3 tells a model's sizes, from
which a config is made where none lies beside it; tokenizers are not converted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype, dtype_name
from thetau.checkpoint.quantised.said import plain_files
from thetau.checkpoint.safetensors import SafetensorsFile, home_of
from thetau.checkpoint.source import Demand, Source, Spec, span
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {  # around attention and the MLP, as Gemma 2 and 3 have them
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp stores one architecture.

    - `model`: the class of transformers that a config made of the file names; None where the file does not say all that a config must.
    - `paired`: whether the rows of queries and keys are stored head by head in pairs.
    - `shift`: what is added to the weights of norms, which multiply by them as they are.
    - `inside`: parts of a block that are called otherwise than Llama's.
    """

    model: str | None = None
    paired: bool = False
    shift: float = 0.0
    inside: Mapping[str, str] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(model="LlamaForCausalLM", paired=True),
    "qwen2": Family(model="Qwen2ForCausalLM"),
    "qwen3": Family(model="Qwen3ForCausalLM"),
    "smollm3": Family(paired=True),
    "gemma": Family(shift=1.0),
    "gemma2": Family(shift=1.0, inside=NORMS),
    "gemma3": Family(shift=1.0, inside=NORMS),
    "phi3": Family(inside={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}
FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PLAIN = {dtype.name: dtype for dtype in (Dtype.F32, Dtype.F16, Dtype.BF16, Dtype.F64)}
ORIGINAL = "Take the original checkpoint in safetensors."
CHUNK = 1 << 20  # elements that are dequantised at once


class GgufFile(SafetensorsFile):
    """One open file: its header, parsed by the `gguf` package, and `pread` access to its data."""

    def _parse(self, pread: Callable[[int, int], bytes]) -> None:
        """Read and check the header."""
        gguf = _package(self.path)
        try:
            reader = gguf.GGUFReader(str(self.path))
            self.fields = {
                key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.t")
            }
            tensors = [
                (one.name, one.tensor_type, tuple(int(n) for n in reversed(one.shape)), int(one.n_bytes), int(one.data_offset))
                for one in reader.tensors
            ]
        except Exception as error:  # a damaged header fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.path}: not a readable GGUF file ({reason}). Copy or download it again.") from error
        self.kinds: dict[str, Any] = {}
        self.specs, self.offsets, self.sizes = {}, {}, {}
        for name, kind, shape, size, offset in tensors:
            if offset + size > self.size:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} ends at byte {offset + size}, the file has {self.size}. It is truncated: copy it again."
                )
            dtype = PLAIN.get(kind.name, Dtype.BF16)
            self.specs[name] = Spec(name=name, shape=shape, dtype=dtype, file=str(self.path))
            self.kinds[name], self.offsets[name], self.sizes[name] = kind, offset, size
        self.metadata, self.start = {}, 0
        self.header_bytes = pread(min(self.offsets.values(), default=0), 0)


def _package(path: Path | str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{path}: GGUF files are read with the `gguf` package: `pip install thetau[gguf]`.") from error
    return gguf


class GgufSource(Source):
    """A model in a GGUF file; quantised weights come in float32 and are written in bfloat16 unless another dtype is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.label = str(path)
        self.folder = home_of(path)
        self.key = "file:" + hashlib.sha256(f"{self._file.place}:{self._file.stamp}".encode()).hexdigest()
        self.architecture = str(self._file.fields.get("general.architecture", ""))
        self._check()
        self.family = FAMILIES[self.architecture]
        self._stored: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        for name, spec in self._file.specs.items():
            if name in FREQUENCIES:
                continue
            shown = self._shown(name)
            self._stored[shown] = name
            self.specs[shown] = Spec(name=shown, shape=spec.shape, dtype=spec.dtype, file=spec.file)
        dtype = self.specs["model.embed_tokens.weight"].dtype if "model.embed_tokens.weight" in self.specs else Dtype.BF16
        self.files = plain_files(self.folder, dtype) if self.folder is not None else {"config.json": self._config(dtype)}
        kinds = sorted({kind.name for kind in self._file.kinds.values()} - set(PLAIN))
        self.quantised = f"GGUF's {', '.join(kinds)}" if kinds else ""
        self._notes = (
            f"{path}: a GGUF file ({', '.join(kinds) or 'plain floats'}), read dequantised under the names of transformers; its tokenizer is not converted.",
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows: of a quantised tensor in float32, of every other as stored."""
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        heads = self._heads(name)
        if not heads:
            rows = self._rows(self._stored[name], spec, start, stop)
            return rows - self.family.shift if self.family.shift and name.endswith("norm.weight") else rows
        # Within a head of h rows, row t · h/2 + j of the model is row 2 · j + t of the file.
        size = spec.rows // heads
        first, last = start // size * size, -(-stop // size) * size
        order = torch.arange(first, last).reshape(-1, size // 2, 2).transpose(1, 2).reshape(-1)
        return self._rows(self._stored[name], spec, first, last)[order[start - first : stop - first] - first]

    def demand(self, name: str) -> Demand:
        """The bytes of a tensor, and the memory that they take while they become numbers."""
        spec = self.specs[name]
        return Demand(self._file.sizes[self._stored[name]], 32 * max(spec.row_elements, min(spec.elements, CHUNK)), 0.0, "torch")

    def fingerprint(self) -> str:
        """That of the file."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._file.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """SHA-256 of the file's header."""
        return {Path(self.label).name: hashlib.sha256(self._file.header_bytes).hexdigest()}

    def changed_files(self) -> list[str]:
        """The file, if it is no longer what was opened."""
        return [] if self._file.unchanged() else [self.label]

    def _rows(self, stored: str, spec: Spec, start: int, stop: int) -> Tensor:
        row_bytes = self._file.sizes[stored] // max(1, spec.rows)
        kind = self._file.kinds[stored]
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        if kind.name in PLAIN:
            raw = self._file.read_bytes(
                self._file.offsets[stored] + start * row_bytes, (stop - start) * row_bytes, f"tensor {stored!r}"
            )
            return raw.view(spec.dtype.torch).reshape(shape)
        out = torch.empty(shape)
        dequantize = _package(self.label).quants.dequantize
        step = max(1, CHUNK // max(1, spec.row_elements))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            raw = self._file.read_bytes(
                self._file.offsets[stored] + first * row_bytes, (last - first) * row_bytes, f"tensor {stored!r}"
            )
            values = dequantize(raw.numpy().reshape(last - first, -1), kind).astype(np.float32, copy=False)
            out[first - start : last - start] = torch.from_numpy(values).reshape(last - first, *spec.shape[1:])
        return out

    def _shown(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
        inside = {**INSIDE, **self.family.inside}
        part = (inside if match[1] else OUTSIDE).get(match[2]) if match else None
        if match is None or part is None:
            raise CheckpointError(
                f"{self.label}: {name!r} is no tensor of {self.architecture!r} that is known (experts are not read). {ORIGINAL}"
            )
        return f"model.layers.{match[1]}.{part}.{match[3]}" if match[1] else f"{part}.{match[3]}"

    def _heads(self, name: str) -> int:
        """How many heads' rows are stored in pairs; 0 where they are stored as they are."""
        match = re.search(r"\.self_attn\.([qk])_proj\.(?:weight|bias)$", name)
        if match is None or not self.family.paired:
            return 0
        return self._number("attention.head_count") if match[1] == "q" else self._kv_heads()

    def _kv_heads(self) -> int:
        return (
            self._number("attention.head_count_kv")
            if self._known("attention.head_count_kv")
            else self._number("attention.head_count")
        )

    def _known(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._file.fields

    def _number(self, key: str) -> int:
        value = self._file.fields.get(f"{self.architecture}.{key}")
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self.label}: must say `{self.architecture}.{key}`, one positive number. Got {str(value)[:60]}. {ORIGINAL}"
            )
        return value

    def _check(self) -> None:
        """Refuse what is not read."""
        fields = self._file.fields
        if self.architecture not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(
                f"{self.label}: GGUF files of the architecture {self.architecture!r} cannot be read; {known} can. {ORIGINAL}"
            )
        if int(fields.get("split.count", 1) or 1) > 1:
            raise CheckpointError(
                f"{self.label}: is one of {fields['split.count']} pieces. Join them: `llama-gguf-split --merge`."
            )
        for name, spec in self._file.specs.items():
            kind = self._file.kinds[name].name
            if kind.startswith("I") and not kind.startswith("IQ"):
                raise CheckpointError(f"{self.label}: {name!r} holds integers ({kind}), which are no weights. {ORIGINAL}")
            if not spec.shape or not spec.elements:
                raise CheckpointError(f"{self.label}: {name!r} is empty. Copy or download the file again.")
        scaling = [
            key for key in fields if key.startswith(f"{self.architecture}.rope.scaling.") and fields[key] not in ("none", "")
        ]
        scaling += [name for name in FREQUENCIES if name in self._file.specs]
        if self.folder is None and FAMILIES[self.architecture].model is None:
            raise CheckpointError(
                f"{self.label}: does not say all that a config of {self.architecture!r} must. Put the original model's config.json, and the tokenizer's files, "
                "beside the GGUF file."
            )
        if self.folder is None and scaling:
            raise CheckpointError(
                f"{self.label}: scales its rotary positions ({scaling[0]!r}), which only the original model's config.json says as "
                "transformers needs it. Put that config.json, and the tokenizer's files, beside the GGUF file."
            )
        for heads, part in ((self._number("attention.head_count"), "attn_q"), (self._kv_heads(), "attn_k")):
            for name, spec in self._file.specs.items():
                if name.endswith((f".{part}.weight", f".{part}.bias")) and spec.rows % (2 * heads):
                    raise CheckpointError(
                        f"{self.label}: {name!r} has {spec.rows} rows, which {heads} heads cannot share in pairs."
                    )

    def _config(self, dtype: Dtype) -> Mapping[str, Any]:
        """A config of these sizes."""
        fields, of = self._file.fields, self.architecture
        embedding = self._file.specs.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.label}: holds no 'token_embd.weight', so it is no whole model. {ORIGINAL}")
        heads = self._number("attention.head_count")
        tokens = {key: fields.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
        return {
            "model_type": of,
            "architectures": [self.family.model],
            "vocab_size": embedding.shape[0],
            "hidden_size": self._number("embedding_length"),
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads(),
            "head_dim": self._number("attention.key_length")
            if self._known("attention.key_length")
            else self._number("embedding_length") // heads,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": float(fields.get(f"{of}.attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_theta": float(fields.get(f"{of}.rope.freq_base", 10000.0)),
            "attention_bias": "blk.0.attn_q.bias" in self._file.specs,
            "tie_word_embeddings": "output.weight" not in self._file.specs,
            "torch_dtype": dtype_name(dtype),
            **{key: value for key, value in tokens.items() if value is not None},
        }


def open_gguf(path: Path) -> GgufSource:
    """A GGUF file.

    Raises:
        CheckpointError: it is damaged, of an architecture that is not read, or the `gguf` package is not installed.
    """
    return GgufSource(path)
