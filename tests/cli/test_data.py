"""`mmgraft data`: ls and prepare, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.demo import assets
from mmgraft.demo.assets import Package
from mmgraft.demo.packaged import offers


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models are installed; easy-VQA is not."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(assets, "smollm2", lambda: folder)
    monkeypatch.setattr(
        Package, "folder", property(lambda self: None if self.name == "easy-vqa" else folder)
    )


def test_ls_says_what_there_is_and_what_is_missing(cli, packages) -> None:
    rows = json.loads(cli("data", "ls", "--json").out)["data"]
    assert [row["name"] for row in rows] == [offer.name for offer in offers()]
    missing = {row["name"]: row["missing"] for row in rows}
    assert missing["easy-vqa"] == ["easy-vqa"]
    assert missing["smollm2-135m"] == []
    shown = cli("data", "ls").out
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(f"{row['name']} "))
        assert (" no " if row["missing"] else " yes ") in line


def test_prepare_writes_and_says_what(cli, packages, tmp_path: Path) -> None:
    ran = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["written"] is True
    assert set(said["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    again = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out")
    assert again.code == 2
    assert "--force" in again.err
    forced = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out", "--force")
    assert forced.code == 0
    assert "Apache-2.0" in forced.err


def test_a_folder_by_the_name_when_none_is_given(cli, packages, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("data", "prepare", "smollm2-135m", "--dry-run").code == 0
    assert not (tmp_path / "smollm2-135m").exists()
    assert cli("data", "prepare", "smollm2-135m").code == 0
    assert (tmp_path / "smollm2-135m/config.json").is_file()


def test_a_missing_package_exits_2_with_the_line_to_run(cli, packages, tmp_path: Path) -> None:
    ran = cli("data", "prepare", "easy-vqa", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "pip install --no-deps easy-vqa" in ran.err
    assert "Traceback" not in ran.err


def test_an_unknown_name_exits_2(cli) -> None:
    ran = cli("data", "prepare", "smollm")
    assert ran.code == 2
    assert "did you mean 'smollm2-135m'" in ran.err


def test_the_makers_of_stamps_are_examples_now(cli, tmp_path: Path) -> None:
    ran = cli("data", "prepare", "stamps", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "examples/grounding" in ran.err
    assert not (tmp_path / "out").exists()


# Rows


@pytest.fixture
def rows(parts: Path, here: Path) -> Path:
    """Three good rows, and one whose picture is missing."""
    lines = (parts / "rows.jsonl").read_text().splitlines()[:4]
    bad = json.loads(lines[0].replace("0.png", "x.png")) | {"id": "x"}
    (here / "rows.jsonl").write_text("\n".join([*lines, json.dumps(bad)]) + "\n")
    (here / "good.jsonl").write_text("\n".join(lines) + "\n")
    (here / "images").mkdir()
    return here / "rows.jsonl"


def test_check_counts_and_ends_with_2_where_a_row_is_bad(cli, parts, rows) -> None:
    given = ["data", "check", rows, "--images", parts / "images"]
    ran = cli(*given)
    assert ran.code == 2
    assert "error: 1 row is bad" in ran.err
    assert "on_bad_row: skip" in ran.err
    assert f"{rows}, line 5 (id x): Image file not found" in ran.out
    assert "positions  not counted; give --run" in ran.out
    said = json.loads(cli(*given, "--json").out)
    assert said["ok"] is False
    (check,) = said["checks"]
    assert (check["rows"], check["text_rows"], check["images"]) == (5, 1, 4)
    assert check["bad"][0]["id"] == "x"
    assert check["faults"]["missing"] == 1
    assert check["positions"] is None


def test_check_of_bad_rows_alone_shows_each(cli, here) -> None:
    (here / "odd.jsonl").write_text('{"text": "a"}\n{"id": "\\ud83d", "messages": []}\n')
    ran = cli("data", "check", here / "odd.jsonl")
    assert ran.code == 2
    assert "error: 2 rows are bad" in ran.err
    assert "line 1 (id 1): no 'conversations' or 'messages' in it but 'text'" in ran.out
    assert "line 2 (id \\ud83d): half a character" in ran.out


def test_check_with_a_run_reads_as_its_stages_do(cli, parts, run, rows) -> None:
    good = ["data", "check", rows.parent / "good.jsonl", "--images", parts / "images"]
    ran = cli(*good, "--run", run, "--max-length", 48)
    assert ran.code == 0, ran.err
    assert "as align reads it" in ran.out
    assert "1 (left out, by text_rows: skip)" in ran.out
    (check,) = json.loads(cli(*good, "--run", run, "--json").out)["checks"]
    assert check["stages"] == ["align"]
    assert check["positions"]["of_images"] == 3 * 4
    whole = cli("data", "check", run, "--json")  # its own rows
    assert whole.code == 0, whole.err
    assert json.loads(whole.out)["checks"][0]["rows"] == 12
    named = ["--base", parts / "base", "--vision", parts / "tower"]
    (other,) = json.loads(cli(*good, *named, "--json").out)["checks"]
    assert other["longest"][0] == check["longest"][0]
    assert len(other["longest"]) == 4  # a file alone leaves no text row out


def test_preview_marks_what_is_trained_and_folds_the_picture(cli, parts, run, rows) -> None:
    given = ["data", "preview", rows, "--images", parts / "images"]
    ran = cli(*given, "--row", 2)  # the only graft here reads it
    assert ran.code == 0, ran.err
    assert "taking the only graft here" in ran.err
    assert f"{rows}, line 2 (id 1), as align reads it" in ran.out
    shown = json.loads(cli(*given, "--row", 2, "--json", "--run", run).out)["previews"][0]
    learned = [piece["text"] for piece in shown["pieces"] if piece["kind"] == "learned"]
    assert f"\u27e6{learned[0]}\u27e7" in ran.out
    assert "\u20394 image positions\u203a" in ran.out
    assert f"{shown['positions']} positions: 4 of images, {shown['learned']} supervised" in ran.out
    text = cli(*given, "--row", 4)
    assert "left out, because it has no image" in text.out


def test_preview_counts_over_all_entries_of_a_stage(cli, parts, run) -> None:
    import yaml

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (entry,) = recipe["data"]
    recipe["data"] = [{**entry, "limit": 2}, entry]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ran = cli("data", "preview", run, "--row", 3)
    assert ran.code == 0, ran.err
    assert "rows.jsonl, line 1 (id 0)" in ran.out  # the first of the second entry
    ran = cli("data", "preview", run, "--row", 15)
    assert ran.code == 2
    assert "have 14 rows" in ran.err


def test_a_row_beyond_the_bases_table_is_named(cli, here, tmp_path) -> None:
    from tiny_runs import make_parts

    parts = make_parts(tmp_path / "gpt2", "gpt2")
    long = json.loads((parts / "rows.jsonl").read_text().splitlines()[3])
    long["messages"][0]["content"] = "and then? " * 40
    (here / "long.jsonl").write_text(json.dumps(long) + "\n")
    reads = ["--base", parts / "base", "--vision", parts / "tower"]
    ran = cli("data", "check", here / "long.jsonl", *reads)
    assert ran.code == 2
    assert "line 1 (id 3): " in ran.out
    assert "the base has a table of 128; set max_length: 128" in ran.out
    shown = cli("data", "preview", here / "long.jsonl", *reads)
    assert shown.code == 2
    assert "a table of 128" in shown.err
    images = ["--images", parts / "images"]
    assert cli("data", "check", parts / "rows.jsonl", *images, *reads).code == 0


def test_preview_colours_on_a_terminal(parts, run, capsys) -> None:
    from rich.console import Console

    from mmgraft.cli import data

    terminal = Console(force_terminal=True, color_system="standard", width=200, no_color=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "stdout", lambda: terminal)
        data.preview(parts / "rows.jsonl", 1, images=parts / "images", run=run)
    out = capsys.readouterr().out
    assert "\x1b[1;32m" in out
    assert "\u27e6" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "nowhere.jsonl"], "no file and no run nowhere.jsonl"),
        (["check", "images"], "neither a file of rows nor the folder of a graft"),
        (["check", "run", "--run", "run"], "is a run itself"),
        (["check", "good.jsonl", "--base", "b", "--run", "run"], "leave --base and --vision out"),
        (["check", "good.jsonl", "--base", "b"], "--base without --vision"),
        (["check", "good.jsonl", "--stage", "align"], "--stage is of a recipe"),
        (["check", "run", "--stage", "allign"], "did you mean 'align'"),
        (["preview", "good.jsonl", "--row", "9"], "good.jsonl has 4 rows"),
        (["preview", "rows.jsonl", "--row", "5", "--max-length", "8"], "line 5 (id x)"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(refused, run, rows, words, said) -> None:
    assert said in refused("data", *words)
