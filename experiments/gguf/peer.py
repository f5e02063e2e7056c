"""Run by the Python that has llama-cpp-python, which need not be ours: what llama.cpp makes of a GGUF file, as JSON on the output.

python peer.py FILE < texts.json
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama  # type: ignore[import-not-found]

MOST = 12  # tokens that are said after each text


def main() -> None:
    """Tokens, the last position's logits, and what is said next, of each text."""
    texts = json.load(sys.stdin)
    model = Llama(sys.argv[1], n_ctx=512, n_threads=2, logits_all=True, verbose=False, seed=0)
    rows = []
    for text in texts:
        tokens = model.tokenize(text.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(tokens)
        logits = np.array(model.scores[len(tokens) - 1], dtype=np.float64)
        said: list[int] = []
        for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
            if token == model.token_eos() or len(said) == MOST:
                break
            said.append(token)
        rows.append({"tokens": tokens, "logits": [float(one) for one in logits], "said": said})
    talk = [{"role": "user", "content": "Say hello."}]
    answer = model.create_chat_completion(messages=talk, max_tokens=24, temperature=0.0)
    json.dump({"rows": rows, "eos": model.token_eos(), "chat": answer["choices"][0]}, sys.stdout)


if __name__ == "__main__":
    main()
