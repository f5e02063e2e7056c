"""Every method has its page: drawn from what is there now, with a word on when to use it, a figure, a recipe that runs, its other names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from commands import run
from experiments.catalogue import costs, page
from experiments.catalogue.names import APART, NAMES
from experiments.catalogue.run import ours
from experiments.common import DOCS
from fixtures import random_weights, shifted, write_model
from thetau.evidence.files import save_evidence
from thetau.methods import registry
from thetau.methods.traits import PURPOSES, suited, traits, use
from thetau.parts import Chain, Method
from thetau.recipes.mergekit.methods import SPECS
from thetau.testing import evidence_for

RESULTS, COSTS = page.read(page.RESULTS), page.read(page.COSTS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models of the pages' recipes, and evidence of theirs."""
    base = random_weights(0)
    write_model(tmp_path / "base", base)
    for seed, name in enumerate(page.NAMES_OF_MODELS):
        write_model(tmp_path / name, shifted(base, seed))
        for method in ours():
            for kind, given in evidence_for(registry.build(method, {}), base, [name]).items():
                save_evidence(tmp_path / f"{name}-{kind}.safetensors", kind, given[name], {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lacking(names: list[str], results: dict[str, Any], planned: dict[str, Any], rows: tuple[Any, ...]) -> list[str]:
    """What a method's page has to stand on and is not there."""
    found = []
    for name in names:
        if use(name) is None:
            found.append(f"{name}: no paragraph that begins with `Use it ` in its file or its class")
        if name not in results["rows"]:
            found.append(f"{name}: no row in experiments/catalogue/results.json; run `make catalogue`")
        if name not in planned["rows"]:
            found.append(f"{name}: no row in experiments/catalogue/costs.json; run `make catalogue`")
        if name not in {row.method for row in rows}:
            found.append(f"{name}: no row in experiments/catalogue/names.py")
        if name not in {one for kind in page.KINDS.values() for one in kind}:
            found.append(f"{name}: stands in no kind of experiments/catalogue/page.py")
    return found


def test_every_method_has_all_that_its_page_stands_on() -> None:
    assert lacking(ours(), RESULTS, COSTS, NAMES) == []


def test_a_method_without_a_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(Method):
        def chain(self) -> Chain:
            raise NotImplementedError

    monkeypatch.setitem(registry._METHODS, "bare", Bare)
    assert len(lacking(["bare"], RESULTS, COSTS, NAMES)) == 5


def test_the_pages_are_drawn_from_what_is_there_now() -> None:
    stale = [
        str(path.relative_to(DOCS))
        for path, text in page.pages(RESULTS, COSTS).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run `python -m experiments.pages`: {', '.join(stale)} are not what the code and the results say"
    assert sorted(path.stem for path in page.FOLDER.glob("*.md")) == ours()


def test_the_results_are_of_every_method_as_it_is() -> None:
    changed = [name for name in ours() if RESULTS["rows"][name]["method"] != registry.plain(registry.build(name, {}))]
    assert not changed, f"their defaults are others now: `python -m experiments.catalogue.run --only {' '.join(changed)}`"
    for name, row in RESULTS["rows"].items():
        assert row.get("failed") or set(row["default"]["accuracy"]) == set(row["tasks"]), name


def test_the_costs_are_what_the_planner_says() -> None:
    made = costs.costs({"matrix": "matrix"}, ours())
    for name, row in made.items():
        said = COSTS["rows"][name]["matrix"]
        assert row["matrix"]["passes"] == said["passes"] == known_passes(name), name
        assert row["matrix"]["flops"] == pytest.approx(said["flops"]), name


def known_passes(name: str) -> int:
    """What the list of methods says."""
    its = traits(name)
    assert its is not None
    return its.passes


@pytest.mark.parametrize("name", ours())
def test_the_recipe_of_a_page_runs(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = (page.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    recipe = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(recipe) == 1
    assert yaml.safe_load(recipe[0])["method"]["name"] == name
    (folder / "recipe.yaml").write_text(recipe[0], encoding="utf-8")
    code, said = run(capsys, "merge", "recipe.yaml", "-o", "merged")
    assert code == 0, said
    assert (folder / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.method)
def test_the_settings_of_other_names_are_methods(row: Any) -> None:
    registry.build(row.method, row.settings)
    defaults = {field.name: field.default for field in registry.describe(row.method)}
    assert all(defaults[key] != value for key, value in row.settings.items()), "a default needs no word"


def test_no_name_of_mergekit_or_peft_is_missing() -> None:
    assert {name for row in NAMES for name in re.findall(r"^`([a-z_]+)`", row.mergekit)} == set(SPECS)
    lora = pytest.importorskip("peft.tuners.lora.model", reason="PEFT is no requirement of ours")
    kinds = set(get_args(get_type_hints(lora.LoraModel.add_weighted_adapter)["combination_type"]))
    assert {name for row in NAMES for name in re.findall(r"`([a-z_]+)`", row.peft)} & kinds | set(APART) == kinds


def test_methods_are_found_by_what_they_are_for() -> None:
    assert suited(["no-base", "many"]) == ["karcher", "linear", "multislerp"]
    assert "fisher" in suited(["data"])
    assert {*suited(["data"]), *suited(["data-free"])} == set(registry.names())
    assert all("lora" in registry.get(name).suits for name in suited(["lora"]))
    assert set(suited(["around"])) >= {"awd", "larv", "svc"}
    assert all(suited([purpose]) for purpose in PURPOSES)
