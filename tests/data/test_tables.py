"""Parquet and data sets of `datasets`: the same rows as lines of JSON, pictures among the cells."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data.formats import tables
from mmgraft.data.formats.layouts import Reading
from mmgraft.data.formats.sources import Checks, Source, index_rows, read_rows
from mmgraft.data.images import open_image
from mmgraft.data.rows import BadRow
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.vision.images import StoredImage

datasets = pytest.importorskip("datasets")


def png(width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 3), "red").save(stream, "PNG")
    return stream.getvalue()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def pair(*content: dict[str, Any], answer: str = "Yes") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": list(content)},
        {"role": "assistant", "content": [text(answer)]},
    ]


IMAGE = {"type": "image"}
ROWS = [
    {"id": "a", "messages": pair(IMAGE, text("What?")), "images": [4]},
    {"id": "b", "messages": pair(text("Nothing to see?")), "images": []},
    {"id": "c", "messages": pair(IMAGE, text("or"), IMAGE), "images": [5, 6]},
]


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": [{"bytes": png(width), "path": None} for width in row["images"]]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table() -> Any:
    return datasets.Dataset.from_list([with_bytes(row) for row in ROWS])


def widths(rows: Any) -> list[list[int]]:
    return [
        [open_image(part["image"], "w").width for part in row.messages[0]["content"]
         if part["type"] == "image"]
        for row in rows
    ]  # fmt: skip


def texts(rows: Any) -> list[Any]:
    """Rows without what their pictures are."""
    return json.loads(
        json.dumps([(row.id, row.messages, row.tools) for row in rows], default=lambda _: "")
    )


@pytest.fixture(params=["parquet", "small groups", "saved", "splits", "hub"])
def source(request, tmp_path: Path, table: Any, monkeypatch) -> Source:
    """The same rows in every kind of table."""
    if request.param == "saved":
        table.save_to_disk(str(tmp_path / "saved"))
        return Source(str(tmp_path / "saved"))
    if request.param == "splits":
        both = datasets.DatasetDict({"test": table, "train": table.select([0])})
        both.save_to_disk(str(tmp_path / "saved"))
        return Source(str(tmp_path / "saved"), split="test")
    if request.param == "hub":
        asked: list[Any] = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or table
        )
        source = Source("hub:me/set", split="test", subset="small", revision="v1")
        index_rows(source)
        assert asked == [(("me/set", "small"), {"split": "test", "revision": "v1"})]
        return source
    path = tmp_path / "rows.parquet"
    table.to_parquet(str(path), batch_size=1 if request.param == "small groups" else None)
    return Source(str(path))


def test_rows_of_a_table_are_those_of_a_jsonl(tmp_path: Path, source: Source) -> None:
    for number in (4, 5, 6):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    lines = [{**row, "images": [f"{n}.png" for n in row["images"]]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = index_rows(Source(str(tmp_path / "rows.jsonl")))
    rows = pickle.loads(pickle.dumps(index_rows(source)))
    shown = [image for row in rows for part in row.messages[0]["content"]
             for image in [part.get("image")] if image is not None]  # fmt: skip
    assert len(set(shown)) == 3
    assert all(isinstance(image, StoredImage) for image in shown)
    names = [str(image).rpartition(", row ")[2] for image in shown]
    assert names == ["1, image 1", "3, image 1", "3, image 2"]
    assert widths(rows) == widths(wanted) == [[4], [], [5, 6]]
    plain = [json.dumps(one).replace('"image": ""', "") for one in texts(rows)]
    mine = [json.dumps(one) for one in texts(wanted)]
    for number in (4, 5, 6):
        mine = [one.replace(f'"image": "{tmp_path}/{number}.png"', "") for one in mine]
    assert plain == mine
    assert rows.facts.images.tolist() == wanted.facts.images.tolist()
    assert rows.facts.characters.tolist() == wanted.facts.characters.tolist()
    assert [rows.key(at)[1] for at in range(3)] == ["row 1", "row 2", "row 3"]
    assert rows[2].where.endswith("row 3 (id c)")
    assert open_image(pickle.loads(pickle.dumps(shown[2])), "w").width == 6


@pytest.mark.parametrize("saved", [False, True])
def test_numbers_that_a_set_names_are_read_as_the_names(tmp_path: Path, saved: bool) -> None:
    kinds = datasets.ClassLabel(names=["no", "yes"])
    found = datasets.Dataset.from_dict({"question": ["a", "b", "c"], "answer": [1, 0, None]})
    found = found.cast_column("answer", kinds)
    path = tmp_path / "rows.parquet"
    if saved:
        path = tmp_path / "saved"
        found.save_to_disk(str(path))
    else:
        found.to_parquet(str(path))
    rows = index_rows(Source(str(path), reading=Reading("vqa")))
    said = [[turn["content"] for turn in row.messages[1:]] for row in rows]
    assert said == [["yes"], ["no"], []]


def test_turns_may_be_json_and_a_picture_a_column_of_its_own(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {"function": {"name": "f", "arguments": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [asked]}
    both = [
        {"conversations": json.dumps(turns), "image": {"bytes": png(7), "path": "x.png"}},
        {"messages": json.dumps([{"role": "user", "content": "Hi"}, call]),
         "tools": json.dumps(tools)},
    ]  # fmt: skip
    keys = {key: None for row in both for key in row}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{**keys, **row} for row in both]).to_parquet(str(path))
    first, second = read_rows(path)
    assert widths([first]) == [[7]]
    assert second.messages[1] == call
    assert second.tools == tools


def test_bad_rows_and_paths_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [
        {"messages": "[{]", "image": None},
        {"messages": json.dumps(pair(IMAGE)), "image": {"bytes": None, "path": "../x.png"}},
        {"messages": json.dumps(pair(IMAGE)), "image": {"bytes": None, "path": "gone.png"}},
        {"messages": json.dumps(pair(IMAGE)), "image": {"bytes": b"GIF89a", "path": None}},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    bad: list[BadRow] = []
    (kept,) = index_rows(Source(str(path)), Checks(on_bad=bad.append))
    assert [(one.place, one.fault) for one in bad] == [
        ("row 1", "row"), ("row 2", "outside"), ("row 3", "missing"),
    ]  # fmt: skip
    assert "'messages' is a text that is not JSON" in bad[0].reason
    with pytest.raises(UsageError, match=r"row 4: .*rows\.parquet, row 4, image 1"):
        open_image(kept.messages[0]["content"][0]["image"], "row 4")


def test_what_is_no_table_is_named(tmp_path: Path, table: Any, monkeypatch) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(UsageError, match=r"rows\.parquet cannot be read as a table \(.+\)"):
        index_rows(Source(str(path)))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"no split 'train' but test; set split"):
        index_rows(Source(str(tmp_path / "saved")))
    table.save_to_disk(str(tmp_path / "one"))
    for split in ("test", "train[:1]"):
        with pytest.raises(UsageError, match=r"has no split 't.+leave split out"):
            index_rows(Source(str(tmp_path / "one"), split=split))
    assert len(index_rows(Source(str(tmp_path / "one")))) == len(table)

    def down(*args, **more):
        raise ConnectionError("no way\nat all")

    monkeypatch.setattr(datasets, "load_dataset", down)
    with pytest.raises(MMGraftError, match=r"hub:me/set cannot be downloaded \(no way\)"):
        index_rows(Source("hub:me/set"))
    paths = datasets.Dataset.from_list(
        [{"messages": pair(IMAGE), "image": {"bytes": None, "path": "a.png"}}]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: paths)
    with pytest.raises(UsageError, match=r"hub:me/set, row 1.*the image is a path \(a\.png\)"):
        index_rows(Source("hub:me/set"))
    (row,) = index_rows(Source("hub:me/set", str(tmp_path)), Checks(images=False))
    assert row.messages[0]["content"][0]["image"] == str(tmp_path / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'mmgraft\[data\]'"):
        index_rows(Source("hub:me/set"))


def test_progress_of_the_package_is_neither_shown_nor_switched_off(
    tmp_path, table, monkeypatch, capfd
) -> None:
    path = tmp_path / "rows.parquet"
    table.to_parquet(str(path))
    load = datasets.Dataset.from_parquet
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: load(str(path)))
    before = datasets.are_progress_bars_disabled()
    capfd.readouterr()
    assert len(index_rows(Source("hub:me/set"))) == 3
    assert datasets.are_progress_bars_disabled() is before
    assert capfd.readouterr().err == ""


def test_a_copy_is_made_once_and_again_when_the_file_changes(tmp_path, table) -> None:
    path = tmp_path / "rows [1].parquet"
    table.to_parquet(str(path))

    def copies() -> dict[Path, int]:
        assert len(index_rows(Source(str(path)))) > 0
        return {one: one.stat().st_mtime_ns for one in (tmp_path / "cache").rglob("*.arrow")}

    first = copies()
    assert len(first) == 1
    assert copies() == first
    table.select([2]).to_parquet(str(path))
    os.utime(path, ns=(1, 1))
    assert [row.id for row in index_rows(Source(str(path)))] == ["c"]


def test_a_parquet_file_that_is_spoilt_inside_is_named_and_no_copy_is_left(tmp_path) -> None:
    path = tmp_path / "rows.parquet"
    table = datasets.Dataset.from_dict({"text": [str(n) * 99 for n in range(99)]})
    table.to_parquet(str(path))
    data = bytearray(path.read_bytes())
    data[10:200] = bytes(190)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"rows\.parquet cannot be read as a table"):
        index_rows(Source(str(path)))
    kept = [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    assert [one for one in kept if one.suffix != ".lock"] == []


def test_a_column_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"messages": ["0" * 2_000_000]}), path, compression="zstd", use_dictionary=False
    )
    monkeypatch.setattr(tables, "_BOMB", 1_000_000)
    with pytest.raises(UsageError, match=r"bytes of its column messages unpack to 2,000,\d+"):
        index_rows(Source(str(path)))
    monkeypatch.setattr(tables, "_BOMB", 3_000_000)
    with pytest.raises(UsageError, match="row 1: its 'messages' is a"):
        index_rows(Source(str(path)))


def test_text_that_is_no_text_and_a_spoilt_copy_are_named(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = json.dumps(pair(text("Q")))
    cells = pa.array([good.encode(), b"[\xff]", good.encode()], pa.binary())
    raw = pa.StringArray.from_buffers(3, cells.buffers()[1], cells.buffers()[2])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": raw}), path)
    bad: list[BadRow] = []
    rows = index_rows(Source(str(path)), Checks(on_bad=bad.append))
    assert [row.place for row in rows] == ["row 1", "row 3"]
    assert [one.place for one in bad] == ["row 2"]
    assert "row 2: not UTF-8 text" in bad[0].reason
    (copy,) = (tmp_path / "cache").rglob("*.arrow")
    for data in (b"", copy.read_bytes()[:100]):
        copy.write_bytes(data)
        with pytest.raises(UsageError, match="cannot be read as a table"):
            index_rows(Source(str(path)))


def test_a_part_of_a_table_and_shuffled_rows_are_read_as_they_are(table, tmp_path) -> None:
    table.to_parquet(str(tmp_path / "rows.parquet"))
    whole = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    for part, wanted in ((whole, "abc"), (whole.select([2, 0, 1]), "cab"), (whole.take(2), "ab")):
        rows = pickle.loads(pickle.dumps(tables.TableFile("x", part)))
        found = list(rows.scan())
        assert "".join(one.record.data["id"] for one in found) == wanted
        back = [rows.read(one.position, one.number).data["id"] for one in found]
        assert "".join(back) == wanted


def test_one_part_of_a_set_that_was_saved_keeps_its_name(tmp_path: Path, table: Any) -> None:
    part = datasets.Dataset(table.data, split="test")
    part.save_to_disk(str(tmp_path / "part"))
    for split in ("test", "train"):  # train is what stands where nothing was set
        assert len(index_rows(Source(str(tmp_path / "part"), split=split))) == len(table)
    with pytest.raises(UsageError, match="no split 'validation'"):
        index_rows(Source(str(tmp_path / "part"), split="validation"))
