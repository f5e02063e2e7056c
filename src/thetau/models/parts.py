"""Which parameters a paradigm trains: attention, its biases, the MLP, a pattern, everything.

Attention-only fine-tuning (Jin et al., ICLR 2025, <https://arxiv.org/abs/2407.07089>) trains the weights of q, k, v and o and nothing
else; the paper's ablation (Table 5) adds the biases, the weights of the MLP, or both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from thetau.checkpoint import Kind, kind_of, layer_of
from thetau.errors import DataError, nearest

SCOPES = ("all", "attention", "attention+bias", "attention+mlp", "attention+mlp+bias")
_NORM = re.compile(r"norm|(?:^|[._])ln(?:_?\w)?(?=[._]|$)", re.IGNORECASE)


def part_of(name: str, shape: tuple[int, ...]) -> str:
    """`attention`, `attention.bias`, `mlp`, `mlp.bias` or `other`, by the parameter's name.

    A bias belongs to the part whose weight has the same name; biases of norms, embeddings and heads are `other`.
    """
    if len(shape) == 2:
        kind = kind_of(name, shape)
        return {Kind.ATTENTION: "attention", Kind.MLP: "mlp"}.get(kind, "other")
    if len(shape) == 1 and name.endswith("bias") and layer_of(name) is not None and not _NORM.search(name):
        kind = kind_of(re.sub(r"bias$", "weight", name), (1, 1))
        return {Kind.ATTENTION: "attention.bias", Kind.MLP: "mlp.bias"}.get(kind, "other")
    return "other"


def chosen_names(shapes: Mapping[str, tuple[int, ...]], scope: str) -> list[str]:
    """The names that `scope` trains: one of `SCOPES`, or patterns with `*`, separated by commas.

    Raises `DataError`: no attention in the model, or a pattern that matches nothing.
    """
    if scope == "all":
        return list(shapes)
    if scope in SCOPES:
        wanted = {"attention"}
        if "mlp" in scope:
            wanted.add("mlp")
        if "bias" in scope:
            wanted |= {f"{part}.bias" for part in wanted}
        parts = {name: part_of(name, shape) for name, shape in shapes.items()}
        if "attention" not in parts.values():
            some = ", ".join(list(shapes)[:3])
            raise DataError(
                f"scope {scope!r}: no attention weights are known in this model by their names ({some}, …). "
                "Name them with a pattern instead, such as '*attn*weight'."
            )
        return [name for name, part in parts.items() if part in wanted]
    patterns = [pattern.strip() for pattern in scope.split(",") if pattern.strip()]
    if not patterns or not any(mark in pattern for pattern in patterns for mark in "*?["):
        unknown = [pattern for pattern in patterns if pattern not in shapes]
        if unknown or not patterns:
            raise DataError(
                f"scope {scope!r} must be one of {', '.join(SCOPES)}, or patterns of parameter names separated by commas."
                f"{nearest(scope, SCOPES)}"
            )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise DataError(f"scope: the pattern {pattern!r} matches no parameter of the model.{nearest(pattern, shapes)}")
    return [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
