"""Whoever asks Python for help on a public name gets some."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import mmgraft
from mmgraft.grafts.registry import Method, methods
from mmgraft.strict import StrictModel

SOURCES = sorted(Path(mmgraft.__file__).parent.rglob("*.py"))
PUBLIC = [name for name in mmgraft.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name: str) -> None:
    assert len(inspect.getdoc(getattr(mmgraft, name)) or "") > 20


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if inspect.isclass(getattr(mmgraft, name))]
)
def test_its_own_public_methods_have_docstrings(name: str) -> None:
    public = getattr(mmgraft, name)
    for member, value in vars(public).items():
        if member.startswith("_") or not (inspect.isroutine(value) or isinstance(value, property)):
            continue
        assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or text.startswith('"""')


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_every_setting_of_a_method_is_described(method: Method) -> None:
    assert issubclass(method.config_class, StrictModel)
    for name, info in method.config_class.model_fields.items():
        assert name == "method" or info.description, name
