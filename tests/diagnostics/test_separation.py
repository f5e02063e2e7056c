"""Disentangling by itself: what it means for a sum, which α, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import thetau
from thetau.cli.app import app
from thetau.diagnostics.separation import calibrated, linear_gram, separation
from thetau.errors import AlignmentError, RecipeError
from thetau.facade import Expression, merge, transform
from thetau.methods import Awd, TaskArithmetic
from thetau.parts import PerTask
from thetau.transforms.awd_gram import solve

QUERY, DENSE, NORM = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.attention.output.LayerNorm.weight",
)
TASKS = ("cr", "mr", "qnli", "rte")


def weights(seed: int | None) -> dict[str, torch.Tensor]:
    """A base, or a model whose vector has a part in common with the others'."""
    shapes = {QUERY: (12, 8), DENSE: (16, 8), NORM: (8,)}
    draw = torch.Generator().manual_seed(99)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if seed is None:
        return base
    common = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    own = torch.Generator().manual_seed(seed)
    return {
        name: base[name] + 0.05 * (0.6 + 0.1 * seed) * common[name] + 0.05 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, Expression]:
    base = thetau.open(weights(None))
    return {task: (thetau.open(weights(seed)) - base).named(task) for seed, task in enumerate(TASKS)}


def test_awd_before_task_arithmetic_is_task_arithmetic(vectors: dict[str, Expression]) -> None:
    """λ_i = λ(1 − K c_i), entry by entry, to rounding in float32."""
    found = separation(vectors)
    listed = list(vectors.values())
    one = merge(listed, Awd(then=TaskArithmetic(scale=0.4)), names=list(TASKS)).state_dict()
    scales = PerTask({task: 0.4 * factor for task, factor in found.factors.items()})
    two = merge(listed, TaskArithmetic(scale=scales), names=list(TASKS)).state_dict()
    assert any(abs(factor - 1) > 0.05 for factor in found.factors.values())
    for name in (QUERY, DENSE):
        size = float(one[name].abs().max())
        assert torch.allclose(one[name], two[name], atol=16 * torch.finfo(torch.float32).eps * max(size, 1.0))


def test_by_row_it_is_not(vectors: dict[str, Expression]) -> None:
    """No four numbers give the sum of vectors that were disentangled row by row."""
    merged = merge(list(vectors.values()), Awd(scope="row", then=TaskArithmetic(scale=1.0)), names=list(TASKS)).state_dict()
    columns = torch.stack([torch.cat([v.state_dict()[n].flatten() for n in (QUERY, DENSE)]) for v in vectors.values()]).T.double()
    target = torch.cat([merged[n].flatten() for n in (QUERY, DENSE)]).double()
    solution = torch.linalg.lstsq(columns, target[:, None]).solution
    assert float((columns @ solution - target[:, None]).norm()) > 0.01 * float(target.norm())


def test_cosines_are_those_of_the_linear_weights(vectors: dict[str, Expression]) -> None:
    found = separation(vectors)
    made = transform(list(vectors.values()), Awd(), names=list(TASKS))
    rows = torch.stack([torch.cat([v.state_dict()[n].flatten() for n in (QUERY, DENSE)]) for v in made]).double()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    assert torch.allclose(torch.tensor(found.after, dtype=torch.float64), unit @ unit.T, atol=1e-5)
    assert found.mean_after < 0.5 * found.mean_before


def test_reversed_at_the_default_of_forwards_destroys_the_vectors(vectors: dict[str, Expression]) -> None:
    """Tables 6 and 7: with the α of the forward problem δ is longer than the vectors; at 0.5 it is not."""
    gram = linear_gram([vectors[task] for task in sorted(TASKS)])
    longest = float(gram.diagonal().max().sqrt())
    assert separation(vectors, alpha=1e-3, reverse=True).length > 3 * longest
    assert separation(vectors, reverse=True).alpha == 0.5
    assert separation(vectors, reverse=True).length < longest
    even = separation(vectors, alpha="auto", reverse=True)
    assert even.length <= separation(vectors, alpha=1e-3).length * (1 + 1e-6), (
        "the same distance, or as near as the problem jumps"
    )


def test_the_rule_for_alpha(vectors: dict[str, Expression]) -> None:
    gram = linear_gram([vectors[task] for task in sorted(TASKS)])
    alpha = calibrated(gram)
    lowest = min(solve(gram, value).mean_after for value in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6))
    chosen = solve(gram, alpha)
    assert chosen.mean_after <= lowest + 0.1 * (chosen.mean_before - lowest)
    assert alpha == 1e-2 or solve(gram, 10 * alpha).mean_after > lowest + 0.1 * (chosen.mean_before - lowest)


def test_what_is_refused(vectors: dict[str, Expression]) -> None:
    with pytest.raises(AlignmentError, match=r"at least two task vectors. Got 1"):
        separation({"cr": vectors["cr"]})
    base = thetau.open({NORM: torch.ones(8)})
    norms = {task: thetau.open({NORM: torch.ones(8) + i}) - base for i, task in enumerate(("a", "b"), 1)}
    with pytest.raises(AlignmentError, match="linear weights of the blocks, and these vectors have none"):
        separation(norms)


def test_the_command(tmp_path: Path) -> None:
    save_file(weights(None), tmp_path / "base.safetensors")
    words = ["vector", "disentangle"]
    for seed, task in enumerate(TASKS):
        save_file(weights(seed), tmp_path / f"{task}.safetensors")
        words.append(f"{task}={tmp_path / task}.safetensors")
    words += ["--base", str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "out"), "--json", str(tmp_path / "s.json")]
    done = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "c.png"), "--alpha", "auto"])
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads((tmp_path / "s.json").read_text())
    delta = {
        name: tensor - load_file(tmp_path / "out/cr.safetensors")[name]
        for name, tensor in {n: weights(0)[n] - weights(None)[n] for n in (QUERY, DENSE)}.items()
    }
    length = sum(float(tensor.double().square().sum()) for tensor in delta.values()) ** 0.5
    assert length == pytest.approx(told["length"], rel=1e-3)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (tmp_path / "out").glob("*.safetensors")} == set(TASKS)
    bad = CliRunner().invoke(app, [*words, "--alpha", "much"])
    assert isinstance(bad.exception, RecipeError)
