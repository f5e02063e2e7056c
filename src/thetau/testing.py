"""The common tests of a method, for packages that bring one: `check_method(Median())` in a test of yours.

Every method of thetau passes the same ones. Each check merges small models in memory, of every kind of tensor and dtype, and says what
it found; one that a method cannot pass is exempt by name, with the reason. Nothing here needs pytest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from thetau.checkpoint.disk import write_tensors
from thetau.checkpoint.naming import Kind, kind_of, view_of
from thetau.engine.executor import Engine
from thetau.facade import Expression, bind, merge
from thetau.facade import open as open_model
from thetau.fields import declared
from thetau.linalg.threads import one_thread
from thetau.methods.registry import build, plain
from thetau.parts import Chain, Form, Method, PerPattern, PerTask, Site, evidence_shape

State = dict[str, Tensor]
NAMES = ("zebra", "ape", "Cat", "emu", "Dog", "bee", "Fox", "gnu")  # sorted otherwise than given
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embeddings.word.weight": (40, 16),
    "layers.0.attn.qkv.weight": (48, 16),
    "layers.0.mlp.fc1.weight": (24, 16),
    "layers.0.norm.weight": (16,),
    "transformer.h.1.attn.c_attn.weight": (16, 48),
    "conv.weight": (4, 3, 2, 2),
    "logit_scale": (),
    "empty": (0, 16),
}
LARGE: Mapping[str, tuple[int, ...]] = {  # several blocks of 65,536 elements
    "layers.0.mlp.fc1.weight": (130, 600),
    "layers.1.mlp.fc1.bias": (70_000,),
    "layers.1.mlp.fc1.weight": (40, 50),
}


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


def vectors_of(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]]) -> tuple[Expression, list[Expression]]:
    """The base and the task vectors, opened."""
    opened = open_model(dict(base), name="base")
    vectors: list[Any] = [open_model(dict(state), name=task) - opened for task, state in tuned.items()]
    return opened, vectors


def evidence_for(method: Any, base: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, dict[str, State]]:
    """Evidence of every kind that a method needs, in its form: positive entries, or positive definite matrices; the same for a task
    whatever the others.
    """
    return {
        kind: {
            task: {
                name: _evidence(f"{kind}/{task}/{name}", form, shape)
                for name, tensor in base.items()
                if tensor.is_floating_point() and (shape := _shape(form, name, tensor)) is not None
            }
            for task in tasks
        }
        for kind, form in bind(method, tasks).chain().forms.items()
    }


def _shape(form: Form, name: str, tensor: Tensor) -> tuple[int, ...] | None:
    """Of a task's evidence at a tensor, whichever way its matrix is stored."""
    shape = tuple(tensor.shape)
    turned = form != "entries" and view_of(name, shape).transposed
    return evidence_shape(form, shape[::-1] if turned else shape)


def _evidence(key: str, form: Form, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(crc32(key.encode()))
    if form in ("entries", "number"):
        return torch.randn(tuple(shape), generator=generator).square() + 1e-3
    rows = torch.randn(3 * shape[0], shape[0], generator=generator) if shape[0] else torch.zeros(1, 0)
    return rows.T @ rows / len(rows)


def merged(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]], method: Any, **options: Any) -> State:
    """The merged model as a state dict. `dtype`, `engine` go to the evaluation, the rest to `merge`."""
    opened, vectors = vectors_of(base, tuned)
    out = {key: options.pop(key) for key in ("dtype",) if key in options}
    options.setdefault("names", list(tuned))
    options.setdefault("evidence", evidence_for(method, base, options["names"]))
    model: Any = opened + merge(vectors, method, **options)
    state: State = model.state_dict(engine=options.get("engine"), **out)
    return state


def merged_vector(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]], method: Any, **options: Any) -> State:
    """The merged task vector alone, in float32."""
    _, vectors = vectors_of(base, tuned)
    options.setdefault("names", list(tuned))
    options.setdefault("evidence", evidence_for(method, base, options["names"]))
    return merge(vectors, method, **options).state_dict(engine=options.get("engine"))


def differences(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]]) -> dict[str, State]:
    """Task vectors, computed directly."""
    return {task: {name: state[name].float() - base[name].float() for name in base} for task, state in tuned.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], about: str) -> None:
    """The same names, dtypes, shapes and bits.

    Raises:
        AssertionError: they are not; `about` begins the message, which names the tensor.
    """
    _expect(sorted(got) == sorted(want), f"{about}: other tensors: {sorted(set(got) ^ set(want))}")
    for name, tensor in want.items():
        _expect(got[name].dtype == tensor.dtype, f"{about}: {name!r} is {got[name].dtype}, not {tensor.dtype}")
        _expect(got[name].shape == tensor.shape, f"{about}: {name!r} is {list(got[name].shape)}, not {list(tensor.shape)}")
        _expect(torch.equal(got[name], tensor), f"{about}: {name!r} has other bits, by {_apart(got[name], tensor):.3g} at most")


def with_scale(method: Any, scale: Any) -> Any:
    """The same method with another `scale`, or with its inner method's; None where there is no such field."""
    for name in declared(type(method)):
        value = method.__dict__[name]
        if name == "scale":
            return replace(method, scale=scale)
        if isinstance(value, Method):
            inner = with_scale(value, scale)
            return None if inner is None else replace(method, **{name: inner})
    return None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method, and the small models that it is tried on."""

    method: Any
    tasks: tuple[str, ...] = NAMES[:3]

    @cached_property
    def chain(self) -> Chain:
        """The method's parts."""
        chain: Chain = self.method.chain()
        return chain

    def fits(self, count: int) -> int:
        """As many tasks as the method takes, of so many."""
        fewest: int
        most: int | None
        fewest, most = self.method.takes
        return max(fewest, count if most is None else min(count, most))

    @property
    def over_models(self) -> bool:
        """Whether models are merged, so that the base's own entries take part, and rounding is theirs."""
        return self.chain.models

    @cached_property
    def models(self) -> tuple[State, dict[str, State]]:
        """A base, and a model a task."""
        return models(SHAPES, self.tasks)

    @cached_property
    def result(self) -> State:
        """What the method makes of them with seed 0."""
        return merged(*self.models, self.method)

    def among(self, tasks: Sequence[str]) -> Any:
        """The method for other tasks: values by task are cut to them, and a new task has the first one's."""
        return _among(self.method, tuple(tasks))

    def touched(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the method's own selection takes this tensor."""
        taken = self.chain.selection.takes(name, shape, kind_of(name, shape)) and 0 not in shape
        return taken and (self.chain.access != "stream" or len(shape) >= 2)


def _among(method: Any, tasks: tuple[str, ...]) -> Any:
    changed: dict[str, Any] = {}
    for name, field in declared(type(method)).items():
        value = method.__dict__[name]
        if isinstance(value, PerTask):
            first = next(iter(value.values.values()))
            changed[name] = PerTask({task: value.values.get(task, first) for task in tasks})
        elif isinstance(value, tuple) and field.rule.by_task:
            changed[name] = (*value, *[value[0]] * len(tasks))[: len(tasks)]
        elif isinstance(value, Method):
            changed[name] = _among(value, tasks)
    return replace(method, **changed) if changed else method


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise AssertionError(problem)


def _keeps_equals(case: Case) -> set[str]:
    """The tensors of which equal models give that model, as any mean does and no sum. Told by a constant model."""
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    got = merged(ones, dict.fromkeys(case.tasks, ones), case.method)
    return {name for name, tensor in got.items() if bool((tensor - 1).abs().lt(1e-4).all())}


def _apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max()) if want.numel() else 0.0


def _finite(state: Mapping[str, Tensor], about: str) -> None:
    for name, tensor in state.items():
        _expect(bool(tensor.isfinite().all()), f"{about}: {name!r} holds NaN or infinite values")


def _close(got: Tensor, want: Tensor, about: str, *, share: float, least: float) -> None:
    beyond = (got.double() - want.double()).abs() - share * want.double().abs()
    _expect(not bool((beyond > least).any()), f"{about}: is {_apart(got, want):.3g} away at most, which is too far")


# What the class says.


def declaration(case: Case) -> None:
    """A frozen dataclass of keyword-only fields, each with a range and a meaning."""
    cls = type(case.method)
    for name, field in declared(cls).items():
        _expect(bool(field.range), f"the field `{name}` says no range: annotate it with a rule of `thetau.methods.fields`")
        _expect(
            len(field.meaning) > 8,
            f"the field `{name}` has no meaning: add a list entry to the docstring, or a string to its type",
        )
        try:
            setattr(case.method, name, case.method.__dict__[name])
        except FrozenInstanceError:
            continue
        raise AssertionError("it can be changed: decorate it with `@dataclass(frozen=True, kw_only=True)`")
    if declared(cls):
        try:
            cls(next(iter(case.method.__dict__.values())))
        except TypeError:
            return
        raise AssertionError("its fields can be given by place: decorate it with `@dataclass(frozen=True, kw_only=True)`")


def round_trip(case: Case) -> None:
    """What an output records of it builds the same method again, through JSON."""
    recorded = json.loads(json.dumps(plain(case.method)))
    again = build(recorded.pop("name"), recorded)
    _expect(again == case.method, f"`build` of what `plain` wrote is another method: {again!r}")


# Shapes, dtypes, corner cases.


def shapes(case: Case) -> None:
    """Every tensor keeps its name, shape and dtype: matrices, fused ones, vectors, 0-d and empty tensors."""
    base, _ = case.models
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in case.result.items()}
    want = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in base.items()}
    _expect(
        got == want, f"the merged model is another one than the base: {sorted(set(got.items()) ^ set(want.items()), key=str)}"
    )
    _finite(case.result, "the merged model")


def half_precision(case: Case) -> None:
    """bfloat16 and float16 models: the same dtype comes out, finite, and something changed."""
    for dtype in (torch.bfloat16, torch.float16):
        base, tuned = models(SHAPES, case.tasks, dtype=dtype)
        out = merged(base, tuned, case.method)
        for name, tensor in base.items():
            _expect(out[name].dtype == dtype, f"{dtype} models: {name!r} comes out as {out[name].dtype}")
            _expect(out[name].shape == tensor.shape, f"{dtype} models: {name!r} comes out as {list(out[name].shape)}")
        _finite(out, f"{dtype} models")
        _expect(any(not torch.equal(out[name], base[name]) for name in base), f"{dtype} models: nothing was merged")


def mixed_dtypes(case: Case) -> None:
    """Base and models in three dtypes: differences are taken in float32, and the base's dtype comes out."""
    base, tuned = case.models
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    mixed = {
        task: {name: tensor.to(kinds[index % 3]) for name, tensor in state.items()}
        for index, (task, state) in enumerate(tuned.items())
    }
    widened = {task: {name: tensor.float() for name, tensor in state.items()} for task, state in mixed.items()}
    out = merged(base, mixed, case.method)
    _expect({tensor.dtype for tensor in out.values()} == {torch.bfloat16}, "a bfloat16 base: another dtype comes out")
    same(out, merged(base, widened, case.method), "models of other dtypes")


def one_task(case: Case) -> None:
    """One task alone, or as few as the method takes."""
    few = case.tasks[: case.fits(1)]
    base, tuned = models(SHAPES, few)
    _finite(merged(base, tuned, case.among(few)), "one task alone")


def zero_vectors(case: Case) -> None:
    """Models equal to the base give the base; one such model among others does no harm."""
    base, tuned = case.models
    got = merged(base, dict.fromkeys(tuned, base), case.method)
    if case.over_models:
        for name in _keeps_equals(case):
            _close(got[name], base[name], f"models that are all the base: {name!r}", share=1e-6, least=1e-6)
        _finite(got, "models that are all the base")
    else:
        same(got, base, "models that are all the base")
    kept = dict(list(tuned.items())[: case.fits(len(tuned) + 1) - 1])
    _finite(merged(base, {**kept, "none": base}, case.among([*kept, "none"])), "one model that is the base")


def unchanged_tensor(case: Case) -> None:
    """A tensor that no task changed stays as it is."""
    base, tuned = models(SHAPES, case.tasks)
    name = "layers.0.mlp.fc1.weight"
    for state in tuned.values():
        state[name] = base[name].clone()
    got = merged(base, tuned, case.method)[name]
    if not case.over_models:
        _expect(torch.equal(got, base[name]), f"{name!r}, which no task changed, is changed")
    elif name in _keeps_equals(case):
        _close(got, base[name], f"{name!r}, which no task changed", share=1e-6, least=1e-6)


def identical_and_opposed(case: Case) -> None:
    """Tasks that agree in everything, and two that cancel."""
    base, tuned = case.models
    _finite(merged(base, dict.fromkeys(case.tasks, tuned[case.tasks[0]]), case.method), "tasks that are all the same")
    one = tuned[case.tasks[0]]
    pair = {"a": one, "b": {name: 2 * base[name] - tensor for name, tensor in one.items()}}
    pair = dict(list(pair.items())[: case.fits(2)])
    _finite(merged(base, pair, case.among(list(pair))), "two tasks that cancel")


# Order, workers, blocks, seeds: the same bits.


def order_of_tasks(case: Case) -> None:
    """The order in which tasks are given changes nothing, to the last bit."""
    base, tuned = case.models
    turned = case.tasks[1:] + case.tasks[:1]
    same(merged(base, {task: tuned[task] for task in turned}, case.method), case.result, f"tasks given as {', '.join(turned)}")


def order_of_tensors(case: Case) -> None:
    """Nor does the order of tensors in the files."""
    base, tuned = case.models
    turned = list(reversed(base))
    shuffled = {
        task: {name: state[name] for name in turned[index:] + turned[:index]} for index, (task, state) in enumerate(tuned.items())
    }
    same(merged({name: base[name] for name in turned}, shuffled, case.method), case.result, "tensors in another order")


def workers_and_blocks(case: Case) -> None:
    """Nor do workers, the size of blocks, or whether models lie in memory or in files, with tensors of several blocks."""
    base, tuned = models(LARGE, case.tasks)
    first = case.tasks[0]
    tuned[first] = {name: tensor.bfloat16() for name, tensor in tuned[first].items()}
    want = merged(base, tuned, case.method, seed=1, engine=Engine(workers=1))
    for engine, about in ((Engine(workers=2), "two workers"), (Engine(workers=2, window=1), "blocks of one row")):
        same(merged(base, tuned, case.method, seed=1, engine=engine), want, about)
    with _stored({"base": base, **tuned}) as folder:
        opened = open_model(str(folder / "base"))
        vectors: list[Any] = [open_model(str(folder / task)) - opened for task in case.tasks]
        engine = Engine(workers=2, window=70_000)
        model: Any = opened + merge(
            vectors,
            case.method,
            names=case.tasks,
            seed=1,
            engine=engine,
            evidence=evidence_for(case.method, base, case.tasks),
        )
        same(model.state_dict(engine=engine), want, "models in files")


def compiled_loop(case: Case) -> None:
    """What is written to a file, by the compiled loop where all parts have such a form, has the bits that torch gives in memory."""
    base, tuned = models(LARGE, case.tasks)
    with _stored({"base": base, **tuned}) as folder:
        opened = open_model(str(folder / "base"))
        vectors: list[Any] = [open_model(str(folder / task)) - opened for task in case.tasks]
        model: Any = opened + merge(vectors, case.method, names=case.tasks, evidence=evidence_for(case.method, base, case.tasks))
        model.save(folder / "out")
        written: Any = open_model(str(folder / "out"))
        same(written.state_dict(), model.state_dict(), "the written file against torch")


def seeds(case: Case) -> None:
    """The same seed gives the same bits, and any other seed a finite result."""
    base, tuned = case.models
    same(merged(base, tuned, case.method), case.result, "the same seed again")
    _finite(merged(base, tuned, case.method, seed=1), "another seed")


def inputs_unchanged(case: Case) -> None:
    """Neither base nor models are changed, and the result shares no memory with them."""
    base, tuned = models(SHAPES, case.tasks)
    for tensor in merged(base, tuned, case.method).values():
        tensor.fill_(7)
    again, others = case.models
    same(base, again, "the base after a merge")
    for task, state in tuned.items():
        same(state, others[task], f"the model {task!r} after a merge")


# Algebra.


def doubling(case: Case) -> None:
    """Twice the task vectors give twice the result; where models are merged, twice the models."""
    base, tuned = case.models
    if case.over_models:
        doubled = {task: {name: 2 * tensor for name, tensor in state.items()} for task, state in tuned.items()}
        again = merged({name: 2 * tensor for name, tensor in base.items()}, doubled, case.method)
        for name, tensor in case.result.items():
            _close(again[name], 2 * tensor, f"twice the models: {name!r}", share=1e-4, least=1e-6)
        return
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    tau = differences(base, tuned)
    once = merged_vector(zero, tau, case.method)
    twice = merged_vector(zero, {task: {name: 2 * t for name, t in state.items()} for task, state in tau.items()}, case.method)
    for name, tensor in once.items():
        _close(twice[name], 2 * tensor, f"twice the vectors: {name!r}", share=1e-4, least=1e-6)


def linear_in_scale(case: Case) -> None:
    """`scale` multiplies the merged vector (the model, where models are merged), where the method has such a field; a pattern of names
    multiplies those tensors alone.
    """
    unit = with_scale(case.method, 1.0)
    if unit is None:
        return
    base, tuned = case.models
    merge_ = merged if case.over_models else merged_vector
    one = merge_(base, tuned, unit)
    back = merge_(base, tuned, with_scale(case.method, -3.0))
    some = merge_(base, tuned, with_scale(case.method, PerPattern({"layers.0.*": 0.5, "*": 2.0})))
    outside = [name for name, shape in SHAPES.items() if name in one and not case.touched(name, shape)]
    for name in one:
        if name not in outside:
            _close(back[name], -3 * one[name], f"scale = -3: {name!r}", share=1e-5, least=1e-7)
            factor = 0.5 if name.startswith("layers.0.") else 2.0
            _close(some[name], factor * one[name], f"scale by pattern: {name!r}", share=1e-5, least=1e-7)
    for name in outside:  # θ₀ + λ τ_m: λ multiplies what is outside the selection too
        _close(back[name], -3 * one[name], f"scale = -3, outside the selection: {name!r}", share=1e-5, least=1e-7)


# Selection.


def selection(case: Case) -> None:
    """Only what the method selects differs; elsewhere the base stays, or gets the mean or the sum of the task vectors."""
    method = with_scale(case.method, 1.0) or case.method
    base, tuned = case.models
    tau = differences(base, tuned)
    out = merged(base, tuned, method)
    elsewhere = case.chain.selection.elsewhere
    for name, shape in SHAPES.items():
        if case.touched(name, shape):
            changed = not torch.equal(out[name], base[name]) or out[name].numel() == 1  # one entry may be dropped or trimmed
            _expect(changed, f"{name!r} is selected and stays as it is")
        elif elsewhere == "base" or 0 in shape:
            _expect(torch.equal(out[name], base[name]), f"{name!r} is not selected and is changed")
        else:
            total = torch.stack([tau[task][name] for task in sorted(case.tasks)]).sum(0)
            want = base[name] + total / (len(tau) if elsewhere == "mean" else 1)
            _close(out[name], want, f"{name!r}, outside the selection", share=0, least=1e-6)


def exclusion(case: Case) -> None:
    """What is excluded keeps the base's bits and counts for nothing in the rest."""
    base, tuned = case.models
    chosen = [name for name, shape in SHAPES.items() if case.touched(name, shape)]
    out = {"logit_scale", chosen[-1]} if len(chosen) > 1 else {"logit_scale"} - set(chosen)
    got = merged(base, tuned, case.method, exclude=sorted(out))
    for name in out:
        _expect(torch.equal(got[name], base[name]), f"{name!r} is excluded and is changed")
    left = [name for name in base if name not in out]
    alone = merged({n: base[n] for n in left}, {t: {n: s[n] for n in left} for t, s in tuned.items()}, case.method)
    same({name: got[name] for name in left}, alone, f"without {', '.join(sorted(out))}")


def saved_vectors(case: Case) -> None:
    """Task vectors that were saved on their own merge as the differences do; models are none without their base."""
    if case.over_models:
        return
    base, tuned = case.models
    want = merged_vector(base, tuned, case.method)
    _, vectors = vectors_of(base, tuned)
    extracted = {task: vector.state_dict() for task, vector in zip(case.tasks, vectors, strict=True)}
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    again = merged_vector(zero, extracted, case.method)
    same({name: again[name] for name in want}, want, "vectors without their base")


CHECKS: Mapping[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        declaration,
        round_trip,
        shapes,
        half_precision,
        mixed_dtypes,
        one_task,
        zero_vectors,
        unchanged_tensor,
        identical_and_opposed,
        order_of_tasks,
        order_of_tensors,
        workers_and_blocks,
        compiled_loop,
        seeds,
        inputs_unchanged,
        doubling,
        linear_in_scale,
        selection,
        exclusion,
        saved_vectors,
    )
}


def check_method(
    method: Any,
    *,
    tasks: int | Sequence[str] = 3,
    only: Sequence[str] = tuple(CHECKS),
    exempt: Mapping[str, str] | None = None,
) -> None:
    """Run the common tests on a method.

    Args:
        method: an instance; give values by task for the names in `tasks`.
        tasks: how many there are (2 to 8), or their names; the first of them, where the method takes fewer.
        only: the checks that are made, of `CHECKS`.
        exempt: checks that this method cannot pass, with the reason. One that passes all the same is reported too.

    Raises:
        AssertionError: everything that was found, check by check.
        ValueError: a check's name is unknown, or there are too few tasks.
    """
    exempt = exempt or {}
    unknown = sorted({*only, *exempt} - set(CHECKS))
    if unknown:
        raise ValueError(f"`check_method(...)` knows no check {unknown[0]!r}. Known: {', '.join(CHECKS)}.")
    names = NAMES[:tasks] if isinstance(tasks, int) else tuple(tasks)
    if len(names) < 2 or (isinstance(tasks, int) and len(names) != tasks):
        raise ValueError(f"`check_method(tasks=...)` must be 2 to {len(NAMES)}, or names. Got {tasks!r}.")
    if not isinstance(method, Method):
        raise AssertionError(f"a method is an instance of a class below `thetau.parts.Method`. Got {method!r}.")
    names = (*names, *(name for name in NAMES if name not in names))[: Case(method=method, tasks=names).fits(len(names))]
    case = Case(method=method, tasks=names)
    problems = []
    with one_thread():
        for name in only:
            problem = _problem(CHECKS[name], case)
            if name in exempt and problem is None:
                problems.append(f"{name}: is exempt ({exempt[name]}) and passes: take the exemption out")
            elif name not in exempt and problem is not None:
                problems.append(f"{name}: {problem}")
    if problems:
        raise AssertionError(
            "\n".join([f"{method!r}: {len(problems)} of {len(only)} checks failed", *(f"- {p}" for p in problems)])
        )


def _problem(check: Callable[[Case], None], case: Case) -> str | None:
    """What a check finds, or None; an error of the method itself is a finding."""
    try:
        check(case)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _stored(states: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Path]:
    """Models as folders with one file each."""
    with tempfile.TemporaryDirectory(prefix="thetau-check-") as name:
        folder = Path(name)
        for model, state in states.items():
            (folder / model).mkdir()
            write_tensors(folder / model / "model.safetensors", state)
        yield folder
