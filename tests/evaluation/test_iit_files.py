from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.dialogues.dialogues import (
    Candidate,
    build_dialogues,
    is_made_of,
    read_dialogues,
    save_dialogues,
)
from mmgraft.evaluation.items.files import read_items
from tiny_choice import choice_sets

MADE_OF = {"seed": 0, "sets": [{"name": "text", "sha256": "12"}]}


def built_of(folder: Path, shapes=("TT", "TV", "V")):
    rng = np.random.default_rng(0)
    pools = {
        letter: [Candidate(spec.name, item, rng.normal(size=3)) for item in read_items(spec)]
        for letter, spec in zip("TV", choice_sets(folder), strict=True)
    }
    return build_dialogues(pools, 2, shapes)


@pytest.fixture
def saved(tmp_path: Path):
    built = built_of(tmp_path / "sets")
    save_dialogues(tmp_path / "iit", built, MADE_OF)
    return tmp_path / "iit", built


def test_what_is_read_is_what_was_built(saved) -> None:
    folder, built = saved
    found = read_dialogues(folder)
    assert {shape: len(items) for shape, items in found.items()} == {"TT": 2, "TV": 2, "V": 2}
    for shape, dialogues in built.items():
        for dialogue, item in zip(dialogues, found[shape], strict=True):
            assert item.id == dialogue.id
            assert item.kind == shape
            assert (item.options, item.gold) == (dialogue.last.options, dialogue.last.gold)
            assert texts_of(item.messages) == texts_of(dialogue.messages())
            pairs = zip(
                images_of_all(item.messages), images_of_all(dialogue.messages()), strict=True
            )
            for mine, source in pairs:
                assert Path(mine).read_bytes() == Path(source).read_bytes()


def texts_of(messages) -> list[tuple[str, str]]:
    return [
        (turn["role"], part if isinstance(part, str) else part.get("text", "an image"))
        for turn in messages
        for part in ([turn["content"]] if isinstance(turn["content"], str) else turn["content"])
    ]


def test_a_set_without_images_is_read_too(tmp_path: Path) -> None:
    built = built_of(tmp_path / "sets", ["T", "TT"])
    save_dialogues(tmp_path / "iit", built, MADE_OF)
    found = read_dialogues(tmp_path / "iit")
    for dialogue, item in zip(built["TT"], found["TT"], strict=True):
        assert texts_of(item.messages) == texts_of(dialogue.messages())


def test_the_folder_stands_by_itself_and_can_be_trained_on(saved) -> None:
    """Moved elsewhere, its sources gone, it is a data set of messages whose answers are there."""
    folder, built = saved
    moved = folder.parent / "elsewhere"
    folder.rename(moved)
    for path in sorted((moved.parent / "sets").rglob("*.*")):
        path.unlink()
    rows = read_rows(moved / "dialogues.jsonl")
    assert [row.messages[-1]["role"] for row in rows] == ["assistant"] * 6
    last = built["V"][0].last
    assert rows[4].messages[-1]["content"] == last.options[last.gold]
    lines = [json.loads(line) for line in (moved / "dialogues.jsonl").read_text().splitlines()]
    assert lines[2]["from"] == [
        {"set": part.set, "id": part.item.id} for part in built["TV"][0].parts
    ]
    assert str(folder.parent) not in (moved / "dialogues.jsonl").read_text()


def test_questions_about_one_picture_are_of_one_group(saved) -> None:
    found = read_dialogues(saved[0])
    assert [item.group for item in found["TV"]] == [item.group for item in found["V"]]
    assert len({item.group for item in found["V"]}) == 2


def test_it_is_known_what_they_are_made_of(saved) -> None:
    folder, _ = saved
    assert is_made_of(folder, MADE_OF)
    assert not is_made_of(folder, {**MADE_OF, "seed": 1})
    assert not is_made_of(folder.parent / "none", MADE_OF)


def test_changed_rows_are_not_taken_for_the_saved_ones(saved) -> None:
    folder, _ = saved
    with (folder / "dialogues.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"was changed.*remove the folder"):
        read_dialogues(folder)
    with pytest.raises(UsageError, match="remove the folder"):
        is_made_of(folder, MADE_OF)


def test_no_data_set_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no dialogues in .*mmgraft eval RUN --iit"):
        read_dialogues(tmp_path)
