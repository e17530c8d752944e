from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.data.formats.sources import read_rows
from mmgraft.demo import easy_vqa
from mmgraft.demo.draft import write_rows
from mmgraft.demo.easy_vqa import (
    Question,
    by_image,
    caption,
    caption_rows,
    draw,
    facts,
    prompt,
    question_rows,
)
from mmgraft.errors import MMGraftError, UsageError


def ask(*pairs: tuple[str, str], picture: int = 0) -> list[Question]:
    return [Question(text, answer, picture, "train") for text, answer in pairs]


@pytest.fixture
def two_pictures() -> list[Question]:
    yes_no = [(f"is there a {color} shape?", "no") for color in ("red", "teal", "gray", "brown")]
    first = ask(*yes_no, ("what color is the shape?", "blue"), ("what shape is present?", "circle"))
    second = ask(*yes_no, ("is there a blue shape?", "no"), picture=7)
    return [*first, *second]


@pytest.mark.parametrize(
    ("text", "answer", "known"),
    [
        ("what is the blue shape?", "circle", {"color": "blue", "shape": "circle"}),
        ("what color is the triangle?", "red", {"color": "red", "shape": "triangle"}),
        ("what shape is present?", "circle", {"shape": "circle"}),
        ("is there a teal shape?", "yes", {"color": "teal"}),
        ("is there a teal shape?", "no", {}),
        ("is no teal shape present?", "no", {"color": "teal"}),
        ("is no teal shape present?", "yes", {}),
        ("does the image not contain a circle?", "no", {"shape": "circle"}),
        ("does the image not contain a circle?", "yes", {}),
    ],
)
def test_facts_are_what_an_answer_tells(text: str, answer: str, known: dict[str, str]) -> None:
    assert facts(ask((text, answer))) == known


def test_facts_of_several_questions_are_joined_to_a_caption() -> None:
    known = facts(ask(("is there a blue shape?", "yes"), ("what shape is present?", "circle")))
    assert caption(known) == "a blue circle"
    assert caption({"color": "blue"}) is None
    assert caption({"shape": "circle"}) is None


def test_a_caption_row_for_each_picture_that_is_fully_told(two_pictures) -> None:
    rows = caption_rows(two_pictures)
    assert [row["messages"] for row in rows] == [
        [
            {"role": "user", "content": [{"type": "image", "image": "train/images/0.png"}]},
            {"role": "assistant", "content": "a blue circle"},
        ]
    ]


def test_question_rows_hold_distinct_questions_of_their_own_picture(two_pictures) -> None:
    rows = [row for seed in range(4) for row in question_rows(two_pictures, turns=3, seed=seed)]
    assert len(rows) == 8
    assert len({row["id"] for row in rows}) == 2
    by_picture = {f"train/images/{n}.png": asked for n, asked in by_image(two_pictures).items()}
    for row in rows:
        users, answers = row["messages"][::2], row["messages"][1::2]
        image, first = users[0]["content"]
        texts = [first["text"], *(turn["content"] for turn in users[1:])]
        pairs = list(zip(texts, (turn["content"] for turn in answers), strict=True))
        assert len(set(pairs)) == 3
        assert set(pairs) <= {(q.text, q.answer) for q in by_picture[image["image"]]}


def test_half_of_a_row_asks_for_shape_or_color_in_any_place(two_pictures) -> None:
    rows = [row for seed in range(40) for row in question_rows(two_pictures, turns=4, seed=seed)]
    firsts = set()
    for row in rows[::2]:  # those of the first image
        answers = [turn["content"] for turn in row["messages"][1::2]]
        assert sorted(answers) == ["blue", "circle", "no", "no"]
        firsts.add(answers[0])
    assert firsts == {"blue", "circle", "no"}, "an answer never stands first, where tests ask"
    assert all(len(row["messages"]) == 8 for row in rows[1::2]), "filled up with what there is"


def test_rows_are_the_same_for_the_same_seed_alone(two_pictures) -> None:
    rows = question_rows(two_pictures, turns=3, seed=5)
    assert rows == question_rows(two_pictures, turns=3, seed=5)
    assert rows != question_rows(two_pictures, turns=3, seed=6)


def test_turns_beyond_the_questions_there_are_take_all_of_them(two_pictures) -> None:
    rows = question_rows(two_pictures, turns=50)
    assert [len(row["messages"]) for row in rows] == [12, 10]


def test_draw_is_fixed_by_its_seed(two_pictures) -> None:
    assert draw(two_pictures, 5, seed=1) == draw(two_pictures, 5, seed=1)
    assert draw(two_pictures, 5, seed=1) != draw(two_pictures, 5, seed=2)
    assert len(set(draw(two_pictures, 5, seed=1))) == 5
    assert sorted(draw(two_pictures, 99, seed=1), key=str) == sorted(two_pictures, key=str)


def test_a_prompt_is_the_first_turn_of_a_row(two_pictures) -> None:
    """Ask test questions in the form of those that were trained."""
    row = question_rows(two_pictures[:1], turns=1)[0]
    assert prompt(two_pictures[0]) == row["messages"][:1]
    there = prompt(two_pictures[0], Path("/data"))[0]["content"][0]["image"]
    assert there == "/data/train/images/0.png"


def test_written_rows_are_read_by_the_reader_of_recipes(two_pictures, tmp_path: Path) -> None:
    (tmp_path / "train/images").mkdir(parents=True)
    for picture in (0, 7):
        (tmp_path / f"train/images/{picture}.png").write_bytes(b"")
    rows = question_rows(two_pictures, turns=2)
    write_rows(rows, tmp_path / "rows.jsonl")
    read = read_rows(tmp_path / "rows.jsonl", tmp_path)
    assert [row.id for row in read] == [row["id"] for row in rows]
    assert all(row.has_image for row in read)
    assert read[0].messages[1] == rows[0]["messages"][1]


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy_vqa.EASY_VQA.__class__, "folder", None)
    with pytest.raises(UsageError, match="pip install --no-deps easy-vqa"):
        easy_vqa.questions("train")


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(easy_vqa, "folder", lambda: tmp_path)
    with pytest.raises(MMGraftError, match="install easy-vqa again"):
        easy_vqa.questions("test")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/questions.json").write_text(json.dumps([["only", "two"]]))
    with pytest.raises(MMGraftError, match="install easy-vqa again"):
        easy_vqa.questions("test")


# -- the published set ----------------------------------------------------------------------------

installed = pytest.mark.skipif(easy_vqa.EASY_VQA.folder is None, reason="easy-vqa is not installed")


@installed
def test_the_published_split_is_whole() -> None:
    train, test = easy_vqa.questions("train"), easy_vqa.questions("test")
    assert (len(train), len(test)) == (38575, 9673)
    assert all((easy_vqa.folder() / question.image).is_file() for question in draw(test, 50, 0))
    assert {question.kind for question in train} == {"yes/no", "shape", "color"}
    words = {question.answer for question in train if question.kind != "yes/no"}
    assert words == {*easy_vqa.COLORS, *easy_vqa.SHAPES}


@installed
def test_no_picture_of_the_published_set_contradicts_itself() -> None:
    """`facts` reads every question form right: two forms never tell different colours."""
    train = easy_vqa.questions("train")
    told = {}
    for number, asked in by_image(train).items():
        for question in asked:
            for what, word in facts([question]).items():
                assert told.setdefault((number, what), word) == word
    assert len(caption_rows(train)) > 3300


@installed
def test_question_only_scores_what_it_is_known_to_score() -> None:
    from mmgraft.evaluation.metrics.answers import Prior

    prior = Prior((question.text, question.answer) for question in easy_vqa.questions("train"))
    test = easy_vqa.questions("test")
    right = sum(prior(question.text) == question.answer for question in test)
    assert right / len(test) == pytest.approx(0.670, abs=0.001)


def test_balanced_rows_ask_for_the_rarer_answer_and_in_any_order() -> None:
    common = [Question("is there a circle?", "no", number, "train") for number in range(1, 5)]
    shown = [
        Question("what shape is present?", "circle", 0, "train"),
        Question("is there a circle?", "yes", 0, "train"),
        Question("is there a triangle?", "no", 0, "train"),
        Question("is there a rectangle?", "no", 0, "train"),
        Question("what color is the shape?", "red", 0, "train"),
    ]
    kinds = set()
    for seed in range(16):
        row = question_rows([*shown, *common], turns=3, seed=seed, balanced=True)[0]
        said = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        told = [answer for answer in said if answer in ("circle", "red")]
        assert len(told) == 1
        assert sorted(set(said) - set(told)) == ["no", "yes"]  # the rare yes, one of the others
        kinds.add(said.index(told[0]))
    assert kinds == {0, 1, 2}
