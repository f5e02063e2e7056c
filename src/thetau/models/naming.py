"""Which tensor of a checkpoint feeds which parameter of a live model, and whether they fit.

Checkpoints name the same weights in several ways: with the prefix of a model that has a head (`bert.encoder…`), with the names
that LayerNorm once had. The map is made once with the base, so that other checkpoints must have the base's names.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from thetau.checkpoint.names import unwrapped
from thetau.errors import AlignmentError, nearest

_SHOWN = 4


def match_names(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, origin: str) -> dict[str, str]:
    """Live name → name in the checkpoint, for every tensor of `module` that the checkpoint must give.

    `prefix` is what models with a head put before the encoder's names; `origin` is the file or folder named in errors.
    A tensor tied to another one needs no entry of its own. Raises `AlignmentError` listing what is missing.
    """
    live = module.state_dict()
    stored = {unwrapped(name): name for name in weights} | {name: name for name in weights}
    spellings = {
        name: [one for word in (name, unwrapped(name)) for one in ([word, f"{prefix}.{word}"] if prefix else [word])]
        for name in live
    }
    found = {
        name: stored[known] for name in live if (known := next((n for n in spellings[name] if n in stored), None)) is not None
    }
    given = {live[name].data_ptr() for name in found}
    missing = [name for name, tensor in live.items() if name not in found and tensor.data_ptr() not in given]
    if missing:
        raise AlignmentError(
            f"{origin}: the model needs {len(live)} tensors, {len(missing)} of them are missing: {_some(missing)}."
            f"{nearest(missing[0], weights)} Is the folder's config.json that of these weights?"
        )
    return found


def check_fit(
    needed: Mapping[str, tuple[int, ...]], carried: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str
) -> None:
    """Raise one `AlignmentError` with all that keeps `weights` from running in a model that needs these names and shapes.

    `carried` are tensors of the base that the live model has no place for: they may be present or absent.
    """
    problems = []
    missing = [name for name in needed if name not in weights]
    unknown = [name for name in weights if name not in needed and name not in carried]
    if missing:
        problems.append(f"{len(missing)} tensors of the base are missing: {_some(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} tensors have no place in the model: {_some(unknown)}{nearest(unknown[0], needed)}")
    for name, shape in needed.items():
        if name in weights and tuple(weights[name].shape) != shape:
            problems.append(f"{name} must have shape {list(shape)}, got {list(weights[name].shape)}")
    if problems:
        raise AlignmentError(f"{origin}: does not fit the base model.\n" + "\n".join(f"  - {problem}" for problem in problems))


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
