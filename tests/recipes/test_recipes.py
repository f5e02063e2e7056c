"""Recipes: read whole, refused with every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from thetau.errors import RecipeError
from thetau.recipes import Recipe, from_mapping, load
from thetau.recipes.schema import parse_size

GOOD = {"base": "b", "models": ["m", {"path": "n", "name": "second"}], "method": {"name": "ties", "density": 0.1}}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    recipe = load(write(tmp_path, "base: b\nmodels: [m, {path: n, name: second}]\nmethod: {name: ties, density: 0.1}\n"))
    assert isinstance(recipe, Recipe)
    assert recipe.base == str(tmp_path / "b"), "relative paths start at the recipe's folder"
    assert [entry.name for entry in recipe.entries()] == [None, "second"]
    assert (recipe.output, recipe.seed, recipe.dtype, recipe.shard_size, recipe.exclude) == ("model", 0, None, "5GB", [])


def test_all_problems_come_together() -> None:
    content = {
        "bse": "b",
        "models": [{"path": "m", "nme": "x"}],
        "method": {"name": "ties", "densty": 1, "trim": "row"},
        "dtype": "bf16",
        "shard_size": "much",
        "seed": "one",
    }
    with pytest.raises(RecipeError) as caught:
        from_mapping(content)
    text = str(caught.value)
    for part in (
        "unknown key 'bse'. Did you mean 'base'?",
        "base is missing",
        "'models.0.nme'. Did you mean 'name'?",
        "unknown field 'densty'. Did you mean 'density'?",
        "dtype: must be one of float32",
        "shard_size: a size is a number of bytes with a unit",
        "seed: ",
    ):
        assert part in text
    assert len(caught.value.problems) >= 7


def test_every_wrong_value_is_heard_and_1e_minus_5_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping({**GOOD, "method": {"name": "wudi", "steps": -1, "rows": 2.0, "lr": -1.0}})
    assert len(caught.value.problems) == 3
    recipe = load(write(tmp_path, "base: b\nmodels: [m]\nmethod: {name: awd, alpha: 1e-4}\n"))
    assert recipe.method == {"name": "awd", "alpha": 1e-4}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("tis", "unknown method 'tis'. Did you mean 'ties'"),
        ({"density": 1}, "needs a `name`"),
        (
            {"name": "awd", "then": {"name": "ties", "densty": 1}},
            "awd.then: ties: unknown field 'densty'. Did you mean 'density'",
        ),
        ({"name": "awd", "then": 3}, "awd.then: must be a method's name"),
        ({"name": "ties", "density": 0}, r"`Ties(density=...)` must be in (0, 1]. Got 0."),
        ({"name": "wudi", "steps": -1}, "`Wudi(steps=...)` must be an integer of at least 0. Got -1."),
        ({"name": "task_arithmetic", "scale": {"a": 1}}, "a mapping must be `per_task"),
        ({"name": "task_arithmetic", "scale": {"per_task": {"a": "x"}}}, "must be a number. Got 'x'."),
        ({"name": "ties", "scale": {"per_task": {"a": 1}}}, "`Ties(scale=...)`"),
    ],
)
def test_a_method_is_checked_at_any_depth(method: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping({**GOOD, "method": method})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a\nbase: b\n", "the key 'base' stands twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("- base\n", "must be a mapping"),
        ("base: [\n", "not valid YAML"),
        ("base: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_odd_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(tmp_path, text))
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("512 MB", 512_000_000), ("1.5k", 1500), (7, 7), ("100", 100)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "0", 0, "5 apples"])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
