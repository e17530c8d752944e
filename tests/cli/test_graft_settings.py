"""Options of ``mmgraft graft`` that come from methods: two packages may use one name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import pytest

from mmgraft.cli import graft as command
from mmgraft.errors import UsageError
from mmgraft.grafts.method import Method, StageSwitches
from mmgraft.grafts.registry import methods
from mmgraft.recipes.recipe import stage_class
from mmgraft.strict import Option, StrictModel


class NarrowConfig(StrictModel):
    method: Literal["narrow"] = "narrow"
    rank: Annotated[float, Option("Share of the width.")] = 0.5
    head: Annotated[int, Option("Number of heads.")] = 1
    sizes: Annotated[list[int] | None, Option("Two sizes.")] = None
    untie: Annotated[bool, Option("Two copies.")] = True
    out: Annotated[str, Option("What comes out.")] = "sum"
    set: Annotated[str, Option("A set.")] = "all"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**methods(), "narrow": Method("narrow", "a method", "", NarrowConfig, "no:Graft")}
    monkeypatch.setattr(command, "methods", lambda: known)
    monkeypatch.setattr(command, "get_method", known.__getitem__)


def kind_of(name: str) -> Any:
    annotation, _ = command._settings()[name]
    return get_args(get_args(annotation)[0])[0]


def test_an_option_is_text_where_methods_read_it_otherwise() -> None:
    assert kind_of("rank") is str
    assert (kind_of("sizes"), kind_of("head")) == (str, bool)
    assert get_args(command._settings()["untie"][0])[1].default == "--untie/--no-untie"


@pytest.mark.parametrize(
    ("method", "given", "read"),
    [
        ("wings", {"rank": "32"}, {"rank": 32}),
        ("narrow", {"rank": "0.25"}, {"rank": 0.25}),
        ("narrow", {"sizes": "3,4"}, {"sizes": [3, 4]}),
        ("narrow", {"untie": False}, {"untie": False}),
        ("wings", {"layers": "1,3"}, {"layers": "1,3"}),
        ("wings", {"learners": "visual"}, {"learners": ["visual"]}),
    ],
)
def test_each_method_reads_a_shared_option_its_way(method: str, given: Any, read: Any) -> None:
    config = command._config(method, given, [], None)
    assert config.model_dump(include=read.keys()) == read


def test_what_does_not_fit_the_method_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'rank': .*valid integer"):
        command._config("wings", {"rank": "0.25"}, [], None)
    with pytest.raises(UsageError, match=r"--head is a switch.*--set head=VALUE"):
        command._config("narrow", {"head": False}, [], None)


def test_a_setting_of_the_commands_own_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "set" not in command._settings()
    command._config("narrow", {}, [], None)
    said = " ".join(capsys.readouterr().err.split())
    for name in ("out", "set"):
        assert f"--{name} is the command's own; set that of method narrow with --set {name}" in said
    command._config("wings", {}, [], None)
    assert capsys.readouterr().err == ""


def test_a_switch_that_every_stage_has_is_refused_by_name() -> None:
    class Rates(StageSwitches):
        lr: float = 0.5

    with pytest.raises(UsageError, match=r"Rates switches lr, .* rename it in the package"):
        stage_class(Rates)
