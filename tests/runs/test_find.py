"""Check which graft a command takes when none, one or several could be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.runs.find import find_run


def make(*parts: str) -> Path:
    folder = Path(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graft_config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_current_folder_wins_over_those_below(here: Path, said: list[str]) -> None:
    make(str(here))
    make("below")
    assert find_run() == here
    assert said == [f"taking the graft in the current folder, {here.name}"]


def test_the_only_one_below_is_taken_and_named(here: Path, said: list[str]) -> None:
    make("runs", "deep", "qwen")
    (here / "other").mkdir()
    assert find_run() == here / "runs" / "deep" / "qwen"
    assert said == ["taking the only graft here, runs/deep/qwen"]


def test_several_are_listed(here: Path) -> None:
    make("b-iaa")
    make("a", "wings")
    with pytest.raises(UsageError, match=r"2 grafts below .*\n  a/wings\n  b-iaa$"):
        find_run()


def test_none_says_how_to_make_one() -> None:
    with pytest.raises(UsageError, match=r"no graft in .*mmgraft graft BASE"):
        find_run()


@pytest.mark.parametrize(
    "hidden", [".cache/x", "run/checkpoints/checkpoint-5", "checkpoints/one", "a/b/c/toodeep"]
)
def test_copies_and_caches_are_not_grafts_to_take(hidden: str) -> None:
    make(hidden)
    if hidden.startswith("run/"):
        make("run")
        assert find_run().name == "run"
    else:
        with pytest.raises(UsageError, match="there is no graft"):
            find_run()


def test_a_named_folder_is_taken_as_it_is(here: Path, said: list[str]) -> None:
    one = make("one")
    make("two")
    assert find_run("one") == Path("one")
    assert find_run(one / "graft_config.json") == one
    assert said == []


def test_a_named_folder_that_is_no_graft(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("")
    make("runs", "one")
    with pytest.raises(UsageError, match=r"empty is no graft: it has no graft_config.json; make"):
        find_run("empty")
    with pytest.raises(UsageError, match="file is a file"):
        find_run("file")
    with pytest.raises(UsageError, match="no folder nothing"):
        find_run("nothing")
    with pytest.raises(UsageError, match=r"runs is no graft, but holds 1.*\n  runs/one"):
        find_run("runs")
