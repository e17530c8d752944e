"""Dialogues joined by meaning: shapes, nearest questions, no question twice, the same lasts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.errors import UsageError
from mmgraft.evaluation.dialogues.dialogues import (
    SHAPES,
    Candidate,
    answer_turn,
    build_dialogues,
    buildable,
    title,
)
from mmgraft.evaluation.items.item import Item


def candidate(letter: str, number: int, angle: float, question: str | None = None) -> Candidate:
    """A question whose meaning is an angle in degrees."""
    text = question or f"{letter} question {number}?"
    content: object = text
    if letter == "V":
        image = {"type": "image", "image": f"{number}.png"}
        content = [image, {"type": "text", "text": text}]
    item = Item(
        id=f"{letter}{number}",
        messages=[{"role": "user", "content": content}],
        question=text,
        answers=("two",),
        options=("one", "two"),
        gold=1,
    )
    turn = np.deg2rad(angle)
    return Candidate(f"{letter}-set", item, np.array([np.cos(turn), np.sin(turn)]))


def pools(texts: int, images: int) -> dict[str, list[Candidate]]:
    rng = np.random.default_rng(0)
    sizes = {"T": texts, "V": images}
    return {
        letter: [candidate(letter, at, rng.uniform(0, 360)) for at in range(size)]
        for letter, size in sizes.items()
    }


def ids(dialogue) -> list[str]:
    return [part.item.id for part in dialogue.parts]


def test_the_nearest_question_stands_right_before_the_last() -> None:
    text = [candidate("T", 0, 170), candidate("T", 1, 12), candidate("T", 2, 40)]
    built = build_dialogues({"T": text, "V": [candidate("V", 0, 10)]}, 1)
    assert ids(built["TTV"][0]) == ["T2", "T1", "V0"]
    assert ids(built["TV"][0]) == ["T1", "V0"]
    assert ids(built["V"][0]) == ["V0"]


def test_of_equally_near_questions_the_first_is_taken() -> None:
    text = [candidate("T", at, 50) for at in range(4)]
    built = build_dialogues({"T": text, "V": [candidate("V", 0, 10)]}, 1, ["TTV"])
    assert ids(built["TTV"][0]) == ["T1", "T0", "V0"]


def test_a_question_of_the_same_words_is_not_put_before_the_last() -> None:
    """It would give the answer away, and nothing is nearer."""
    text = [candidate("T", 0, 10, "what  is it?"), candidate("T", 1, 190)]
    last = candidate("V", 0, 10, "what is it?")
    assert ids(build_dialogues({"T": text, "V": [last]}, 1, ["TV"])["TV"][0]) == ["T1", "V0"]
    with pytest.raises(UsageError, match=r"no text question is left .* \(T,V\).*same words"):
        build_dialogues({"T": text[:1], "V": [last]}, 1, ["TV"])


def test_earlier_questions_are_answered_and_the_last_is_not() -> None:
    dialogue = build_dialogues(pools(6, 2), 1)["TTV"][0]
    messages = dialogue.messages()
    assert [turn["role"] for turn in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[1] == {"role": "assistant", "content": "two"}
    assert messages[-1] == dialogue.last.messages[0]
    assert dialogue.last.has_image
    assert answer_turn(dialogue.last)["content"] == "two"


def test_a_system_prompt_stands_at_the_beginning_alone() -> None:
    told = {"role": "system", "content": "Be short."}
    parts = []
    for at in range(2):
        plain = candidate("T", at, at)
        item = Item(**{**vars(plain.item), "messages": [told, *plain.item.messages]})
        parts.append(Candidate("s", item, plain.vector))
    messages = build_dialogues({"T": parts}, 1, ["TT"])["TT"][0].messages()
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "user"]


@given(
    st.integers(3, 20),
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(0, 5),
    st.permutations(SHAPES),
)
def test_shapes_counts_and_no_question_twice(texts, images, count, seed, shapes) -> None:
    asked = pools(texts, images)
    built = build_dialogues(asked, count, shapes, seed)
    assert list(built) == list(shapes)
    for shape, dialogues in built.items():
        most = texts // 3 if shape[-1] == "T" else min(images, texts // 2)
        assert len(dialogues) == min(count, most)
        used = Counter(part.item.id for dialogue in dialogues for part in dialogue.parts)
        assert max(used.values(), default=1) == 1
        for number, dialogue in enumerate(dialogues, start=1):
            assert "".join(name[0] for name in ids(dialogue)) == shape
            assert dialogue.id == f"{shape}-{number}"
    for letter in "TV":
        lasts = {
            tuple(dialogue.last.id for dialogue in dialogues)
            for shape, dialogues in built.items()
            if shape[-1] == letter
        }
        assert len(lasts) == 1, "shapes that end alike must ask the same last questions"


def test_a_seed_gives_the_same_dialogues_and_another_one_others() -> None:
    asked = pools(40, 20)
    one, again, other = (build_dialogues(asked, 5, seed=seed) for seed in (1, 1, 2))
    listed = [{k: [ids(d) for d in v] for k, v in built.items()} for built in (one, again, other)]
    assert listed[0] == listed[1]
    assert listed[0] != listed[2]


def test_shapes_that_cannot_be_built_are_named() -> None:
    assert buildable({"T": 2, "V": 0}) == ["T", "TT"]
    assert buildable({"T": 0, "V": 1}) == ["V"]
    assert buildable({"T": 3, "V": 1}) == list(SHAPES)
    assert title("TTV") == "(T,T,V)"
    with pytest.raises(UsageError, match=r"\(T,T,T\) has 3 text questions, and there are 2"):
        build_dialogues(pools(2, 1), 1)
    with pytest.raises(UsageError, match="no dialogue of shape 'TX'"):
        build_dialogues(pools(2, 1), 1, ["TX"])
