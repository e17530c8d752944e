from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.registry import (
    Method,
    broken_methods,
    built_in,
    get_method,
    methods,
)

PLUGIN = """\
from typing import Literal

from mmgraft.grafts import Method, StrictModel


class BridgeConfig(StrictModel):
    method: Literal["bridge"] = "bridge"
    width: int = 4


class BridgeGraft:
    pass


METHOD = Method("bridge", "a bridge", "arXiv 0000.00000", BridgeConfig, "bridges.code:BridgeGraft")
IAA = Method("iaa", "a second iaa", "", BridgeConfig, "bridges.code:BridgeGraft")
UNFIT = Method("unfit", "settings of another method", "", BridgeConfig, "bridges.code:BridgeGraft")
LOST = Method("bridge", "no such class", "", BridgeConfig, "bridges.code:Missing")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package that brings entry points, as pip would, into a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(**points: str) -> None:
        (tmp_path / "bridges").mkdir()
        (tmp_path / "bridges" / "__init__.py").touch()
        (tmp_path / "bridges" / "code.py").write_text(PLUGIN)
        info = tmp_path / "mmgraft_bridges-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: mmgraft-bridges\nVersion: 1.0\n"
        )
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[mmgraft.methods]\n{lines}")

    yield add
    for name in ("bridges", "bridges.code"):
        __import__("sys").modules.pop(name, None)


BUILT_IN = ["iaa", "wings", "llava", "lora", "expert", "xattn", "wings-official"]


def test_what_is_built_in() -> None:
    assert list(methods()) == BUILT_IN
    for method in built_in():
        assert method.config_class.model_fields["method"].default == method.name
        assert method.paper.startswith("arXiv ")


@pytest.mark.parametrize("method", built_in(), ids=lambda method: method.name)
def test_the_built_in_graft_classes_load(method: Method) -> None:
    assert method.load_graft().method == method.name


def test_an_installed_package_brings_a_method(install) -> None:
    install(bridge="bridges.code:METHOD")
    assert list(methods()) == [*BUILT_IN, "bridge"]
    method = get_method("bridge")
    assert method.origin == "mmgraft-bridges"
    assert method.load_graft().__name__ == "BridgeGraft"
    assert method.config_class.parse({"width": 2}, "config").model_dump()["width"] == 2
    assert broken_methods() == []


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("bridge", "bridges.nothing:METHOD", "ModuleNotFoundError"),
        ("bridge", "bridges.code:NOTHING", "AttributeError"),
        ("bridge", "bridges.code:BridgeGraft", "is a type, not an mmgraft Method"),
        ("brigde", "bridges.code:METHOD", "calls itself 'bridge'"),
        ("iaa", "bridges.code:IAA", "the name is taken by mmgraft"),
        ("unfit", "bridges.code:UNFIT", "BridgeConfig needs the field method = 'unfit'"),
    ],
)
def test_a_broken_package_is_named_and_disturbs_nobody(
    install, name: str, target: str, reason: str
) -> None:
    install(**{name: target})
    assert list(methods()) == BUILT_IN
    (broken,) = broken_methods()
    assert (broken.name, broken.origin) == (name, "mmgraft-bridges")
    assert reason in broken.reason
    assert get_method("iaa").config_class is IAAConfig
    if name != "iaa":
        with pytest.raises(UsageError, match="mend or uninstall 'mmgraft-bridges'"):
            get_method(name)


def test_a_graft_class_that_is_not_there_is_named(install) -> None:
    install(bridge="bridges.code:LOST")
    with pytest.raises(UsageError, match=r"bridges\.code:Missing.*mmgraft-bridges"):
        get_method("bridge").load_graft()


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'wing'; did you mean 'wings'"):
        get_method("wing")
    with pytest.raises(
        UsageError, match="known: iaa, wings, llava, lora, expert, xattn, wings-official"
    ):
        get_method("zebra")
