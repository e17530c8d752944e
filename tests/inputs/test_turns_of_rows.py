"""Check what may stand in a row and in its turns: each entry is read, or refused by its name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data.formats.sources import read_rows
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.recipes.evaluation_set import SetSpec

USER, ANSWER = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red fox"}
CALL = {"name": "zoom", "arguments": {"factor": 2}}


def _read(folder: Path, turns: Any = (USER, ANSWER), **beside: Any) -> Row:
    row = {"messages": list(turns), **beside} if "conversations" not in beside else beside
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (row,) = read_rows(folder / "rows.jsonl")
    return row


READ_BESIDE: list[dict[str, Any]] = [
    *({key: "x"} for key in ("id", "source", "model", "category", "split", "url", "task", "lang")),
    *({key: 3} for key in ("question_id", "num_images", "imageId", "video_id", "label_type")),
    {"image_correspondence_ratings": [1]},
    *({key: "y"} for key in ("question", "answer", "options", "kind", "group", "bbox", "text")),
    *({key: None} for key in ("system", "videos", "rejected", "tools", "objects", "loss")),
    *({key: []} for key in ("images", "videos", "audios", "history")),
    *({"loss": True}, {"weight": 1.0}, {"train": True}, {"system": ""}, {"label": True}),
    *({"skip": False}, {"ignore": 0}, {"skip_formatting": False}, {"source": "a.jsonl"}),
    *({"has_image": True}, {"hasImage": 1}, {"num_images": 2}, {"n_tools": 3}),
    {"prompt": "Which?"},  # said in the turns
    {"response": " red fox"},
]
REFUSED_BESIDE: list[dict[str, Any]] = [
    *({key: "x.mp4"} for key in ("video", "videoPath", "video_url", "audio", "speech_file")),
    *({key: ["x"]} for key in ("videos", "audios", "history", "documents", "frames", "objects")),
    *({key: "x"} for key in ("chosen", "rejected", "rejected_response", "system_prompt")),
    *({key: "x"} for key in ("instruction", "prompt", "image_path", "kto_tag", "developer")),
    *({key: 0.5} for key in ("weight", "loss_weight", "sample_weights", "label")),
    *({key: False} for key in ("loss", "train", "label", "kto_label", "training", "learn")),
    *({key: True} for key in ("ignore", "skip_row", "masked", "no_loss")),
    *({key: "x.png"} for key in ("img", "picture", "photo", "file", "thumb", "depth", "source")),
    {"media": ["a/b.JPEG"]},
    {"attachments": [{"file": "x.wav"}]},
    *({key: "A red fox."} for key in ("context", "hint", "rationale", "channel", "sys_msg")),
    *({"repeat": 3}, {"is_train": False}, {"isMasked": True}, {"hash_function": "f"}),
    *({key: [USER]} for key in ("all_turns", "conversation", "raw", "positive_messages")),
    {"negative": [[USER, ANSWER]]},
    *({key: [1, 0]} for key in ("mask", "loss_mask", "assistant_masks")),
    *({key: {"a": 1}} for key in ("chat_template_kwargs", "tool_choice", "functions")),
]


@pytest.mark.parametrize("beside", READ_BESIDE, ids=json.dumps)
def test_keys_that_change_nothing_may_stand_beside_turns(
    tmp_path: Path, beside: dict[str, Any]
) -> None:
    assert _read(tmp_path, **beside).messages == [USER, ANSWER]
    spoken = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red fox"}]
    assert _read(tmp_path, conversations=spoken, **beside).messages == [USER, ANSWER]


@pytest.mark.parametrize("beside", REFUSED_BESIDE, ids=json.dumps)
def test_keys_that_change_a_row_are_refused_by_name(tmp_path: Path, beside: dict[str, Any]) -> None:
    (key,) = beside
    with pytest.raises(UsageError, match=f"line 1 .*'{key}' is not read"):
        _read(tmp_path, **beside)
    with pytest.raises(UsageError, match=f"'{key}' is not read"):
        _read(tmp_path, conversations=[{"from": "human", "value": "Which?"}], **beside)


@pytest.mark.parametrize(
    "key", ["loss", "train", "weight", "mask", "video", "audio", "images", "tool_choice", "label",
            "eot", "partial", "refusal", "attachments", "picture", "channel", "recipient", "hint"]
)  # fmt: skip
def test_keys_that_change_a_turn_are_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"turn 2: '{key}' is not read"):
        _read(tmp_path, [USER, {**ANSWER, key: 0.25}])
    spoken = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red", key: 0.25}]
    with pytest.raises(UsageError, match=f"turn 2: '{key}' is not read"):
        _read(tmp_path, conversations=spoken)
    part = {"type": "text", "text": "red", key: 0.25}
    with pytest.raises(UsageError, match=f"turn 1: '{key}' is not read"):
        _read(tmp_path, [{**USER, "content": [part]}, ANSWER])


@pytest.mark.parametrize("key", ["id", "timestamp", "name", "reasoning_content", "thinking"])
def test_other_keys_of_a_turn_go_to_the_template(tmp_path: Path, key: str) -> None:
    turn = {**ANSWER, key: "7", "loss": True, "weight": 1}
    assert _read(tmp_path, [USER, turn]).messages == [USER, turn]


def test_a_system_prompt_beside_the_turns_is_their_first(tmp_path: Path) -> None:
    first = {"role": "system", "content": "Answer in French only."}
    Image.new("RGB", (2, 2)).save(tmp_path / "red.png")
    spoken = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "rouge"}]
    for row in (
        _read(tmp_path, system=first["content"]),
        _read(tmp_path, [first, USER, ANSWER], system=first["content"]),
        _read(tmp_path, conversations=spoken, image="red.png", system=first["content"]),
    ):
        assert row.messages[0] == first
        assert [turn["role"] for turn in row.messages] == ["system", "user", "assistant"]
    with pytest.raises(UsageError, match="beside the turns is 'In French'"):
        _read(tmp_path, [{**first, "content": "In German."}, USER, ANSWER], system="In French")
    with pytest.raises(UsageError, match="'system' beside the turns is 3; write a text"):
        _read(tmp_path, system=3)


@pytest.mark.parametrize(
    ("given", "role"),
    [("human", "user"), ("Human", "user"), (" USER ", "user"), ("gpt", "assistant"),
     ("model", "assistant"), ("observation", "tool"), ("developer", "developer")],
)  # fmt: skip
def test_speakers_are_roles(tmp_path: Path, given: str, role: str) -> None:
    row = _read(tmp_path, [{"role": given, "content": "a"}, ANSWER])
    assert row.messages[0] == {"role": role, "content": "a"}
    row = _read(tmp_path, conversations=[{"from": given, "value": "a"}])
    assert row.messages[0] == {"role": role, "content": "a"}


@pytest.mark.parametrize("given", ["usr", "narrator", "function_call", "", "user<|im_end|>"])
def test_unknown_roles_are_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(UsageError, match=r"turn 1: the role .* is not known; write one of user"):
        _read(tmp_path, [{"role": given, "content": "a"}, ANSWER])
    with pytest.raises(UsageError, match="turn 1: the role"):
        _read(tmp_path, conversations=[{"from": given, "value": "a"}])


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([CALL], [CALL]),
        ([{"type": "function", "function": CALL}], [{"type": "function", "function": CALL}]),
        ([{**CALL, "arguments": '{"factor": 2}'}], [CALL]),
        ([{"function": {**CALL, "arguments": '{"factor": 2}'}}], [{"function": CALL}]),
        (json.dumps([CALL]), [CALL]),
        ([{"name": "zoom", "arguments": ""}], [{"name": "zoom", "arguments": {}}]),
        ([{"name": "zoom"}], [{"name": "zoom", "arguments": {}}]),
        ([], None),
        (None, None),
    ],
)
def test_calls_of_tools_have_objects_for_arguments(tmp_path: Path, calls: Any, read: Any) -> None:
    row = _read(tmp_path, [USER, {**ANSWER, "tool_calls": calls}])
    assert row.messages[1] == ({**ANSWER, "tool_calls": read} if read else ANSWER)


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ([3], "3 is no call of a tool"),
        ([{"arguments": {}}], "is no call of a tool"),
        ([{"function": 3}], "is no call of a tool"),
        ([{**CALL, "arguments": "factor 2"}], "'factor 2'} is no call of a tool"),
        ([{**CALL, "arguments": "[2]"}], "is no call of a tool"),
        ({"name": "zoom"}, "is a list of calls"),
        ("zoom", "is a list of calls"),
    ],
)
def test_calls_that_are_none_are_refused(tmp_path: Path, calls: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"turn 2: .*{says}"):
        _read(tmp_path, [USER, {**ANSWER, "tool_calls": calls}])
    with pytest.raises(UsageError, match=r"turn 1: 'tool_calls' .* turn of the assistant"):
        _read(tmp_path, [{**USER, "tool_calls": [CALL]}])


def test_tools_may_be_json_text(tmp_path: Path) -> None:
    tools = [{"name": "zoom", "parameters": {}}]
    for given in (tools, json.dumps(tools)):
        assert _read(tmp_path, tools=given).tools == tools
    for nothing in (None, "", [], "[]"):
        assert _read(tmp_path, tools=nothing).tools is None
    for wrong in ("zoom", 3, {"name": "zoom"}, ["zoom"]):
        with pytest.raises(UsageError, match=r"'tools' is .*write a list of objects"):
            _read(tmp_path, tools=wrong)


@pytest.mark.parametrize("key", ["system", "videos", "audio_path", "tools", "history"])
def test_a_question_of_an_evaluation_is_not_cut(tmp_path: Path, key: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    record = {
        "question": "Which?",
        "image": "a.png",
        "answer": "red",
        "label": "x",
        "video_id": "z",
    }
    spec = SetSpec(name="a", path=str(tmp_path / "a.jsonl"), metric="exact", modality="image")
    for beside, good in (({}, True), ({key: "x"}, False), ({key: None}, True)):
        (tmp_path / "a.jsonl").write_text(json.dumps({**record, **beside}), encoding="utf-8")
        if good:
            assert read_items(spec)[0].answers == ("red",)
        else:
            with pytest.raises(UsageError, match=f"'{key}' is not read"):
                read_items(spec)


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"from": "human", "value": "b"}, "'from' and 'role' differ"),
        ({"value": "b"}, "'value' and 'content' differ"),
        ({"thumb": "red.png"}, "'thumb' is not read"),
        ({"more": {"shown": ["red.webp"]}}, "'more' is not read"),
        ({"alternatives": [ANSWER]}, "'alternatives' is not read"),
    ],
)
def test_a_turn_says_one_thing(tmp_path: Path, turn: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=f"turn 2: .*{says}"):
        _read(tmp_path, [USER, {**ANSWER, **turn}])
    same = {"role": "assistant", "from": "assistant", "value": None, "content": "red fox"}
    assert _read(tmp_path, [USER, same]).messages == [USER, ANSWER]


def test_a_row_with_images_may_name_files(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "red.png")
    assert _read(tmp_path, images=["red.png"], file_name="red.png", url="x.jpg").has_image
    with pytest.raises(UsageError, match="'image' and 'images' differ"):
        _read(tmp_path, images=["red.png"], image="blue.png")
    for image in ("red.png", ["red.png"], "", None):
        assert _read(tmp_path, images=["red.png"], image=image).has_image


@pytest.mark.parametrize("kind", [["image"], {"image": 1}, 3, None, "input_text", "Image"])
@pytest.mark.parametrize("key", ["role", "from"])
def test_parts_of_no_known_type_are_refused(tmp_path: Path, kind: Any, key: str) -> None:
    part = {"type": kind, "text": "Which?", "image": "red.png"}
    for content in ([part], [None], [3], [["Which?"]], ["Which?"]):
        turn = (
            {"from": "human", "value": content} if key == "from" else {**USER, "content": content}
        )
        with pytest.raises(UsageError, match=r"line 1 .*turn 1: a content part of type"):
            _read(tmp_path, conversations=[turn])


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(60)).decode()


@pytest.mark.parametrize(
    "more",
    [{"crop": [0, 0, 9, 9]}, {"text": "Which?"}, {"weight": 2}, {"data": PNG}, {"src": "b.png"},
     {"source": {"type": "base64", "data": PNG}}, {"bytes": f"data:image/png;base64,{PNG}"}],
)  # fmt: skip
def test_what_a_part_says_beside_its_listed_image_is_not_lost(tmp_path: Path, more: Any) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "red.png")
    part = {"type": "image", "index": 0, "text": None}
    assert _read(tmp_path, [{**USER, "content": [part]}, ANSWER], images=["red.png"]).has_image
    with pytest.raises(UsageError, match=r"turn 1: .*(is not read|an image part with text)"):
        _read(tmp_path, [{**USER, "content": [{**part, **more}]}, ANSWER], images=["red.png"])


def test_a_part_is_a_text_or_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "red.png")
    part = {"type": "image", "image": "red.png", "text": None}
    assert _read(tmp_path, [{**USER, "content": [part]}, ANSWER]).has_image
    with pytest.raises(UsageError, match="turn 1: an image part with text"):
        _read(tmp_path, [{**USER, "content": [{**part, "text": "Which?"}]}, ANSWER])
    with pytest.raises(UsageError, match="turn 1: an image part with text, or two images"):
        _read(tmp_path, [{**USER, "content": [{**part, "path": "blue.png"}]}, ANSWER])
    both = {"type": "text", "text": "Which?", "image": "red.png"}
    with pytest.raises(UsageError, match="turn 1: 'image' is not read"):
        _read(tmp_path, [{**USER, "content": [both]}, ANSWER])


def test_images_stand_in_the_order_of_their_parts_index(tmp_path: Path) -> None:
    names = ["red.png", "blue.png", "green.png"]
    for name in names:
        Image.new("RGB", (2, 2)).save(tmp_path / name)

    def shown(*order: Any) -> list[str]:
        parts = [{"type": "image", "index": at, "text": None} for at in order]
        row = _read(tmp_path, [{**USER, "content": parts}, ANSWER], images=names)
        return [Path(part["image"]).name for part in row.messages[0]["content"]]

    assert shown(None, None, None) == shown(0, 1, 2) == names
    assert shown(2, 0, 1) == ["green.png", "red.png", "blue.png"]
    for wrong in ((1, 2, 3), (0, 0, 1), ("a", 0, 1), (-1, 0, 1), (2, 0, 3)):
        with pytest.raises(UsageError, match=r"line 1 .*of index .*number them from 0"):
            shown(*wrong)
