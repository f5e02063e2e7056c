"""Our rows of merged vocabularies against mergekit's, token by token; no test, since mergekit wants an environment of its own.

`PYTHONPATH=src:tests:tests/recipes python tests/parity/make_mergekit_tokens.py ours FOLDER`, then, where mergekit 0.1.5 is installed,
`python tests/parity/make_mergekit_tokens.py theirs FOLDER`, which must say that nothing differs: BPE, WordPiece and Unigram, two bases,
union, base, a model, tokens with sources, padding (whose mean is taken in float64 here).
"""

import copy
import json
import sys
from pathlib import Path

import torch

CASES = {
    "union": {"source": "union"},
    "base": {"source": "base"},
    "model": {"source": "second"},
    "pad": {"source": "union", "pad_to_multiple_of": 16},
    "tokens": {
        "source": "union",
        "tokens": {
            "<p>": {"source": "third", "force": True},
            "<q>": {"source": {"kind": "zero"}},
            "<new>": {"source": {"kind": "model_token", "model": "second", "token": "<unk>"}},
            "<id>": {"source": {"kind": "model_token", "model": "first", "token_id": 5}},
            "<unk>": {"source": {"kind": "zero"}, "force": True},
        },
    },
}


def ours(root: Path) -> None:
    """Make the models, and what thetau reads of them."""
    from safetensors.torch import save_file
    from test_tokens import KINDS, OTHER_WORDS, WORDS, AutoTokenizer, make_model, make_tokenizer, rows_of, speaker

    from thetau.recipes.mergekit.tokens import TokenizerSettings, vocabulary

    found = {}
    for kind in KINDS:
        tok, other = make_tokenizer(kind, WORDS, []), make_tokenizer(kind, [*WORDS, *OTHER_WORDS], ["<z>"], 75)
        said = {"first": (tok, []), "second": (tok, ["<q>", "<p>"]), "third": (other, ["<p>", "<r>"])}
        for at, (name, (t, added)) in enumerate(said.items()):
            f = make_model(root / kind / name, t, added=added)
            torch.manual_seed(at)
            n = len(AutoTokenizer.from_pretrained(str(f)))
            w = {"model.embed_tokens.weight": torch.randn(n, 8), "lm_head.weight": torch.randn(n, 8)}
            save_file(w, f / "model.safetensors")
            (f / "config.json").write_text(
                json.dumps(
                    {
                        "model_type": "llama",
                        "architectures": ["LlamaForCausalLM"],
                        "vocab_size": n,
                        "hidden_size": 8,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 1,
                        "intermediate_size": 8,
                    }
                )
            )
        for base in ("first", "third"):
            for case, y in CASES.items():
                sp = [speaker(root / kind / n) for n in said]
                v = vocabulary(sp, base, TokenizerSettings.read(y))
                found[kind, base, case] = (
                    dict(v.tokens),
                    v.rows,
                    v.real,
                    {
                        (label, n): rows_of(v, sp, label, n)
                        for label in said
                        for n in ("model.embed_tokens.weight", "lm_head.weight")
                    },
                )
    torch.save((CASES, found), root / "ours.pt")


def theirs(root: Path) -> None:
    """Compare with what mergekit makes of them."""
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import TokenizerConfig
    from mergekit.tokenizer.embed import PermutedVocabulary
    from safetensors.torch import load_file

    cases, ours = torch.load(root / "ours.pt", weights_only=False)
    n, worst, bad, fails, padw = 0, 0.0, [], [], 0.0
    for (kind, base, case), (tokens, rows, real, mine) in ours.items():

        def ref(label, kind=kind):
            return ModelReference.parse(f"{root}/{kind}/{label}")

        def path(o, ref=ref):
            if isinstance(o, dict):
                return {
                    k: (
                        str(ref(v))
                        if k in ("model", "source") and isinstance(v, str) and v in ("first", "second", "third")
                        else path(v, ref)
                    )
                    for k, v in o.items()
                }
            return o

        cfg = TokenizerConfig.model_validate(path(copy.deepcopy(cases[case])))
        labels = ["first", "second", "third"]
        models = [ref(label) for label in labels]
        try:
            info = build_tokenizer(ref(base), models, cfg.source, False, list((cfg.tokens or {}).keys()))
        except Exception as e:
            fails.append((kind, base, case, repr(e)[:120]))
            continue
        known = info.tokenizer.get_vocab()
        if set(known) != set(tokens):
            bad.append((kind, base, case, "tokens", sorted(set(known) ^ set(tokens))[:5]))
            continue
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            t = {m: load_file(f"{root}/{kind}/{label}/model.safetensors")[name] for label, m in zip(labels, models, strict=False)}
            task = PermutedVocabulary.model_construct(
                gather_tensors=None,
                tokenizer_task=None,
                tokens=ImmutableMap(data=cfg.tokens) if cfg.tokens else None,
                pad_to_multiple_of=cfg.pad_to_multiple_of,
                base_model=ref(base),
                vocabulary_axis=0,
            )
            res = task.execute(tokenizer_info=info, tensors=t)
            for label, m in zip(labels, models, strict=False):
                a, b = mine[label, name], res[m]
                if len(a) != len(b):
                    bad.append((kind, base, case, label, len(a), len(b)))
                for tok, i in tokens.items():
                    n += 1
                    d = (a[i] - b[known[tok]]).abs().max().item()
                    worst = max(worst, d)
                    if d:
                        bad.append((kind, base, case, label, tok, d))
                if rows > real:
                    padw = max(padw, (a[real:] - b[len(known) :]).abs().max().item())
    print("rows compared", n, "worst", worst, "padding", padw, "differing", len(bad))
    print(*bad[:20], sep="\n")
    print("mergekit failed:", *fails, sep="\n")
    sys.exit(bool(bad or fails or padw > 1e-6))


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](Path(sys.argv[2]))
