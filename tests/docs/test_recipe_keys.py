"""Every key that a recipe may have stands in the page on recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmgraft.recipes.recipe import DataEntry, GraftDefaults, Recipe, Stage

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.parametrize("model", [Recipe, Stage, DataEntry, GraftDefaults])
def test_every_key_has_a_line(model: type[Recipe]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [
        name
        for name in model.model_fields
        if not re.search(rf"`{name}[`:]|^ *(- )?{name}:", text, re.MULTILINE)
    ]
    assert missing == []
