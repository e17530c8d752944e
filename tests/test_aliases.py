from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmgraft.aliases import aliases, default_tower, resolve_alias
from mmgraft.errors import UsageError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_documented_names() -> None:
    assert resolve_alias("qwen2-7b") == "Qwen/Qwen2-7B-Instruct"
    assert resolve_alias("QWEN2-7B") == "Qwen/Qwen2-7B-Instruct"
    assert default_tower() == "google/siglip2-so400m-patch14-384"


@pytest.mark.parametrize("name", ["me/model", "./model", "/data/model", "~/model", "C:\\model"])
def test_ids_and_paths_are_what_they_are(name: str) -> None:
    assert resolve_alias(name) == name


def test_a_folder_goes_before_an_alias(tmp_path: Path) -> None:
    (tmp_path / "qwen2-7b").mkdir()
    assert resolve_alias("qwen2-7b") == "qwen2-7b"


def test_an_unknown_word_names_the_nearest_alias() -> None:
    with pytest.raises(UsageError, match="did you mean 'qwen2-7b'"):
        resolve_alias("qwen27b")
    with pytest.raises(UsageError, match="give a Hub id such as"):
        resolve_alias("zebra")
    with pytest.raises(UsageError, match="empty"):
        resolve_alias(" ")


def test_the_table_is_well_formed() -> None:
    for alias, target in aliases().items():
        assert re.fullmatch(r"[a-z0-9.-]+", alias), alias
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", target), target
    assert len(set(aliases().values())) == len(aliases()), "two aliases mean one model"
