from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data.batches.sampler import Part, mix
from mmgraft.data.formats.sources import read_rows
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError

DATA_URI = "data:image/png;base64,AAAA"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / name)
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    return tmp_path


def _write(folder: Path, rows: Any, name: str = "data.json") -> Path:
    path = folder / name
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def _llava(values: list[str], **more: Any) -> dict[str, Any]:
    turns = [{"from": ["human", "gpt"][i % 2], "value": v} for i, v in enumerate(values)]
    return {"id": "r1", "conversations": turns, **more}


def _messages(*contents: Any, **more: Any) -> dict[str, Any]:
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns, **more}


def test_llavas_words_become_parts_where_they_stand(folder: Path) -> None:
    row = _llava(
        ["<image>\nWhat?", "A cat", "And <image> or this?\n<image>", "Two"],
        image=["a.png", "b.png", "deep/c.png"],
    )
    path = _write(folder, [row])
    (read,) = read_rows(path, images=folder / "images")
    images = [str(folder / "images" / name) for name in ("a.png", "b.png", "deep/c.png")]
    assert read.id == "r1"
    assert read.has_image
    assert read.where == f"{path}, row 1 (id r1)"
    assert read.messages == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": images[0]},
                {"type": "text", "text": "\nWhat?"},
            ],
        },
        {"role": "assistant", "content": "A cat"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And "},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": " or this?\n"},
                {"type": "image", "image": images[2]},
            ],
        },
        {"role": "assistant", "content": "Two"},
    ]


def test_one_image_may_be_a_text_and_system_turns_are_kept(folder: Path) -> None:
    row = {
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "A cat"},
        ],
    }
    (read,) = read_rows(_write(folder / "images", [row]))  # images lie beside the file
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant"]
    assert read.id == "1"


def test_messages_take_every_spelling_of_an_image(folder: Path) -> None:
    parts = [
        {"type": "text", "text": "An <image> tag"},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "deep/../b.png"}},
        {"type": "image_url", "image_url": {"url": DATA_URI}},
        {"type": "image"},
        {"type": "image", "image": (folder / "images/a.png").as_uri()},
    ]
    row = _messages(parts, "Fine", images=["deep/c.png"], id=7)
    path = _write(folder, [row, _messages("An <image> tag", "Text")], "data.jsonl")
    with_image, text = read_rows(path, images=folder / "images")
    content = with_image.messages[0]["content"]
    assert content[0] == parts[0]
    names = [part["image"] for part in content[1:]]
    images = str(folder / "images")
    expected = ["a.png", "b.png", DATA_URI, "deep/c.png", "a.png"]
    assert names == [n if n == DATA_URI else f"{images}/{n}" for n in expected]
    assert with_image.where.endswith("data.jsonl, line 1 (id 7)")
    assert text.messages[0]["content"] == "An <image> tag"
    assert not text.has_image


def test_tools_and_other_keys_of_messages_are_kept(folder: Path) -> None:
    made = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    call = {"role": "assistant", "tool_calls": made, "content": None}
    row = {"messages": [{"role": "user", "content": "Hi"}, call], "tools": [{"name": "f"}]}
    (read,) = read_rows(_write(folder, [row]))
    assert read.messages[1] == call
    assert read.tools == [{"name": "f"}]


def test_kinds_of_rows_and_of_files_are_told_by_content(folder: Path) -> None:
    rows = [_llava(["Hi", "Ho"]), _messages("Hi", "Ho")]
    for name in ("data.json", "data.jsonl"):
        read = read_rows(_write(folder, rows, name))
        assert [row.messages for row in read] == [rows[1]["messages"]] * 2
    path = folder / "odd.txt"
    path.write_text("\ufeff\n" + json.dumps(rows[1]) + "\n\n", encoding="utf-8")
    assert len(read_rows(path)) == 1
    assert len(read_rows(folder / "data.json", limit=1)) == 1
    with pytest.raises(UsageError, match=r"row 2 .*no 'conversations' in it but 'messages'"):
        read_rows(folder / "data.json", format="llava")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (_llava(["Hi"], image="a.png"), "1 images are listed, but <image> occurs 0 times"),
        (_llava(["<image><image>"], image="a.png"), "1 images are listed, but .* 2 times"),
        (_llava(["<image>"]), "0 images are listed, but <image> occurs 1 times"),
        (_llava(["<image>"], image="c.png"), r"image file not found: .*images/c\.png"),
        (_llava(["<image>"], image="../outside.png"), "lies outside of the image folder"),
        (_llava(["<image>"], image="/etc/hostname"), "lies outside of the image folder"),
        (_llava(["<image>"], image="https://x.org/a.png"), "download it first"),
        (_llava(["<image>"], image=[3]), "not paths"),
        ({"conversations": []}, "'conversations' is not a list of turns"),
        (
            {"conversations": [{"from": "bard", "value": "x"}]},
            "turn 1: the role 'bard' is not known",
        ),
        ({"conversations": [{"from": "human"}]}, "turn 1: not"),
        ({"text": "x"}, "no 'conversations' or 'messages' in it but 'text'"),
        ([1], "a list, not an object"),
        (_messages([{"type": "image"}]), "turn 1: an image part without an image"),
        (
            _messages([{"type": "image", "image": "a.png"}], images=["a.png"]),
            "1 images are listed, but 0 parts take one",
        ),
        (_messages([{"type": "video"}]), "turn 1: a content part of type 'video'"),
        (_messages([{"type": "text", "text": 3}]), "turn 1: a content part of type 'text'"),
        (_messages(3), "turn 1: 'content' is neither"),
        (_messages([{"type": "image", "image": {"bytes": "x"}}], images=[]), "without an image"),
        ({"messages": [{"content": "x"}]}, "turn 1: not"),
        ({"id": "\ud83d", **_messages("Hi")}, r"\(id \\ud83d\): half a character \('\\ud83d'\)"),
        (_messages("Hi", tools=[{"\ud83d": 1}]), "half a character"),
        (_messages("Hi", tools=json.loads("[" * 200 + "]" * 200)), "more than 100 lists in lists"),
        ({"messages": {}}, "'messages' is not a list"),
    ],
)
def test_bad_rows_are_named(folder: Path, row: Any, says: str) -> None:
    good = _messages("Hi", "Ho")
    path = _write(folder, [good, row])
    with pytest.raises(UsageError, match=rf"data\.json, row 2.*{says}"):
        read_rows(path, images=folder / "images")
    path = _write(folder, [good, row], "data.jsonl")
    with pytest.raises(UsageError, match=rf"data\.jsonl, line 2.*{says}"):
        read_rows(path, images=folder / "images")


def test_a_picture_without_its_head_is_named_in_few_words(folder: Path) -> None:
    row = {**_messages([{"type": "image", "image": "iVBORw0KGgo" * 9000}], "Ho"), "id": None}
    with pytest.raises(UsageError, match="begin with data:image/png;base64,") as raised:
        read_rows(_write(folder, [row]), images=folder / "images")
    assert len(str(raised.value)) < 1000
    assert "row 1 (id 1)" in str(raised.value)  # null is no id


def test_missing_images_can_wait_but_the_folder_is_kept_to(folder: Path) -> None:
    path = _write(folder, [_llava(["<image>"], image="later.png")])
    assert read_rows(path, check_images=False)[0].has_image
    path = _write(folder, [_llava(["<image>"], image="../later.png")])
    with pytest.raises(UsageError, match="lies outside"):
        read_rows(path, check_images=False)
    # A folder whose name the image folder's begins with is another folder.
    (folder / "images2").mkdir()
    path = _write(folder, [_llava(["<image>"], image="../images2/x.png")])
    with pytest.raises(UsageError, match="lies outside"):
        read_rows(path, images=folder / "images", check_images=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"messages": [{"role": "user", "content": "a"}]},\n{]', r"line 2: not JSON"),
        ('{"messages": []}\n{"messages"', r"line 2: not JSON|row 1|line 1"),
        ('{\n "messages": []\n}', r"line 1: not JSON .* one object a line"),
        ("", "has no rows"),
        ("[]", "has no rows"),
    ],
)
def test_files_that_are_no_rows_are_refused(folder: Path, text: str, says: str) -> None:
    path = folder / "data.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_rows(path)


def test_files_and_folders_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="no data file"):
        read_rows(folder / "none.json")
    path = _write(folder, [_messages("Hi", "Ho")])
    with pytest.raises(UsageError, match="no image folder"):
        read_rows(path, images=folder / "none")
    path.write_bytes(b'[{"messages": "\xff"}]')
    with pytest.raises(UsageError, match="not UTF-8"):
        read_rows(path)


def _rows(name: str, count: int) -> list[Row]:
    return [Row(f"{name}{i}", [{"role": "user", "content": "Hi"}]) for i in range(count)]


def _ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


def test_weights_repeat_and_draw() -> None:
    mixed = _ids(mix([Part(_rows("a", 4), 2.5), Part(_rows("b", 10), 0.3)], seed=1))
    assert len(mixed) == 13
    counts = sorted(mixed.count(f"a{i}") for i in range(4))
    assert counts == [2, 2, 3, 3]
    drawn = [name for name in mixed if name[0] == "b"]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("rows", "weight", "shown"),
    [(10, 0.37, 4), (10, 0.34, 3), (10, 1.26, 13), (10, 2.96, 30), (3, 0.2, 1), (7, 1.0, 7)],
)
def test_a_weight_gives_the_nearest_whole_number_of_rows(
    rows: int, weight: float, shown: int
) -> None:
    mixed = _ids(mix([Part(_rows("a", rows), weight)], seed=1))
    assert len(mixed) == shown
    counts = [mixed.count(name) for name in set(mixed)]
    assert max(counts) - (min(counts) if weight >= 1 else 0) <= 1


def test_a_mixture_depends_on_its_seed_alone() -> None:
    parts = [Part(_rows("a", 20)), Part(_rows("b", 20), 0.5)]
    once = _ids(mix(parts, seed=3))
    assert once == _ids(mix(parts, seed=3))
    assert once != _ids(mix(parts, seed=4))
    assert once != sorted(once)
    alone = {name for name in once if name[0] == "b"}
    assert alone != {name for name in _ids(mix(parts, seed=4)) if name[0] == "b"}
    other = mix([Part(_rows("c", 5)), parts[1]], seed=3)
    assert alone == {name for name in _ids(other) if name[0] == "b"}


def test_a_mixture_without_rows_or_with_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="above 0"):
        mix([Part(_rows("a", 1), 0)])
    with pytest.raises(UsageError, match="no rows"):
        mix([Part([])])
    with pytest.raises(UsageError, match="no rows"):
        mix([Part(_rows("a", 1), 0.2)])
