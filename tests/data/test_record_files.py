"""Lines and lists read by place: each record equals what `json` reads of the whole file."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmgraft.data.formats import record_files
from mmgraft.data.formats.record_files import ListFile, Record, json_file
from mmgraft.errors import UsageError

TEXT = st.text(alphabet='ab"\\[]{},:\n \u00e9\U0001f600', max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def read_back(path: Path) -> list[tuple[int, Any, Any]]:
    """Number, record as it was met, and the same read by its place, the last one first."""
    file = json_file(str(path))
    found = list(file.scan())
    again = pickle.loads(pickle.dumps(file))  # as a process that loads rows has it
    back = [again.read(one.position, one.number) for one in reversed(found)]
    return [
        (one.number, one.record.data, other.data)
        for one, other in zip(found, reversed(back), strict=True)
    ]


QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    plain=st.booleans(),
    bom=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_a_list_is_read_in_pieces_of_any_size(
    tmp_path, monkeypatch, values, indent, plain, bom, chunk
):
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    monkeypatch.setattr(record_files, "_SHORT", chunk)
    path = tmp_path / "list.json"
    text = " \n" * plain + json.dumps(values, indent=indent, ensure_ascii=plain) + "\n" * plain
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    assert read_back(path) == [(at, one, one) for at, one in enumerate(values, start=1)]


@QUICK
@given(
    lines=st.lists(st.none() | st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_lines_are_counted_with_the_empty_ones(tmp_path, lines, ending, bom):
    path = tmp_path / "lines.jsonl"
    text = ending.join("" if one is None else json.dumps(one, ensure_ascii=False) for one in lines)
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    wanted = [(at, one, one) for at, one in enumerate(lines, start=1) if one is not None]
    assert read_back(path) == wanted


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[{"a": 1},\n\n{"b" 2}]', 3, "Expecting ':' delimiter"),
        ('[{"a": 1}\n{"b": 2}]', 2, "Expecting ',' delimiter"),
        ('[{"a": 1},\n', 2, "Expecting value"),
        ('[\n{"a": "cut', 2, "Unterminated string"),
        ("[1]\n[2]", 2, "Extra data"),
        ("[1,]", 1, "Expecting value"),
    ],
)
def test_a_list_that_is_no_json_is_named_with_its_line(tmp_path, monkeypatch, text, line, says):
    monkeypatch.setattr(record_files, "_CHUNK", 4)
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"list\.json, line {line}: not JSON \({says}"):
        list(ListFile(str(path)).scan())


def test_a_record_without_an_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_LONGEST", 1000)
    path = tmp_path / "list.json"
    path.write_text('["' + "x" * 100_000)
    file = ListFile(str(path))
    with path.open("rb") as opened:
        window = record_files._Window(file, opened, 0, 64)
        window.skip("[")
        with pytest.raises(UsageError, match="line 1: not JSON"):
            window.value()
    assert len(window.text) < 5000


def test_a_file_that_changed_or_went_is_not_read_on(tmp_path):
    for text in ('{"a": 1}\n{"a": 2}\n', '[{"a": 1}, {"a": 2}]'):
        path = tmp_path / "rows.json"
        path.write_text(text)
        file = json_file(str(path))
        second = list(file.scan())[1]
        assert file.read(second.position, second.number) == Record({"a": 2})
        path.write_text(text.replace("2", "3"))
        os.utime(path, ns=(1, 1))
        with pytest.raises(UsageError, match=r"rows\.json has changed since"):
            file.read(second.position, second.number)
        path.unlink()
        with pytest.raises(UsageError, match=r"rows\.json cannot be read any more"):
            file.read(second.position, second.number)


def test_what_is_nested_without_end_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = '{"a":' * 100_000
    path.write_text('{"b": 1}\n' + deep + "\n")
    _, second = json_file(str(path)).scan()
    assert isinstance(second.record, UsageError)
    assert "line 2: lists in lists" in str(second.record)
    path.write_text("[\n" + deep)
    with pytest.raises(UsageError, match="line 2: lists in lists"):
        list(json_file(str(path)).scan())


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    first, second, third = json_file(str(path)).scan()
    assert isinstance(second.record, UsageError)  # of this line alone
    assert "line 2: not UTF-8 text" in str(second.record)
    assert [one.record.data for one in (first, third)] == [{"a": 1}, {"a": 3}]
    (found,) = json_file(str(path)).scan() if path.write_bytes(b"\xff") else ()
    assert "line 1: not UTF-8" in str(found.record)
    path.write_bytes(b'[\n{"a": "' + b"x" * 5000 + b'\xff"}]')
    with pytest.raises(UsageError, match=r"rows\.jsonl, line \d or after: not UTF-8"):
        list(json_file(str(path)).scan())


def test_a_number_without_end_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"b": 1}\n{"a": ' + "1" * 5000 + "}\n")  # more digits than Python reads
    _, second = json_file(str(path)).scan()
    assert "line 2: a number of thousands of digits" in str(second.record)
    path.write_text('[\n{"a": ' + "1" * 5000 + "}]\n")
    with pytest.raises(UsageError, match="line 2: a number of thousands of digits"):
        list(json_file(str(path)).scan())


@pytest.mark.parametrize("twice", ['{"a": 1, "a": 2}', '{"m": [{"b": "x", "c": 1, "b": "x"}]}'])
def test_a_key_that_stands_twice_is_named(tmp_path: Path, twice: str) -> None:
    """Python would keep the last of the two values, and say nothing."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + twice + '\n{"a": {"a": [{"a": 3}]}}\n')
    first, second, third = json_file(str(path)).scan()
    assert "line 2: an object in which one key stands twice" in str(second.record)
    assert [one.record.data for one in (first, third)] == [{"a": 1}, {"a": {"a": [{"a": 3}]}}]
    path.write_text('[\n{"a": 1},\n' + twice + "]\n")
    with pytest.raises(UsageError, match="line 3: an object in which one key stands twice"):
        list(json_file(str(path)).scan())
