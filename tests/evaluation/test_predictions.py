from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.errors import MMGraftError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Predictions, fingerprint_items, read_predictions
from tiny_towers import picture

ASKED = {"graft": {"sha256": "a"}, "settings": {"max_new_tokens": 8}}


def row(number: int) -> dict[str, str]:
    return {"id": str(number), "answer": f"answer {number}"}


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "predictions" / "set.jsonl"
    first = Predictions(path, ASKED)
    assert not path.exists(), "nothing is written before there is an answer"
    first.add([row(1), row(2)])
    first.add([row(3)])
    again = Predictions(path, ASKED)
    assert again.done == first.done == {str(n): row(n) for n in (1, 2, 3)}
    assert read_predictions(path) == [row(1), row(2), row(3)]
    assert again.put_aside is None


@pytest.mark.parametrize(
    "other", [{**ASKED, "graft": {"sha256": "b"}}, {**ASKED, "settings": {"max_new_tokens": 9}}, {}]
)
def test_answers_of_another_model_or_other_settings_are_put_aside(
    tmp_path: Path, other: dict[str, object]
) -> None:
    path = tmp_path / "set.jsonl"
    Predictions(path, ASKED).add([row(1)])
    fresh = Predictions(path, other)
    assert fresh.done == {}
    assert fresh.put_aside is not None
    assert read_predictions(fresh.put_aside) == [row(1)]
    fresh.add([row(2)])
    assert read_predictions(path) == [row(2)]
    second = Predictions(path, ASKED)
    assert second.put_aside not in (None, fresh.put_aside), "nothing put aside is written over"


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "set.jsonl"
    Predictions(path, ASKED).add([row(1), row(2)])
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    again = Predictions(path, ASKED)
    kept = [row(1)] if cut < len(json.dumps(row(2))) + 2 else []
    assert list(again.done.values()) == kept
    again.add([row(7)])
    assert read_predictions(path) == [*kept, row(7)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_cut_within_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    Predictions(path, ASKED).add([row(1)])
    path.write_bytes(path.read_bytes()[:20])
    again = Predictions(path, ASKED)
    again.add([row(2)])
    assert Predictions(path, ASKED).done == {"2": row(2)}


def test_lines_after_a_damaged_one_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    Predictions(path, ASKED).add([row(1), row(2), row(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0\0\0\n", lines[3]]))
    assert list(Predictions(path, ASKED).done) == ["1"]


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MMGraftError, match="goes on from there"):
        Predictions(tmp_path / "file" / "set.jsonl", ASKED).add([row(1)])


def item(text: str, image: Path | None = None, **more: object) -> Item:
    content: list[dict[str, str]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image", "image": str(image)})
    return Item("1", [{"role": "user", "content": content}], text, **more)  # type: ignore[arg-type]


def test_a_fingerprint_is_of_what_is_asked(tmp_path: Path) -> None:
    """Hash words, options and pixels; neither where a picture lies nor what is right."""
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    picture().save(a)
    picture().save(b)
    same = fingerprint_items([item("what?", a)])
    assert fingerprint_items([item("what?", b, answers=("red",))]) == same
    others = [item("which?", a), item("what?"), item("what?", a, options=("x", "y"))]
    assert same not in [fingerprint_items([one]) for one in others]
    picture(which=1).save(b)
    assert fingerprint_items([item("what?", b)]) != same
