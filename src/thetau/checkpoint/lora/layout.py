"""The names of an adapter file, taken apart: which module each tensor belongs to, and as what.

Three spellings are read. PEFT's: `base_model.model.PATH.lora_A.weight`, with the adapter's own name in it where a training state was kept
(`lora_A.default.weight`). Diffusers': `unet.PATH.lora_A.weight`, or `unet.PATH.lora.down.weight` before version 0.26. Kohya's:
`lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`, with `.alpha` beside it. The last two come without a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

from thetau.checkpoint.lora.config import PREFIX, REMEDY
from thetau.checkpoint.names.renaming import new_names
from thetau.errors import CheckpointError, nearest

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
KOHYA = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_PARTS = (
    r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|ia3_l"
    r"|(?:token_adapter\.)?trainable_tokens_delta"
)
_PEFT = re.compile(rf"(.*?)\.({_PARTS})(?:\.(?!(?:weight|bias)$)([^.]+))?(?:\.(weight|bias))?$")
_SAVED = re.compile(r"(.*)\.modules_to_save(?:\.(?!(?:weight|bias)$)([^.]+))?(\.[^.]+)$")
_FLAT = re.compile(r"(.*?)(?:\.(?:lora\.)?(?:lora_)?|_lora\.)(down|up|A|B)\.weight$")
_FLAT_OTHER = re.compile(r"(.*)\.(alpha|dora_scale|lora_mid\.weight|diff|diff_b|lora_(?:down|up|A|B)\.bias)$")
_UNKNOWN = {
    "hada_": "LyCORIS's LoHa",
    "lokr_": "LyCORIS's LoKr",
    "oft_": "OFT",
    "glora": "GLoRA",
    "dora_scale": "LyCORIS's DoRA",
    "lora_mid": "LoCon's Tucker form",
    "diff": "LyCORIS's full differences",
}


@final
@dataclass
class Module:
    """One adapted module: `parts` maps what a tensor is (`A`, `B`, `B.bias`, `alpha`, …) to its name in the file."""

    path: str
    component: str = ""
    parts: dict[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """An adapter file, taken apart.

    - `modules`: those with parts, by the path that the file gives them.
    - `saved`: tensors that are saved whole, name in the file → name in the model that was trained.
    - `flat`: whether dots in paths are written as underscores.
    """

    modules: Mapping[str, Module]
    saved: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False


def is_flat(names: Iterable[str]) -> bool:
    """Whether a file without a configuration is LoRA in kohya's or diffusers' spelling."""
    starts = (*KOHYA, *(f"{component}." for component in COMPONENTS))
    return any(name.startswith(starts) and (_FLAT.match(name) or _FLAT_OTHER.match(name)) for name in names)


def lacks_config(names: Iterable[str]) -> bool:
    """Whether these are names of PEFT's, which mean nothing without the configuration beside them."""
    return any(name.startswith(PREFIX) and _PEFT.match(name) for name in names)


def peft_layout(label: str, names: Iterable[str], adapter: str | None = None) -> Layout:
    """PEFT's names; of the `adapter` that is asked for where there are several.

    Raises:
        CheckpointError: a file of several adapters and none chosen, or one that it lacks.
    """
    modules: dict[str, dict[str, Module]] = {}
    saved: dict[str, dict[str, str]] = {}
    for name in names:
        path = name.removeprefix(PREFIX)
        if match := _PEFT.match(path):
            module = modules.setdefault(match[3] or "", {}).setdefault(match[1], Module(match[1]))
            part = match[2].removeprefix("lora_").removeprefix("token_adapter.")
            module.parts[f"{part}.bias" if match[4] == "bias" else part] = name
        elif match := _SAVED.match(path):
            saved.setdefault(match[2] or "", {})[name] = match[1] + match[3]
        else:
            saved.setdefault("", {})[name] = path
    known = sorted(({*modules, *saved}) - {""})
    if adapter is None and len(known) > 1:
        raise CheckpointError(f"{label}: holds {len(known)} adapters ({', '.join(known)}). Choose one: `{label}#{known[0]}`.")
    if adapter is not None and adapter not in known:
        raise CheckpointError(
            f"{label}: holds no adapter {adapter!r}.{nearest(adapter, known)} It holds: {', '.join(known) or 'one without a name'}."
        )
    chosen = adapter or (known[0] if known else "")
    return Layout(
        modules={**modules.get("", {}), **modules.get(chosen, {})}, saved={**saved.get("", {}), **saved.get(chosen, {})}
    )


def layout_renamed(label: str, layout: Layout, rename: Mapping[str, str]) -> Layout:
    """The layout with every pattern replaced in the paths of modules and in the names of what is saved whole.

    Raises:
        RecipeError: a pattern is no regular expression.
        AlignmentError: a pattern fits nothing, or two paths become one; both are named.
    """
    if not rename:
        return layout
    names = new_names(
        label, dict.fromkeys((*(module.path for module in layout.modules.values()), *layout.saved.values())), rename
    )
    modules = {key: replace(module, path=names[module.path]) for key, module in layout.modules.items()}
    return replace(layout, modules=modules, saved={name: names[path] for name, path in layout.saved.items()})


def flat_layout(label: str, names: Iterable[str]) -> Layout:
    """Kohya's names, or diffusers'.

    Raises:
        CheckpointError: the file holds parts that are not read, each named with what it is.
    """
    modules: dict[str, Module] = {}
    problems: dict[str, str] = {}
    for name in names:
        match = _FLAT.match(name) or _FLAT_OTHER.match(name)
        part = {"down": "A", "up": "B"}.get(match[2], match[2]) if match else ""
        component, path = _component(match[1]) if match else ("", name)
        if component and part in ("A", "B", "alpha"):
            assert match is not None
            module = modules.setdefault(match[1], Module(path.replace(".processor.", "."), component))
            module.parts[part] = name
        else:
            problems.setdefault(next((what for key, what in _UNKNOWN.items() if key in name), "an unknown layout"), name)
    if problems:
        said = "; ".join(f"{what} ({name!r})" for what, name in problems.items())
        raise CheckpointError(
            f"{label}: holds {said}, which thetau cannot restore. {REMEDY.replace('PEFT', 'the program that made it, or PEFT')}"
        )
    return Layout(modules=modules, flat=any(name.startswith(tuple(KOHYA)) for name in modules))


def _component(path: str) -> tuple[str, str]:
    """The part of a pipeline that a path belongs to, and the rest of it; ("", path) where it names none."""
    for start, component in KOHYA.items():
        if path.startswith(start):
            return component, path.removeprefix(start)
    head, dot, rest = path.partition(".")
    return (head, rest) if dot and head in COMPONENTS else ("", path)
