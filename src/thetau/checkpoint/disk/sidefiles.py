"""What lies beside a model's weights and belongs to the model: one list, for every output that takes it from a base.

Configs, tokenizers, templates, the code of a model and its licence go along. Weights of any format do not, nor does what tells of another
model: its page, its records, its training.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

# Compared without regard to case; also what is asked of a hub, which regards it.
SIDE_FILES = (
    "*.json",  # config, generation config, tokenizer, vocabulary, preprocessor, modules
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.vocab",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "*/config.json",
    "additional_chat_templates/*.jinja",
)
OF_ANOTHER = (
    "*.index.json",
    "thetau.json",
    "thetau_finetune.json",
    "adapter_config.json",
    "trainer_state.json",
    "data_config.json",
    "training_args.*",
    "*_results.json",
    "README*",
)
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.npz",
    "*.npy",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.h5",
    "*.keras",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.pb",
    "*.pkl",
    "*.nemo",
)
LARGEST = 200_000_000  # bytes: no tokenizer is larger, and weights under an unknown name are


def is_side_file(name: str) -> bool:
    """Whether a file belongs to the model beside which it lies; `name` is relative to the model's folder, with `/`."""
    path = PurePosixPath(name.lower())
    if any(part.startswith(".") for part in path.parts):
        return False
    if len(path.parts) == 2 and path.name == "config.json" and not path.parts[0][0].isdigit():
        return False  # only modules of sentence-transformers have one there, as 1_Pooling; checkpoint-500 is another model
    return _fits(path, SIDE_FILES) and not _fits(path, OF_ANOTHER) and not _fits(path, WEIGHTS)


def _fits(path: PurePosixPath, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(str(path), pattern.lower()) for pattern in patterns if pattern.count("/") == len(path.parts) - 1)


def copy_side_files(source: Path, target: Path, *, leave: Sequence[str] = ()) -> list[str]:
    """Copy the side files of a model's folder into another folder, which is there, but for some; their names, with `/`. Raises `OSError`."""
    copied: list[str] = []
    for path in sorted([*source.iterdir(), *source.glob("*/*")]):
        name = path.relative_to(source).as_posix()
        if is_side_file(name) and name not in leave and path.is_file() and path.stat().st_size < LARGEST:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name)
    return copied
