"""`--evidence kind:task=file`, wherever a command takes it."""

from __future__ import annotations

import pytest

from thetau.errors import RecipeError
from thetau.recipes.schema import parse_evidence


def test_files_by_kind_and_task() -> None:
    told = parse_evidence(["fisher:a=x/a.safetensors", "fisher:b=b=2.safetensors", "gram:a=g"])
    assert told == {"fisher": {"a": "x/a.safetensors", "b": "b=2.safetensors"}, "gram": {"a": "g"}}
    assert parse_evidence([]) == {}


def test_all_that_is_wrong_is_said_together() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_evidence(["fisher=a", "fisher:=a", "fisher:a=", "gram:a=x", "gram:a=y", "gram:b=x"])
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1] == "`--evidence gram:a` is given twice: x and y. Leave one out."
