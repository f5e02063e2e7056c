"""An adapter as a task vector: rows of what it does to each tensor of its base, never a whole model.

Format: `adapter_config.json` beside `adapter_model.safetensors`, <https://huggingface.co/docs/peft/developer_guides/checkpoint>, or one
LoRA file of kohya's scripts or of diffusers. Covers LoRA on linear, transposed (Conv1D), embedding and convolution layers and on fused
experts (`target_parameters`), rank-stabilised scaling, rank and alpha patterns, trained biases, `modules_to_save`, trained tokens, and DoRA;
LoHa, LoKr and (IA)³. What it does not cover is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.lora.changes import Addition, Bias, Change, Hadamard, Kronecker, Overlay, Product, Rows, Scaling
from thetau.checkpoint.lora.config import Settings, is_adapter, read_settings
from thetau.checkpoint.lora.layout import Layout, Module, flat_layout, layout_renamed, peft_layout
from thetau.checkpoint.lora.targets import base_name, flat_names, form_of, parameter, saved_name
from thetau.checkpoint.memory import open_torch
from thetau.checkpoint.names.experts import with_fused
from thetau.checkpoint.safetensors import open_file
from thetau.checkpoint.source import Source, span
from thetau.checkpoint.ties import Ties, spread
from thetau.errors import AlignmentError, CheckpointError, nearest

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements that are multiplied at once, always the same ones, so that no way of reading changes a bit


@dataclass(frozen=True, kw_only=True)
class Delta:
    """How one base tensor changes: new values in its place, products that are added, DoRA's norms, and what is laid over all that.

    `along` is the axis of the base tensor that a magnitude runs along: its norms are taken over the others.
    """

    add: tuple[Addition, ...] = ()
    replace: str | None = None
    magnitude: str | None = None
    along: int = 0
    over: tuple[Overlay, ...] = ()

    @property
    def uses(self) -> tuple[str, ...]:
        """The adapter's tensors that it takes."""
        made = [name for change in (*self.add, *self.over) for name in change.uses]
        return (*made, *(name for name in (self.replace, self.magnitude) if name is not None))

    @property
    def tied(self) -> bool:
        """Whether it is made on what is tied to the tensor too."""
        return not self.add and self.replace is None and self.magnitude is None and all(change.tied for change in self.over)

    @property
    def plain(self) -> bool:
        """Whether it is a sum that needs nothing of the base."""
        return self.magnitude is None and self.replace is None and not self.over


class LoraSource(Source):
    """The difference that an adapter makes to its base: names are the base's; absent names do not change."""

    degree = 0
    partial = True

    def __init__(
        self, path: Path, base: Source, adapter: str | None = None, rename: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.folder: Path | None = path if path.is_dir() else path.parent
        self.label = f"{path}#{adapter}" if adapter else str(path)
        self.over: Source | None = base
        plain = base
        base = spread(base)
        self._weights = open_weights(path)
        settings, layout = settings_of(path, self.label, self._weights, adapter)
        layout = layout_renamed(self.label, layout, rename)
        self._base = base = with_fused(base) if settings.values.get("target_parameters") else base
        found = _Found(self.label, self._weights, base, settings, layout)
        self.deltas: Mapping[str, Delta] = found.deltas()
        self._settings = found.settings
        self.apart = not settings.values.get("ensure_weight_tying") and _parts(plain, self.deltas)
        self.specs = {name: replace(spec, file=self._weights.label) for name, spec in base.specs.items() if name in self.deltas}
        self._extra = {wanted: name for name, wanted in found.extra.items()}
        for wanted, name in self._extra.items():
            self.specs[wanted] = replace(self._weights.specs[name], name=wanted)
        self.key = f"lora:{self._weights.key}:{adapter or ''}:{dict(rename) or ''}:{base.key}"
        kind = found.settings.kind.replace("LORA", "LoRA").replace("_", " ")
        self._notes = (
            f"{self.label}: {kind} adapter, restored over {base.label} in {len(self.deltas)} tensors.",
            *found.notes,
        )
        self._norms: dict[str, Tensor] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the difference, in float32: `[stop - start, *shape[1:]]`."""
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        if name not in self.deltas:
            return self._weights.read(self._extra[name], start, stop)
        delta = self.deltas[name]
        step = max(1, BLOCK // max(1, spec.row_elements))
        first = start - start % step
        blocks = [self._block(delta, name, low, min(low + step, spec.rows)) for low in range(first, stop, step)]
        rows = torch.cat(blocks) if blocks else torch.empty((0, *spec.shape[1:]))
        return rows[start - first : stop - first] if spec.shape else rows

    def _block(self, delta: Delta, name: str, start: int, stop: int) -> Tensor:
        if delta.plain:
            return self._sum(delta, name, start, stop)
        base = self._base.read(name, start, stop).float()
        moved = self._moved(delta, name, start, stop, base)
        if delta.magnitude is not None:
            moved = moved * self._factor(delta, name, moved, start, stop)
        for change in delta.over:
            moved = change.onto(moved, self._weights, start, stop)
        return moved - base

    def _sum(self, delta: Delta, name: str, start: int, stop: int) -> Tensor:
        shape = self._base.specs[name].shape
        total = delta.add[0].rows(self._weights, shape, start, stop)
        for change in delta.add[1:]:
            total = total + change.rows(self._weights, shape, start, stop)
        return total

    def _moved(self, delta: Delta, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The tensor's rows before norms are set and anything is laid over them."""
        ground = base if delta.replace is None else self._weights.read(delta.replace, start, stop).float()
        return self._sum(delta, name, start, stop) + ground if delta.add else ground

    def _factor(self, delta: Delta, name: str, moved: Tensor, start: int, stop: int) -> Tensor:
        """DoRA's magnitudes over the norms that the rows have, to be multiplied with them."""
        assert delta.magnitude is not None
        magnitude = self._weights.read(delta.magnitude).float().flatten()
        if delta.along == 0:
            norm: Tensor = torch.linalg.vector_norm(moved.flatten(1), dim=1)
            return (magnitude[start:stop] / norm).reshape(-1, *[1] * (moved.ndim - 1))
        if name not in self._norms:  # two threads that both find it missing get the same bits
            self._norms[name] = self._column_norms(delta, name)
        factor: Tensor = magnitude / self._norms[name]
        return factor

    def _column_norms(self, delta: Delta, name: str) -> Tensor:
        """Norms of the columns of a moved tensor, block by block in float64."""
        spec = self.specs[name]
        step = max(1, BLOCK // max(1, spec.row_elements))
        total = torch.zeros(spec.shape[1], dtype=torch.float64)
        for low in range(0, spec.rows, step):
            high = min(low + step, spec.rows)
            moved = self._moved(delta, name, low, high, self._base.read(name, low, high).float())
            total += moved.double().square().sum(0)
        return total.sqrt().float()

    def warnings(self, base: Source | None) -> list[str]:
        """A word where the adapter says that it was trained on another model."""
        said = self._settings.base_name()
        known = _names_of(self._base)
        if said is None or not known or said.rstrip("/").rsplit("/", 1)[-1].lower() in known:
            return []
        return [
            f"{self.label}: says that it was trained on {said!r}, and is put over {self._base.label}. Check that these are the same weights."
        ]

    def fingerprint(self) -> str:
        """That of the adapter's own file."""
        return self._weights.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """Those of the adapter's own file."""
        return self._weights.header_hashes()

    def changed_files(self) -> list[str]:
        """The adapter's file, if it is no longer what was opened."""
        return self._weights.changed_files()


def _parts(base: Source, deltas: Mapping[str, Delta]) -> bool:
    """Whether what the base ties is changed apart: one of two names by itself, and not by what PEFT makes on both."""
    ties = Ties(base)
    head = ties.head()
    pairs = [*ties.copies().items(), *([head] if head is not None else [])]
    return any(name in deltas or (keeper in deltas and not deltas[keeper].tied) for name, keeper in pairs)


def open_weights(path: Path) -> Source:
    """The tensors of an adapter: of its folder, or of one file.

    Raises:
        CheckpointError: they are not there, or cannot be read.
    """
    if path.is_dir():
        safe, older = path / "adapter_model.safetensors", path / "adapter_model.bin"
        flat = path / "pytorch_lora_weights.safetensors"
        if not any(file.exists() for file in (safe, older, flat)):
            raise CheckpointError(
                f"{path}: holds no adapter_model.safetensors or adapter_model.bin, so it is no LoRA adapter. "
                "A model is made one by `thetau adapter extract`."
            )
        path = safe if safe.exists() else flat if flat.exists() and not is_adapter(path) else older
    return open_torch(path) if path.suffix in {".bin", ".pt", ".pth", ".ckpt"} else open_file(path)


def settings_of(path: Path, label: str, weights: Source, adapter: str | None) -> tuple[Settings, Layout]:
    """What is said about the tensors, and their names taken apart."""
    if path.is_dir() and is_adapter(path):
        return read_settings(path / "adapter_config.json", label), peft_layout(str(path), weights.specs, adapter)
    return Settings(label=label, values={}, stated=False), flat_layout(label, weights.specs)


def _names_of(base: Source) -> set[str]:
    """What a base may be called: its folder, the hub's name for its snapshot, what its configuration says."""
    if base.folder is None:
        return set()
    names = {base.folder.resolve().name.lower(), base.folder.name.lower()}
    names |= {part.rsplit("--", 1)[-1].lower() for part in base.folder.parts if part.startswith("models--")}
    try:
        said = json.loads((base.folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        said = None
    return names | ({said.rsplit("/", 1)[-1].lower()} if isinstance(said, str) else set())


class _Found:
    """The tensors of an adapter, being matched to its base's; all problems are raised together."""

    def __init__(self, label: str, weights: Source, base: Source, settings: Settings, layout: Layout) -> None:
        self.label, self.weights, self.base, self.settings, self.layout = label, weights, base, settings, layout
        self.shapes = {name: spec.shape for name, spec in weights.specs.items()}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.extra: dict[str, str] = {}
        self._deltas: dict[str, Delta] = {}

    def deltas(self) -> Mapping[str, Delta]:
        """How each base tensor changes.

        Raises:
            AlignmentError: something stands for no tensor of the base, or does not fit it.
        """
        for name, path in self.layout.saved.items():
            self._saved(name, saved_name(path))
        flat = flat_names(self.base) if self.layout.flat else {}
        lost: dict[str, list[str]] = {}
        met: set[str] = set()
        for module in self.layout.modules.values():
            target = self._target(module, flat)
            if target is not None:
                met.add(module.component)
                self._module(module, target)
            elif target is None and not any(module.path in problem for problem in self.problems):
                lost.setdefault(module.component, []).append(module.path)
        self._lost(lost, met)
        self._grown()
        if not self._deltas and not self.extra and not self.problems:
            self.problems.append(f"{self.label}: the adapter changes nothing.")
        self.problems += [
            f"{self.label}: {problem}" for name, delta in self._deltas.items() for problem in self._misfits(name, delta)
        ]
        if self.problems:
            raise AlignmentError("\n".join(self.problems))
        return self._deltas

    def _lost(self, lost: Mapping[str, list[str]], met: set[str]) -> None:
        """Modules that the base lacks: another part of a pipeline is left out with a note, anything else is a problem."""
        for component, paths in lost.items():
            if component and component not in met and met:
                self.notes.append(
                    f"{self.label}: {len(paths)} modules of {component!r} are left out, which {self.base.label} is not."
                )
                continue
            for path in paths:
                wanted = f"{path}.weight"
                self.problems.append(
                    f"{self.label}: the adapter changes {wanted!r}, which the base {self.base.label} lacks.{nearest(wanted, self.base.specs)}"
                )

    def _saved(self, name: str, path: str) -> None:
        if ".original_module." in name:
            return  # the base's own values, which newer versions of PEFT save beside the trained ones where a table has grown
        target = base_name(path, self.base)
        if target is None and (".lora_" in name or ".oft_" in name):
            self.problems.append(
                f"{self.label}: {name!r} is a part of LoRA that thetau does not know. Merge the adapter with PEFT's `merge_and_unload` first."
            )
        elif target is None:
            self.extra[name] = saved_name(path)  # a head that the base lacks: alignment says so, or `exclude` names it
        elif target in self._deltas and self._equal(name, self._deltas[target].replace):
            return  # and the trained ones twice
        elif target in self._deltas:
            self.problems.append(f"{self.label}: {name!r} and {self._deltas[target].replace!r} both stand for {target!r}.")
        else:
            self._deltas[target] = Delta(replace=name)

    def _equal(self, name: str, other: str | None) -> bool:
        """Whether two of the file's tensors are one of the model's, and hold the same, read by rows."""
        spec, saved = self.weights.specs[name], self.layout.saved
        if other is None or saved[name] != saved.get(other) or self.weights.specs[other].shape != spec.shape:
            return False
        step = max(1, BLOCK // max(1, spec.row_elements))
        return all(
            torch.equal(*(self.weights.read(one, first, min(first + step, spec.rows)) for one in (name, other)))
            for first in range(0, spec.rows, step)
        )

    def _grown(self) -> None:
        """Tables that the adapter saves with other rows than the base's: no differences, which `exclude` may name and alignment tells of."""
        for target, delta in list(self._deltas.items()):
            want = self.base.specs[target].shape
            got = self.shapes[delta.replace] if delta.replace is not None else want
            if delta.replace is not None and len(got) == len(want) == 2 and got[0] != want[0] and got[1] == want[1]:
                self.extra[delta.replace] = target
                del self._deltas[target]

    def _target(self, module: Module, flat: Mapping[str, Any]) -> str | None:
        if self.layout.flat:
            names = list(flat.get(module.path, ()))
            if len(names) > 1:
                self.problems.append(f"{self.label}: {module.path!r} may stand for {' or '.join(map(repr, names))}.")
            return names[0] if len(names) == 1 else None
        product = self._pair(module)
        shapes = [self.shapes[name] for name in product] if product else []
        if len(shapes) == 2 and all(len(shape) >= 2 for shape in shapes):
            try:
                return parameter(module.path, shapes[0], shapes[1], self.settings, self.base, self._added())
            except AlignmentError as error:
                self.problems.append(str(error))
                return None
        return base_name(f"{saved_name(module.path + '.')}weight", self.base)

    def _added(self) -> set[str]:
        return {name for name, delta in self._deltas.items() if delta.add}

    @staticmethod
    def _pair(module: Module) -> tuple[str, str] | None:
        """The names of A and B, of an embedding's in the same way."""
        parts = module.parts
        for a, b in (("A", "B"), ("embedding_A", "embedding_B")):
            if a in parts and b in parts:
                return parts[a], parts[b]
        return None

    def _module(self, module: Module, target: str) -> None:
        """Add what one module does to the deltas."""
        parts, kinds = module.parts, {part.split("_")[0] for part in module.parts}
        if "trainable" in kinds:
            self._tokens(module, target)
        if "ia3" in kinds:
            self._scaling(module, target)
        if "hada" in kinds or "lokr" in kinds:
            self._change(module, target, self._hadamard if "hada" in kinds else self._kronecker)
        if not kinds & {"A", "B", "B.bias", "embedding", "magnitude"}:
            return
        pair = self._pair(module)
        if pair is None:
            self.problems.append(f"{self.label}: {module.path!r} has only one of its two LoRA matrices.")
            return
        a, b = (self.shapes[name] for name in pair)
        if len(a) < 2 or len(b) < 2:
            self.problems.append(f"{self.label}: {pair[0]!r} {list(a)} and {pair[1]!r} {list(b)} must be matrices.")
            return
        try:
            form = "columns" if "embedding_A" in parts else form_of(target, a, b, self.settings, self.base)
        except AlignmentError as error:
            self.problems.append(str(error))
            return
        count = self.base.specs[target].shape[0] if form.startswith("experts") else 1
        fused = f"{saved_name(module.path + '.')}{target.rsplit('.', 1)[-1]}" if form.startswith("experts") else None
        scale = self._scale(module, a[0] // count, fused)
        self._put(target, add=(Product(a=pair[0], b=pair[1], scale=scale, form=form),))
        if "magnitude_vector" in parts:
            self._put(target, magnitude=parts["magnitude_vector"], along=1 if form == "columns" else 0)
        if "B.bias" in parts:
            bias = f"{target.removesuffix('weight')}bias"
            if bias in self.base.specs:
                self._put(bias, add=(Bias(name=parts["B.bias"], scale=scale),))
            else:
                self.problems.append(
                    f"{self.label}: {parts['B.bias']!r} is a bias for {target!r}, whose layer has none in the base."
                )

    def _scale(self, module: Module, rank: int | None, fused: str | None = None) -> float:
        """α/r of a module; patterns know experts by the name of the `fused` parameter."""
        scale = self.settings.scale(fused or module.path.removesuffix(".base_layer"), rank)
        if "alpha" in module.parts and rank:
            return float(self.weights.read(module.parts["alpha"]).float()) / rank
        return scale

    def _change(self, module: Module, target: str, make: Any) -> None:
        try:
            self._put(target, add=(make(module),))
        except KeyError as error:
            self.problems.append(f"{self.label}: {module.path!r} lacks its part {error}.")

    def _hadamard(self, module: Module) -> Hadamard:
        parts = module.parts
        cores = (parts["hada_t1"], parts["hada_t2"]) if "hada_t1" in parts else None
        first, second = ((parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        return Hadamard(first=first, second=second, cores=cores, scale=self._scale(module, self.shapes[first[1]][0]))

    def _kronecker(self, module: Module) -> Kronecker:
        parts = module.parts
        factors: list[tuple[str, ...]] = []
        rank = None
        for n in (1, 2):
            whole = f"lokr_w{n}"
            pair = (whole,) if whole in parts else (f"{whole}_a", f"{whole}_b")
            core = ("lokr_t2",) if n == 2 and "lokr_t2" in parts and whole not in parts else ()
            factors.append(tuple(parts[name] for name in (*core, *pair)))
            rank = rank if whole in parts else self.shapes[parts[f"{whole}_b"]][0]
        return Kronecker(first=factors[0], second=factors[1], scale=self._scale(module, rank))

    def _scaling(self, module: Module, target: str) -> None:
        name, shape = module.parts["ia3_l"], self.base.specs[target].shape
        forward = self.settings.feeds_forward(module.path)
        transposed = len(shape) == 2 and bool(self.settings.values.get("fan_in_fan_out"))
        self._put(target, over=(Scaling(name=name, axis=int(forward != transposed)),))
        bias = f"{target.removesuffix('weight')}bias"
        if not forward and bias in self.base.specs:
            self._put(bias, over=(Scaling(name=name, axis=0),))

    def _tokens(self, module: Module, target: str) -> None:
        rows = self.settings.tokens(module.path)
        if rows is None:
            self.problems.append(
                f"{self.label}: holds trained tokens of {module.path!r}, and `adapter_config.json` does not say which."
            )
        else:
            self._put(target, over=(Rows(name=module.parts["trainable_tokens_delta"], indices=tuple(rows)),))

    def _put(self, target: str, **more: Any) -> None:
        delta = self._deltas.get(target, Delta())
        joined = {
            key: value + {"add": delta.add, "over": delta.over}[key] if key in ("add", "over") else value
            for key, value in more.items()
        }
        self._deltas[target] = replace(delta, **joined)

    def _misfits(self, name: str, delta: Delta) -> list[str]:
        """What of one tensor's change does not fit the base."""
        want, base = self.base.specs[name].shape, self.base.label
        found: list[str] = []
        for change in (*delta.add, *delta.over):
            if problem := self._problem(change, want):
                tail = f", the base {base} has {list(want)}. Give the base it was trained on."
                found.append(f"the adapter changes {name!r} {problem}{tail}" if problem.startswith(("by ", "in ")) else problem)
        others = [(delta.replace, name, want)] if delta.replace else []
        if delta.magnitude and delta.along < len(want) and prod(self.shapes[delta.magnitude]) != want[delta.along]:
            others.append((delta.magnitude, delta.magnitude, want[delta.along : delta.along + 1]))
        for given, told, due in others:
            if self.shapes[given] != due:
                found.append(
                    f"the adapter changes {told!r} by shape {list(self.shapes[given])}, the base {base} has {list(due)}. "
                    "Give the base it was trained on."
                )
        return found

    def _problem(self, change: Change, want: tuple[int, ...]) -> str | None:
        return change.problem(self.shapes, want)
