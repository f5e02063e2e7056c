"""What can be told of a base and its models before they are merged, from the weights and, where there are some, from examples: the result's shape.

`thetau doctor` fills it in, `--json` writes it, and reports draw it. Matrices are nested tuples in the order of `compared`, rows first;
a figure that is not defined is None. Names of models, tensors and layers are text from files: a page must escape them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

from thetau.diagnostics.candidates import Candidates
from thetau.diagnostics.results import Matrix, Result

Topic = Literal["leave out", "conflict", "method", "scale", "cost", "check"]
Relation = Literal[
    "duplicate", "rescaled", "continuation", "alike", "opposed", "wrong base", "other vocabulary", "does not fit", "no change"
]


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, or the base, as its files say it.

    - `form`: `model`, `adapter` (LoRA and its kin) or `vector` (a saved task vector).
    - `architecture`: what its config calls itself, "" where there is none.
    - `dtypes`: tensors by dtype. `quantised`: the form of its codes, "" where there are none.
    - `norm`: ‖θ₀‖ of the base, ‖τ‖ of a model. `shift`: ‖τ‖/‖θ₀‖.
    - `tied`: names that the config or the storage ties, as `name = name`.
    - `beside`: what differs from the base in config, tokenizer and template, in sentences.
    - `problems`: why it could not be compared; then it is not in `compared`.
    """

    name: str
    path: str
    form: Literal["model", "adapter", "vector"]
    architecture: str
    dtypes: Mapping[str, int]
    quantised: str
    tensors: int
    parameters: int
    norm: float | None
    shift: float | None
    tied: tuple[str, ...]
    beside: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors taken together: all of them (`by` is `whole`), those of a block (`layer`), or those of a kind (`kind`).

    - `name`: "" for the whole; the block's number as text, or `outside`; the kind.
    - `base`: ‖θ₀‖ here. `norms`: ‖τ‖ by model, as `compared`.
    - `cosine`: between the task vectors here.
    """

    by: Literal["whole", "layer", "kind"]
    name: str
    tensors: int
    parameters: int
    base: float
    norms: tuple[float, ...]
    cosine: Matrix


@final
@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of one matrix of one task vector.

    - `stable_rank`: ‖τ‖²/σ₁². `effective_rank`: exp of the entropy of σ²/Σσ²; at most this where not `exact`.
    - `shares`: of ‖τ‖² that the first singular directions hold, each, falling; at most 16.
    - `full`: the matrix's smaller side, the largest rank that there is.
    """

    model: str
    tensor: str
    kind: str
    layer: int | None
    full: int
    stable_rank: float
    effective_rank: float
    exact: bool
    shares: tuple[float, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How two task vectors lie to each other, from their inner products alone.

    - `projection`: ⟨τ_a, τ_b⟩/‖τ_a‖², how much of τ_a stands in τ_b; near 1 in all tensors where b was trained from a. `back`: the same
      from b to a. `steady`, `steady_back`: the share of tensors in which it is within 0.3 of 1.
    - `distance`: ‖τ_a − τ_b‖.
    """

    a: str
    b: str
    cosine: float
    projection: float
    back: float
    steady: float
    steady_back: float
    distance: float


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two task vectors: what `Likeness` has, and

    - `overlap`: Σ min(|a|, |b|) / Σ max(|a|, |b|) over entries, 1 for entries of equal sizes.
    - `conflict`: the share of Σ min(|a|, |b|) on entries whose signs are opposed; 0.5 by chance.
    - `inputs`, `outputs`: how much of the leading singular directions they share (0 to 1), at the layers' inputs and outputs, and what
      random directions would share.
    - `a_on_b`: ‖τ_a τ_bᵀ‖/‖τ_b τ_bᵀ‖ over the layers: what a does to the inputs that b was trained on, relative to what b does. `b_on_a`.
    """

    a: str
    b: str
    cosine: float
    projection: float
    back: float
    steady: float
    steady_back: float
    distance: float
    overlap: float
    conflict: float
    inputs: float | None
    outputs: float | None
    inputs_by_chance: float | None
    outputs_by_chance: float | None
    a_on_b: float | None
    b_on_a: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Harm:
    """What a merge would do to each task, estimated without data: the root of WUDI's Eq. 21 over what it is at θ₀.

    ‖(τ_m − τ_i) τ_iᵀ‖/‖τ_i τ_iᵀ‖, task i's own rows standing for its inputs: 0 where the merge does to them what τ_i does, 1 where it does
    as little as the base.

    - `method`: as a recipe has it. `scale`: λ, where it has one.
    - `whole`: over all matrices of the blocks, by model as `Doctor.staying`.
    - `layers`: block → the same there.
    """

    method: str
    scale: float | None
    whole: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]


@final
@dataclass(frozen=True, kw_only=True)
class OnTask:
    """What the examples of one task say of the base and of every model; tuples are by model as `Doctor.compared`.

    A figure is None where it is not defined for that model: the notes say why.

    - `own`: the model that was trained on it, "" where none is known.
    - `base_loss`, `loss`: means over the examples, by the head that reads the task. `base_score`, `score`: the same by `metric`.
    - `tau_jp`: the mean of ‖J(x; θ₀) τ‖². `unit`: the mean of ‖f(x; θ₀)‖², to compare with.
    - `direction`, `magnitude`: how far the inputs of the linear layers turn and stretch against the base (WUDI's Eqs. 7 and 8), means over layers.
    - `layers`: block → `direction` there.
    """

    task: str
    own: str
    split: str
    n: int
    metric: str
    unit: float | None
    base_loss: float | None
    base_score: float | None
    loss: tuple[float | None, ...]
    score: tuple[float | None, ...]
    tau_jp: tuple[float | None, ...]
    direction: tuple[float | None, ...]
    magnitude: tuple[float | None, ...]
    layers: Mapping[str, tuple[float | None, ...]]


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that stands out. `models`: those it is about, the one to leave out last. `figures`: what it is told from."""

    kind: Relation
    models: tuple[str, ...]
    sentence: str
    figures: Mapping[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class HitRate:
    """How often such advice was right where it was tried: `hits` of `n`, with the 95 % interval (Wilson), and what was tried."""

    hits: int
    n: int
    low: float
    high: float
    what: str


@final
@dataclass(frozen=True, kw_only=True)
class Advice:
    """One piece of advice.

    - `sentence`: what to do. `evidence`: what it is told from. `uncertainty`: what may make it wrong.
    - `measured`: how often such advice was right; None where that was not tried.
    """

    topic: Topic
    models: tuple[str, ...]
    sentence: str
    evidence: str
    uncertainty: str
    measured: HitRate | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Doctor(Result):
    """The whole picture.

    - `compared`: the models that fit the base, in the order of all matrices and tuples by model.
    - `candidates`: where other bases were given.
    - `staying`: those of `compared` that the advice does not leave out; `harms` are of merges of these.
    - `harms`: one a method and scale; empty for a single model.
    - `best_scale`: λ of task arithmetic that makes Eq. 21 least.
    - `notes`: what was estimated from a sample, what was left out, and why.
    - `tasks`: what their examples say, where some were given.
    """

    version: int = 1
    base: Subject
    models: tuple[Subject, ...]
    compared: tuple[str, ...]
    staying: tuple[str, ...]
    groups: tuple[Group, ...]
    spectra: tuple[Spectrum, ...]
    pairs: tuple[Pair, ...]
    harms: tuple[Harm, ...]
    best_scale: float | None
    candidates: Candidates | None
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    tasks: tuple[OnTask, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
