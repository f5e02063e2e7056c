r"""Combinations of task vectors, evaluated where the vectors belong: in the model, or in its linear form.

In the model, $f(x;\, \theta_0 + \sum_t \alpha_t \tau_t)$ is run anew for every α. In the linear form it is
$f_0(x) + \sum_t \alpha_t\, J(x)\tau_t$: each term is computed once for an example and kept, and every grid over α is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from thetau.checkpoint.disk import write_tensors
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import Loss, Measure
from thetau.models import weights_hash
from thetau.models.linear import LinearModel
from thetau.pace import counted_by, doing
from thetau.tasks.encoding import ordered_batches

Reader = Callable[[str, str, Sequence[int] | None], Tensor]


@runtime_checkable
class Space(Protocol):
    """Named task vectors over one base."""

    def accuracy(self, coefficients: Mapping[str, float], task: str, split: str) -> Measure:
        """Of θ₀ + Σ α_t τ_t on a task's split; vectors that are not named count 0."""
        ...

    def accuracies(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Measure]:
        """The same on several tasks, the weights made once."""
        ...

    def losses(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Loss]:
        """The mean loss of each task's head."""
        ...

    def features(self, coefficients: Mapping[str, float], task: str, split: str) -> Tensor:
        """What the head reads, `[example, feature]`, in the order of the split."""
        ...

    def loaded(self, coefficients: Mapping[str, float]) -> Reader:
        """The combination, made once: (task, split, rows) → what the head reads of these examples, until another one is loaded."""
        ...


@final
class WeightSpace:
    """By the model itself. `vectors`: name → τ under the checkpoint's names; tensors that are absent stay the base's."""

    def __init__(self, evaluator: Evaluator, base: Mapping[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._evaluator, self._base, self._vectors = evaluator, base, dict(vectors)

    def weights(self, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
        """θ₀ + Σ α_t τ_t, added in the order of the names."""
        _known(coefficients, self._vectors)
        made = dict(self._base)
        with torch.inference_mode():
            for name in sorted(coefficients):
                if coefficients[name] == 0:
                    continue
                for key, tau in self._vectors[name].items():
                    if made[key].is_floating_point():
                        made[key] = made[key].float() + coefficients[name] * tau.float()
            return {key: tensor.to(self._base[key].dtype) for key, tensor in made.items()}

    def accuracy(self, coefficients: Mapping[str, float], task: str, split: str) -> Measure:
        """Run the model, or look the result up by the content of the weights."""
        return self.accuracies(coefficients, [task], split)[task]

    def accuracies(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Measure]:
        """The same on several tasks: one model, made and loaded once."""
        return self._evaluator.evaluate(self.weights(coefficients), split, tasks, origin=_origin(coefficients))

    def losses(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Loss]:
        """The mean loss on each of `tasks`: one model, made and loaded once."""
        return self._evaluator.losses(self.weights(coefficients), split, tasks, origin=_origin(coefficients))

    def features(self, coefficients: Mapping[str, float], task: str, split: str) -> Tensor:
        """Run the model."""
        return self._evaluator.features(self.weights(coefficients), task, split)

    def loaded(self, coefficients: Mapping[str, float]) -> Reader:
        """The model with these weights, which runs on what is asked of it."""
        self._evaluator.load(self.weights(coefficients), _origin(coefficients))
        return self._evaluator.read


@final
class TangentSpace:
    """By the linear form. `vectors`: name → τ under the names of the live module's parameters.

    With `cache`, what was computed is kept there by the content of base, vector and inputs.
    """

    def __init__(self, evaluator: Evaluator, vectors: Mapping[str, Mapping[str, Tensor]], cache: Path | None = None) -> None:
        self._evaluator, self._vectors, self._cache = evaluator, {name: dict(tau) for name, tau in vectors.items()}, cache
        self._hashes = {name: weights_hash(tau) for name, tau in self._vectors.items()}
        self._kept: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}

    def terms(self, vector: str, task: str, split: str) -> tuple[Tensor, Tensor]:
        """f₀ and Jτ of every example, `[example, feature]` both."""
        key = (vector, task, split)
        if key not in self._kept:
            self._kept[key] = self._compute(vector, task, split)
        return self._kept[key]

    def features(self, coefficients: Mapping[str, float], task: str, split: str) -> Tensor:
        """f₀ + Σ α_t Jτ_t from the terms that are kept."""
        _known(coefficients, self._vectors)
        used = {name: value for name, value in coefficients.items() if value}
        first = self.terms(next(iter(used), next(iter(self._vectors))), task, split)[0]
        return sum((value * self.terms(name, task, split)[1] for name, value in used.items()), start=first)

    def loaded(self, coefficients: Mapping[str, float]) -> Reader:
        """Sums of the terms that are kept."""

        def read(task: str, split: str, rows: Sequence[int] | None) -> Tensor:
            found = self.features(coefficients, task, split)
            return found if rows is None else found[list(rows)]

        return read

    def accuracy(self, coefficients: Mapping[str, float], task: str, split: str) -> Measure:
        """No model is run once the terms are there."""
        return self._evaluator.judge(task, split, self.features(coefficients, task, split))[0]

    def accuracies(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Measure]:
        """The same on several tasks."""
        return {task: self.accuracy(coefficients, task, split) for task in tasks}

    def losses(self, coefficients: Mapping[str, float], tasks: Iterable[str], split: str) -> dict[str, Loss]:
        """From the terms that are kept."""
        return {task: self._evaluator.judge(task, split, self.features(coefficients, task, split))[1] for task in tasks}

    def _compute(self, vector: str, task: str, split: str) -> tuple[Tensor, Tensor]:
        inputs = self._evaluator.inputs(task, split)
        encoder = self._evaluator.encoder
        path = None
        if self._cache is not None:
            path = (
                self._cache
                / f"terms-{encoder.base_hash[:12]}-{self._hashes[vector][:16]}-{inputs.unlabelled[:12]}{'-raw' * encoder.raw}.safetensors"
            )
            found = _read(path)
            if found is not None:
                return found
        self._evaluator.load_base()
        model = LinearModel(encoder.module.eval(), self._vectors[vector])
        rows: list[tuple[int, Tensor, Tensor]] = []
        told = doing(f"linear terms of {vector} on {task}, {split}")
        with torch.no_grad(), told, counted_by(self._evaluator.on_tokens, sum(inputs.lengths), "tokens") as advance:
            for indices in ordered_batches(inputs.lengths):
                first, change = model.parts(inputs.batch(indices))
                rows.extend(zip(indices, first, change, strict=True))
                advance(sum(inputs.lengths[i] for i in indices))
        rows.sort(key=lambda row: row[0])
        terms = torch.stack([row[1] for row in rows]), torch.stack([row[2] for row in rows])
        if not all(bool(torch.isfinite(term).all()) for term in terms):
            raise DataError(f"vector {vector!r} on task {task!r}: the linear model gives NaN or Inf.")
        if path is not None:
            write_tensors(path, {"base": terms[0], "change": terms[1]})
        return terms


def _origin(coefficients: Mapping[str, float]) -> str:
    return " + ".join(f"{value:g}·{name}" for name, value in coefficients.items() if value) or "the base"


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    try:
        kept = load_file(path)
        return kept["base"], kept["change"]
    except (OSError, SafetensorError, KeyError):
        return None


def _known(coefficients: Mapping[str, float], vectors: Iterable[str]) -> None:
    unknown = [name for name in coefficients if name not in set(vectors)]
    if unknown:
        raise DataError(f"no task vector {unknown[0]!r}. Known: {', '.join(vectors)}.")
