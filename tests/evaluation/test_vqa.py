from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmgraft.data.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.vqa import (
    Prior,
    answer,
    by_kind,
    exact,
    normalised,
    vqa_match,
    vqa_v2,
)
from mmgraft.grafts.llava.config import LlavaConfig
from mmgraft.model.modeling import GraftedModel
from tiny import tiny_model, tiny_tower
from tiny_tokenizer import tiny_tokenizer
from tiny_towers import picture


@pytest.mark.parametrize(
    ("given", "truth", "right"),
    [
        ("Blue", "blue", True),
        (" blue\n", "blue", True),
        ("blue.", "blue", False),
        ("a blue", "blue", False),
        ("", "no", False),
    ],
)
def test_exact_forgives_case_and_white_space_alone(given: str, truth: str, right: bool) -> None:
    assert exact(given, truth) is right


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("A blue rectangle.", "blue rectangle"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 m.", "2.5 m"),
        ("yes, it is!", "yes it is"),
        ("black-and-white", "black and white"),
        ("dog's", "dog's"),
        ("another", "another"),  # an article is a word, not the start of one
    ],
)
def test_normalisation_follows_the_vqa_rules(given: str, clean: str) -> None:
    assert normalised(given) == clean


def test_vqa_match_compares_what_is_normalised() -> None:
    assert vqa_match("The circle.", "circle")
    assert not vqa_match("circles", "circle")


@pytest.mark.parametrize(
    ("agreeing", "score"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_v2_averages_over_nine_of_ten_people(agreeing: int, score: float) -> None:
    """With 3 who agree: three choices leave 2 of them (2/3), seven leave all (1): 9/10."""
    answers = ["The cat."] * agreeing + [f"dog {at}" for at in range(10 - agreeing)]
    assert vqa_v2("cat", answers) == pytest.approx(score)


def test_vqa_v2_needs_people() -> None:
    assert vqa_v2("cat", ["cat"] * 4) == 1.0
    with pytest.raises(UsageError, match=r"ten people's answers, or at least 4, not 1"):
        vqa_v2("cat", ["cat"])


def test_by_kind_splits_the_share() -> None:
    assert by_kind([True, False, True, True], ["b", "b", "a", "b"]) == {"a": 1.0, "b": 2 / 3}


def test_prior_gives_the_most_frequent_answer_to_each_question() -> None:
    prior = Prior([("q", "no"), ("q", "yes"), ("q", "no"), ("color?", "red"), ("color?", "blue")])
    assert prior("q") == "no"
    assert prior("color?") == "blue"  # a tie goes to the first in the alphabet
    assert prior("never asked") == "no"


def test_prior_needs_answers() -> None:
    with pytest.raises(UsageError, match="no training answers"):
        Prior([])


@pytest.fixture(scope="module")
def asked() -> tuple[GraftedModel, GraftProcessor, list[list[dict[str, object]]]]:
    tower = tiny_tower()
    model = GraftedModel.graft(tiny_model("llama"), tower, LlavaConfig(), tokenizer=None)
    processor = GraftProcessor(tiny_tokenizer(), tower.num_patches, 5, "chat", tower.preprocess)
    chats = [
        [{"role": "user", "content": _content(text, image)}]
        for text, image in [
            ("Is there a triangle in the picture? Say yes or no, please.", picture()),
            ("What?", picture(which=1)),
            ("What?", None),
            ("Is there a circle?", picture(20, 50)),
            ("What?", picture()),
        ]
    ]
    return model, processor, chats


def _content(text: str, image: Image.Image | None) -> object:
    if image is None:
        return text
    return [{"type": "image", "image": image}, {"type": "text", "text": text}]


def test_answers_come_in_the_order_of_the_questions(asked) -> None:
    """Rows are sorted by length into batches; each must get the answer it gets alone."""
    model, processor, chats = asked
    alone = [answer(model, processor, [chat], max_new_tokens=6)[0] for chat in chats]
    assert len(set(alone)) > 1, "equal answers could not show a mistaken order"
    steps: list[tuple[int, int]] = []
    together = answer(
        model,
        processor,
        chats,
        max_new_tokens=6,
        batch_size=2,
        progress=lambda *at: steps.append(at),
    )
    assert together == alone
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_features_given_are_used_for_the_right_pictures(asked, tmp_path) -> None:
    model, processor, _ = asked
    names = []
    for which in range(2):
        names.append(tmp_path / f"{which}.png")
        picture(which=which).save(names[-1])
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": str(name)}]}] for name in names
    ]
    seen: list[str] = []

    def features(paths):
        seen.extend(path.name for path in paths)
        pixels = model.vision_tower.preprocess([Image.open(path) for path in paths])
        return model.vision_tower(pixels)

    opened = answer(model, processor, chats, max_new_tokens=6)
    assert answer(model, processor, chats, max_new_tokens=6, features=features) == opened
    assert seen == ["0.png", "1.png"]

    def nothing(paths):
        return torch.zeros(len(paths), 4, 16)

    assert answer(model, processor, chats, max_new_tokens=6, features=nothing) != opened
