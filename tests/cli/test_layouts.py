"""Layouts of rows in every command that reads rows, and `mmgraft data convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layout_rows import COLUMNS, ROWS, TABLE, seen, with_images, written
from mmgraft.data.formats.sources import read_rows
from tiny_runs import write_recipe

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)


READ = [f"--read=columns.{what}={name}" for what, name in COLUMNS.items()]
LAYOUTS = ["swift", "alpaca", "cauldron", "trl-parts", "trl-messages"]


@pytest.mark.parametrize("image_data", ["paths", "embed", "beside"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_converted_row_says_and_shows_the_same(
    cli: Callable[..., Any], here: Path, name: str, ending: str, image_data: str
) -> None:
    layout, row, turns = ROWS[name]
    source = written(with_images(here), row, "json")
    out = here / "out" / f"rows.{ending}"
    out.parent.mkdir()
    asked = ("data", "convert", source, out, "--to", "messages", "--image-data", image_data)
    ran = cli(*asked, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["rows"] == 2
    assert [one.partition(":")[0] for one in said["layouts"]] == [layout]
    images = here if image_data == "paths" else None
    if image_data != "paths":
        for image in here.glob("*.png"):
            image.unlink()
    rows = read_rows(out, images=images)
    assert [seen(one) for one in rows] == [turns, turns]
    assert rows[0].layout.startswith("messages: ")
    assert cli(*asked).code == 2  # it is there


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tools_and_their_calls_are_converted(
    cli: Callable[..., Any], here: Path, ending: str
) -> None:
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    turns = [
        {"role": "user", "content": "a <image> tag"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    tools = [{"name": "look", "parameters": {}}]
    source = written(here, {"messages": turns, "tools": tools}, "json")
    assert cli("data", "convert", source, f"out.{ending}").code == 0
    (row, _) = read_rows(f"out.{ending}")
    assert row.tools == tools
    assert row.messages[1]["tool_calls"] == [call]
    assert "<image>" in json.dumps(row.messages[0]["content"])
    assert not row.has_image


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("json", ["out.jsonl"], "write --image-data paths, embed"),
        ("json", ["out.csv", "--image-data", "embed"], ".jsonl or a .parquet"),
        ("json", ["none/out.jsonl", "--image-data", "embed"], "no folder none"),
        ("json", ["out.jsonl", "--to", "llava"], "messages"),
        ("json", ["out.jsonl", "--image-data", "all"], "embed"),
        ("json", ["out.jsonl", "--image-data", "embed", "--read", "format=llava"],
         "no 'conversations' in it but 'messages'"),
        ("json", ["out.jsonl", "--image-data", "embed", "--read", "fromat=swift"], "'format'"),
        ("json", ["out.jsonl", "--image-data", "embed", "--read", "columns.image=i",
                  "--read", "format=llava"], "columns are of a table"),
        ("tar", ["out.jsonl", "--image-data", "paths"], "its image is no file"),
        ("parquet", ["out.parquet", "--image-data", "paths"], "its image is no file"),
        ("broken", ["out.jsonl", "--image-data", "embed"], "red.png"),
        ("broken", ["out.parquet", "--image-data", "beside"], "red.png"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_writes_nothing(
    refused: Callable[..., str], here: Path, kind: str, arguments: list[str], says: str
) -> None:
    source = written(with_images(here), ROWS["swift"][1], "json" if kind == "broken" else kind)
    if kind == "broken":
        (here / "red.png").write_bytes((here / "red.png").read_bytes()[:40])
    assert says in refused("data", "convert", source, *arguments)


def test_check_counts_layouts_and_says_why(cli: Callable[..., Any], here: Path) -> None:
    with_images(here)
    rows = [ROWS[name][1] for name in ("swift", "swift", "swift-first", "alpaca", "cauldron")]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = cli("data", "check", "rows.jsonl").out
    assert "layout     swift: 'messages', <image> for each image (2 rows)" in shown
    found = json.loads(cli("data", "check", "rows.jsonl", "--json").out)["checks"][0]["layouts"]
    assert [one.partition(":")[0] for one in found] == ["swift", "swift", "alpaca", "cauldron"]
    assert list(found.values()) == [2, 1, 1, 1]


def test_a_row_that_is_not_clear_is_refused_by_every_command(
    refused: Callable[..., str], run: Path, here: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "prompt": "b", "completion": "c"}
    (here / "rows.jsonl").write_text(json.dumps(row))
    for command in (
        ("data", "preview", "rows.jsonl", "--run", run),
        ("data", "convert", "rows.jsonl", "out.jsonl"),
        ("generate", run, "rows.jsonl", "--out", "out.jsonl"),
        ("train", run, "--data", "rows.jsonl"),
        ("estimate", run, "--data", "rows.jsonl"),
        ("eval", run, "--data", "rows.jsonl", "--metric", "exact"),
    ):
        assert "keys of several layouts" in refused(*command), command
    assert "1 row is bad" in refused("data", "check", "rows.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_every_command_reads_layouts_and_tables(
    cli: Callable[..., Any], parts: Path, run: Path, here: Path, kind: str
) -> None:
    (here / "a").mkdir()
    rows = written(with_images(here / "a"), ROWS["alpaca"][1], kind)
    table = here / "b"
    table.mkdir()
    table = written(with_images(table), {**TABLE, "given": ["green"]}, kind)
    entries = [{"path": str(rows)}, {"path": str(table), "columns": COLUMNS}]
    stage = {"name": "s", "train": ["projector"], "lr": 1e-3, "batch_size": 2, "max_steps": 2}
    write_recipe(run, parts, "iaa", [{**stage, "packing": True, "max_length": 192}],
                 data=entries, feature_cache=True)  # fmt: skip
    assert cli("estimate", run).code == 0
    ran = cli("train", run, "--device", "cpu")
    assert ran.code == 0, ran.err
    answers = ("generate", run, "--max-new-tokens", 2, "--device", "cpu")
    assert cli(*answers, rows, "--out", "rows.jsonl").code == 0
    assert cli(*answers, table, "--out", "table.jsonl", *READ).code == 0
    shown = cli("data", "preview", table, "--run", run, *READ)
    assert "Which colour?" in shown.out, shown.err
    checked = json.loads(cli("data", "check", run, "--json").out)
    assert list(checked["checks"][0]["layouts"].values()) == [2, 2]
    asked = ("eval", run, "--device", "cpu", "--metric", "exact", "--data")
    ran = cli(*asked, rows, "--json")
    assert ran.code == 0, ran.err
