from __future__ import annotations

from pathlib import Path

import pytest

import mmgraft.recipes.source
from mmgraft.errors import UsageError
from mmgraft.recipes.source import recipe_dir


def test_the_checkout_has_recipes_for_every_built_in_method() -> None:
    from mmgraft.grafts.registry import built_in

    assert any(method.recipe for method in built_in())
    for method in built_in():
        assert method.recipe is None or (recipe_dir() / method.recipe).is_file()


def test_an_installed_package_uses_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmgraft.recipes.source, "_PACKAGE", tmp_path / "mmgraft" / "recipes")
    with pytest.raises(UsageError, match="reinstall mmgraft"):
        recipe_dir()
    (tmp_path / "recipes").mkdir()
    assert recipe_dir() == tmp_path / "recipes"
    shipped = tmp_path / "mmgraft" / "recipes" / "shipped"
    shipped.mkdir(parents=True)
    assert recipe_dir() == shipped
