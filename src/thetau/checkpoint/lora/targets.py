"""Which tensor of the base a module of an adapter stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thetau.checkpoint.lora.changes import Form
from thetau.checkpoint.lora.config import PREFIX, Settings
from thetau.checkpoint.names import names_of
from thetau.checkpoint.naming import has_conv1d, view_of
from thetau.checkpoint.source import Source
from thetau.errors import AlignmentError


def saved_name(name: str) -> str:
    """What a module calls a tensor that an adapter saves whole."""
    return name.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def base_name(path: str, base: Source) -> str | None:
    """The base's name for an adapter's path, whatever library named it."""
    return names_of(base).find(path, among=base.label)


def flat_names(base: Source) -> Mapping[str, Sequence[str]]:
    """The base's modules by their names with underscores, with and without the first part of the path."""
    found: dict[str, list[str]] = {}
    for name in base.specs:
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            for spelled in dict.fromkeys((path, path.split(".", 1)[-1])):
                found.setdefault(spelled.replace(".", "_"), []).append(name)
    return found


def parameter(
    module: str, a: tuple[int, ...], b: tuple[int, ...], settings: Settings, base: Source, taken: set[str]
) -> str | None:
    """The tensor that a module's product changes: its `weight`, or one that the configuration names in `target_parameters`.

    Two parameters of one module are told by their shapes, since PEFT writes the order in which it wrapped them, not their names.

    Raises:
        AlignmentError: two of them fit.
    """
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    targets = settings.values.get("target_parameters") or []
    weight = base_name(f"{owner}.weight", base)
    if not targets or weight is not None:
        return weight or base_name(f"{owner}.in_proj_weight", base)  # `nn.MultiheadAttention`
    fits = []
    for end in sorted({str(target).rsplit(".", 1)[-1] for target in targets}):
        name = base_name(f"{owner}.{end}", base)
        named = any(f".{owner}.{end}".endswith(f".{target}") for target in targets)
        if name is not None and named and name not in taken:
            shape = base.specs[name].shape
            if len(shape) == 3 and a[0] == b[1] and {(a[1], b[0])} & {shape[1:], shape[:0:-1]}:
                fits.append(name)
    if len(fits) > 1:
        raise AlignmentError(
            f"{settings.label}: {module!r} may stand for {' or '.join(map(repr, fits))}, which have one shape. "
            "Merge the adapter with PEFT's `merge_and_unload` first."
        )
    return fits[0] if fits else None


def form_of(name: str, a: tuple[int, ...], b: tuple[int, ...], settings: Settings, base: Source) -> Form:
    """How the base stores what A and B make. PEFT's flag holds for all targets, so shapes and names go first: it mixes layers too.

    Raises:
        AlignmentError: experts whose orientation nothing tells.
    """
    shape = base.specs[name].shape
    if len(shape) == 3 and len(a) == 2:
        return _experts(name, a, b, settings, base)
    if len(shape) != 2 or len(a) != 2:
        return "rows"
    if shape[0] != shape[1]:
        return "columns" if shape == (a[1], b[0]) else "rows"
    conv1d = has_conv1d({other: spec.shape for other, spec in base.specs.items()})
    transposed = view_of(name, shape).transposed if conv1d else bool(settings.values.get("fan_in_fan_out"))
    return "columns" if transposed else "rows"


def _experts(name: str, a: tuple[int, ...], b: tuple[int, ...], settings: Settings, base: Source) -> Form:
    """Whether experts are stored `[expert, out, in]`, as most are, or `[expert, in, out]`; square ones as the module's others are."""
    shape = base.specs[name].shape
    if shape[1] != shape[2]:
        return "experts transposed" if shape[1:] == (a[1], b[0]) else "experts"
    owner = name.rsplit(".", 1)[0]
    for other, spec in base.specs.items():
        gated = other.rsplit(".", 1) == [owner, "gate_up_proj"] and len(spec.shape) == 3
        if gated and other != name and spec.shape[1] != spec.shape[2]:  # two outputs for each hidden neuron
            return "experts transposed" if spec.shape[2] == 2 * spec.shape[1] else "experts"
        down = other.rsplit(".", 1) == [owner, "down_proj"] and len(spec.shape) == 3
        if down and other != name and spec.shape[1] != spec.shape[2]:  # a square gate and up: half as many neurons as outputs
            return "experts" if spec.shape[1] == 2 * spec.shape[2] else "experts transposed"
    raise AlignmentError(
        f"{settings.label}: {name!r} {list(shape)} is square, and nothing tells whether it is stored [expert, out, in] or [expert, in, out]. "
        "Merge the adapter with PEFT's `merge_and_unload` first."
    )
