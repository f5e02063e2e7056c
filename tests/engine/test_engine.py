"""The engine: bounded memory, the same bits from any setting, one error that stops everything."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import assert_same, bits, leftovers, load_folder, random_weights, shifted, write_model
from thetau.checkpoint import Spec
from thetau.checkpoint.dtypes import Dtype
from thetau.engine import kernels
from thetau.engine.executor import Engine
from thetau.engine.window import BLOCK, block_rows, blocks, windows
from thetau.engine.work import Call, gigabytes
from thetau.errors import CheckpointError, OutputError, ThetauError
from thetau.facade import grams
from thetau.plan import Step
from thetau.random import element_bits
from thetau.sums import sum_in_order, weighted_sum

METHODS = {
    "average": thetau.methods.Average,
    "task_arithmetic": lambda: thetau.methods.TaskArithmetic(scale=0.3),
    "ties": thetau.methods.Ties,
    "dare_linear": lambda: thetau.methods.DareLinear(drop=0.5),
    "dare_ties": lambda: thetau.methods.DareTies(drop=0.5),
    "topk": thetau.methods.TopK,
    "awd": thetau.methods.Awd,
    "wudi": lambda: thetau.methods.Wudi(solver="closed_form"),
}


def large_weights(seed: int) -> dict[str, Tensor]:
    """Tensors of several blocks, of one block and a row, of rows longer than a block, and small ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embeddings.word_embeddings.weight": normal(950, 70).to(torch.bfloat16),
        "encoder.layer.0.attention.self.query.weight": normal(260, 260),
        "encoder.layer.0.attention.self.query.bias": normal(260),
        "encoder.layer.0.intermediate.dense.weight": normal(130, 260),
        "encoder.layer.0.output.dense.weight": normal(260, 130).to(torch.float16),
        "conv.weight": normal(5, 30, 30, 20),
        "long.bias": normal(2 * BLOCK + 5),
        "wide": normal(2, BLOCK + 1),
        "logit_scale": normal(),
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models, of about half a million weights each."""
    root = tmp_path_factory.mktemp("large")
    base = large_weights(0)
    return [
        write_model(root / "base", base),
        *(write_model(root / f"m{seed}", shifted(base, seed)) for seed in (1, 2, 3)),
    ]


def merged(paths: list[Path], method: str, engine: Engine) -> dict[str, Tensor]:
    base = thetau.open(paths[0])
    vectors = [thetau.open(path) - base for path in paths[1:]]
    return (base + thetau.merge(vectors, METHODS[method](), engine=engine)).state_dict(engine=engine)


# The same bits


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_from_any_setting(large: list[Path], method: str) -> None:
    want = merged(large, method, Engine(workers=1))
    for engine in (Engine(workers=2, window=1), Engine(workers=2, window=BLOCK + 7)):
        assert_same(merged(large, method, engine), want)
    assert_same(merged([large[0], *large[:0:-1]], method, Engine(workers=2)), want)  # tasks in another order


def test_the_same_files_from_any_setting(tmp_path: Path, large: list[Path]) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    engines = [Engine(workers=1), Engine(workers=2, window=1), Engine(workers=3, window=1 << 30)]
    for number, engine in enumerate(engines):
        (base + thetau.merge(vectors, thetau.methods.Ties(), engine=engine)).save(
            tmp_path / f"{number}", engine=engine, shard_bytes=400_000
        )
    for path in (tmp_path / "0").iterdir():
        contents = {(tmp_path / f"{number}" / path.name).read_bytes() for number in range(len(engines))}
        assert len(contents) == 1, path.name


def test_statistics_are_the_same_bits_from_any_setting(large: list[Path]) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    want = grams(vectors, engine=Engine(workers=1))
    for engine in (Engine(workers=2, window=1), Engine(workers=2, window=5 * BLOCK)):
        assert_same(grams(vectors, engine=engine), want)
    assert_same(grams(vectors[::-1]), {name: value.flip(0, 1) for name, value in want.items()})


def test_an_average_is_what_torch_says(large: list[Path]) -> None:
    """Over all blocks, none twice and none forgotten."""
    got = merged(large, "average", Engine(workers=2, window=1))
    base, *models = (thetau.open(path).state_dict() for path in large)
    for name, value in base.items():
        want = value.float() + torch.stack([model[name].float() - value.float() for model in models]).mean(0)
        assert torch.allclose(got[name].float(), want, rtol=2 * torch.finfo(value.dtype).eps, atol=1e-6), name


def test_a_merge_of_merges(large: list[Path]) -> None:
    base = thetau.open(large[0])
    a, b, c = (thetau.open(path) - base for path in large[1:])

    def nested(engine: Engine) -> dict[str, Tensor]:
        inner = thetau.merge([a, b], thetau.methods.Ties(), engine=engine).named("inner")
        wudi = thetau.merge([a, c], METHODS["wudi"](), engine=engine).named("wudi")
        outer = thetau.merge([inner, wudi, c], thetau.methods.Average(), engine=engine)
        return (base + 0.5 * outer - 0.1 * inner).state_dict(engine=engine)

    want = nested(Engine(workers=1))
    assert_same(nested(Engine(workers=2, window=1)), want)
    average = thetau.merge([a, b], thetau.methods.Average())
    twice = thetau.merge([average.named("x"), average.named("y")], thetau.methods.Average())
    for name, value in twice.state_dict().items():
        assert torch.allclose(value, average.state_dict()[name], atol=1e-7), name


def test_parts_of_a_merge(large: list[Path]) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    parts = thetau.transform(vectors, thetau.methods.Average())
    for part, vector in zip(parts, vectors, strict=True):
        want = vector.state_dict()
        for name, value in part.state_dict(engine=Engine(window=1)).items():
            assert torch.equal(value, want[name]), name


# Blocks and windows


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 5), (5, 0), (7,), (3 * BLOCK + 5,), (1000, 700), (2, BLOCK + 1), (BLOCK, 2), (33, 2, 1000)]
)
@pytest.mark.parametrize("elements", [1, 100, BLOCK, 2 * BLOCK + 1, 1 << 40])
def test_windows_are_runs_of_the_same_blocks(shape: tuple[int, ...], elements: int) -> None:
    spec = Spec(name="w", shape=shape, dtype=Dtype.F32, file="")
    whole = list(blocks(spec, 0, spec.rows))
    pieces = [block for low, high in windows(spec, elements) for block in blocks(spec, low, high)]
    assert pieces == whole
    assert [row for start, stop in whole for row in range(start, stop)] == list(range(spec.rows))
    assert all((stop - start) * spec.row_elements <= max(BLOCK, spec.row_elements) for start, stop in whole)
    assert all(start % block_rows(spec) == 0 for start, _ in whole)
    for low, high in windows(spec, elements):
        assert (high - low) * spec.row_elements <= max(elements, block_rows(spec) * spec.row_elements)


def test_random_bits_do_not_depend_on_where_a_block_begins() -> None:
    whole = element_bits((0, "task", "w"), 0, 1000)
    for start, stop in [(0, 1), (1, 999), (500, 1000), (7, 7)]:
        assert torch.equal(element_bits((0, "task", "w"), start, stop - start), whole[start:stop])
    edge = (1 << 31) - 3
    across = element_bits((0, "task", "w"), edge, 10)
    assert torch.equal(across[5:], element_bits((0, "task", "w"), edge + 5, 5))
    assert not torch.equal(element_bits((1, "task", "w"), 0, 1000), whole)
    assert not torch.equal(element_bits((0, "other", "w"), 0, 1000), whole)
    assert not torch.equal(across[3:], element_bits((0, "task", "w"), 0, 7))  # the upper half of the index counts


def test_random_bits_are_spread_evenly() -> None:
    share = element_bits((3, "x"), 0, 1 << 20).double() / (1 << 31)
    assert share.min() >= 0 and share.max() < 1
    counts = torch.histc(share, bins=64, min=0, max=1)
    expected = (1 << 20) / 64
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 25 < chi < 120  # 63 degrees of freedom
    pairs = torch.corrcoef(torch.stack([share[:-1], share[1:]]))[0, 1]
    assert abs(float(pairs)) < 5e-3


def test_sums_go_in_order() -> None:
    stack = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    want = (((stack[0] + stack[1]) + stack[2]) + stack[3]) + stack[4]
    before = stack.clone()
    assert torch.equal(sum_in_order(stack), want)
    assert torch.equal(torch.cat([sum_in_order(stack[:, :333]), sum_in_order(stack[:, 333:])]), want)
    assert torch.allclose(
        weighted_sum(stack, [1.0, 0.0, 2.0, -1.0, 0.5]), stack[0] + 2 * stack[2] - stack[3] + stack[4] / 2, atol=1e-5
    )
    assert torch.equal(stack, before)


# Running


class Recorder:
    """Remembers what a progress bar is told."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def begin(self, description: str, total: int) -> None:
        self.runs.append({"what": description, "total": total, "done": 0, "ended": False})

    def advance(self, done: int) -> None:
        with self.lock:
            self.runs[-1]["done"] += done

    def end(self) -> None:
        self.runs[-1]["ended"] = True


def items(count: int, memory: int = 1) -> list[Step]:
    return [Step(f"tensor{number}", 10 + number, memory) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    def work(item: Step) -> str:
        time.sleep(0.01 if item.name.endswith(("0", "3")) else 0)
        return item.name * 2

    progress = Recorder()
    given = items(20)
    got = list(Engine(workers=workers, progress=progress).run(given, Call(work), "Doubling"))
    assert got == [(item, item.name * 2) for item in given]
    total = sum(item.read for item in given)
    assert progress.runs == [{"what": "Doubling", "total": total, "done": total, "ended": True}]


def test_nothing_to_do() -> None:
    progress = Recorder()
    assert list(Engine(progress=progress).run([], Call(lambda item: None), "Nothing")) == []
    assert progress.runs == [{"what": "Nothing", "total": 0, "done": 0, "ended": True}]


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("thetau")]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_error_stops_everything(workers: int) -> None:
    done: list[str] = []

    def work(item: Step) -> None:
        if item.name == "tensor3":
            raise CheckpointError("tensor3: damaged")
        time.sleep(0.002)
        done.append(item.name)

    progress = Recorder()
    before = torch.get_num_threads()
    with pytest.raises(CheckpointError, match="tensor3: damaged"):
        list(Engine(workers=workers, progress=progress).run(items(1000), Call(work), "Working"))
    assert len(done) < 3 + 3 * workers + 1
    assert alive() == []
    assert progress.runs[0]["ended"]
    assert torch.get_num_threads() == before


def test_an_error_while_others_wait_for_memory() -> None:
    def work(item: Step) -> None:
        time.sleep(0.01)
        raise OutputError(item.name)

    with pytest.raises(OutputError, match="tensor0"):
        list(Engine(workers=4, max_memory=10).run(items(50, memory=10), Call(work), "Working"))
    assert alive() == []


def test_stopping_early_stops_the_threads() -> None:
    results: Iterator[Any] = Engine(workers=2).run(items(100), Call(lambda item: item.name), "Working")
    assert next(results)[1] == "tensor0"
    results.close()  # type: ignore[attr-defined]
    assert alive() == []


def test_memory_in_flight_stays_within_the_budget() -> None:
    lock, flying, most = threading.Lock(), [0], [0]

    def work(item: Step) -> None:
        with lock:
            flying[0] += item.memory
            most[0] = max(most[0], flying[0])
        time.sleep(0.002)
        with lock:
            flying[0] -= item.memory

    given = [Step(f"t{number}", 1, 40 if number % 3 else 90) for number in range(30)]
    list(Engine(workers=6, max_memory=100).run(given, Call(work), "Working"))
    assert 80 <= most[0] <= 100


def test_workers_use_one_thread_each() -> None:
    got = list(Engine(workers=2).run(items(4), Call(lambda item: torch.get_num_threads()), "Counting"))
    assert {threads for _, threads in got} == {1}


def test_a_budget_that_cannot_hold_one_tensor() -> None:
    given = [*items(3), Step("the.big.one", 1, 2_000_000_000)]
    message = r"Working needs 2\.00 GB for the tensor 'the\.big\.one'; the memory budget is 0\.1 MB\. Raise it \(`--max-memory`\) or choose"
    with pytest.raises(ThetauError, match=message):
        list(Engine(max_memory=100_000).run(given, Call(lambda item: None), "Working"))


@pytest.mark.parametrize("method", ["average", "ties", "wudi"])
def test_a_small_budget_is_refused_before_anything_is_written(tmp_path: Path, large: list[Path], method: str) -> None:
    base = thetau.open(large[0])
    engine = Engine(max_memory=10_000)
    vectors = [thetau.open(path) - base for path in large[1:]]
    with pytest.raises(ThetauError, match=r"needs .* for the tensor '.*'; the memory budget is 10\.0 kB"):
        (base + thetau.merge(vectors, METHODS[method](), engine=engine)).save(tmp_path / "out", engine=engine)
    assert leftovers(tmp_path) == []


def test_a_budget_that_holds_one_tensor_at_a_time_gives_the_same_bits(large: list[Path]) -> None:
    want = merged(large, "ties", Engine(workers=1))
    assert_same(merged(large, "ties", Engine(workers=4, max_memory=60_000_000, window=BLOCK)), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 0}, r"workers=...\)` must be at least 1. Got 0"),
        ({"window": 0}, "at least 1 element. Got 0"),
        ({"max_memory": 0}, "positive number of bytes"),
    ],
)
def test_engines_that_cannot_be(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(**fields)  # type: ignore[arg-type]


def test_sizes_are_told_in_gigabytes() -> None:
    assert [gigabytes(count) for count in (0, 10_000, 1e6, 99e6, 1e8, 1.5e9)] == [
        "0.0 kB",
        "10.0 kB",
        "1.0 MB",
        "99.0 MB",
        "0.10 GB",
        "1.50 GB",
    ]


@pytest.mark.parametrize("method", ["average", "ties", "awd", "wudi"])
def test_progress_adds_up_in_every_pass(tmp_path: Path, large: list[Path], method: str) -> None:
    progress = Recorder()
    engine = Engine(workers=2, progress=progress)
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    (base + thetau.merge(vectors, METHODS[method](), engine=engine)).save(tmp_path / "out", engine=engine)
    assert progress.runs[-1]["what"] == "Writing"
    assert len(progress.runs) == {"average": 1, "ties": 3, "awd": 2, "wudi": 1}[method]
    for run in progress.runs:
        assert run["done"] == run["total"] > 0 and run["ended"], run


def test_an_error_in_the_last_pass_names_the_file_and_leaves_nothing(tmp_path: Path, base: Path) -> None:
    weights = shifted(random_weights(0), 1)
    weights["logit_scale"] = torch.tensor(float("nan"))
    start = thetau.open(base)
    vector = thetau.open(write_model(tmp_path / "bad", weights)) - start
    with pytest.raises(
        CheckpointError, match=r"bad/model\.safetensors: tensor 'logit_scale' holds 1 NaN and 0 infinite values of 1\."
    ):
        (start + thetau.merge([vector], thetau.methods.Average())).save(tmp_path / "out", engine=Engine(workers=2))
    assert leftovers(tmp_path) == ["bad", "base"]
    assert alive() == []


def test_a_saved_merge_can_be_read_by_rows(large: list[Path]) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    for method in ("ties", "wudi"):
        source = thetau.merge(vectors, METHODS[method]()).terms[0][1]
        for name, spec in source.specs.items():
            whole = source.read(name)
            assert whole.shape == spec.shape
            if spec.shape and (method != "wudi" or "query.weight" in name):
                step = block_rows(spec)
                rows = torch.cat([source.read(name, start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)])
                assert torch.equal(bits(rows), bits(whole)), (method, name)


def test_empty_tensors_pass_through() -> None:
    base = {"w": torch.ones(3, 2), "no.rows": torch.empty(0, 4), "no.columns": torch.empty(4, 0)}
    start = thetau.open(base)
    model = thetau.open({name: value + 0.01 for name, value in base.items()})
    for method in ("average", "ties"):
        got = (start + thetau.merge([model - start, 2 * (model - start)], METHODS[method](), names=["x", "y"])).state_dict()
        assert got["no.rows"].shape == (0, 4) and got["no.columns"].shape == (4, 0)
        assert got["w"].mean() > 1


# The compiled loop: `save` uses it where it can, `state_dict` never writes with it


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *(("average", dtype) for dtype in (None, "float32", "float16", "bfloat16", "float64")),
        ("dare_ties", None),
        ("ties", "float16"),
    ],
)
def test_what_is_saved_has_the_bits_of_the_torch_path(tmp_path: Path, large: list[Path], method: str, dtype: str | None) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    merge = thetau.merge(vectors, METHODS[method]())
    (base + merge).save(tmp_path / "model", dtype=dtype)
    assert_same(load_folder(tmp_path / "model"), (base + merge).state_dict(dtype=dtype))
    (base - 0.7 * merge).save(tmp_path / "less", dtype=dtype)
    assert_same(load_folder(tmp_path / "less"), (base - 0.7 * merge).state_dict(dtype=dtype))
    merge.save(tmp_path / "vector", dtype=dtype)
    assert_same(load_folder(tmp_path / "vector"), merge.state_dict(dtype=dtype))


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "topk", "awd"])
def test_without_the_compiled_loop_the_bits_are_the_same(
    tmp_path: Path, large: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base = thetau.open(large[0])
    vectors = [thetau.open(path) - base for path in large[1:]]
    if not kernels.available():
        pytest.skip("built without the compiled loop")
    (base + thetau.merge(vectors, METHODS[method]())).save(tmp_path / "compiled")
    monkeypatch.setattr(kernels, "available", lambda: False)
    (base + thetau.merge(vectors, METHODS[method]())).save(tmp_path / "torch")
    for path in (tmp_path / "compiled").iterdir():
        assert path.read_bytes() == (tmp_path / "torch" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "scale"), [("float16", 3e6), (None, 1e38), ("bfloat16", 1e38)])
def test_a_merge_that_overflows(
    tmp_path: Path,
    base: Path,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    dtype: str | None,
    scale: float,
) -> None:
    warnings.simplefilter("ignore", thetau.ThetauWarning)  # that it is far from its base is another test's matter
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda: False)
    start = thetau.open(base)
    merge = thetau.merge([1e4 * (thetau.open(path) - start) for path in models], thetau.methods.TaskArithmetic(scale=scale))
    message = r"does not fit float16|gave values that are not finite"
    with pytest.raises((OutputError, CheckpointError), match=message):
        (start + merge).save(tmp_path / "out", dtype=dtype)
    assert leftovers(tmp_path) == ["base", "model1", "model2"]


def test_a_file_that_shrinks_under_the_compiled_loop(tmp_path: Path, large: list[Path]) -> None:
    copy = write_model(tmp_path / "copy", large_weights(0))
    base = thetau.open(large[0])
    merge = thetau.merge([thetau.open(copy) - base, thetau.open(large[1]) - base], thetau.methods.Average())
    path = copy / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match=r"copy/model\.safetensors: .*ended.*changed while it was read"):
        (base + merge).save(tmp_path / "out")
    assert leftovers(tmp_path) == ["copy"]
