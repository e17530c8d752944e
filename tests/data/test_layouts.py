"""Every layout of public sets, from every kind of file, as the same messages."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layout_rows import (
    BLUE,
    COLOURS,
    COLUMNS,
    GREEN,
    KINDS,
    PARTS,
    RED,
    ROWS,
    TABLE,
    image,
    png,
    seen,
    text,
    users,
    with_images,
    written,
)
from mmgraft.data.formats.layouts import Reading, Vqa
from mmgraft.data.formats.sources import Source, index_rows, read_rows
from mmgraft.data.images import open_image
from mmgraft.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from console import read_blocks  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return with_images(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROWS)
def test_each_layout_is_told_and_read_from_each_kind_of_file(
    folder: Path, name: str, kind: str
) -> None:
    layout, row, turns = ROWS[name]
    rows = read_rows(written(folder, row, kind))
    assert [seen(one) for one in rows] == [turns, turns]
    assert rows[1].layout.startswith(f"{layout}: ")
    named = read_rows(folder / f"rows.{kind}", format=layout)  # type: ignore[arg-type]
    assert seen(named[0]) == turns


@pytest.mark.parametrize("name", ["swift", "conversations-from", "cauldron", "trl-strings"])
def test_a_sample_that_names_no_images_shows_its_own(folder: Path, name: str) -> None:
    _, row, _ = ROWS[name]
    (first, _) = read_rows(written(folder, {**row, "images": None}, "tar"))
    shown = [one for _, parts in seen(first) for one in parts if isinstance(one, dict)]
    assert shown == [RED, BLUE, GREEN]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("columns", "vqa", "asked", "answer"),
    [
        ({}, {}, "Which colour?\nA. red\nB. green", "green"),
        ({}, {"prompt_with_options": "Of {options}: {question}"},
         "Of A. red\nB. green: Which colour?", "green"),
        ({"options": "none"}, {"answer": "first"}, "Which colour?", "lime"),
        ({"options": "none"}, {"answer": "most_frequent", "prompt": "Q: {question}"},
         "Q: Which colour?", "green"),
        ({"options": "none"}, {"answer": "sampled", "seed": 1}, "Which colour?", "green"),
        ({"options": "none"}, {"answer": "sampled", "seed": 5}, "Which colour?", "lime"),
    ],
)  # fmt: skip
def test_tables_are_read_by_their_columns(
    folder: Path, kind: str, columns: dict[str, str], vqa: dict[str, Any], asked: str, answer: str
) -> None:
    row: dict[str, Any] = {**TABLE, "none": None}
    if not columns:
        row["given"] = [1, 0]  # numbers of options
    reading = Reading("auto", {**COLUMNS, **columns}, Vqa(**vqa))
    rows = list(index_rows(Source(str(written(folder, row, kind)), reading=reading)))
    turns = [("user", [GREEN, asked]), ("assistant", [answer])]
    assert [seen(one) for one in rows] == [turns, turns]


@pytest.mark.parametrize("listed", ["['navy', \"b'lue\"]", ["navy", "b'lue"]])
def test_lists_may_be_written_as_python_writes_them(folder: Path, listed: Any) -> None:
    row = {"image": "red.png", "question": "a", "choices": listed, "answer": "B"}
    several = {"image": "red.png", "question": "a", "answers": listed}
    box = {"image": "red.png", "question": "a", "answer": "[1, 2, 3, 4]"}
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, (row, several, box))))
    rows = read_rows(folder / "a.jsonl", format="vqa")
    assert [one.messages[1]["content"] for one in rows] == ["b'lue", "navy", "[1, 2, 3, 4]"]
    assert seen(rows[0])[0] == ("user", [RED, "a\nA. navy\nB. b'lue"])


@pytest.mark.parametrize("name", ["swift", "cauldron", "alpaca", "conversations-from"])
def test_turns_may_be_a_text_that_is_json(folder: Path, name: str) -> None:
    _, row, turns = ROWS[name]
    keys = ("messages", "texts", "history", "conversations")
    said = {key: json.dumps(one) if key in keys else one for key, one in row.items()}
    for kind in ("jsonl", "parquet"):
        assert seen(read_rows(written(folder, said, kind))[1]) == turns


@pytest.mark.parametrize("key", ["conversations", "texts"])
def test_lists_of_a_table_may_be_an_object_of_lists(folder: Path, key: str) -> None:
    _, row, turns = ROWS["conversations-from" if key == "conversations" else "cauldron"]
    columns = {name: [one[name] for one in row[key]] for name in row[key][0]}
    assert seen(read_rows(written(folder, {**row, key: columns}, "parquet"))[1]) == turns


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_images_may_stand_in_several_columns(folder: Path, kind: str) -> None:
    row = {"pic_1": "blue.png", "pic_2": "red.png", "pic_3": None, "q": "<image> or <image>?"}
    reading = Reading("vqa", {"image": "pic_1, pic_2,pic_3", "question": "q"})
    path = written(folder, row, kind)
    (read, _) = index_rows(Source(str(path), reading=reading))
    assert seen(read) == [("user", [BLUE, " or ", RED, "?"])]


def test_samples_of_answers_differ_by_row_and_not_by_file(folder: Path) -> None:
    rows = [{**TABLE, "id": number, "choices": None} for number in range(40)]
    reading = Reading("vqa", COLUMNS, Vqa(answer="sampled", seed=3))
    found = []
    for name in ("a.json", "b.json"):
        (folder / name).write_text(json.dumps(rows))
        read = index_rows(Source(str(folder / name), reading=reading))
        found.append([row.messages[1]["content"] for row in read])
    assert found[0] == found[1]
    assert 3 < found[0].count("lime") < 25


PLAIN = {"messages": [{"role": "user", "content": "What?"}]}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("form", ["text", "wrapped", "uri", "object", "list"])
def test_the_bytes_of_an_image_are_read_as_text(folder: Path, kind: str, form: str) -> None:
    data = png("blue.png", kind)
    plain = base64.b64encode(data).decode()
    given: Any = {
        "text": plain,
        "wrapped": base64.encodebytes(data).decode(),
        "uri": f"data:image/x;base64,{plain}",
        "object": {"bytes": plain, "path": "lost.png"},
        "list": [plain],
    }[form]
    (folder / "a.json").write_text(json.dumps([{**PLAIN, "images": given}]))
    (row,) = read_rows(folder / "a.json")
    pixel = open_image(row.messages[0]["content"][0]["image"], "").getpixel((1, 1))
    assert isinstance(pixel, tuple)
    assert pixel[2] > 240 > 20 > pixel[0]


@pytest.mark.parametrize("held", [{"path": "red.png"}, {"bytes": None, "path": "red.png"}])
def test_an_object_with_a_path_is_that_file(folder: Path, held: Any) -> None:
    part = {"messages": [{"role": "user", "content": [image(image=held)]}]}
    for row in ({**PLAIN, "image": held}, part):
        (folder / "a.json").write_text(json.dumps([row]))
        assert seen(read_rows(folder / "a.json")[0])[0][1][0] == RED


USER = {"role": "user", "content": "What?"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER], "conversations": [USER]}, "several layouts.*format: llava"),
        ({"instruction": "a", "output": "b", "texts": [{"user": "a"}]}, "several layouts.*alpaca"),
        ({"messages": [{"role": "user", "content": [image(), text("x")]},
                       {"role": "assistant", "content": "<image>"}], "images": ["red.png"]},
         "1 parts may take one, and <image> occurs 1 times; write format: messages"),
        ({"messages": [{"role": "user", "content": [image()]}, {**USER, "content": "<image>"}],
          "images": ["red.png", "blue.png"]}, "2 images are listed, 1 parts may.*format: swift"),
        ({"messages": [{**USER, "content": "<image>"}], "images": ["red.png", "blue.png"]},
         "2 images are listed, but <image> occurs 1 times"),
        ({"conversations": [{**USER, "content": "<image><image>"}], "images": ["red.png"]},
         "1 images are listed, but <image> occurs 2 times"),
        ({"conversations": [{"role": "assistant", "content": "a"}], "images": ["red.png"]},
         "no turn of a user"),
        ({"instruction": "<image>", "output": "a"}, "0 images are listed, but <image> occurs 1"),
        ({"instruction": "a", "output": ["b", "c"]}, "'output'.*string"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"'history\[0\]"),
        ({"instruction": "a", "output": "b", "rejected": "c"}, "'rejected' is not read"),
        ({"texts": []}, "'texts'.*at least 1"),
        ({"texts": ["a"], "images": ["red.png"]}, r"texts\[0\]"),
        ({"texts": [{"user": "a", "assistant": 3}]}, r"texts\[0\].assistant"),
        ({"texts": [{"user": "a", "assistant": "b", "system": "c"}]}, r"texts\[0\]: 'system'"),
        ({"texts": [{"user": "<image>", "assistant": "b"}], "images": ["red.png", "red.png"]},
         "2 images are listed, but <image> occurs 1 times"),
        ({"prompt": 3, "completion": "a"}, "'prompt' is not a list of turns"),
        ({"prompt": "a", "completion": [3]}, "turn 1: not"),
        ({"prompt": "a", "completion": "b", "images": [["red.png"]]}, "not paths"),
        ({"prompt": PARTS, "completion": "b", "images": ["red.png"]}, "part without an image"),
        ({"prompt": PARTS, "completion": "b", "images": list(COLOURS)},
         "3 images are listed, but 2 parts take one"),
        ({"prompt": "a", "chosen": "b"}, "no 'conversations' or 'messages' in it but 'prompt'"),
        ({"messages": [{"role": "user", "content": [image(image={"bytes": "x"})]}]},
         "without an image"),
    ],
)  # fmt: skip
def test_rows_that_are_not_clear_are_refused(folder: Path, row: dict[str, Any], says: str) -> None:
    (folder / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match=rf"a\.jsonl, line 1.*{says}"):
        read_rows(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("format", "content"),
    [("messages", [RED, "x"]), ("swift", None)],
)
def test_a_named_format_says_what_a_word_is(folder: Path, format: Any, content: Any) -> None:
    answer = {"role": "assistant", "content": "an <image> tag"}
    row = {"messages": [{"role": "user", "content": [image(), text("x")]}, answer]}
    (folder / "a.jsonl").write_text(json.dumps({**row, "images": ["red.png"]}))
    if content is None:
        with pytest.raises(UsageError, match="occurs 1 times"):
            read_rows(folder / "a.jsonl", format=format)
        return
    (read,) = read_rows(folder / "a.jsonl", format=format)
    assert seen(read) == [("user", content), ("assistant", ["an <image> tag"])]


@pytest.mark.parametrize(
    ("format", "first"), [("llava", "a"), ("messages", "b"), ("alpaca", "c"), ("trl", "d")]
)
def test_a_named_format_chooses_among_several(folder: Path, format: Any, first: str) -> None:
    row = {
        "conversations": [{"from": "human", "value": "a"}],
        "messages": [{"role": "user", "content": "b"}],
        "instruction": "c",
        "output": "x",
        "prompt": "d",
        "completion": "e",
    }
    (folder / "a.jsonl").write_text(json.dumps(row))
    assert read_rows(folder / "a.jsonl", format=format)[0].messages[0]["content"] == first


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": "picture"}, "columns says that image is 'picture', which this row has not"),
        ({"answer": "giv"}, "columns says that answer is 'giv'.*did you mean 'given'"),
        ({"question": "choices"}, "a question that is no text"),
        ({"answer": "split_name"}, "the answer 'val' is not among the options"),
        ({"options": "q"}, "no lettered lines"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    folder: Path, columns: dict[str, str], says: str
) -> None:
    (folder / "a.jsonl").write_text(json.dumps({**TABLE, "given": "green"}))
    source = Source(str(folder / "a.jsonl"), reading=Reading("vqa", {**COLUMNS, **columns}))
    with pytest.raises(UsageError, match=rf"line 1.*{says}"):
        index_rows(source)


def test_images_that_are_put_first_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**PLAIN, "images": ["red.png"]}, PLAIN, {**PLAIN, "image": "blue.png"}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read_rows(folder / "a.jsonl")
    assert "a.jsonl: 2 rows list images" in caplog.text


SHOWN = {
    "messages.jsonl": ["messages", "messages", "messages"],
    "llava.json": ["llava", "llava"],
    "swift.jsonl": ["swift", "swift"],
    "conversations.json": ["swift"],
    "alpaca.json": ["alpaca"],
    "cauldron.jsonl": ["cauldron"],
    "trl.jsonl": ["trl", "trl"],
    "parts.jsonl": ["messages"],
    "vqa.jsonl": ["vqa", "vqa"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_rows_of_the_page_are_read_as_it_says(folder: Path, name: str) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    blocks = {block.options.get("file"): block for block in read_blocks(page)}
    (folder / name).write_text(blocks[name].text)
    (folder / "white.png").write_bytes(png("red.png"))
    reading = Reading()
    if name == "vqa.jsonl":
        entry = yaml.safe_load(blocks["vqa.yaml"].text)["data"][0]
        reading = Reading("auto", entry["columns"], Vqa(**entry["vqa"]))
    rows = index_rows(Source(str(folder / name), reading=reading))
    assert [row.layout.partition(":")[0] for row in rows] == SHOWN[name]
    if name == "vqa.jsonl":
        assert [row.messages[1]["content"] for row in rows] == ["blue", "red"]
        assert rows[0].id == "7"


@pytest.mark.parametrize(
    "word",
    ["<image_1>", "<image 2>", "<IMAGE>", "<image/>", "<|image|>", "<|image_1|>", "<ImageHere>",
     "<|vision_start|><|image_pad|>", "<start_of_image>", "<image_soft_token>", "[IMG]", "<img>",
     "[img-1]", "&lt;image&gt;", "Picture 1: <img>red.png</img>\n", "<video>", "<audio>",
     "<|video_pad|>"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["role", "from"])
def test_placeholders_of_other_tools_are_named(folder: Path, word: str, key: str) -> None:
    turns = users(key, ("user", f"{word}Which?"), ("assistant", "red"))
    for images in ([], ["red.png"]):
        row = {"conversations": turns, "images": images}
        (folder / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(UsageError, match=r"stands in a text|<image> occurs 0 times"):
            read_rows(folder / "a.jsonl")
    text = {"messages": users("role", ("user", f"What is {word}?"), ("assistant", "a word"))}
    (folder / "a.jsonl").write_text(json.dumps(text))
    assert read_rows(folder / "a.jsonl")[0].messages == text["messages"]


@pytest.mark.parametrize(
    ("options", "answer", "said"),
    [
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "1", "red"),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, 2, "blue"),
        ({"label": ["B", "A"], "text": ["red", "blue"]}, "A", "blue"),
        ({"text": ["red", "blue"]}, "B", "blue"),
        ({"B": "blue", "A": "red"}, "B", "blue"),
        ({"1": "red", "2": "blue"}, 1, "red"),
        ({"C": "x", "D": "y"}, "C", "x"),
        ({"A": "red", "B": "blue"}, "blue", "blue"),
        ([4, 7], 7, "7"),
        ([4, 7], "4", "4"),
        ([4, 7], 1, "7"),
        ([0, 1], 1, "1"),
        (["4", "1"], 1, "1"),
        ([], "red", "red"),
        ("", "red", "red"),
        ("[]", "red", "red"),
    ],
)
def test_an_answer_is_the_option_that_the_set_means(
    folder: Path, options: Any, answer: Any, said: str
) -> None:
    row = {"question": "Which?", "options": options, "answer": answer}
    (folder / "a.jsonl").write_text(json.dumps(row))
    (read,) = read_rows(folder / "a.jsonl", format="vqa")
    assert read.messages[1]["content"] == said


@pytest.mark.parametrize(
    ("options", "answer", "says"),
    [
        ([1, 2], 1, "may be an option of .* or its place"),
        ([{"text": "red"}, {"text": "blue"}], "A", "no list of texts"),
        ([["red"], ["blue"]], "A", "no list of texts"),
        (5, "A", "no list of texts"),
        (["red", None, "blue"], "blue", "none empty"),
    ],
)
def test_options_that_are_unclear_are_refused(
    folder: Path, options: Any, answer: Any, says: str
) -> None:
    row = {"question": "Which?", "options": options, "answer": answer}
    (folder / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match=f"line 1 .*{says}"):
        read_rows(folder / "a.jsonl", format="vqa")
