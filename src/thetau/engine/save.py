"""The last pass: evaluating a combination tensor by tensor, into a file or into memory."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau._version import __version__
from thetau.checkpoint import Alignment, Dtype, Slots, Source, Spec, Writer, align, dtype_name
from thetau.checkpoint.align import STATISTIC
from thetau.checkpoint.config import has_config, read_config, stem_of
from thetau.checkpoint.disk import check_json, check_new
from thetau.checkpoint.hub import bring
from thetau.checkpoint.quantised.said import model_dtype, plain_files, read_said
from thetau.checkpoint.quantised.writing import SCHEMES, Coded, coded, plain_modules
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.checkpoint.source import computed, leaves
from thetau.checkpoint.ties import untied
from thetau.checkpoint.window import Window
from thetau.checkpoint.writer import SHARD_BYTES
from thetau.engine.executor import Engine
from thetau.engine.guard import Guard, refuse_nonfinite
from thetau.engine.window import Reading, blocks, straight, window_rows, windows
from thetau.engine.work import Call, Work
from thetau.errors import AlignmentError, CheckpointError, OutputError
from thetau.parts import as_float
from thetau.plan import TORCH_PACE, Pass, Step
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Report:
    """What a run did: where the output lies, what a user should know, and warnings that deserve a second look."""

    path: Path | str | None
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """Everything needed to evaluate a combination: how its sources align and what comes out."""

    combination: Combination
    alignment: Alignment
    reading: Reading
    specs: Mapping[str, Spec]  # of the output
    copied: Mapping[str, Source]  # tensors that go over as they are
    made: Sequence[Source]  # the sources that are computed, among and below the terms, those below first
    guard: Guard  # of a combination without merges, which look at their own inputs
    coded: Mapping[str, Coded] = field(default_factory=dict)  # tensors that are written as codes and scales

    @classmethod
    def plan(
        cls,
        combination: Combination,
        *,
        dtype: Dtype | None = None,
        exclude: Sequence[str] = (),
        quantise: str | None = None,
    ) -> Output:
        """Align the sources and settle the output's tensors; `quantise` is one of `quantised.writing.SCHEMES`.

        Raises:
            AlignmentError: the combination is neither a model nor a task vector, or its sources do not fit.
            OutputError: nothing of it can be quantised so.
        """
        if not combination.terms:
            raise AlignmentError("Nothing is left to save: every term cancels.")
        if not (combination.is_model or combination.is_vector):
            raise AlignmentError(
                f"{combination!r} is neither a model (its models' weights sum to 1) nor a task vector (they sum to 0). Subtract or add the base as needed."
            )
        reference = combination.reference or next((s for s in combination.sources() if s.degree == 1), None)
        _check_dtype(combination, reference, dtype)
        sources = {s.key: s for s in ([reference] if reference is not None else []) + combination.sources()}
        label = reference.label if reference is not None else combination.label
        alignment = align(combination.specs(), label, list(sources.values()), exclude)
        reading = Reading(alignment, [combination])
        vector = combination.is_vector
        # What a merge leaves out by name goes over from the base as it is.
        inherited = {name for source in sources.values() for name in source.excluded(reference)}
        specs: dict[str, Spec] = {}
        copied: dict[str, Source] = {}
        for name, spec in alignment.specs.items():
            statistic = alignment.kept.get(name) == STATISTIC and _convex(combination)
            if (name in alignment.kept or name in inherited) and not statistic:
                if not vector and reference is not None and reference.degree == 1:
                    copied[name] = reference
                    specs[name] = replace(spec, dtype=dtype) if dtype is not None and spec.dtype.is_floating_point else spec
                continue
            terms = reading.terms(combination, name)
            if vector and (name in alignment.tied or (not terms and name not in alignment.own)):
                continue  # a copy of another tensor, or zeros; those of what its base ties are said
            wanted = dtype or (Dtype.F32 if vector else spec.dtype)
            specs[name] = Spec(name=name, shape=spec.shape, dtype=wanted, file=spec.file)
        guard = Guard(list(_models(combination)))
        codes = _coded(combination, reference, specs, dtype, quantise)
        return cls(combination, alignment, reading, specs, copied, computed(sources.values()), guard, codes)

    @property
    def stored(self) -> dict[str, Spec]:
        """The tensors of the output's files: of one that is written as codes, these and their scales."""
        found: dict[str, Spec] = {}
        for name, spec in self.specs.items():
            found |= self.coded[name].stored() if name in self.coded else {name: spec}
        return found

    def stored_as(self, name: str) -> list[str]:
        """The tensors of the files that one of the output's is written as."""
        return list(self.coded[name].stored()) if name in self.coded else [name]

    @property
    def untied(self) -> bool:
        """Whether something that the base ties comes out as a tensor of its own: changed apart in some source, or left out by name."""
        tied = self.alignment.tied
        return bool(self.alignment.own) or any((name in self.copied) != (keeper in self.copied) for name, keeper in tied.items())

    def leaves(self) -> list[Source]:
        """Every stored source below this output."""
        return _leaves(self.combination, self.combination.reference)

    def fetch(self, engine: Engine) -> None:
        """Download what the stored sources lack, where every pass over them is known to fit into memory and their disk has room.

        Raises:
            CheckpointError: there is no room, or a download failed. OutputError: a pass does not fit.
        """
        if any(source.lacking() is not None for source in self.leaves()):
            for one in self.passes(engine):
                engine.check(one.steps, one.what, one.held)
                engine.allow(one.memory + one.held, f"{one.what}: what is then solved")
        bring(self.leaves())

    def prepare(self) -> None:
        """What is stored elsewhere comes here; then the statistics passes of everything that is computed, once."""
        bring(self.leaves())
        for source in self.made:
            source.prepare()

    def typed(self, dtypes: Mapping[str, Dtype]) -> Output:
        """The same output in other dtypes, where one is given."""
        specs = {name: replace(spec, dtype=dtypes.get(name, spec.dtype)) for name, spec in self.specs.items()}
        return replace(self, specs=specs)

    def walk(self, engine: Engine) -> Pass:
        """The last pass, in the order in which the tensors lie in the reference's files."""
        return Pass("merge and write", tuple(self._step(name, engine) for name in self.specs))

    def passes(self, engine: Engine) -> list[Pass]:
        """Every walk over the inputs, the writing one last."""
        return [*(one for source in self.made for one in source.passes()), self.walk(engine)]

    @property
    def _readers(self) -> int:
        """Sources that are read side by side."""
        return max([len(self.combination.terms), *(source.abreast for source in self.made)])

    def _step(self, name: str, engine: Engine) -> Step:
        step = self._plain_step(name, engine)
        if name not in self.coded:
            return step
        made, spec = self.coded[name], self.specs[name]
        grain = 1 if name in self.copied else self.grain(name)
        window = spec.row_elements * window_rows(spec, engine.reach(self._readers), grain)
        return replace(
            step,
            read=step.read * (2 if made.twice(window) else 1),
            memory=step.memory + made.memory(window),
            written=sum(one.nbytes for one in made.stored().values()),
            by="torch",
            pace=TORCH_PACE,
        )

    def _plain_step(self, name: str, engine: Engine) -> Step:
        """The same without codes."""
        spec, written = self.alignment.specs[name], self.specs[name].nbytes
        if name in self.copied:
            return Step(name, spec.nbytes, spec.nbytes, written, by="copy", pace=1e12)
        window = spec.row_elements * window_rows(spec, engine.reach(self._readers), self.grain(name))
        terms = self.reading.terms(self.combination, name)
        below = _below(tuple(source for _, source, _ in terms))
        read, memory, flops, pace, loop = 0, 3 * window * 4, 0.0, TORCH_PACE, False
        for _, source, theirs in terms:
            if source.key in below:  # a window reads each source once
                continue
            inner = source.demand(theirs)
            stored = 0 if source.children() else window * spec.dtype.itemsize
            read, memory, flops = read + inner.read, memory + inner.memory + stored, flops + inner.flops
            if source.children():
                pace, loop = inner.pace, loop or inner.by == "loop"
        return Step(
            name,
            read,
            memory,
            written,
            flops,
            "loop" if loop and straight(self.reading, self.combination, name) else "torch",
            pace,
        )

    def grain(self, name: str) -> int:
        """The rows that some merge needs at once: an expert's, or all."""
        return max((source.grain(theirs) for _, source, theirs in self.reading.terms(self.combination, name)), default=1)

    def pieces(self, name: str, engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
        """Yield `(stored tensor, first row, rows)`: what is written of an output tensor. A 0-d tensor comes as shape `[1]`."""
        if name in self.coded:
            yield from self.coded[name].encode(lambda: self.rows(name, engine, wide=True))
            return
        for start, rows in self.rows(name, engine):
            yield name, start, rows

    def rows(self, name: str, engine: Engine, *, wide: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of an output tensor, rounded once to its dtype. A 0-d tensor comes as shape `[1]`.

        `wide` gives float32 instead, of values that its dtype can hold.
        """
        spec, out = self.alignment.specs[name], self.specs[name]
        if name in self.copied:
            for low, high in windows(spec, engine.reach(1)):
                values = self.copied[name].read(name, low, high)
                rows = values.to(out.dtype.torch)  # what is computed comes wider than it is written
                if wide or values.dtype != rows.dtype:
                    self._check(as_float(values), rows, name)
                rows = as_float(values).float() if wide else rows
                yield low, rows.reshape(1) if rows.ndim == 0 else rows
            return
        for low, high in windows(spec, engine.reach(self._readers), self.grain(name)):
            window = Window(name, low, high)
            done = torch.empty((high - low, *spec.shape[1:]), dtype=torch.float32 if wide else out.dtype.torch)
            for start, stop in blocks(spec, low, high):
                value = torch.empty((stop - start, *spec.shape[1:]), dtype=self.reading.dtype)
                self.reading.evaluate(self.combination, window, start, stop, value)
                done[start - low : stop - low] = value
                self._check(value, value.to(out.dtype.torch) if wide else done[start - low : stop - low], name)
                self._look(window, start, stop)
            yield low, done

    def write(self, step: Step, slots: Slots, engine: Engine) -> None:
        """Compute a tensor and store it."""
        spec, name = self.specs[step.name], step.name
        for part in self.stored_as(name):
            slots.begin(part)
        if self._as_stored(name):
            for low, high in windows(self.alignment.specs[name], engine.reach(1)):
                slots.write_raw(name, low, self.copied[name].raw(name, low, high))
            return
        found = straight(self.reading, self.combination, name) if name not in self.coded else None
        if found is None or not found[1].write(name, found[2], found[0], slots):
            for part, start, rows in self.pieces(name, engine):
                slots.write(part, start, rows if spec.shape else rows.reshape(()))

    def _as_stored(self, name: str) -> bool:
        """Whether a tensor goes over byte for byte from an open file."""
        source = self.copied.get(name)
        if source is None or name in self.coded or source.place(name) is None:
            return False
        return source.specs[name].dtype == self.specs[name].dtype

    @property
    def guards(self) -> list[Guard]:
        """This output's own guard and those of its merges."""
        return [self.guard, *(guard for source in self.made for guard in source.guards())]

    def _look(self, window: Window, start: int, stop: int) -> None:
        """Let the guard see how far each model is from its base."""
        base, models = self.combination.reference, _models(self.combination)
        if self.made or base is None or not models:
            return
        theirs = [
            as_float(window.rows(self.alignment.seen(source), self.alignment.maps[source.key][window.name], start, stop)).to(
                self.reading.dtype
            )
            for source in (base, *models.values())
        ]
        stack = torch.stack(theirs[1:]) - theirs[0]
        self.guard.look(self.guard.tasks, stack, self.reading, [self.combination], window, start, stop, base)

    def _check(self, value: Tensor, rounded: Tensor, name: str) -> None:
        byte = rounded.dtype.itemsize == 1  # torch rounds what an 8-bit float cannot hold to its largest value
        clipped = byte and bool((value.abs() > torch.finfo(rounded.dtype).max).any())
        if not clipped and bool(torch.isfinite(rounded.float() if byte else rounded).all()):
            return
        for _, source, theirs in self.reading.terms(self.combination, name):
            if not source.children():
                refuse_nonfinite(source, theirs)
        if bool(torch.isfinite(value).all()):
            largest = float(value.abs().max())
            raise OutputError(
                f"{name!r}: {largest:.4g} does not fit {dtype_name(rounded.dtype)}. "
                "Choose another output dtype (`--dtype bfloat16` or `float32`). Nothing was written."
            )
        raise CheckpointError(
            f"{name!r}: the merge gave values that are not finite, though its inputs are. Please report it. Nothing was written."
        )


def save(
    combination: Combination,
    target: Path,
    *,
    engine: Engine,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    exclude: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    resume: bool = False,
    config: Path | None = None,
    quantise: str | None = None,
) -> Report:
    """Write a model or a task vector: a folder, or one file where `target` ends in `.safetensors`.

    `quantise` writes matrices as codes and scales, in one of `quantised.writing.SCHEMES`.
    `config` is the folder whose config, tokenizer and template go with it; by default the base's.
    `resume` continues what an earlier run of the same recipe on the same inputs began, and keeps what was done if this one ends early.

    Raises:
        OutputError: the target exists, the disk is full, a value does not fit the output's dtype, or what was begun is another run's.
        CheckpointError: an input is damaged, changed while it was read, or holds values that are not finite.
    """
    output = Output.plan(combination, dtype=dtype, exclude=exclude, quantise=quantise)
    walk = output.walk(engine)
    stored = output.stored
    engine.check(walk.steps, "Writing")
    if not resume:
        check_new(target)
    output.fetch(engine)
    vector = combination.is_vector
    reference = combination.reference or next((s for s in combination.sources() if s.degree == 1), None)
    record = _record(output, reference, provenance or {})
    check_json(record, target, "provenance")
    metadata = metadata_of(combination, record["recipe"])
    metadata["thetau.run"] = hashlib.sha256(_compact([record, metadata, stored, shard_bytes]).encode()).hexdigest()
    folder = (config or reference.folder) if reference is not None and not vector else None
    side = reference.files if reference is not None and not vector else {}
    if config is not None and not vector:
        said = read_said(config)  # of another model's files: what they say of codes does not hold for this one's weights
        side = plain_files(config, model_dtype(config)) if said is not None and said.method else {}
    codes = _codes_config(output, reference, folder, target, side.get("config.json")) if quantise is not None else None
    changed = _config(folder, side.get("config.json"), dtype, own=output.untied, codes=codes)
    files = {**side, **changed, "thetau.json": record}
    if resume and _is_done(target, metadata["thetau.run"]):
        return report_of(output, target, reference, f"{target}: was complete already.")
    keys = [source.key for source in _leaves(combination, reference) if not source.key.startswith("memory:")]
    run = hashlib.sha256(_compact([metadata["thetau.run"], keys]).encode()).hexdigest()
    stem = stem_of(folder)
    with Writer(target, stored, metadata, shard_bytes=shard_bytes, run=run, resume=resume, stem=stem) as writer:
        left = [step for step in walk.steps if not all(part in writer.sealed for part in output.stored_as(step.name))]
        kept = f"{len(walk.steps) - len(left)} of {len(walk.steps)} tensors were there from an earlier run." if resume else ""
        if left:
            output.prepare()
        for _, sums in engine.run(left, _Write(output, writer.slots, engine, shared=engine.executor != "local"), "Writing"):
            for part, crc in sums.items():
                writer.done(part, crc)
        other = changed_inputs(combination)
        if other:
            raise CheckpointError(
                f"{other[0]}: changed while it was read ({len(other)} files did). Nothing was written: run again when it is at rest."
            )
        record["tensors"] = {
            name: {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape), "crc32": writer.sealed[name]}
            for name, spec in stored.items()
        }
        writer.commit(copy_from=folder, files=files)
    return report_of(output, target, reference, kept)


def _below(sources: Sequence[Source]) -> frozenset[str]:
    """The keys of the sources that some sources are computed from; not asked of stored ones."""
    return frozenset(child.key for source in computed(sources) for child in source.children())


def metadata_of(combination: Combination, recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a file says of itself: its kind, how it was made, its base, its space."""
    reference = combination.reference or next((s for s in combination.sources() if s.degree == 1), None)
    kind = "task_vector" if combination.is_vector else "model"
    metadata = {"thetau.kind": kind, "thetau.version": __version__, "thetau.recipe": _compact(recipe)}
    bases = {source.metadata.get("thetau.base") for source in _vectors(combination, reference)}
    if combination.is_vector and reference is not None:
        metadata["thetau.base"] = reference.fingerprint()
    elif combination.is_vector and len(bases) == 1 and None not in bases:
        metadata["thetau.base"] = str(bases.pop())  # saved vectors of one base, without it
    if set(_spaces(combination, reference).values()) == {"tangent"}:
        metadata["thetau.space"] = "tangent"  # of vectors that belong to the linear form, their sums and merges do too
    return metadata


def changed_inputs(combination: Combination) -> list[str]:
    """Files below a combination that are no longer what was opened."""
    reference = combination.reference
    return [file for source in _leaves(combination, reference) for file in source.changed_files()]


def _spaces(combination: Combination, reference: Source | None) -> dict[str, str]:
    """Where each model or vector besides the base says it belongs: label → `tangent` or `weights`."""
    others = [source for source in _vectors(combination, reference) if reference is None or source.key != reference.key]
    return {source.label: source.metadata.get("thetau.space", "weights") for source in others}


@dataclass(frozen=True)
class _Write(Work):
    """The work of the last pass, which may run in another process: one tensor into its place; checksums of what is stored come back."""

    output: Output
    slots: Slots
    engine: Engine
    shared: bool  # the place is another machine's too: the rows must be on the disk before this one says that they are there

    def __call__(self, step: Step) -> dict[str, int]:
        """The checksum of each stored tensor."""
        self.output.write(step, self.slots, self.engine)
        return {part: self.slots.seal(part, sync=self.shared) for part in self.output.stored_as(step.name)}

    def guards(self) -> list[Guard]:
        """Whose findings must come back."""
        return self.output.guards


def _is_done(target: Path, run: str) -> bool:
    """Whether the target is the finished output of this very run."""
    file = target if target.suffix == ".safetensors" else next(iter(sorted(target.glob("*.safetensors"))), None)
    return file is not None and file.is_file() and SafetensorsFile(file).metadata.get("thetau.run") == run


def state_dict(
    combination: Combination, *, engine: Engine, dtype: Dtype | None = None, exclude: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Report]:
    """The same, into memory: a new tensor for each name."""
    output = Output.plan(combination, dtype=dtype, exclude=exclude)
    output.prepare()
    out = {name: torch.empty(spec.shape, dtype=spec.dtype.torch) for name, spec in output.specs.items()}

    def fill(step: Step) -> None:
        for start, rows in output.rows(step.name, engine):
            if out[step.name].ndim == 0:
                out[step.name].copy_(rows.reshape(()))
            else:
                out[step.name][start : start + len(rows)] = rows

    here = replace(engine, executor="local")  # another process could not fill this one's memory
    for _ in here.run(output.walk(engine).steps, Call(fill), "Evaluating"):
        pass
    reference = combination.reference or next((s for s in combination.sources() if s.degree == 1), None)
    return out, report_of(output, None, reference)


def _convex(combination: Combination) -> bool:
    """Whether it is a weighted mean of stored models: then a statistic of them is one too, and a mean of variances is none below zero."""
    return combination.is_model and all(
        weight >= 0 and source.degree == 1 and not source.children() for weight, source in combination.terms
    )


def _models(combination: Combination) -> dict[str, Source]:
    """The models of a combination besides its base, by their labels."""
    base = combination.reference
    found: dict[str, Source] = {}
    for source in combination.sources():
        if source.degree == 1 and (base is None or source.key != base.key):
            found[source.label if source.label not in found else f"{source.label} ({len(found) + 1})"] = source
    return found


def _leaves(combination: Combination, reference: Source | None) -> list[Source]:
    """Every stored source below a combination, through merges, each once, the reference first."""
    return leaves([*([reference] if reference is not None else []), *combination.sources()])


def _check_dtype(combination: Combination, reference: Source | None, dtype: Dtype | None) -> None:
    """Refuse to write codes without scales where the inputs are codes with scales, and nobody would expect the former."""
    if dtype is not None and dtype.itemsize == 1:
        for source in _leaves(combination, reference):
            if source.quantised:
                raise OutputError(
                    f"{source.label}: its weights are quantised with scales ({source.quantised}), and `--dtype {dtype_name(dtype)}` writes none: "
                    f"without them most of the precision would be lost. Ask for scales (`--quantise {' | '.join(SCHEMES)}`), or leave `--dtype` out."
                )


def _coded(
    combination: Combination, reference: Source | None, specs: Mapping[str, Spec], dtype: Dtype | None, quantise: str | None
) -> dict[str, Coded]:
    """What is written as codes. Raises `OutputError`."""
    if quantise is None:
        return {}
    if quantise not in SCHEMES:
        raise OutputError(f"`quantise` must be one of {', '.join(SCHEMES)}. Got {quantise!r}.")
    if combination.is_vector:
        raise OutputError(f"`{quantise}` quantises a model; of a task vector most would be lost. Leave `--quantise` out.")
    if dtype is not None and dtype.itemsize == 1:
        raise OutputError(
            f"`{quantise}` quantises the matrices; {dtype_name(dtype)} would be the dtype of all others, without scales. Take `--dtype bfloat16`."
        )
    return coded(reference, specs, SCHEMES[quantise])


def _codes_config(
    output: Output, reference: Source | None, folder: Path | None, target: Path, changed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The `quantization_config` of the output.

    Raises:
        OutputError: there would be no config in which it could stand.
    """
    if target.suffix == ".safetensors" or (changed is None and not has_config(folder)):
        where = "a single file has none" if target.suffix == ".safetensors" else f"{folder or 'the base'} has none"
        raise OutputError(
            f"{target}: what is quantised must be said in a config.json, and {where}. Write a folder over a base with a config."
        )
    scheme = next(iter(output.coded.values())).scheme
    return scheme.config(plain_modules(output.specs, output.coded, reference))


def _vectors(combination: Combination, reference: Source | None) -> list[Source]:
    """The same without evidence, which belongs to no base and no space."""
    return [source for source in _leaves(combination, reference) if source.metadata.get("thetau.kind") != "evidence"]


def _record(output: Output, reference: Source | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = [
        {"path": source.label, "fingerprint": source.fingerprint(), "headers": source.header_hashes()}
        for source in _leaves(output.combination, reference)
    ]
    recipe = provenance.get("recipe") or {"expression": output.combination.label}
    return {
        "thetau": __version__,
        "kind": "task_vector" if output.combination.is_vector else "model",
        "recipe": recipe,
        "seed": provenance.get("seed", 0),
        "base": reference.label if reference is not None else None,
        "not_merged": dict(output.alignment.kept)
        | {name: why for source in output.combination.sources() for name, why in source.left_out(reference).items()},
        "inputs": inputs,
        **({"arrangement": reference.fingerprint()} if reference is not None and reference.children() else {}),
        "versions": {"torch": version("torch"), "python": platform.python_version()},
    }


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _config(
    folder: Path | None,
    changed: Mapping[str, Any] | None,
    dtype: Dtype | None,
    *,
    own: bool,
    codes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The base's config, or a changed one, with the output's dtype where the recipe gives one, untied where the head is a tensor of its own,
    and with what is said of codes."""
    if (dtype is None and not own and codes is None) or (changed is None and not has_config(folder)):
        return {}
    config = dict(changed) if changed is not None else read_config(folder) if folder is not None else {}
    for key in ("torch_dtype", "dtype"):
        if key in config and dtype is not None:
            config[key] = dtype_name(dtype)
    if own:
        config = untied(config)
    if codes is not None:
        config["quantization_config"] = dict(codes)
    return {"config.json": config}


def report_of(output: Output, path: Path | None, reference: Source | None, *said: str) -> Report:
    """What a walk over an output has to say, once everything was read."""
    notes = [line for line in said if line]
    warnings: list[str] = []
    base = reference.label if reference is not None else "the base"
    for source in output.combination.sources():
        notes += source.notes
    if not output.made:  # a merge has said it, of all its models
        notes += output.alignment.notes
        warnings += output.alignment.alarms
    notes += output.guard.notes()
    warnings += output.guard.warnings(base)
    for source in (*output.made, *leaves(output.combination.sources())):
        warnings += source.warnings(reference)
    if reference is not None:
        for source in _vectors(output.combination, reference):
            trained_on = source.metadata.get("thetau.base")
            if trained_on and trained_on != reference.fingerprint():
                warnings.append(
                    f"{source.label}: this task vector was taken from another base than {base} (their fingerprints differ)."
                )
    spaces = _spaces(output.combination, reference)
    linear = [label for label, space in spaces.items() if space == "tangent"]
    if linear and len(linear) < len(spaces):
        other = next(label for label, space in spaces.items() if space != "tangent")
        warnings.append(
            f"{linear[0]} belongs to the tangent space and {other} does not: vectors of both paradigms in one sum mean nothing exact. "
            "Fine-tune them with the same paradigm."
        )
    if output.coded:
        notes.append(_codes_note(output))
    stored = output.stored
    nbytes = sum(spec.nbytes for spec in stored.values())
    return Report(path, len(stored), nbytes, tuple(dict.fromkeys(notes)), tuple(dict.fromkeys(warnings)))


def _codes_note(output: Output) -> str:
    """How many matrices were written as codes, and what was not."""
    first = next(iter(output.coded.values()))
    rest = [spec.elements for name, spec in output.specs.items() if name not in output.coded]
    share = 1 - sum(rest) / max(1, sum(spec.elements for spec in output.specs.values()))
    return (
        f"{len(output.coded)} matrices ({share:.0%} of the values) are written in fp8 with a scale for each {first.scheme.share} "
        f"(`{first.scheme.name}`); the other {len(rest)} tensors stay as they are."
    )
