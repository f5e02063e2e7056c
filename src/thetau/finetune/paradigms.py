"""How a task is fine-tuned, as data for the one loop: a view of the model, what of it is trained, a penalty.

- `standard`: every parameter of the encoder, by the model itself.
- `attention`: the weights of q, k, v and o only (Jin et al., ICLR 2025).
- `linear`: the model's first-order expansion at θ₀ (Ortiz-Jimenez et al., NeurIPS 2023).
- `taujp`: the same, with a penalty on what τ does to other tasks' inputs (Yoshida et al., NeurIPS 2024 workshop, Eqs. 10 and 11).
- `lora`: adapters of low rank (Hu et al., ICLR 2022), through peft.
- `mtl`: several tasks jointly, an upper baseline; joins with the others, as `mtl+linear`.

Names join with `+`: `attention+linear` is the expansion in the attention weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from thetau.errors import nearest


@final
@dataclass(frozen=True, kw_only=True)
class Paradigm:
    """`scope`: what is trained where the config names nothing (`thetau.models.parts`). `linear`: by the linear model."""

    scope: str = "all"
    linear: bool = False
    penalty: bool = False
    lora: bool = False
    joint: bool = False


PARADIGMS = {
    "standard": Paradigm(),
    "attention": Paradigm(scope="attention"),
    "linear": Paradigm(linear=True),
    "taujp": Paradigm(linear=True, penalty=True),
    "lora": Paradigm(lora=True),
    "mtl": Paradigm(joint=True),
}


def paradigm_of(text: str) -> Paradigm:
    """The paradigm of a name, or of several joined by `+`. Raises `ValueError`."""
    names = text.split("+")
    for name in names:
        if name not in PARADIGMS:
            raise ValueError(
                f"`FinetuneConfig(paradigm=...)` must be {', '.join(PARADIGMS)}, or some of them joined by '+'. "
                f"Got {text!r}.{nearest(name, PARADIGMS)}"
            )
    parts = [PARADIGMS[name] for name in names]
    joined = Paradigm(
        scope=next((part.scope for part in parts if part.scope != "all"), "all"),
        linear=any(part.linear for part in parts),
        penalty=any(part.penalty for part in parts),
        lora=any(part.lora for part in parts),
        joint=any(part.joint for part in parts),
    )
    if joined.lora and (joined.linear or joined.scope != "all"):
        raise ValueError(f"`FinetuneConfig(paradigm=...)`: lora joins with mtl only; its targets are a field. Got {text!r}.")
    return joined
