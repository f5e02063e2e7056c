"""Big checkpoints at a tiny size: what is written is read as it was meant, headers alone give the same plan, and the page is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import thetau
from experiments.big_checkpoints import checkpoints, page
from experiments.big_checkpoints.run import PLANNED, plans
from thetau.engine.planning import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning")


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_values_are_those_that_thetau_reads(form: checkpoints.Form, tmp_path: Path) -> None:
    checkpoints.main(["make", str(tmp_path), form, "tiny"])
    base, *models = (thetau.open(tmp_path / model) for model in checkpoints.MODELS)
    name, shape = "model.layers.1.self_attn.o_proj.weight", (32, 32)
    ours = checkpoints.values(tmp_path / "a", form, name, shape, 32)
    np.testing.assert_allclose(models[0].state_dict()[name].float().numpy(), ours, rtol=2**-8, atol=1e-9)
    vectors = [model - base for model in models]
    method = thetau.methods.TaskArithmetic(scale=checkpoints.SCALE)
    (base + thetau.merge(vectors, method, names=("a", "b"))).save(tmp_path / "out")
    assert checkpoints.checked(tmp_path, form, "tiny", tmp_path / "out") <= 1 + 1e-3  # one rounding, into bfloat16
    wrong = thetau.methods.TaskArithmetic(scale=0.5)
    (base + thetau.merge(vectors, wrong, names=("a", "b"))).save(tmp_path / "wrong")
    assert checkpoints.checked(tmp_path, form, "tiny", tmp_path / "wrong") > 2


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_headers_alone_give_the_plan_of_the_whole(form: checkpoints.Form, tmp_path: Path) -> None:
    checkpoints.main(["make", str(tmp_path), form, "tiny"])
    base, *models = (thetau.open(tmp_path / model) for model in checkpoints.MODELS)
    engine = thetau.Engine(workers=1, max_memory=16_000_000_000)
    vectors = [model - base for model in models]
    found = plan(base + thetau.merge(vectors, thetau.methods.TaskArithmetic(), names=("a", "b"), engine=engine), engine=engine)
    rows = plans("tiny", [form])
    assert [row["method"] for row in rows] == list(PLANNED)
    assert rows[0]["in_flight_mb"] == round(found.memory / 1e6)
    assert rows[0]["parameters"] == sum(spec.elements for spec in base.specs().values())
    expected = 2 * checkpoints.SHAPES["tiny"]["mixture"].layers
    assert any(row["said"].startswith(f"{expected} tensors of stacked experts") for row in rows) == (form == "mixture")


def test_the_page_is_drawn_from_the_file() -> None:
    result = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    drawn = page.drawn(result)
    assert all(row["peak_mb"] < row["budget_mb"] for row in result["runs"])
    assert all(row["roundings_off"] <= 1.001 for row in result["runs"] if "roundings_off" in row)
    for row in (*result["runs"], *result["plans"]):
        assert f"`{row['method']}`" in drawn
    assert page.PAGE.read_text(encoding="utf-8") == drawn + "\n"
