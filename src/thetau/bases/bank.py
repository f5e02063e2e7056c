"""The bank: a folder of bases and what is known of the tasks in them, whole at every instant.

`bank.json` is the bank. It names a file for each basis, and is replaced in one step after every file that it names was written and
synced; files of its own kind that it does not name are rubbish of a run that died, and the next change clears them away. One process
changes a bank at a time, any number read it; a long read of a basis that is replaced meanwhile ends with an error, never with a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from thetau._version import __version__
from thetau.bases.cluster import OPPOSED, Similarity, Spectrum
from thetau.engine.executor import Engine
from thetau.errors import BankError, CheckpointError, nearest
from thetau.facade import Expression, gram, open_base
from thetau.facade import open as open_weights
from thetau.methods import build as build_method
from thetau.statistics.gram import cosines

FORMAT = 1
MANIFEST = "bank.json"
LOCK = ".lock"
OURS = re.compile(r"\.?b\d+-\d{6}\.safetensors(\.\w+)?|\.bank\.json\.(part|new)")
Rows = tuple[tuple[float | None, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a bank is kept.

    - `inner`: merge_in as a recipe spells it. `opposed`: δ₁, None never splits.
    - `join`: similarity from which a new vector joins a basis; None: halfway between what clusters have inside and between them.
    - `evidence`: what the inner method must know of the tasks' data: kind → task → where its file lay.
    - `max_bases`, `max_bytes`: the budget. `store`: how a basis is stored: `{"form": "dense"}`, or a compressed form with its fields.
    """

    inner: dict[str, Any] = field(default_factory=lambda: {"name": "average"})
    evidence: dict[str, dict[str, str]] = field(default_factory=dict)
    opposed: float | None = OPPOSED
    join: float | None = None
    max_bases: int | None = None
    max_bytes: int | None = None
    store: dict[str, Any] = field(default_factory=lambda: {"form": "dense"})
    exclude: tuple[str, ...] = ()
    seed: int = 0


@final
@dataclass(frozen=True, kw_only=True)
class Member:
    """A task of the bank: its basis, where its vector lay and what it was, and ‖τ‖."""

    name: str
    basis: str
    source: str
    fingerprint: str
    norm: float


@final
@dataclass(frozen=True, kw_only=True)
class Basis:
    """A stored vector that stands for its members.

    - `how`: `member` (the vector itself), `merged` (by the inner method, in one go), `online` (merged step by step), `given`.
    - `error`: relative error that its last writing in a compressed form brought, 0 where it is kept in float32.
    - `slack`: the most that it can differ from the inner merge of its members in one go, as a length: every rounding and every lossy writing
      since it was built. None where nothing bounds it: merged step by step by a method that is not linear, or given.
    - `digest`: BLAKE2 of the file's bytes.
    """

    name: str
    members: tuple[str, ...]
    file: str
    nbytes: int
    fingerprint: str
    digest: str
    norm: float
    how: Literal["member", "merged", "online", "given"]
    error: float = 0.0
    slack: float | None = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Operation:
    """What a change did and cost. `drift`: how far the bank is from one built offline of the same vectors, where it was measured."""

    kind: str
    names: tuple[str, ...]
    read: int
    written: int
    seconds: float
    said: tuple[str, ...] = ()
    drift: dict[str, Any] | None = None
    thetau: str = __version__


@final
@dataclass(frozen=True, kw_only=True)
class State:
    """The content of `bank.json`. `gram` is lower triangular over the sorted members, None where an inner product is unknowable;
    `basis_gram` over the bases in their order."""

    base: str
    base_fingerprint: str
    base_norm: float
    space: Literal["weights", "tangent"]
    settings: Settings
    members: dict[str, Member]
    bases: dict[str, Basis]
    gram: Rows
    basis_gram: tuple[tuple[float, ...], ...]
    spectrum: Spectrum | None = None
    log: tuple[Operation, ...] = ()
    generation: int = 1
    format: int = FORMAT
    thetau: str = __version__


@final
class Bank:
    """A bank as it was when it was opened. Changes (`insert`, `forget`, `rebuild`) return the new one."""

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state = path, state
        self._base: Expression | None = None

    def __repr__(self) -> str:
        return f"<bank {self.path}: {len(self.members)} tasks in {len(self.bases)} bases>"

    @property
    def members(self) -> dict[str, Member]:
        """Tasks by name."""
        return self.state.members

    @property
    def bases(self) -> dict[str, Basis]:
        """Bases by name."""
        return self.state.bases

    @property
    def space(self) -> Literal["weights", "tangent"]:
        """Where the vectors belong."""
        return self.state.space

    @property
    def base_label(self) -> str:
        """The base as it was given: a path or a hub id."""
        return self.state.base

    @property
    def nbytes(self) -> int:
        """Bytes of all the stored bases."""
        return sum(basis.nbytes for basis in self.bases.values())

    @property
    def offline_vectors(self) -> int:
        """Whole vectors that an offline build holds at once, max(max |C_i|, m): a cluster's members while it is merged, the bases when they are joined."""
        return max([len(self.bases), *(len(basis.members) for basis in self.bases.values())])

    @property
    def inner(self) -> Any:
        """The inner method."""
        given = dict(self.state.settings.inner)
        return build_method(given.pop("name"), given)

    def use_base(self, base: Expression) -> Bank:
        """The same bank with the base opened elsewhere (it was moved).

        Raises:
            BankError: it is another base.
        """
        if base.terms[0][1].fingerprint() != self.state.base_fingerprint:
            raise BankError(
                f"{self.path}: its vectors are of another base than {base.label} (their fingerprints differ). "
                f"The bank was made with {self.base_label}."
            )
        self._base = base
        return self

    def base(self) -> Expression:
        """The base, opened.

        Raises:
            BankError: it is not where it was, or is no longer what it was.
        """
        if self._base is None:
            try:
                opened = open_base(self.base_label)
            except CheckpointError as error:
                raise BankError(f"{self.path}: its base cannot be opened: {error} Say where it is (`--base`).") from error
            self.use_base(opened)
        assert self._base is not None
        return self._base

    def vector(self, name: str) -> Expression:
        """A basis, lazily, over the bank's base where that was opened.

        Raises:
            BankError: there is none of that name, or its file is missing, damaged or another one.
        """
        basis = self.basis(name)
        path = self.path / basis.file
        lost = f"{path}: the file of the basis {name} ({', '.join(basis.members)})"
        remedy = "Restore the bank from a copy, or build it anew from the vectors (`thetau basis build`)."
        try:
            opened = open_weights(path, name=name)
            told = opened.terms[0][1].fingerprint()
        except CheckpointError as error:
            if read_state(self.path).generation != self.state.generation:
                raise BankError(f"{self.path}: was changed by another process meanwhile. Open it again.") from error
            raise BankError(f"{lost} cannot be read: {error} {remedy}") from error
        if told != basis.fingerprint:
            raise BankError(f"{lost} is not the one that was written there. {remedy}")
        return Expression(opened.terms, reference=self._base.reference if self._base is not None else None, name=name)

    def vectors(self) -> dict[str, Expression]:
        """All bases."""
        return {name: self.vector(name) for name in self.bases}

    def basis(self, name: str) -> Basis:
        """A basis by name. Raises `BankError`."""
        if name not in self.bases:
            raise BankError(f"{self.path}: no basis {name!r}.{nearest(name, self.bases)} Bases: {', '.join(self.bases)}.")
        return self.bases[name]

    def basis_of(self, task: str) -> str:
        """The basis that stands for a task of the bank. Raises `BankError`."""
        if task not in self.members:
            raise BankError(f"{self.path}: no task {task!r}.{nearest(task, self.members)} Tasks: {', '.join(self.members)}.")
        return self.members[task].basis

    def similar(self, vector: Expression, engine: Engine | None = None) -> dict[str, float]:
        """Cosine of a vector with each basis, in one pass over the bases."""
        listed = [vector, *self.vectors().values()]
        found = cosines(gram(listed, exclude=self.state.settings.exclude, engine=engine))
        return dict(zip(self.bases, found[0, 1:].tolist(), strict=True))

    @property
    def similarity(self) -> Similarity:
        """Inner products of the bases."""
        order = sorted(self.bases)
        places = [list(self.bases).index(name) for name in order]
        matrix = torch.tensor(self.state.basis_gram, dtype=torch.float64)[places][:, places]
        return Similarity(names=tuple(order), gram=matrix, base_norm=self.state.base_norm)

    def known(self) -> tuple[list[str], Tensor]:
        """The tasks' names and their inner products `[task, task]`, NaN where unknowable."""
        return sorted(self.members), full(self.state.gram)

    def verify(self) -> list[str]:
        """What is wrong with the files; nothing where all is well. Reads every byte."""
        problems = [
            f"{entry}: is no part of the bank any more. The next change removes it; so can you."
            for entry in left_over(self.path, self.state)
        ]
        for name, basis in self.bases.items():
            try:
                self.vector(name)
            except BankError as error:
                problems.append(str(error))
            else:
                if digest_of(self.path / basis.file) != basis.digest:
                    problems.append(
                        f"{self.path / basis.file}: its bytes are not those that were written. Restore the bank from a copy."
                    )
        return problems


def digest_of(path: Path) -> str:
    """BLAKE2 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def full(rows: Rows) -> Tensor:
    """A symmetric matrix from its lower triangle; None becomes NaN."""
    count = len(rows)
    matrix = torch.full((count, count), torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                matrix[i, j] = matrix[j, i] = value
    return matrix


def lower(matrix: Tensor) -> Rows:
    """The lower triangle, diagonal included; NaN becomes None."""
    return tuple(
        tuple(None if value != value else value for value in row[: place + 1]) for place, row in enumerate(matrix.tolist())
    )


def open_bank(path: str | os.PathLike[str]) -> Bank:
    """Open a bank; reads `bank.json` alone.

    Raises:
        BankError: there is none, it is damaged, or a newer thetau wrote it.
    """
    folder = Path(path)
    return Bank(folder, read_state(folder))


def read_state(folder: Path) -> State:
    """The manifest. Raises `BankError`."""
    file = folder / MANIFEST
    if not file.is_file():
        raise BankError(f"{folder}: holds no bank ({MANIFEST} is missing). Make one with `thetau basis build`.")
    damaged = f"{file}: the bank's list is damaged"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BankError(f"{damaged} ({error}). Restore it from a copy.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise BankError(f"{damaged}: it must be a table with a `format`. Restore it from a copy.")
    if content["format"] > FORMAT:
        raise BankError(
            f"{file}: was written by thetau {content.get('thetau')} in format {content['format']}; this one knows up to {FORMAT}. "
            "Upgrade thetau."
        )
    try:
        state: State = TypeAdapter(State).validate_python(content)
    except ValidationError as error:
        raise BankError(f"{damaged} ({' '.join(str(error).split())[:300]}). Restore it from a copy.") from error
    problems = list(_inconsistent(state))
    if problems:
        raise BankError(f"{damaged}: {' '.join(problems)} Restore it from a copy.")
    return state


def _inconsistent(state: State) -> Iterator[str]:
    listed = {task: name for name, basis in state.bases.items() for task in basis.members}
    if listed != {name: member.basis for name, member in state.members.items()}:
        yield "bases and members do not agree."
    if len(listed) != sum(len(basis.members) for basis in state.bases.values()):
        yield "a task stands in two bases."
    if [len(row) for row in state.gram] != list(range(1, len(state.members) + 1)):
        yield f"the inner products are not those of {len(state.members)} tasks."
    if [len(row) for row in state.basis_gram] != [len(state.bases)] * len(state.bases):
        yield f"the bases' inner products are not those of {len(state.bases)} bases."
    for basis in state.bases.values():
        if Path(basis.file).name != basis.file or not basis.file.endswith(".safetensors"):
            yield f"the basis {basis.name} names the file {basis.file!r}, which is not one beside it."


def left_over(path: Path, state: State) -> list[Path]:
    """Files of the bank's own kinds that it does not name: of its past, and of runs that died. Other files are none of its business."""
    kept = {basis.file for basis in state.bases.values()}
    return sorted(entry for entry in path.iterdir() if entry.name not in kept and OURS.fullmatch(entry.name))
