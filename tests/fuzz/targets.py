"""What the fuzzers call: each target puts hostile bytes where thetau reads, and lets only thetau's own errors through.

Anything else that comes out is a finding: another exception, a crash, a hang, a file opened outside the folder (see `guard`), memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import thetau
from thetau.engine.planning import plan
from thetau.errors import ThetauError
from thetau.recipes import load

MODEL = {"layers.0.mlp.weight": torch.arange(24.0).reshape(4, 6), "norm.weight": torch.ones(6), "ids": torch.arange(3)}
GOOD = save(MODEL)


def target(function: Callable[[bytes, Path], None]) -> Callable[[bytes, Path], bool]:
    """True where the input was read, False where it was refused; the folder is empty before and after."""

    def run(data: bytes, folder: Path) -> bool:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            with inside(folder):
                function(data, folder)
        except ThetauError as error:
            if not str(error):
                raise AssertionError("an error must say something") from error
            return False
        return True

    run.__doc__ = function.__doc__
    return run


def _read(source: Any) -> None:
    for name, spec in source.specs.items():
        assert source.read(name).shape == spec.shape
    source.fingerprint()


@target
def safetensors_file(data: bytes, folder: Path) -> None:
    """A model's file."""
    (folder / "model.safetensors").write_bytes(data)
    _read(thetau.open(folder).terms[0][1])


@target
def shard_index(data: bytes, folder: Path) -> None:
    """An index beside two good shards."""
    (folder / "model.safetensors.index.json").write_bytes(data)
    (folder / "a.safetensors").write_bytes(GOOD)
    (folder / "b.safetensors").write_bytes(save({"other": torch.zeros(2)}))
    (folder / "link.safetensors").symlink_to("/etc/hostname")
    _read(thetau.open(folder).terms[0][1])


@target
def recipe(data: bytes, folder: Path) -> None:
    """A recipe of models that are there."""
    for name in ("base", "a", "b"):
        (folder / f"{name}.safetensors").write_bytes(GOOD)
    (folder / "recipe.yaml").write_bytes(data)
    from thetau.facade import from_recipe

    expression = from_recipe(load(folder / "recipe.yaml"), engine=thetau.Engine(workers=1))
    plan(expression, engine=thetau.Engine(workers=1))


@target
def adapter(data: bytes, folder: Path) -> None:
    """A LoRA adapter's config over a good base; its weights are good too."""
    (folder / "base").mkdir()
    (folder / "base" / "model.safetensors").write_bytes(GOOD)
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_bytes(data)
    prefix = "base_model.model.layers.0.mlp"
    weights = {f"{prefix}.lora_A.weight": torch.ones(2, 6), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    (folder / "lora" / "adapter_model.safetensors").write_bytes(save(weights))
    base = thetau.open(folder / "base")
    _read(thetau.open(folder / "lora", base=base).terms[1][1])


@target
def torch_file(data: bytes, folder: Path) -> None:
    """A torch file: pickles of tensors alone are loaded."""
    (folder / "pytorch_model.bin").write_bytes(data)
    _read(thetau.open(folder).terms[0][1])


@target
def merge(data: bytes, folder: Path) -> None:
    """A merge of a good base and a hostile model, into a file."""
    (folder / "base.safetensors").write_bytes(GOOD)
    (folder / "model.safetensors").write_bytes(data)
    base = thetau.open(folder / "base.safetensors")
    merged = base + thetau.merge([thetau.open(folder / "model.safetensors") - base], thetau.methods.Ties())
    merged.save(folder / "out.safetensors", engine=thetau.Engine(workers=1))


@target
def record(data: bytes, folder: Path) -> None:
    """The record of an output, as `thetau verify` reads it."""
    (folder / "out").mkdir()
    (folder / "out" / "model.safetensors").write_bytes(GOOD)
    (folder / "out" / "thetau.json").write_bytes(data)
    thetau.verify(folder / "out", engine=thetau.Engine(workers=1))


TARGETS: dict[str, Callable[[bytes, Path], bool]] = {
    "safetensors_file": safetensors_file,
    "shard_index": shard_index,
    "recipe": recipe,
    "adapter": adapter,
    "torch_file": torch_file,
    "merge": merge,
    "record": record,
}


# No file outside the folder.

_ROOM: list[Path] = []
_SEEN: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _ROOM or not isinstance(arguments[0], str | bytes):
        return
    path = Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0])
    homes = (
        *_ROOM,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(thetau.__file__).parent,
        Path("/proc"),
        Path("/dev"),
        Path("/sys"),
    )
    with contextlib.suppress(OSError):
        path = path.resolve()
    if not any(path.is_relative_to(home.resolve()) for home in homes):
        _SEEN.append(str(path))


sys.addaudithook(_audit)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Fail where something outside the folder (and Python's own places) is opened meanwhile."""
    _ROOM.append(folder)
    _SEEN.clear()
    try:
        yield
    finally:
        _ROOM.pop()
    assert not _SEEN, f"opened outside the folder: {_SEEN}"


# Corpus.


class Evil:
    """A pickle that would make a file if it ran."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("open('ran', 'w')",))


def _header(entries: Any, data: bytes = b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def corpus() -> dict[str, dict[str, bytes]]:
    """Named hostile inputs (and a good one) by target."""
    two = [0, 8], [4, 12]
    files = {
        "good": GOOD,
        "empty": b"",
        "huge_length": struct.pack("<Q", 2**63) + b"{}",
        "length_of_a_gigabyte": struct.pack("<Q", 10**9) + b"{}",
        "overlap": _header({"v": _entry(data_offsets=two[0]), "w": _entry(data_offsets=two[1])}, bytes(12)),
        "out_of_range": _header({"w": _entry(data_offsets=[0, 1 << 40], shape=[1 << 38])}, bytes(8)),
        "negative": _header({"w": _entry(data_offsets=[-8, 0])}, bytes(8)),
        "absurd_shape": _header({"w": _entry(shape=[1 << 62, 0], data_offsets=[0, 0])}),
        "overflowing_shape": _header({"w": _entry(shape=[1 << 32, 1 << 32])}, bytes(8)),
        "shape_of_floats": _header({"w": _entry(shape=[2.0])}, bytes(8)),
        "shape_of_bools": _header({"w": _entry(shape=[True, True])}, bytes(8)),
        "nan_in_json": _header(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
        "duplicate": _header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":1}', bytes(8)),
        "deep": _header(b"[" * 50_000),
        "surrogate": _header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "huge_integer": _header(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        "odd_names": _header(
            {"../w": _entry(), "": _entry(data_offsets=[8, 16]), "a\0b": _entry(data_offsets=[16, 24])}, bytes(24)
        ),
    }
    index = {
        "good": {"weight_map": {**dict.fromkeys(MODEL, "a.safetensors"), "other": "b.safetensors"}},
        "up": {"weight_map": {"w": "../a.safetensors"}},
        "absolute": {"weight_map": {"w": "/etc/passwd"}},
        "link": {"weight_map": {"w": "link.safetensors"}},
        "nul": {"weight_map": {"w": "a\0b"}},
        "itself": {"weight_map": {"w": "model.safetensors.index.json"}},
        "folder": {"weight_map": {"w": "."}},
        "numbers": {"weight_map": {"w": 1}},
        "list": {"weight_map": ["w"]},
        "long": {"weight_map": {"w": "a" * 5000}},
    }
    recipes = {
        "good": "{base: base.safetensors, models: [a.safetensors, b.safetensors], method: ties}",
        "bomb": "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nbase: *c",
        "merge_keys": "<<: {base: base.safetensors}\nmodels: [a.safetensors]\nmethod: ties",
        "python": "base: !!python/object/apply:os.system ['touch ran']\nmodels: []\nmethod: ties",
        "deep": "[" * 20_000,
        "flow": "{" * 20_000,
        "twice": "base: a\nbase: b",
        "infinite": "{base: base.safetensors, models: [a.safetensors], method: {name: ties, density: .inf}}",
        "huge": "{base: base.safetensors, models: [a.safetensors], method: ties, seed: 1" + "0" * 5000 + "}",
        "sexagesimal": "{base: base.safetensors, models: [a.safetensors], method: {name: ties, density: 1:30}}",
        "date": "{base: 2001-01-01, models: [a.safetensors], method: ties}",
        "binary": "base: !!binary aGVsbG8=",
        "many_keys": "\n".join(f"k{index}: 1" for index in range(20_000)),
        "long_path": "{base: " + "a" * 5000 + ", models: [a.safetensors], method: ties}",
        "set": "base: !!set {a, b}",
        "unhashable": "? [a, b]\n: c",
        "passwd": "{base: /etc/passwd, models: [a.safetensors], method: ties}",
        "nul": 'base: "a\\0b"\nmodels: [a.safetensors]\nmethod: ties',
        "patterns": "{base: base.safetensors, models: [a.safetensors], method: ties, exclude: ['"
        + "*a" * 40
        + "b', '[', '[!]']}",
    }
    adapters: dict[str, Any] = {
        "good": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"]},
        "elsewhere": {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "base_model_name_or_path": "/etc",
            "auto_mapping": {"base_model_class": "os.system"},
        },
        "regex": {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "alpha_pattern": {"(a+)+$" * 5: 3},
            "rank_pattern": {"(.*)*x": 2},
        },
        "broken_regex": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"(": 3}},
        "infinite": {"peft_type": "LORA", "r": 2, "lora_alpha": 1e400},
        "zero": {"peft_type": "LORA", "r": 0, "lora_alpha": 4},
        "text": {"peft_type": "LORA", "r": "2", "lora_alpha": "x"},
        "other": {"peft_type": "IA3"},
        "list": [],
        "dora": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True},
    }
    good = io.BytesIO()
    torch.save(MODEL, good)
    torch_files = {
        "good": good.getvalue(),
        "evil": pickle.dumps({"w": Evil()}),
        "list": pickle.dumps([1, 2]),
        "empty": b"",
        "text": b"hello",
    }
    records: dict[str, Any] = {
        "good": {"tensors": {n: {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "crc32": 0} for n, t in MODEL.items()}},
        "numbers": {"tensors": {"w": {"dtype": 1, "shape": 2, "crc32": "x"}}},
        "inputs": {"tensors": {}, "inputs": 3, "recipe": 4},
        "list": [],
    }
    return {
        "safetensors_file": files,
        "shard_index": {name: json.dumps(content).encode() for name, content in index.items()},
        "recipe": {name: content.encode() for name, content in recipes.items()},
        "adapter": {name: json.dumps(content).encode() for name, content in adapters.items()},
        "torch_file": torch_files,
        "merge": files,
        "record": {name: json.dumps(content).encode() for name, content in records.items()},
    }
