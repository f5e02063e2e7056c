"""Which stored tensors hold several matrices, and how they lie in them; from names, shapes and the base's config.

The rule has two halves. **Experts** stacked in one tensor are matrices of their own, and so are the gate and the up projection of an expert:
one library keeps a mixture in either form, and the form must not change a merge. **Fused q/k/v** and the `gate_up_proj` of an MLP that is no
mixture are one matrix of the model; a method with `split_fused` takes them apart. How the heads lie in fused q/k/v is read from the config:

- one after the other: q, then k, then v (`qkv`, `in_proj_weight`, `Wqkv`, GPT-2's `c_attn`, Phi-3's `qkv_proj`, Falcon with one key head);
- head by head, or group by group: the queries that share a key, the key, the value (GPT-NeoX, BLOOM, Persimmon, Falcon otherwise, InternLM2).

Names of the pieces are those that the same matrices have where they are stored alone, as `experts.3.gate_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from thetau.checkpoint.naming import view_of
from thetau.checkpoint.pieces import Fused, Part, Strip
from thetau.checkpoint.source import Spec

_STACKED = re.compile(r"^(?P<before>(?:.*\.)?)experts\.(?P<leaf>[A-Za-z]\w*?)(?P<bias>_bias|\.bias)?(?:\.weight)?$")
_LINEAR = re.compile(r"^(?P<before>.*\.)(?P<leaf>input_linear|output_linear)\.weight$")  # Granite and JetMoE
_BELOW = re.compile(
    r"^(?P<before>(?:.*\.)?)experts\.mlp\.(?P<leaf>w1|v1|w2)$"
)  # DBRX: one expert's rows after another's, in two dimensions
_ONE = re.compile(r"^(?P<before>(?:.*\.)?)experts\.\d+\.")
_ROUTER = re.compile(r"^(?:(?:gate|router)(?:\.\w+)?\.\w+|shared_expert_gate\.\w+)$")
_BACK = {"gate_up_proj": "down_proj", "fc1": "fc2", "input_linear": "output_linear"}  # gate and up in one → the way back
_DOWN = ("down_proj", "fc2", "output_linear", "w2")
_CALLED = {"fc1": "up_proj", "fc2": "down_proj", "input_linear": "up_proj", "output_linear": "down_proj", "v1": "up_proj"}
_TURNED = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")  # experts are kept [in, out]
_ALTERNATING = ("gpt_oss",)  # gate and up alternate along d_out
_QKV = re.compile(r"^(?P<before>(?:.*\.)?)(?P<leaf>query_key_value|qkv_proj|wqkv|Wqkv|c_attn|qkv|W_pack|in_proj(?=_))[._]weight$")
_GATE_UP = re.compile(r"^(?P<before>.*\.)gate_up_proj\.weight$")
# How q, k and v lie in what a model type calls so; of the others nothing is known, unless they are three equal parts by name.
_ORDER: Mapping[tuple[str, str], str] = {
    **{(kind, "query_key_value"): "grouped" for kind in ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")},
    **{(kind, "query_key_value"): "grouped" for kind in ("falcon", "RefinedWeb", "RefinedWebModel")},
    **{(kind, "qkv_proj"): "in turn" for kind in ("phi3", "phi3_v", "phi4_multimodal", "phi4mm")},
    ("chatglm", "query_key_value"): "in turn",
    ("internlm2", "wqkv"): "grouped",
    ("dbrx", "Wqkv"): "in turn",
    ("gpt_bigcode", "c_attn"): "in turn",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a config says that shapes fused tensors; 0 and empty for what it does not say.

    - `kind`: the model type.
    - `hidden`: entries of the residual stream.
    - `heads`, `keys`: heads of queries, and of keys and values; `width`: entries of a head.
    - `order`: how q, k and v lie, where the model type leaves it to other entries.
    - `experts`: of a mixture.
    """

    kind: str = ""
    hidden: int = 0
    heads: int = 0
    keys: int = 0
    width: int = 0
    order: str = ""
    experts: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Those of one model's table."""
        kind = str(config.get("model_type", ""))
        inner = [part for key in ("attn_config", "ffn_config") if isinstance(part := config.get(key), Mapping)]
        table = {key: value for part in (*inner, config) for key, value in part.items()}

        def number(*names: str) -> int:
            return next((table[name] for name in names if type(table.get(name)) is int and table[name] > 0), 0)

        hidden = number("hidden_size", "n_embd", "d_model")
        heads = number("num_attention_heads", "n_head", "n_heads", "num_heads")
        keys = number("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads") or heads
        order = ""
        if kind == "gpt_bigcode" or (kind.startswith(("falcon", "Refined")) and not table.get("new_decoder_architecture")):
            one = bool(table.get("multi_query", True))
            keys, order = (1, "in turn") if one else (heads, "grouped")
        elif kind == "chatglm" and table.get("multi_query_attention"):
            keys = number("multi_query_group_num")
        width = number("head_dim", "kv_channels") or (hidden // heads if heads else 0)
        experts = number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return cls(kind=kind, hidden=hidden, heads=heads, keys=keys, width=width, order=order, experts=experts)


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """What the stored tensors of one model hold.

    - `fused`: by stored name.
    - `unknown`: fused q/k/v of which nothing says how the heads lie; they stay one matrix.
    """

    fused: Mapping[str, Fused] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads off the names, shapes and config of one model what its tensors hold.

    - `specs`: all of its tensors.
    - `config`: its config.json, empty where there is none.
    """

    specs: Mapping[str, Spec]
    config: Mapping[str, Any] = field(default_factory=dict)

    def layouts(self, names: Iterable[str], *, split: bool) -> Layouts:
        """What these tensors hold; `split` is whether fused q/k/v, and gate and up, are taken apart. Experts always are."""
        fused: dict[str, Fused] = {}
        unknown: list[str] = []
        for name in names:
            found = self._expert(name)
            if found is None and split:
                found = self._attention(name) or self._gate_up(name)
                if found is None and _QKV.match(name) and len(self.specs[name].shape) == 2:
                    unknown.append(name)
            found = found or self._turned(name)
            if found is not None and not (set(found.pieces) - {name}) & self.specs.keys():
                fused[name] = found
        return Layouts(fused=fused, unknown=tuple(unknown))

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """The tensors that choose among the experts of a mixture: what is called so beside the experts."""
        return tuple(name for name in self.specs if any(_ROUTER.match(name[len(b) :]) for b in self._before(name)))

    @cached_property
    def _mixtures(self) -> frozenset[str]:
        """What stands before the experts' own names."""
        found = set()
        for name, spec in self.specs.items():
            match = _ONE.match(name) or _STACKED.match(name) or _BELOW.match(name)
            match = match or (_LINEAR.match(name) if len(spec.shape) == 3 else None)
            if match is not None:
                found.add(match["before"])
        return frozenset(found)

    def _before(self, name: str) -> list[str]:
        """The mixtures to which a tensor may belong, by its name."""
        ends = [at + 1 for at, letter in enumerate(name) if letter == "."]
        return [name[:end] for end in (0, *ends) if name[:end] in self._mixtures]

    def _sizes(self, name: str) -> Sizes:
        """Of the part of the model that a tensor belongs to."""
        return self._vision if "vision" in name or "visual" in name else self._text

    @cached_property
    def _vision(self) -> Sizes:
        return Sizes.of(_table(self.config, "vision_config"))

    @cached_property
    def _text(self) -> Sizes:
        return Sizes.of(_table(self.config, "text_config", "llm_config"))

    # Experts.

    def _expert(self, name: str) -> Fused | None:
        shape = self.specs[name].shape
        if (match := _STACKED.match(name)) is not None and match["bias"]:
            return self._bias(name, match["before"], match["leaf"])
        if len(shape) == 2:
            return self._below(name) if _BELOW.match(name) else None
        match = match or _LINEAR.match(name)
        if match is None or len(shape) != 3 or 0 in shape:
            return None
        before, leaf = match["before"], match["leaf"]
        turned, gated = self._kept(before, leaf, shape[1:])
        parts = self._halves(before, leaf, shape[1 + turned], "weight", turned=turned, gated=gated)
        return Fused(name=name, shape=shape, parts=parts, units=shape[0], stacked=True, turned=turned, experts=True)

    def _weight(self, before: str, leaf: str) -> Spec | None:
        """The stacked matrices of that name in a mixture."""
        for name in (f"{before}experts.{leaf}", f"{before}experts.{leaf}.weight", f"{before}{leaf}.weight"):
            if name in self.specs and len(self.specs[name].shape) == 3:
                return self.specs[name]
        return None

    def _kept(self, before: str, leaf: str, shape: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether stacked matrices are `[in, out]`, and whether they are gate and up in one; from the two tensors of a mixture where both are there."""
        sizes = self._sizes(before)
        up = leaf if leaf in _BACK else next((one for one, back in _BACK.items() if back == leaf), None)
        there, back = (self._weight(before, up), self._weight(before, _BACK[up])) if up is not None else (None, None)
        if there is not None and back is not None:
            (a, b), (c, d) = there.shape[1:], back.shape[1:]
            for turned, (out, inner, out_back, inner_back) in ((False, (a, b, c, d)), (True, (b, a, d, c))):
                if out == 2 * inner_back and inner == out_back:
                    return turned, leaf == up
        hidden = sizes.hidden or next((s.shape[1] for n, s in self._beside(before) if len(s.shape) == 2), 0)
        outer, other = (shape[0], shape[1]) if leaf in _DOWN else (shape[1], shape[0])  # the residual stream's side of [out, in]
        turned = other == hidden if (outer == hidden) != (other == hidden) else sizes.kind in _TURNED
        return turned, leaf == "gate_up_proj" and back is None and shape[turned] % 2 == 0

    def _beside(self, before: str) -> list[tuple[str, Spec]]:
        """The routers of one mixture."""
        return [(name, self.specs[name]) for name in self.routers if name.startswith(before)]

    def _halves(self, before: str, leaf: str, out: int, end: str, *, turned: bool, gated: bool) -> tuple[Part, ...]:
        called = f"{before}experts.{{}}"
        if not gated:
            return (Part(called=f"{called}.{_CALLED.get(leaf, leaf)}.{end}", strip=Strip.whole(out)),)
        kind, half = self._sizes(before).kind, out // 2
        biased = f"{before}experts.{leaf}_bias" in self.specs
        if kind in _ALTERNATING or (not kind and turned and biased):
            strips = [Strip(first=first, count=1, every=2, times=half) for first in (0, 1)]
        else:
            strips = [Strip(first=first, count=half, every=out) for first in (0, half)]
        return tuple(
            Part(called=f"{called}.{one}_proj.{end}", strip=strip) for one, strip in zip(("gate", "up"), strips, strict=True)
        )

    def _bias(self, name: str, before: str, leaf: str) -> Fused | None:
        """Biases of experts, `[expert, entries]`: vectors, whatever the number of dimensions."""
        weight, shape = self._weight(before, leaf), self.specs[name].shape
        if weight is None or len(shape) != 2 or 0 in shape:
            return None
        turned, gated = self._kept(before, leaf, weight.shape[1:])
        if shape != (weight.shape[0], weight.shape[1 + turned]):
            return None
        parts = self._halves(before, leaf, shape[1], "bias", turned=turned, gated=gated)
        return Fused(name=name, shape=shape, parts=parts, units=shape[0], stacked=True, experts=True)

    def _below(self, name: str) -> Fused | None:
        """DBRX's experts; their number is the router's, or the config's."""
        match = _BELOW.match(name)
        assert match is not None
        before, leaf, shape = match["before"], match["leaf"], self.specs[name].shape
        units = next((s.shape[0] for n, s in self._beside(before) if len(s.shape) == 2), self._sizes(name).experts)
        if not units or shape[0] % units or 0 in shape:
            return None
        turned = leaf == "w2"
        called = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[leaf]
        size = shape[1] if turned else shape[0] // units
        part = Part(called=f"{before}experts.{{}}.{called}.weight", strip=Strip.whole(size))
        return Fused(name=name, shape=shape, parts=(part,), units=units, turned=turned, experts=True)

    # One matrix of the model that holds several.

    def _attention(self, name: str) -> Fused | None:
        match, shape, sizes = _QKV.match(name), self.specs[name].shape, self._sizes(name)
        if match is None or len(shape) != 2 or 0 in shape:
            return None
        order, view = _ORDER.get((sizes.kind, match["leaf"])), view_of(name, shape)
        turned = view.transposed and sizes.kind != "gpt_bigcode"
        out = shape[turned]
        if order is not None:
            strips = _heads(out, sizes, sizes.order or order)
        elif view.parts == 3:
            strips = [Strip(first=part * (out // 3), count=out // 3, every=out) for part in range(3)]
        else:
            return None
        parts = tuple(
            Part(called=f"{match['before']}{one}_proj.weight", strip=strip) for one, strip in zip("qkv", strips, strict=False)
        )
        return Fused(name=name, shape=shape, parts=parts, turned=turned) if parts else None

    def _gate_up(self, name: str) -> Fused | None:
        match, shape = _GATE_UP.match(name), self.specs[name].shape
        if match is None or len(shape) != 2 or 0 in shape or shape[0] % 2:
            return None
        half = shape[0] // 2
        parts = tuple(
            Part(called=f"{match['before']}{one}_proj.weight", strip=Strip(first=first, count=half, every=2 * half))
            for one, first in (("gate", 0), ("up", half))
        )
        return Fused(name=name, shape=shape, parts=parts)

    def _turned(self, name: str) -> Fused | None:
        """One matrix that is kept `[in, out]`."""
        shape = self.specs[name].shape
        if not view_of(name, shape).transposed or self._sizes(name).kind == "gpt_bigcode":
            return None
        return Fused(name=name, shape=shape, parts=(Part(called=name, strip=Strip.whole(shape[1])),), turned=True)


def _heads(out: int, sizes: Sizes, order: str) -> list[Strip]:
    """Where q, k and v lie along d_out; none where the config's heads do not add up to it."""
    heads, keys, width = sizes.heads, sizes.keys, sizes.width
    if not keys or heads % keys or out != (heads + 2 * keys) * width:
        return []
    if order == "in turn":
        q, k = heads * width, keys * width
        return [Strip(first=0, count=q, every=out), *(Strip(first=first, count=k, every=out) for first in (q, q + k))]
    shared = heads // keys * width  # the queries that share a key
    every = shared + 2 * width
    counts = ((0, shared), (shared, width), (shared + width, width))
    return [Strip(first=first, count=count, every=every, times=keys) for first, count in counts]


def _table(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The table of a part of a model, or the whole where it has none."""
    return next((part for key in keys if isinstance(part := config.get(key), Mapping)), config)
