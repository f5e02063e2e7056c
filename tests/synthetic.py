"""Small models in memory: a base and fine-tuned neighbours of it, for tests of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

import thetau
from thetau.checkpoint.naming import Kind
from thetau.parts import Site

State = dict[str, Tensor]


def site(tasks: Sequence[str] = ("a",), name: str = "w", start: int = 0, shape: tuple[int, ...] = (1, 1), seed: int = 0) -> Site:
    """A place for parts that are called without the engine."""
    row = int(torch.Size(shape[1:]).numel())
    return Site(name=name, shape=shape, kind=Kind.MLP, layer=0, tasks=tuple(tasks), start=start, row_elements=row, seed=seed)


def models(
    shapes: Mapping[str, tuple[int, ...]],
    tasks: Sequence[str],
    *,
    seed: int = 0,
    rms: float = 1e-2,
    dtype: torch.dtype = torch.float32,
) -> tuple[State, dict[str, State]]:
    """A base of unit entries and a model a task, whose differences share a part, as fine-tuning's do."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    shared = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return base, {
        task: {
            name: (base[name].float() + rms * (0.3 * shared[name] + torch.randn(shape, generator=generator))).to(dtype)
            for name, shape in shapes.items()
        }
        for task in tasks
    }


def vectors_of(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, list[Any]]:
    """The base and the task vectors, opened."""
    opened = thetau.open(dict(base), name="base")
    return opened, [thetau.open(dict(state), name=task) - opened for task, state in tuned.items()]


def merged(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]], method: Any, **options: Any) -> State:
    """The merged model as a state dict. `dtype`, `engine` go to the evaluation, the rest to `merge`."""
    opened, vectors = vectors_of(base, tuned)
    out = {key: options.pop(key) for key in ("dtype",) if key in options}
    engine = options.get("engine")
    options.setdefault("names", list(tuned))
    return (opened + thetau.merge(vectors, method, **options)).state_dict(engine=engine, **out)


def merged_vector(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]], method: Any, **options: Any) -> State:
    """The merged task vector alone, in float32."""
    _, vectors = vectors_of(base, tuned)
    options.setdefault("names", list(tuned))
    return thetau.merge(vectors, method, **options).state_dict(engine=options.get("engine"))


def differences(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]]) -> dict[str, State]:
    """Task vectors, computed directly."""
    return {task: {name: state[name].float() - base[name].float() for name in base} for task, state in tuned.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def checked(cls: Any, values: dict[str, Any]) -> None:
    """A method's own checks: the tests' type checker, which users do not have, would speak before them."""
    method = copy(cls())
    for name, value in values.items():
        object.__setattr__(method, name, value)
    method.__post_init__()
