"""Two outputs of one recipe beside one another: names, shapes, configs, tokens, and the largest difference of any entry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

BOUND = 2e-6
ENTRIES = 6
MANY, SIGMAS = 100_000, 5.0  # fewest entries for statistics; widths of the bound
BY_TOKEN = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
KEYS = ("num_hidden_layers", "n_layer", "vocab_size", "tie_word_embeddings", "num_local_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Output:
    """A model that was written."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    template: str | None = None


@dataclass
class Verdict:
    """What two outputs differ in: words for what is not a number, and the largest difference of any entry."""

    largest: float = 0.0
    worst: str = ""
    tensors: int = 0
    differences: list[str] = field(default_factory=list)


def read(folder: Path) -> Output:
    """The output in a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    said = folder / "tokenizer_config.json"
    config = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    whole = folder / "config.json"
    return Output(tensors, json.loads(whole.read_text(encoding="utf-8")) if whole.exists() else {}, tokens(folder), template)


def tokens(folder: Path) -> dict[str, int]:
    """The ids of a tokenizer's tokens; nothing where there is none."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return {}
    document = json.loads(file.read_text(encoding="utf-8"))
    return {**document["model"]["vocab"], **{one["content"]: one["id"] for one in document["added_tokens"]}}


def compare(ours: Output, theirs: Output, apart: tuple[str, ...] = (), *, templates: bool = False) -> Verdict:
    """Every tensor against the other's of that name; rows of tokens by token where the two number them otherwise.

    Of tensors whose name ends in one of `apart`, which are drawn, only the shapes are compared. Chat templates are compared by
    what they write, with `templates`.
    """
    verdict = Verdict(tensors=len(theirs.tensors))
    for names, label in (
        (ours.tensors.keys() - theirs.tensors.keys(), "here"),
        (theirs.tensors.keys() - ours.tensors.keys(), "there"),
    ):
        if names:
            verdict.differences.append(f"only {label}: {', '.join(sorted(names))}")
    for key in KEYS:
        mine, other = ours.config.get(key), theirs.config.get(key)
        if mine != other and None not in (mine, other):
            verdict.differences.append(f"`{key}` {mine} here, {other} there")
    if ours.tokens.keys() != theirs.tokens.keys() and theirs.tokens:
        verdict.differences.append(f"{len(ours.tokens)} tokens here, {len(theirs.tokens)} there")
    if templates and rendered(ours.template) != rendered(theirs.template):
        verdict.differences.append("the chat templates render otherwise")
    for name in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        mine, other = ours.tensors[name], theirs.tensors[name]
        if mine.dtype != other.dtype:
            verdict.differences.append(f"{name}: {mine.dtype} here, {other.dtype} there")
        if (
            name.endswith(BY_TOKEN)
            and ours.tokens
            and theirs.tokens
            and (ours.tokens != theirs.tokens or mine.shape != other.shape)
        ):
            shared = [token for token in theirs.tokens if token in ours.tokens]
            if mine.shape != other.shape:
                verdict.differences.append(f"{name}: {mine.shape[0]} rows here, {other.shape[0]} there")
            mine = mine[[ours.tokens[token] for token in shared]]
            other = other[[theirs.tokens[token] for token in shared]]
        if mine.shape != other.shape:
            verdict.differences.append(f"{name}: {list(mine.shape)} here, {list(other.shape)} there")
            continue
        if name.endswith(apart):
            continue
        difference = (mine.double() - other.double()).abs().max().item() if mine.numel() else 0.0
        if math.isnan(difference) or difference > verdict.largest:
            verdict.largest, verdict.worst = difference, name
    return verdict


def unstacked(tensors: Mapping[str, torch.Tensor], named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that lie stacked in one tensor, as transformers 5 holds them, one by one under the names of published checkpoints."""
    block = "block_sparse_moe" if any("block_sparse_moe" in name for name in named) else "mlp"
    parts = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, tensor in tensors.items():
        said = name.replace(".mlp.", f".{block}.")
        at, stack, kind = said.partition(".experts.")
        if stack and kind in ("gate_up_proj", "down_proj"):
            for number, expert in enumerate(tensor):
                pieces = expert.chunk(2) if kind == "gate_up_proj" else (expert,)
                for part, piece in zip(parts[:2] if len(pieces) == 2 else parts[2:], pieces, strict=True):
                    found[f"{at}.experts.{number}.{part}.weight"] = piece
        else:
            found[said] = tensor
    return found


def rendered(template: str | None) -> list[str]:
    """Two conversations as a chat template writes them; nothing where there is none."""
    if not template:
        return []
    import jinja2

    turns = [
        {"role": "user", "content": " Hello. "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]
    reader = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).from_string(
        template
    )
    words = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return [
        reader.render(messages=messages, **words) for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns])
    ]


def fingerprint(output: Output) -> dict[str, np.ndarray]:
    """Names of the tensors, and of each its norm, its largest magnitude and a few entries, `[tensor, 2 + ENTRIES]`.

    Rows that belong to tokens stand in the order of the tokens' text.
    """
    names, rows = sorted(output.tensors), []
    for name in names:
        tensor = output.tensors[name].double()
        if name.endswith(BY_TOKEN) and output.tokens:
            tensor = tensor[[output.tokens[token] for token in sorted(output.tokens)]]
        flat = tensor.reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), ENTRIES).long()
        entries = flat[places] if flat.numel() else torch.zeros(ENTRIES, dtype=torch.float64)
        rows.append(torch.cat([torch.stack([flat.norm(), flat.norm(torch.inf)]), entries]))
    return {"names": np.array("\n".join(names)), "values": torch.stack(rows).to(torch.float32).numpy()}


def drawn(ours: Output, theirs: Output, base: Output) -> dict[str, Any]:
    """The share of entries that changed, their mean and their mean square, of every tensor of at least `MANY` entries.

    Entries are drawn independently, so that each of these is a mean of n independent numbers; two such means differ by at most `SIGMAS`
    times the root of the sum of their variances over n, but for one case in millions. `ratio` is the largest difference over that bound.
    """
    ratios: dict[str, float] = {"density": 0.0, "mean": 0.0, "variance": 0.0}
    count = 0
    for name, before in base.tensors.items():
        if before.numel() < MANY:
            continue
        count += 1
        changes = [(output.tensors[name].double() - before.double()).reshape(-1) for output in (ours, theirs)]
        for key, of in {"density": _changed, "mean": _itself, "variance": _square}.items():
            one, other = (of(change) for change in changes)
            spread = (one.var() + other.var()) / before.numel()
            ratios[key] = max(ratios[key], ((one.mean() - other.mean()).abs() / (SIGMAS * spread.sqrt())).item())
    return {
        "tensors": count,
        "ratios": ratios,
        "ratio": max(ratios.values()),
        "verdict": "agrees" if max(ratios.values()) <= 1 else "differs",
    }


def _changed(change: torch.Tensor) -> torch.Tensor:
    return (change != 0).double()


def _itself(change: torch.Tensor) -> torch.Tensor:
    return change


def _square(change: torch.Tensor) -> torch.Tensor:
    return change.square()
