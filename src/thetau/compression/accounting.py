"""What a bank of task vectors takes, as Table 8 of "Task vector bases" counts it, and in bytes.

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>: storage = number of masks × their mean density × the size of a dense vector, which
counts values alone. A mask adds one bit an entry (as much as 3 % more density in float32), and this adds the real bytes beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from thetau._lazy import torch
from thetau.checkpoint import FLOATS, Spec
from thetau.checkpoint.compressed import layout, nbytes
from thetau.compression.forms import DTYPES, Sparse, Values
from thetau.compression.stitching import Clusters, numbers, stored
from thetau.compression.write import compress
from thetau.engine.executor import Engine
from thetau.engine.kernels import Inside, Result
from thetau.engine.measuring import measured
from thetau.fields import OneOf
from thetau.methods import LocalizeStitch
from thetau.parts import PerTask, Site, Statistic
from thetau.statistics import MagnitudeQuantile
from thetau.statistics.quantile import Counts, Hits
from thetau.transforms import Trim
from thetau.transforms.share import Rounding, Sharing, shared
from thetau.vectors import Combination
from thetau.vectors.combination import require_vector
from thetau.vectors.identity import identities

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ROWS: dict[str, Sharing] = {"localize_stitch": "none", "mask_sharing": "mask", "stitch_twice": "twice"}


@final
@dataclass(frozen=True, kw_only=True)
class StorageRow:
    """One way of keeping the vectors.

    - `masks`: sparse models that are kept (for `dense`: vectors). `density`: the mean share of their entries that is not zero.
    - `values`: bytes of masks × density × size, Table 8's number.
    - `nbytes`: bytes of the tensors in our files, the masks' bits and the offsets included.
    - `on_disk`: bytes of the files, headers included, where they were written.
    """

    name: str
    masks: int
    density: float
    values: int
    nbytes: int
    on_disk: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Storage:
    """The ways side by side; `elements` of one vector, each `itemsize` bytes."""

    rows: tuple[StorageRow, ...]
    elements: int
    itemsize: int
    clusters: tuple[tuple[str, int], ...] = ()

    def row(self, name: str) -> StorageRow:
        """One of them."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def storage(
    vectors: Sequence[Combination],
    *,
    density: float = 0.05,
    trim: Literal["vector", "tensor"] = "vector",
    clusters: Clusters | None = None,
    rounding: Rounding = "half_up",
    dtype: Values = "float32",
    names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
    folder: Path | None = None,
) -> Storage:
    """Count what dense vectors, Localize-and-Stitch, Mask Sharing and Stitch Twice keep: exactly, in one pass after that of the cuts.

    Args:
        vectors: task vectors; localised ones with `density=1`, which then counts their own masks.
        density, trim, clusters, rounding: as of the method `localize_stitch`; without clusters the last two rows are left out.
        dtype: of the values.
        names, exclude, engine: as for `thetau.merge`.
        folder: an existing folder that the files of every row are written to, so that their real size is told.

    Raises:
        AlignmentError: a vector is a model, or vectors do not fit each other.
        RecipeError: clusters do not fit the tasks.
        OutputError: files cannot be written there.

    Examples:
        >>> import thetau
        >>> base = thetau.open("base")
        >>> told = storage([thetau.open(name) - base for name in ("a", "b")], density=0.1)
        >>> [(row.name, round(row.density, 1)) for row in told.rows]
        [('dense', 1.0), ('localize_stitch', 0.1)]
    """
    for vector in vectors:
        require_vector(vector, "Storage")
    OneOf(DTYPES).check("storage", "dtype", dtype)
    tasks = identities(vectors, names)
    of = dict(zip(tasks, numbers(clusters, tasks), strict=True))
    wanted = [name for name in ROWS if clusters is not None or name == "localize_stitch"]
    quantile = Trim(density=density, scope=trim).requires()
    counts = MaskCounts(
        quantile=quantile,
        trim=Trim(density=density, scope=trim),
        clusters=tuple(of[task] for task in sorted(tasks)),
        rounding=rounding,
    )
    named = dict(zip(tasks, vectors, strict=True))
    result, merge = measured(named, counts, label="storage", exclude=exclude, engine=engine)
    found: Tensor = torch.stack(list(result.values())).sum(0) if isinstance(result, dict) else result
    specs = [merge.aligned.alignment.specs[name] for name in merge.aligned.selected]
    elements = sum(spec.elements for spec in specs)
    rows = [dense_row(len(tasks), elements, dtype)]
    for name in wanted:
        kept = counts.of(found, ROWS[name])
        rows.append(_row(name, kept, specs, elements, dtype))
    if folder is not None:
        options: dict[str, Any] = {"exclude": exclude, "engine": engine}
        given = PerTask({task: float(of[task]) for task in tasks})
        for place, name in enumerate(["dense", *wanted]):
            held = dict(zip(tasks, vectors, strict=True))
            if name != "dense":
                method = LocalizeStitch(
                    density=density,
                    trim=trim,
                    sharing=ROWS[name],
                    clusters=given if clusters is not None else None,
                    rounding=rounding,
                )
                held = dict(stored(vectors, method, names=tasks, **options))
            row = rows[place]
            size = sum(
                compress(one, folder / f"{name}-{number:03d}.safetensors", Sparse(density=None, dtype=dtype), **options).nbytes
                if name != "dense"
                else _dense_file(one, folder / f"dense-{number:03d}.safetensors", dtype, options)
                for number, one in enumerate(held.values())
            )
            rows[place] = StorageRow(**{**asdict(row), "on_disk": size})
    return Storage(
        rows=tuple(rows),
        elements=elements,
        itemsize=FLOATS[dtype].itemsize,
        clusters=tuple(sorted(of.items())) if clusters is not None else (),
    )


def dense_row(count: int, elements: int, dtype: str) -> StorageRow:
    """So many vectors with every entry."""
    size = count * elements * FLOATS[dtype].itemsize
    return StorageRow(name="dense", masks=count, density=1.0, values=size, nbytes=size)


def _row(name: str, kept: Sequence[int], specs: Sequence[Spec], elements: int, dtype: str) -> StorageRow:
    item = FLOATS[dtype]
    overhead = sum(nbytes(layout("sparse", spec.shape, item)) for spec in specs)  # bits and offsets
    return StorageRow(
        name=name,
        masks=len(kept),
        density=sum(kept) / (len(kept) * elements) if elements else 0.0,
        values=sum(kept) * item.itemsize,
        nbytes=sum(kept) * item.itemsize + len(kept) * overhead,
    )


def _dense_file(vector: Combination, path: Path, dtype: str, options: dict[str, Any]) -> int:
    from thetau.facade import Expression

    Expression(vector.terms, reference=vector.reference, name=vector.name).save(path, dtype=dtype, **options)
    return path.stat().st_size


@dataclass(frozen=True, kw_only=True)
class MaskCounts(Statistic):
    """How many entries each mask keeps, before and after sharing; in one round after those of the exact cuts.

    Int64 of shape `[2 · task + cluster]`: by task, by cluster under Mask Sharing, by task under Stitch Twice.
    """

    quantile: MagnitudeQuantile | None
    trim: Trim
    clusters: tuple[int, ...]
    rounding: Rounding

    @property
    def rounds(self) -> int:
        """Of the cuts, and one."""
        return 1 + (self.quantile.rounds if self.quantile is not None else 0)

    @property
    def per_tensor(self) -> bool:
        """Where cuts are by tensor."""
        return self.trim.scope == "tensor"

    def add(self, total: Any, stack: Float[Tensor, "task *block"], site: Site, seen: Any) -> Any:
        """A block's counts."""
        if self.quantile is not None and not isinstance(seen, torch.Tensor):
            return self.quantile.add(total, stack, site, seen)
        state = None
        if isinstance(seen, torch.Tensor):
            state = self.trim.prepare({site.name: seen} if self.per_tensor else seen, site.tasks)
        kept = self.trim.apply(stack, state, site) != 0
        first = [self.clusters.index(number) for number in sorted(set(self.clusters))]
        parts = [
            kept,
            shared(kept, self.clusters, "mask", self.rounding)[first],
            shared(kept, self.clusters, "twice", self.rounding),
        ]
        counts = torch.cat([part.reshape(len(part), -1).sum(1) for part in parts])
        return counts if total is None else total + counts

    def fold(self, total: Any, other: Any) -> Any:
        """Sum over tensors."""
        return self.quantile.fold(total, other) if self.quantile is not None and isinstance(total, Counts) else total + other

    def finish(self, total: Any, seen: Any) -> Any:
        """Of the cuts what they say, then the counts."""
        if self.quantile is not None and not isinstance(seen, torch.Tensor):
            return self.quantile.finish(total, seen)
        return total

    @property
    def compiled(self) -> tuple[str, ...]:
        """The cuts have a compiled form."""
        return (*self.quantile.compiled, "") if self.quantile is not None else ("",)

    def inside(self, seen: Any) -> Inside | None:
        """As for the cuts."""
        return self.quantile.inside(seen) if self.quantile is not None and not isinstance(seen, torch.Tensor) else None

    def from_compiled(self, result: Result, site: Site, seen: Any) -> Counts | Hits:
        """Of the cuts."""
        assert self.quantile is not None
        return self.quantile.from_compiled(result, site, seen)

    def memory(self, tasks: int, elements: int) -> int:
        """That of the cuts."""
        return self.quantile.memory(tasks, elements) if self.quantile is not None else 8 * 3 * tasks

    def of(self, counts: Int[Tensor, " count"], sharing: Sharing) -> list[int]:
        """The counts of one way of sharing."""
        tasks = len(self.clusters)
        masks = len(set(self.clusters))
        ends = {"none": (0, tasks), "mask": (tasks, tasks + masks), "twice": (tasks + masks, 2 * tasks + masks)}
        low, high = ends[sharing]
        return [int(count) for count in counts[low:high]]
