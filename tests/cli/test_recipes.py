"""`mmgraft recipes`: ls, show, cp, validate, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.cli.app import run
from mmgraft.comparison.spec import FOLDER, shipped_comparisons
from mmgraft.recipes.source import recipe_dir, shipped_recipes


def test_ls_lists_every_recipe(capsys):
    assert run(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped_recipes())


def test_comparisons_are_listed_shown_and_copied_by_name(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    assert "llava-full, llava, iaa, wings" in out
    assert all(name in out for name in shipped_comparisons())
    assert run(["recipes", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["comparisons"]
    assert [one["name"] for one in listed] == shipped_comparisons()
    assert run(["recipes", "show", "easy-vqa"]) == 0
    written = (recipe_dir() / FOLDER / "easy-vqa.yaml").read_text()
    assert capsys.readouterr().out == written
    assert run(["recipes", "show", "easy-vqa", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "easy-vqa"
    assert run(["recipes", "cp", "easy-vqa"]) == 0
    assert (tmp_path / "easy-vqa.yaml").read_text() == written
    capsys.readouterr()


@pytest.mark.parametrize("name", shipped_comparisons())
def test_validate_passes_the_comparisons_that_ship(name, capsys):
    assert run(["recipes", "validate", name]) == 0
    assert "is a right comparison of" in capsys.readouterr().out


def test_validate_refuses_an_arm_that_cannot_be(tmp_path: Path, capsys):
    text = (recipe_dir() / FOLDER / "easy-vqa.yaml").read_text()
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("stages.tune.batch_size", "stages.tune.batchsize"))
    assert run(["recipes", "validate", str(path)]) == 2
    err = capsys.readouterr().err
    assert "arm 'llava-full'" in err
    assert "did you mean 'batch_size'" in err
    assert run(["recipes", "validate", "easy-vqa", "--method", "iaa"]) == 2
    assert "leave --method out" in capsys.readouterr().err


def test_ls_json_can_be_narrowed_to_a_method(capsys):
    assert run(["recipes", "ls", "--method", "llava", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert {row["name"] for row in rows} == {"llava", "llava-full", "demo-llava"}
    assert next(row for row in rows if row["name"] == "llava-full")["base"] == "full"


def test_ls_refuses_an_unknown_method(capsys):
    assert run(["recipes", "ls", "--method", "lava"]) == 2
    assert "llava" in capsys.readouterr().err


def test_show_prints_the_file_as_it_is(capsys):
    assert run(["recipes", "show", "iaa-24gb"]) == 0
    assert capsys.readouterr().out == (recipe_dir() / "iaa-24gb.yaml").read_text()


def test_show_names_the_nearest_recipe(capsys):
    assert run(["recipes", "show", "iaa-24"]) == 2
    assert "did you mean 'iaa-24gb'" in capsys.readouterr().err


def test_cp_writes_once_and_not_over_a_file(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "cp", "iaa", "--dry-run"]) == 0
    assert not (tmp_path / "iaa.yaml").exists()
    assert run(["recipes", "cp", "iaa"]) == 0
    (tmp_path / "iaa.yaml").write_text("mine")
    assert run(["recipes", "cp", "iaa"]) == 2
    assert (tmp_path / "iaa.yaml").read_text() == "mine"
    assert run(["recipes", "cp", "iaa", "--force"]) == 0
    assert (tmp_path / "iaa.yaml").read_text() == (recipe_dir() / "iaa.yaml").read_text()
    (tmp_path / "sub").mkdir()
    assert run(["recipes", "cp", "wings", "sub"]) == 0
    assert (tmp_path / "sub" / "wings.yaml").is_file()
    assert run(["recipes", "cp", "wings", "nowhere/x.yaml"]) == 2
    capsys.readouterr()


def test_cp_over_itself_is_refused(tmp_path: Path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text((recipe_dir() / "iaa.yaml").read_text())
    assert run(["recipes", "cp", str(own), str(own), "--force"]) == 2
    assert own.read_text()
    capsys.readouterr()


@pytest.mark.parametrize("name", shipped_recipes())
def test_validate_passes_what_ships(name, capsys):
    assert run(["recipes", "validate", name]) == 0
    out = capsys.readouterr().out
    assert "still to set" in out
    assert "rows a step" in out


def test_validate_refuses_with_line_and_key(tmp_path: Path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text((recipe_dir() / "iaa.yaml").read_text().replace("max_length", "max_lenght"))
    assert run(["recipes", "validate", str(path)]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'max_length'" in err
    assert "line " in err


def test_validate_for_another_method(capsys):
    assert run(["recipes", "validate", "iaa", "--method", "wings"]) == 2
    assert "recipe for iaa" in capsys.readouterr().err


def test_validate_json_is_the_resolved_recipe(capsys):
    assert run(["recipes", "validate", "iaa", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["valid"] is True
    assert data["data_to_set"] == ["data[0].path"]
    assert data["recipe"]["stages"][1]["text_rows"] == "skip"
