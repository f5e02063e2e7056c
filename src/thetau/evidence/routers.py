r"""The routers of a merged mixture of experts, calibrated: what they say of a task's text is brought to what the task's own model says.

A router reads the hidden states of the layers below it, and in a merged model these are others than those that it was trained on. Here task t's
texts run through its own model, whose routers give the logits y (at its own hidden states), and then through the merged model, which gives the
routers' inputs h. Each router is the ridge regression of y on h that stays at the merge's weights W₀ where no input says otherwise,

$W = (C + ρ W_0)(H + ρ I)^{-1}$ with $H = \sum h h^\top$, $C = \sum y h^\top$ and $ρ = \text{ridge} · \mathrm{tr}(H) / d$,

the sums over the tokens of all tasks (Hoerl and Kennard, Technometrics 1970, shrunk to W₀ and not to 0). It is solved for the change,
$W - W_0 = (C - W_0 H)(H + ρ I)^{-1}$, of which C − W₀H is summed as it is: a router whose logits are right already keeps its bits. A bias is one
more column, of an input that is always 1.

All routers are solved at once, after one pass of each model. Routers below change the inputs of those above, so `rounds` may repeat the merged
model's pass with the calibrated routers, always towards W₀. After n rounds the lowest n routers are what solving one after the other gives.

Of a fit to few tokens nothing follows for others, so some texts are held back to measure it. Nothing here comes from a paper; RegMean++
(`thetau.evidence.layerwise`) uses the merged model's inputs in the same sense.

One model lies in memory at a time, in float32, beside the logits of all tasks (4 bytes for each token, router and expert) and the sums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thetau.checkpoint.config import config_for
from thetau.checkpoint.layouts import Reader
from thetau.checkpoint.memory import MemorySource
from thetau.checkpoint.source import computed, leaves
from thetau.engine.patchwork import Patch, Patchwork
from thetau.errors import AlignmentError, DataError
from thetau.evidence.config import RouterConfig
from thetau.evidence.layers import batched, groups
from thetau.facade import Expression
from thetau.linalg.gram import add_upper, mirrored
from thetau.models.decoder import Decoder, has_tokenizer, live_names, load_decoder, read_tokens
from thetau.vectors import Combination

Tokens = list[list[int]]
Logits = dict[str, list[Tensor]]
_SHOWN = 3


@final
@dataclass(frozen=True, kw_only=True)
class Router:
    """One router: the module of the live model that holds it, and what its tensors are called in the merged checkpoint."""

    module: str
    weight: str
    bias: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A merged model with calibrated routers.

    - `model`: the merged model, of which only the routers differ; `model.save(path)` writes it.
    - `before`, `after`: by the router's stored name, ‖y − W h‖ / ‖y‖ over the texts, in the merged model and in the calibrated one, each at its own
      hidden states.
    - `held_before`, `held_after`: the same over the texts that were held back; empty where there are none.
    - `tokens`: of each task's texts that the routers were fitted to.
    """

    model: Expression
    before: Mapping[str, float]
    after: Mapping[str, float]
    held_before: Mapping[str, float]
    held_after: Mapping[str, float]
    tokens: Mapping[str, int]
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the model."""
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "held_before": dict(self.held_before),
            "held_after": dict(self.held_after),
            "tokens": dict(self.tokens),
            "notes": list(self.notes),
        }


def calibrate_routers(
    merged: Expression,
    models: Mapping[str, Expression],
    texts: Mapping[str, Sequence[str]],
    config: RouterConfig | None = None,
    *,
    tick: Callable[[float], None] | None = None,
) -> Calibrated:
    """Calibrate the routers of a merged mixture on texts of its tasks.

    Args:
        merged: the merged model as it was written, with config and tokenizer beside it.
        models: the fine-tuned model of each task.
        texts: of each task, by the names of `models`.
        tick: told of the share of all work that was done since it was called last.

    Raises:
        DataError: the merge is not written yet, there are no routers, a task has no text, or a model reads the texts as other tokens than the merged one does.
        CheckpointError: a model cannot run: no config, no tokenizer, a model that transformers does not know.
        AlignmentError: the models are of different architectures, or their routers of different shapes.
    """
    config = config or RouterConfig()
    if computed(merged.sources()):
        raise DataError(
            f"{merged.label}: is no written model, and its weights are read more than once. Save the merge first, and open it."
        )
    routers, left = routers_of(merged)
    tokens, notes = _tokens(merged, models, texts, config)
    fitted = {task: [text for place, text in enumerate(one) if not _held(place, config)] for task, one in tokens.items()}
    aside = {task: [text for place, text in enumerate(one) if _held(place, config)] for task, one in tokens.items()}
    batches, others = _batches(fitted, config), _batches(aside, config)
    shapes = {router.weight: merged.specs()[router.weight].shape for router in routers}
    counts, rest = ({task: sum(map(len, one)) for task, one in part.items()} for part in (fitted, aside))
    parts = groups(
        {router.weight: 8 * (shapes[router.weight][1] + (router.bias is not None)) ** 2 for router in routers}, config.memory
    )
    total = sum(counts.values()) * (config.rounds * len(parts) + 2) + sum(rest.values()) * 3

    def done(count: int) -> None:
        if tick is not None:
            tick(count / total)

    wanted: dict[str, Logits] = {}
    unseen: dict[str, Logits] = {}
    for task in sorted(models):
        own = load_decoder(models[task], task)
        _fits(own, task, routers, shapes)
        wanted[task], unseen[task] = (_logits(own, routers, part[task], done) for part in (batches, others))
        del own  # before the next one comes
    live = load_decoder(merged, merged.label)
    _fits(live, merged.label, routers, shapes)
    start = {router.weight: _matrix(live, router) for router in routers}
    dtypes = {name: spec.dtype.torch for name, spec in merged.specs().items()}
    changed: dict[str, Tensor] = {}
    known = {router.weight: router for router in routers}
    before: dict[str, float] = {}
    held_before = _errors(_measure(live, routers, others, unseen, done, solving=False)) if any(rest.values()) else {}
    for number in range(config.rounds):
        solved: dict[str, Tensor] = {}
        for names in parts:
            sums = _measure(live, [known[name] for name in names], batches, wanted, done, solving=True)
            for name in names:
                now, biased = _matrix(live, known[name]), known[name].bias is not None
                solved[name] = _solve(start[name], now, sums[name], config.ridge, biased=biased)
            if not number:
                before |= {name: sums[name].error for name in names}
        for name, matrix in solved.items():  # after the pass, so that none runs with some of them
            stored = _tensors(known[name], matrix, dtypes)
            _put(live, known[name], stored)
            changed |= stored
    after = _errors(_measure(live, routers, batches, wanted, done, solving=False))
    held_after = _errors(_measure(live, routers, others, unseen, done, solving=False)) if held_before else {}
    if left:
        what = "tensor of a router is" if len(left) == 1 else "tensors of routers are"
        notes.append(f"{len(left)} {what} not multiplied by the inputs, and left as it was: {_some(left)}.")
    read, width = sum(counts.values()), max(matrix.shape[1] for matrix in start.values())
    if read < width:
        notes.append(
            f"{read} tokens for routers that read {width} numbers: in most directions they stay the merge's. Give more text."
        )
    record = {
        "models": {task: {"path": one.label, "fingerprints": _fingerprints(one)} for task, one in sorted(models.items())},
        "texts": {task: {"tokens": counts[task], "digest": _digest(one)} for task, one in sorted(fitted.items())},
        "config": asdict(config),
    }
    model = _changed(merged, changed, {"routers": record})
    farther = [name for name, error in held_before.items() if held_after[name] > error]
    if farther:
        notes.append(
            f"On the texts that were held back {len(farther)} of {len(routers)} routers are farther from the tasks' own than before ({_some(farther)}): give "
            "more text, or a larger ridge."
        )
    return Calibrated(
        model=model,
        before=before,
        after=after,
        held_before=held_before,
        held_after=held_after,
        tokens=counts,
        notes=tuple(notes),
    )


def _held(place: int, config: RouterConfig) -> bool:
    """Whether a task's text of this place is held back."""
    return config.hold > 0 and place % config.hold == config.hold - 1 and place > 0


def _batches(texts: Mapping[str, Tokens], config: RouterConfig) -> dict[str, list[Tokens]]:
    return {task: [[one[i] for i in part] for part in batched([*map(len, one)], config.batch)] for task, one in texts.items()}


# Which tensors.


def routers_of(merged: Expression) -> tuple[list[Router], list[str]]:
    """The routers of a mixture, in the checkpoint's order, and the tensors of routers that are none of their matrices.

    Raises:
        DataError: there is none.
        CheckpointError: no config says what the model is, or transformers does not know it.
        AlignmentError: a router is no parameter of the model.
    """
    specs = merged.specs()
    reference = merged.reference
    config = config_for(reference) if reference is not None else {}
    names = Reader(specs, config).routers
    matrices = [name for name in names if len(specs[name].shape) == 2]
    if not matrices:
        raise DataError(
            f"{merged.label}: has no router, so there is nothing to calibrate. Routers are those of a mixture of experts."
        )
    live = live_names(merged, merged.label)
    lost = [name for name in matrices if name not in live or not live[name].endswith(".weight")]
    if lost:
        raise AlignmentError(
            f"{merged.label}: {len(lost)} routers are no parameter of the model that transformers builds: {_some(lost)}. Is config.json that of these weights?"
        )
    stored = {theirs: name for name, theirs in live.items()}
    modules = {name: live[name].removesuffix(".weight") for name in matrices}
    routers = [Router(module=module, weight=name, bias=stored.get(f"{module}.bias")) for name, module in modules.items()]
    taken = {*matrices, *(router.bias for router in routers)}
    return routers, [name for name in names if name not in taken]


def _fits(live: Decoder, label: str, routers: Sequence[Router], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `AlignmentError` where a model does not have the merged model's routers."""
    known = {name: tuple(parameter.shape) for name, parameter in live.module.named_parameters()}
    for router in routers:
        got = known.get(f"{router.module}.weight")
        if got != shapes[router.weight] or (router.bias is not None) != (f"{router.module}.bias" in known):
            has = "is not there" if got is None else f"has shape {list(got)}"
            raise AlignmentError(
                f"{label}: the router {router.module!r} {has}; the merged model's is {list(shapes[router.weight])}. "
                "Models that were merged share their routers: give those."
            )


# Texts.


def _tokens(
    merged: Expression, models: Mapping[str, Expression], texts: Mapping[str, Sequence[str]], config: RouterConfig
) -> tuple[dict[str, Tokens], list[str]]:
    """Of each task the tokens of the texts that run, and what is to be said of the others."""
    if not models:
        raise DataError("a calibration needs the fine-tuned model of a task, and its text. Got none.")
    lacking = [task for task in models if not [text for text in texts.get(task, ()) if text.strip()]]
    if lacking:
        raise DataError(
            f"{lacking[0]}: there is no text of this task, and its routers are asked about one. Give a file with a text a line."
        )
    strangers = [task for task in texts if task not in models]
    if strangers:
        raise DataError(
            f"{strangers[0]}: there is text of this task but no model. Models are given for {', '.join(sorted(models))}."
        )
    found: dict[str, Tokens] = {}
    notes: list[str] = []
    for task in sorted(models):
        given = [text for text in texts[task] if text.strip()]
        read = read_tokens(merged, merged.label, given)
        _alike(merged, models[task], task, given, read)
        cut = [one[: config.length] for one in read if one]
        taken: Tokens = []
        held = 0
        for one in cut:
            if taken and held + len(one) > config.tokens:
                break
            taken.append(one[: config.tokens])
            held += len(taken[-1])
        if not taken:
            raise DataError(f"{task}: the tokenizer makes no token of its texts. Is it that of this model?")
        shortened = sum(len(one) > config.length for one in read)
        if shortened:
            are = "text is" if shortened == 1 else "texts are"
            notes.append(f"{task}: {shortened} {are} cut to {config.length} tokens.")
        if len(taken) < len(cut):
            notes.append(f"{task}: {len(taken)} of {len(cut)} texts are read, {held} tokens; `tokens` is {config.tokens}.")
        found[task] = taken
    return found, notes


def _alike(merged: Expression, model: Expression, task: str, texts: Sequence[str], tokens: Tokens) -> None:
    """Raise `DataError` where a task's own tokenizer reads its texts otherwise than the merged model's."""
    if not has_tokenizer(model):
        return
    for text, ours, theirs in zip(texts, tokens, read_tokens(model, task, texts), strict=True):
        if ours != theirs:
            raise DataError(
                f"{task}: its tokenizer reads {text[:60]!r} as other tokens than that of {merged.label} ({len(theirs)} and {len(ours)}). "
                "The same tokens must run through both models: give text that both read alike."
            )


# Running.


@contextmanager
def _watched(
    live: Decoder, routers: Sequence[Router], seen: Callable[[Router, Float[Tensor, "token d"]], None]
) -> Iterator[dict[str, Bool[Tensor, "text position"]]]:
    """While it lasts, every call of a router tells `seen` of its inputs at the real positions. Set `real` of what is yielded before each run."""
    place: dict[str, Tensor] = {}

    def before(router: Router, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        rows, real = given.reshape(-1, given.shape[-1]), place["real"].flatten()
        if len(rows) != len(real):
            raise DataError(
                f"{live.label}: the router {router.module!r} reads {len(rows)} rows of {len(real)} positions, so none says which token is whose."
            )
        rows = rows[real]
        if not bool(torch.isfinite(rows).all()):
            raise DataError(
                f"{live.label}: the inputs of {router.module!r} must be finite; they hold NaN or Inf. Look at the weights below it."
            )
        seen(router, rows)

    handles = [
        live.module.get_submodule(router.module).register_forward_pre_hook(partial(before, router), with_kwargs=True)
        for router in routers
    ]
    try:
        yield place
    finally:
        for handle in handles:
            handle.remove()


def _run(
    live: Decoder,
    routers: Sequence[Router],
    batches: Sequence[Tokens],
    seen: Callable[[Router, Tensor], None],
    done: Callable[[int], None],
) -> None:
    """Run texts through a model, telling `seen` of what each router reads, batch by batch.

    Raises:
        DataError: a token has no row in the embedding, or a router never ran.
    """
    ran: set[str] = set()

    def note(router: Router, rows: Tensor) -> None:
        ran.add(router.module)
        seen(router, rows)

    with _watched(live, routers, note) as place:
        for batch in batches:
            largest = max(map(max, batch))
            if largest >= live.vocabulary:
                raise DataError(
                    f"{live.label}: the text has the token {largest}; the model's embedding has {live.vocabulary} rows. Is the tokenizer that of this model?"
                )
            place["real"] = live.real(batch)
            live.run(batch)
            done(sum(map(len, batch)))
    still = [router.module for router in routers if batches and router.module not in ran]
    if still:
        raise DataError(
            f"{live.label}: {len(still)} routers did not run on text: {_some(still)}. Only those that text goes through are calibrated."
        )


def _logits(own: Decoder, routers: Sequence[Router], batches: Sequence[Tokens], done: Callable[[int], None]) -> Logits:
    """What the routers of a task's own model say of its texts, by router and batch, `[token, expert]`."""
    found: dict[str, list[Tensor]] = {router.weight: [] for router in routers}
    _run(own, routers, batches, lambda router, rows: found[router.weight].append(_said(own, router, rows)), done)
    return found


def _said(live: Decoder, router: Router, rows: Float[Tensor, "token d"]) -> Float[Tensor, "token expert"]:
    """A router's logits, float32."""
    with torch.no_grad():
        weight = live.module.get_parameter(f"{router.module}.weight")
        bias = None if router.bias is None else live.module.get_parameter(f"{router.module}.bias")
        return nn.functional.linear(rows, weight, bias)


@final
@dataclass
class _Sums:
    """Over tokens, in float64: H = Σ h hᵀ (its upper triangle), R = Σ (y − W h) hᵀ, Σ ‖y − W h‖² and Σ ‖y‖². W is the router as it is."""

    gram: Float[Tensor, "d d"]
    rest: Float[Tensor, "expert d"]
    lost: float = 0.0
    whole: float = 0.0

    @property
    def error(self) -> float:
        """‖y − W h‖ / ‖y‖; 0 where nothing was said."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


def _errors(sums: Mapping[str, _Sums]) -> dict[str, float]:
    return {name: one.error for name, one in sums.items()}


def _measure(
    live: Decoder,
    routers: Sequence[Router],
    batches: Mapping[str, Sequence[Tokens]],
    wanted: Mapping[str, Logits],
    done: Callable[[int], None],
    *,
    solving: bool,
) -> dict[str, _Sums]:
    """The sums of these routers over the texts of all tasks; without `solving` only the two errors."""
    sums: dict[str, _Sums] = {}
    for router in routers:
        experts, width = _matrix(live, router).shape if solving else (0, 0)
        zeros = partial(torch.zeros, dtype=torch.float64)
        sums[router.weight] = _Sums(gram=zeros(width, width), rest=zeros(experts, width))
    for task in sorted(batches):
        place = dict.fromkeys(sums, 0)

        def seen(router: Router, rows: Tensor, task: str = task, place: dict[str, int] = place) -> None:
            name = router.weight
            target, total = wanted[task][name][place[name]], sums[name]
            place[name] += 1
            missing = (target - _said(live, router, rows)).double()
            total.lost += float(missing.square().sum())
            total.whole += float(target.double().square().sum())
            if solving:
                inputs = rows.double()
                if router.bias is not None:
                    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
                add_upper(total.gram, inputs)
                total.rest += missing.T @ inputs

        _run(live, routers, batches[task], seen, done)
    return sums


# Solving.


def _solve(
    start: Float[Tensor, "expert d"], now: Float[Tensor, "expert d"], sums: _Sums, ridge: float, *, biased: bool
) -> Float[Tensor, "expert d"]:
    """The router, float64; `start` is the merge's, `now` the one that the sums were taken with."""
    gram = mirrored(sums.gram)
    squares = gram.diagonal()[:-1] if biased else gram.diagonal()
    strength = ridge * float(squares.mean())
    if not strength:
        return start  # no input, or nothing but zeros
    rest = sums.rest + (now - start) @ gram  # from W h to W₀ h
    change: Tensor = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), rest, left=False)
    return start + change


def _matrix(live: Decoder, router: Router) -> Float[Tensor, "expert d"]:
    """A router's weight in float64, with its bias as one more column."""
    parts = [live.module.get_parameter(f"{router.module}.weight").detach().double()]
    if router.bias is not None:
        parts.append(live.module.get_parameter(f"{router.module}.bias").detach().double()[:, None])
    return torch.cat(parts, 1)


def _tensors(router: Router, matrix: Float[Tensor, "expert d"], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """What is stored of a router, rounded to the merged checkpoint's dtype."""
    if router.bias is None:
        return {router.weight: matrix.to(dtypes[router.weight])}
    weight, bias = matrix[:, :-1].contiguous(), matrix[:, -1].contiguous()
    return {router.weight: weight.to(dtypes[router.weight]), router.bias: bias.to(dtypes[router.bias])}


def _put(live: Decoder, router: Router, tensors: Mapping[str, Tensor]) -> None:
    """Let the live model run with a router as it is stored."""
    with torch.no_grad():
        live.module.get_parameter(f"{router.module}.weight").copy_(tensors[router.weight])
        if router.bias is not None:
            live.module.get_parameter(f"{router.module}.bias").copy_(tensors[router.bias])


# The model with other routers.


def _changed(merged: Expression, tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> Expression:
    whole = Patchwork.of(merged, label=merged.label)
    routers = MemorySource(tensors, label="calibrated routers")
    rest = tuple(name for name in whole.specs if name not in tensors)
    patches = [Patch(Combination(((1.0, whole),), reference=whole), rest), Patch(Combination(((1.0, routers),)), tuple(tensors))]
    source = Patchwork(
        patches,
        whole.specs,
        label=f"{merged.label} with calibrated routers",
        folder=whole.folder,
        files=whole.files,
        made=made,
    )
    return Expression(((1.0, source),), reference=source, name=source.label)


def _fingerprints(model: Expression) -> list[str]:
    return [source.fingerprint() for source in leaves(model.sources())]


def _digest(tokens: Tokens) -> str:
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).hexdigest()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
