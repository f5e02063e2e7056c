r"""The diagonal of the Fisher information matrix: how much each parameter matters to a task.

Matena and Raffel, NeurIPS 2022, <https://arxiv.org/abs/2111.09832>: $F = \mathbb{E}_x \sum_y p(y|x)\, (\partial_\theta \log p(y|x))^2$, the
labels being those that the model itself gives. As in the authors' code the gradients of *each example* are squared and then averaged.
Public ports square the gradient of a batch, where different examples cancel each other, or that of $\sum_y \sqrt{p_y} \log p_y$, whose
cross terms remove exactly the uncertain examples; neither is this matrix, and neither is here.

The expectation over labels is exact up to `most_classes` classes, and drawn from the model's probabilities beyond. A regression is read as
a Gaussian of variance 1 around the prediction, whose matrix is the squared gradient of the prediction. `empirical` takes the data's own
label instead. A text-to-text model is read as a distribution over the labels' texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from thetau.checkpoint.disk import write_tensors
from thetau.errors import DataError
from thetau.evidence.collecting import check_head, check_start, existing, file_of, key_of, labels_drawn, labels_of, stored_names
from thetau.evidence.config import FisherConfig, Labels
from thetau.evidence.files import save_evidence
from thetau.evidence.jobs import ALL, Jobs, Opened, Share, Tick, added, run_shares, running
from thetau.finetune.lesson import to_device
from thetau.finetune.state import StateFolder
from thetau.models import Encoder, weights_hash
from thetau.tasks import Task, encode, make_head
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs

EVIDENCE = "fisher"
GRADIENT_BYTES = 256_000_000  # that the gradients of a batch's examples may take; one example's are held in any case
_HELD = 3  # float32 tensors of a parameter's size that an example of a batch takes: its gradient, its square, their sum
_TOLERANCE = 1e-4
_SUMS, _LABELS = "sums.safetensors", "thetau.labels"  # of a share
_LOOP = 1  # part of every key; raised when what is computed changes


@final
@dataclass(frozen=True, kw_only=True)
class Fisher:
    """What `collect_fisher` wrote to `path`.

    `labels`: whose gradients were squared in the end. `norm`: over all tensors, before it was divided by where it was. `zero`: tensors
    that are zero throughout, such as a pooler that the task does not use. `cached`: the file held this very result already.
    """

    path: Path
    task: str
    examples: int
    labels: str
    tensors: int
    elements: int
    norm: float
    normalised: bool
    zero: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path)}


def collect_fisher(
    encoder: Encoder,
    task: Task,
    weights: Mapping[str, Tensor],
    path: str | Path,
    config: FisherConfig | None = None,
    *,
    head: AnyHead | None = None,
    origin: str = "the model",
    tick: Tick | None = None,
    jobs: Jobs | None = None,
    device: str | None = None,
) -> Fisher:
    """Collect the Fisher diagonal of a fine-tuned model on a task, and write it as safetensors by the checkpoint's names.

    Every parameter of the model that the checkpoint holds gets a tensor of float32; buffers and heads get none. A run that was cut off
    goes on where its last state was, to the same bits.

    Args:
        encoder: holds the base's weights, before and after.
        weights: of the fine-tuned model, by the base's names; `origin` is what messages and the file call them.
        path: of the file, new or this very result, ending in `.safetensors`.
        head: by default the task's frozen head, made from the base. One that was trained with the model must be given.
        tick: told of the number of examples that were done since it was called last.
        jobs: processes that share the examples; their sums lie beside the file meanwhile.
        device: where the model runs; by default where it is.

    Raises:
        DataError: the encoder does not hold its base, no example or no label, a head of another model, a Fisher of zeros or NaN.
        AlignmentError: the weights are not the encoder's.
        OutputError: the file cannot be written, or holds something else.
    """
    config, path = config or FisherConfig(), Path(path)
    check_start(path, encoder)
    opened = Opened(encoder=encoder, task=task, weights=weights, head=head)
    head, inputs = _examples(opened, config)
    facts = {
        "task": task.name,
        "data": inputs.hash,
        "head": head.hash(),
        "base": encoder.base_hash,
        "fingerprint": weights_hash(weights),
    }
    chosen = {name: value for name, value in asdict(config).items() if name != "save_every"}
    key = key_of(_LOOP, facts, chosen)
    kept = existing(path, EVIDENCE, key, "Fisher")
    if kept is not None:
        return Fisher(path=path, cached=True, **{**kept, "zero": tuple(kept["zero"]), "notes": tuple(kept["notes"])})
    stored = stored_names(encoder)
    state = StateFolder.beside(path, key)
    work = _Sums(config=config, origin=origin, device=device)
    if jobs is None or jobs.count == 1:
        sums, labels = work.found(opened, head, inputs, ALL, state, tick)
    else:
        files = [folder / _SUMS for folder in run_shares(jobs, work, opened, state, tick)]
        sums, labels = dict(added(files)), _labels_in(files[0])
    mean = {name: total.div_(len(inputs)).cpu() for name, total in sums.items()}
    squares = {name: float(value.double().square().sum()) for name, value in mean.items()}
    norm = math.sqrt(math.fsum(squares.values()))
    if not norm > 0:
        raise DataError(
            f"task {task.name!r}: the Fisher of {origin} is zero everywhere, so it says nothing about any parameter. The model is certain of "
            "every label, or the head does not depend on it."
        )
    if config.normalise:
        mean = {name: value.div_(norm) for name, value in mean.items()}
    tensors = {known: value.clone() for name, value in mean.items() for known in stored[name]}
    zero = [known for name in mean if not squares[name] for known in stored[name]]
    notes = []
    if labels != config.labels:
        notes.append(
            f"the task has more than {config.most_classes} classes: {config.draws} label(s) an example were drawn from the model."
        )
    if zero:
        notes.append(
            f"{len(zero)} tensors do not act on the task and are zero ({', '.join(zero[:3])}{', …' if len(zero) > 3 else ''})."
        )
    result = Fisher(
        path=path,
        task=task.name,
        examples=len(inputs),
        labels=labels,
        tensors=len(tensors),
        elements=sum(value.numel() for value in tensors.values()),
        norm=norm,
        normalised=config.normalise,
        zero=tuple(zero),
        notes=tuple(notes),
    )
    told = {name: value for name, value in result.to_json().items() if name not in ("path", "cached")}
    more = {
        "model": origin,
        **file_of(origin, encoder),
        "examples": str(len(inputs)),
        "labels": labels,
        "config": json.dumps(asdict(config)),
        "key": key,
    }
    save_evidence(path, EVIDENCE, tensors, facts | more | {"result": json.dumps(told)})
    state.remove()
    return result


def _examples(opened: Opened, config: FisherConfig) -> tuple[AnyHead, Inputs]:
    """The head and the examples; the encoder holds the base."""
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    head = opened.head or make_head(opened.encoder, opened.task, **sizes)
    return head, encode(opened.encoder, opened.task, config.split, limit=config.examples, **sizes)


@final
@dataclass(frozen=True, kw_only=True)
class _Sums:
    """The squared gradients of a share of the examples."""

    config: FisherConfig
    origin: str
    device: str | None

    def found(
        self, opened: Opened, head: AnyHead, inputs: Inputs, share: Share, state: StateFolder, tick: Tick | None
    ) -> tuple[dict[str, Tensor], str]:
        """They, and whose labels counted."""
        with running(opened, self.origin, share.device(self.device)):
            check_head(opened.encoder, head, inputs, opened.task)
            run = _Run(opened.encoder.module, inputs, head, self.config, list(stored_names(opened.encoder)), share)
            return run.finish(state, tick), run.labels

    def summed(self, opened: Opened, share: Share, state: StateFolder, tick: Tick | None) -> None:
        """Leave them in a file, unless they are there."""
        if not (state.folder / _SUMS).is_file():
            sums, labels = self.found(opened, *_examples(opened, self.config), share, state, tick)
            write_tensors(state.folder / _SUMS, sums, {_LABELS: labels})


def _labels_in(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()[_LABELS])


def fisher_sums(
    module: nn.Module, inputs: Inputs, head: AnyHead, names: Sequence[str], config: FisherConfig
) -> dict[str, Float[Tensor, "..."]]:
    """The squared gradients of every example's log-likelihood, by the names of the module's parameters, summed over the examples.

    `module` is in evaluation mode and holds the model's weights. Raises `DataError`: no example, no labels, NaN.
    """
    return _Run(module, inputs, head, config, names).finish(None, None)


@final
class _Run:
    """One pass over the examples of a share, the shortest first; its sums can be kept and taken up between any two batches."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        head: AnyHead,
        config: FisherConfig,
        names: Sequence[str],
        share: Share = ALL,
    ) -> None:
        if not len(inputs):
            raise DataError("a Fisher needs at least one example. Got none.")
        if config.labels == "empirical" and len(inputs.labels) != len(inputs):
            raise DataError(
                f"labels empirical needs a label for each example. Got {len(inputs.labels)} for {len(inputs)} examples. Use labels true, "
                "which needs none."
            )
        known = dict(module.named_parameters())
        self.module, self.inputs, self.config = module, inputs, config
        self.parameters = {name: known[name] for name in names}
        self.device = next(iter(self.parameters.values())).device
        self.head = head.to(self.device)
        taken = 4 * _HELD * sum(parameter.numel() for parameter in self.parameters.values())
        width = max(1, min(config.batch, GRADIENT_BYTES // taken))
        order = sorted(range(len(inputs)), key=lambda index: (inputs.lengths[index], index))
        self.batches = share.of([order[start : start + width] for start in range(0, len(order), width)])
        self.labels: Labels = config.labels
        self.together: bool | None = None if width > 1 else False

    def finish(self, state: StateFolder | None, tick: Tick | None) -> dict[str, Tensor]:
        """The sums over all the examples, from those that `state` holds."""
        saved = None if state is None else state.load()
        asked = {name: parameter.requires_grad for name, parameter in self.module.named_parameters()}
        training = self.module.training
        self.module.eval()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.parameters)
        try:
            with torch.no_grad():
                outcomes = self.head.outcomes(self._features(self.inputs.batch([0])))[0].shape[-1]
            self.labels = labels_of(self.config.labels, outcomes, self.config.most_classes)
            sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in self.parameters.items()}
            done = kept = 0
            if saved is not None:
                sums |= {name: total.to(self.device) for name, total in saved.tensors.items()}
                done = kept = saved.step
                if tick is not None:
                    tick(done)
            begun, total = done, sum(map(len, self.batches))
            for number, batch in enumerate(self.batches):
                before = sum(map(len, self.batches[:number]))
                if before < begun:
                    continue
                self._add(batch, sums)
                done = before + len(batch)
                if tick is not None:
                    tick(len(batch))
                if state is not None and done - kept >= self.config.save_every and done < total:
                    state.save(done, sums, [], [])
                    kept = done
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(asked[name])
            self.module.train(training)
        broken = next((name for name, total in sums.items() if not torch.isfinite(total).all()), None)
        if broken is not None:
            raise DataError(
                f"the Fisher must be finite; that of {broken!r} holds NaN or Inf. Look at the weights of this tensor."
            )
        return sums

    def _features(self, columns: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.module(**to_device(columns, self.device))
        return out

    def _add(self, batch: list[int], sums: dict[str, Tensor]) -> None:
        """Add the squares of some examples, all at once where the module lets its gradients be mapped over examples."""
        if self.together is None:
            self.together = self._mappable(batch)
        if self.together:
            for name, square in self._mapped(batch).items():
                sums[name].add_(square)
        else:
            for index in batch:
                self._one(index, sums)

    def _drawn(self, features: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The labels whose gradients are squared, and what each counts: `[example, label]` both."""
        return labels_drawn(self.head, features, self.inputs, indices, self.labels, self.config)

    def _one(self, index: int, sums: dict[str, Tensor]) -> None:
        parameters = list(self.parameters.values())
        with torch.enable_grad():
            features = self._features(self.inputs.batch([index]))
            labels, shares = self._drawn(features, [index])
            told = torch.cat([self.head.log_likelihood(features, label[None]) for label in labels[0]])
        if not torch.isfinite(told).all():
            raise DataError(
                f"the log-likelihood of example {index} must be finite. Got {told.tolist()}; look at the model's weights."
            )
        if not told.requires_grad:
            raise DataError(
                "the head does not depend on the model's parameters: they have no Fisher. Is it the head of this model?"
            )
        for place, share in enumerate(shares[0]):
            slopes = torch.autograd.grad(told[place], parameters, retain_graph=place + 1 < len(told), allow_unused=True)
            for name, slope in zip(self.parameters, slopes, strict=True):
                if slope is not None:
                    sums[name].addcmul_(slope, slope * share)

    def _mapped(self, batch: list[int]) -> dict[str, Tensor]:
        """The sum of the squares over a batch, its gradients held for each example."""
        columns = to_device(self.inputs.batch(batch), self.device)
        single = self.inputs.batch(batch[:1])
        own = {
            name: column for name, column in columns.items() if len(single[name]) == 1
        }  # the others are shared by all examples
        shared = {name: column for name, column in columns.items() if name not in own}
        with torch.no_grad():
            labels, shares = self._drawn(self._features(columns), batch)
        constant = {name: parameter.detach() for name, parameter in self.parameters.items()}

        def squares(row: dict[str, Tensor], those: Tensor, weights: Tensor) -> dict[str, Tensor]:
            def told(given: dict[str, Tensor]) -> Tensor:
                whole = {name: column[None] for name, column in row.items()} | shared
                features: Tensor = functional_call(self.module, given, (), whole)
                return torch.cat([self.head.log_likelihood(features, label[None]) for label in those])

            both: Any = vjp(told, constant)
            out, pull = both
            total = {name: torch.zeros_like(value) for name, value in constant.items()}
            for place, unit in enumerate(torch.eye(len(those), dtype=out.dtype, device=out.device)):
                (slopes,) = pull(unit)
                total = {name: total[name] + weights[place] * slope.square() for name, slope in slopes.items()}
            return total

        each: dict[str, Tensor] = vmap(squares)(own, labels, shares)
        return {name: square.sum(0) for name, square in each.items()}

    def _mappable(self, batch: list[int]) -> bool:
        """Whether torch can map the gradients over examples and finds what it finds one by one.

        Modules that look at values, as transformers does when it makes the masks of texts, forbid it.
        """
        few = batch[:2]
        expected = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in self.parameters.items()}
        for index in few:
            self._one(index, expected)
        try:
            got = self._mapped(few)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError):
            return False
        away = math.fsum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
        size = math.fsum(float(value.double().square().sum()) for value in expected.values())
        return away <= _TOLERANCE**2 * size
