"""The contact sheet of a comparison: the same questions, and what each arm answered."""

from __future__ import annotations

from mmgraft.comparison.answers import SetAnswers
from mmgraft.data.content import images_of_all
from mmgraft.evaluation.answer_sheet import Asked, Said, answer_sheet, sheet_png
from mmgraft.evaluation.box_sheet import SHOWN, drawn_places, said_box
from mmgraft.evaluation.item_files import data_file
from mmgraft.evaluation.items import Item
from mmgraft.evaluation.pages.page import Block, Cell, Picture, Table, plain
from mmgraft.evaluation.pages.words import listed
from mmgraft.evaluation.scoring import measure_answers
from mmgraft.evaluation.source_licence import none_forbids, stated_licences

RIGHT, WRONG = "right", "wrong"


def sheet_blocks(answers: SetAnswers, shown: int = SHOWN) -> list[Block]:
    """The sheet as a picture, and the same as a table for who cannot see it.

    Args:
        answers: To a set with images.
        shown: So many items are drawn by a fixed seed, whatever was answered.

    Raises:
        UsageError: A picture that cannot be read.
    """
    places = drawn_places(answers.items, shown)
    if not places:
        return []
    asked = [_asked(answers, at) for at in places]
    name = plain(answers.spec.name)
    arms = list(answers.said)
    licences = stated_licences(data_file(answers.spec), [answers.items[at] for at in places])
    told = (
        "; the true box has an unbroken green line, each arm's a dashed one in its colour; a "
        "crossed square marks an answer that is no box."
        if answers.spec.metric == "box"
        else ". A tick is a right answer, a cross a wrong one."
    )
    embedded = none_forbids(licences)
    if not embedded:
        told += " The picture is a file beside this page and does not go along with it."
    picture = Picture(
        f"answers-{answers.spec.name}",
        sheet_png(answer_sheet(asked)),
        f"{len(asked)} pictures of {name} with the question, the true answer and the answers of "
        f"{listed([plain(arm) for arm in arms])}; the table below it says the same in words.",
        f"{len(asked)} of {len(answers.items):,} items of {name}, drawn by chance whatever was "
        f"answered{told}",
        embedded=embedded,
    )
    rows = [
        [Cell(plain(one.question)), Cell(plain(one.truth)), *map(_cell, one.said)] for one in asked
    ]
    columns = ["question", "truth", *map(plain, arms)]
    return [picture, Table(f"{name}, the answers in words", columns, rows, folded=True)]


def _asked(answers: SetAnswers, at: int) -> Asked:
    spec, item = answers.spec, answers.items[at]
    said = [
        said_box(arm, spec, item, texts[at])
        if spec.metric == "box"
        else Said(arm, texts[at], _is_right(answers, arm, at))
        for arm, texts in answers.said.items()
    ]
    image = next(iter(images_of_all(item.messages)))
    return Asked(image, item.question, _truth(item), said, item.box)


def _is_right(answers: SetAnswers, arm: str, at: int) -> bool | None:
    spec, item = answers.spec, answers.items[at]
    if spec.metric == "caption":
        return None
    if spec.metric == "choice":
        return item.gold is not None and answers.said[arm][at] == item.options[item.gold]
    found = measure_answers(spec, [item], [answers.said[arm][at]])
    return found.values()[found.main] >= 0.5


def _truth(item: Item) -> str:
    if item.gold is not None:
        return item.options[item.gold]
    if item.box is not None:
        return f"[{', '.join(f'{value:.0f}' for value in item.box)}]"
    # Of ten people's answers the most frequent, the earlier of equals.
    return max(item.answers, key=item.answers.count, default="-")


def _cell(said: Said) -> Cell:
    text = plain(said.text) or "(nothing)"
    if said.right is None:
        return Cell(text)
    worth = ", ".join(word for word in (RIGHT if said.right else WRONG, said.note) if word)
    return Cell(text, worth, "good" if said.right else "bad")
