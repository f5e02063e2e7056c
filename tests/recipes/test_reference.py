"""Models as mergekit's recipes name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thetau.errors import RecipeError
from thetau.recipes.mergekit.reference import Place, Reference, parse


@pytest.mark.parametrize(
    ("text", "model", "lora"),
    [
        ("org/a", Place(path="org/a"), None),
        ("org/a@v1", Place(path="org/a", revision="v1"), None),
        ("org/a+org/b", Place(path="org/a"), Place(path="org/b")),
        ("org/a@v1+org/b@v2", Place(path="org/a", revision="v1"), Place(path="org/b", revision="v2")),
    ],
)
def test_a_text_says_model_revision_and_adapter(text: str, model: Place, lora: Place | None) -> None:
    assert parse(text) == Reference(model=model, lora=lora)
    assert str(parse(text)) == text


def test_a_mapping_says_the_same() -> None:
    value = {"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/b"}}
    assert parse(value) == parse("org/a@v1+org/b")
    assert parse({"model": "org/a@v1", "lora": "org/b"}) == parse("org/a@v1+org/b")
    assert parse({"model": "org/a@v1+org/b"}) == parse("org/a@v1+org/b")
    assert parse({"model": "org/a", "override_architecture": "LlamaForCausalLM"}).architecture == "LlamaForCausalLM"


def test_paths_start_at_the_recipe_where_they_exist_there(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert parse("one+other", folder=tmp_path).model.path == str(tmp_path / "one")
    assert parse("one+other", folder=tmp_path).lora == Place(path="other")


def test_a_folder_may_have_our_signs_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a+b@c").mkdir()
    assert parse("a+b@c", folder=tmp_path) == Reference(model=Place(path=str(tmp_path / "a+b@c")))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a+b+c", "takes one adapter"),
        ("a@b@c", "one revision"),
        ("a+", "must name a path"),
        (3, "must be a path, a hub id"),
        ({"modle": "a"}, "unknown key 'modle'. Did you mean 'model'?"),
        ({"model": {"path": "a", "revison": "v"}}, "unknown key 'revison'. Did you mean 'revision'?"),
        ({"model": {"path": "a", "revision": 1.5}}, "put it in quotes"),
    ],
)
def test_what_is_wrong_is_said(value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(value, "experts.0.source_model")
    assert said in str(caught.value)
    assert "experts.0.source_model" in str(caught.value)
