"""Text files that a user brings: not UTF-8, no text, not what they should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from mmgraft.errors import UsageError
from mmgraft.textfiles import read_json, read_text
from refusals import GRAFT, STAGE

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings_are_refused_by_name(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("é: 1\n".encode(encoding))
    with pytest.raises(UsageError, match=r"notes\.txt is not UTF-8 text \(.*\); convert it"):
        read_text(path)


def test_utf_8_is_read_with_and_without_a_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a").write_bytes('{"é": 1}\n'.encode(encoding))
        assert read_text(tmp_path / "a") == '{"é": 1}\n'
        assert read_json(tmp_path / "a", "mend it") == {"é": 1}


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"a"', "[" * 100_000, "9" * 5000])
def test_what_is_no_json_object_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=r"a\.json is damaged \(.*\); mend it"):
        read_json(tmp_path / "a.json", "mend it")


@pytest.mark.parametrize("what", ["gone", "a folder", "a loop", "a secret"])
def test_what_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    if what == "a folder":
        path.mkdir()
    elif what == "a loop":
        path.symlink_to(path)
    elif what == "a secret":
        path.write_text("a: 1")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(UsageError, match=r"a\.yaml cannot be read"):
        read_text(path)


# Every door for text

RECIPE = {"name": "é", "method": "iaa", "graft": {"config": {"layers": [1]}}, "stages": [STAGE]}
DOORS = {
    "validate": ["recipes", "validate", "FILE"],
    "show": ["recipes", "show", "FILE"],
    "cp": ["recipes", "cp", "FILE", "copy.yaml"],
    "graft": ["graft", "BASE", "--recipe", "FILE", "--vision", "TOWER", "--out", "g"],
    "template": ["graft", "BASE", *GRAFT, "--vision", "TOWER", "--out", "g", "--template", "FILE"],
    "train": ["train", "run", "--recipe", "FILE"],
    "compare": ["compare", "FILE", "--out", "c"],
    "estimate": ["estimate", "FILE", "--base", "BASE"],
    "rows": ["train", "run", "--data", "ROWS"],
    "generate": ["generate", "run", "ROWS", "--out", "o.jsonl"],
    "eval": ["eval", "run", "--data", "ROWS", "--metric", "exact"],
    "laws": ["laws", "run", "ROWS"],
}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_it(refused, run, parts, here, door, encoding) -> None:
    row = '{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "é"}]}'
    files = {
        "FILE": here / "f.yaml",
        "ROWS": here / "rows.jsonl",
        "BASE": parts / "base",
        "TOWER": parts / "tower",
    }
    files["FILE"].write_bytes(yaml.safe_dump(RECIPE, allow_unicode=True).encode(encoding))
    files["ROWS"].write_bytes(row.encode(encoding))
    said = refused(*(files.get(word, word) for word in DOORS[door]))
    assert "not UTF-8 text" in said, said
    assert "convert it" in said


def test_a_look_at_rows_lists_those_that_are_no_text(cli, here) -> None:
    (here / "rows.jsonl").write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    looked = cli("data", "check", "rows.jsonl")
    assert looked.code == 2
    assert "line 1: not UTF-8 text" in looked.out


BAD_YAML = {
    "nested": "a: " + "[" * 3000,
    "a date": "name: 2020-99-99",
    "a tag": "a: !!python/object/apply:os.mkdir ['code-was-run']",
    "a list": "- 1",
    "nothing": "",
    "twice": "name: a\nname: b",
    "tabs": "a:\n\t- b",
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_what_is_no_recipe_is_refused(refused, run, here, kind) -> None:
    (here / "f.yaml").write_text(BAD_YAML[kind])
    for command in (["recipes", "validate", "f.yaml"], ["train", "run", "--recipe", "f.yaml"]):
        assert "f.yaml" in refused(*command)


@pytest.mark.parametrize("value", ["yes", "true", "[yes]", "{default: yes}"])
@pytest.mark.parametrize("key", ["batch_size", "lr", "max_steps", "accumulate"])
def test_yes_is_no_number(refused, run, key, value) -> None:
    assert key in refused("train", run, "--set", f"stages.0.{key}={value}")


@pytest.mark.parametrize("value", ["[", "2020-99-99", "{a: b: c}"])
def test_a_setting_that_is_no_yaml_is_refused(refused, run, parts, value) -> None:
    assert f"--set seed={value} is not YAML" in refused("train", run, "--set", f"seed={value}")
    base, tower = parts / "base", parts / "tower"
    said = refused("graft", base, *GRAFT, "--vision", tower, "--out", "g", "--set", f"gate={value}")
    assert f"--set gate={value} is not YAML" in said
