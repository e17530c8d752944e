"""Draw two to four coloured shapes on white, and ask what needs reading and comparing.

    python examples/shapes/shapes_set.py --out shapes

align.jsonl (what is where, as a caption) and tune.jsonl (questions about one image, and at last
what is where) train, as messages. train.jsonl and test.jsonl have one question a row: for priors,
and to evaluate on.
Every kind of question has its answers about equally often, and no set of things (such as a red
circle with a blue square) is in both parts, wherever the things stand.
"""

from __future__ import annotations

import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmgraft.demo.draft import Draft, write_set
from mmgraft.errors import MMGraftError, UsageError

COLORS = {
    "red": (220, 30, 30),
    "blue": (40, 70, 220),
    "green": (30, 160, 60),
    "yellow": (245, 210, 40),
    "purple": (150, 50, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.4, "big": 0.8}
"""Side of a shape as a part of its cell."""
GRID = 3
"""The image has so many columns and rows of cells, one thing a cell at most."""
COLUMNS, ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")
COUNTS = ("zero", "one", "two", "three", "four")
TEST_SHARE = 0.2
"""Share of the sets of things that are kept for the test."""
TURNS = 5
DESCRIBE = "what is where?"
SLACK = 2
"""Largest lead of an answer over the rarest of its kind."""
ANSWERS = {
    "count": ("zero", "one", "two"),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "side": ("yes", "no"),
    "same": ("yes", "no"),
    "larger": SHAPES,
    "color beside": tuple(COLORS),
    "shape beside": SHAPES,
}
"""Kinds of questions and the answers to each."""
SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda one, other: one.column < other.column,
    "right of": lambda one, other: one.column > other.column,
    "above": lambda one, other: one.row < other.row,
    "below": lambda one, other: one.row > other.row,
}


@dataclass(frozen=True)
class Thing:
    """One shape of an image; ``dx`` and ``dy`` move it in its cell, as a part of the cell."""

    color: str
    shape: str
    size: str
    column: int
    row: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def name(self) -> str:
        """Its name in questions, which nothing else in the image has."""
        return f"{self.color} {self.shape}"


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class ShapesSettings:
    """Settings of the set: images to train on and to test on, their side in pixels, the seed."""

    images: int = 2000
    test_images: int = 250
    size: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.images, self.test_images) < 1:
            raise UsageError("--images and --test-images: give 1 or more")
        if self.size < 96:
            raise UsageError(f"--size {self.size}: shapes cannot be told apart; give 96 or more")


def draw_scene(rng: random.Random) -> Scene:
    """Place two to four things, no two of the same colour and shape, half of them in a colour
    that is there already.
    """
    cells = rng.sample([(column, row) for column in range(GRID) for row in range(GRID)], 4)
    things: list[Thing] = []
    for column, row in cells[: rng.randint(2, 4)]:
        used = [one.color for one in things]
        names = {one.name for one in things}
        while True:
            color = rng.choice(used if used and rng.random() < 0.4 else list(COLORS))
            shape = rng.choice(SHAPES)
            if f"{color} {shape}" not in names:
                break
        moved = [rng.uniform(-0.08, 0.08) for _ in range(2)]
        things.append(Thing(color, shape, rng.choice(list(SIZES)), column, row, *moved))
    return tuple(things)


def in_test(scene: Scene, seed: int) -> bool:
    """Return the part of a scene, by its colours and shapes alone."""
    names = ",".join(sorted(thing.name for thing in scene))
    return random.Random(f"{seed} {names}").random() < TEST_SHARE


def questions(scene: Scene) -> Iterator[Question]:
    """Return all questions about a scene that have one right answer."""
    shapes = Counter(one.shape for one in scene)
    colors = Counter(one.color for one in scene)
    for color in COLORS:
        if colors[color] < len(ANSWERS["count"]):
            yield Question("count", f"how many {color} shapes are there?", COUNTS[colors[color]])
    for one in scene:
        if shapes[one.shape] == 1:
            yield Question("color", f"what color is the {one.shape}?", one.color)
        if colors[one.color] == 1:
            yield Question("shape", f"what shape is {one.color}?", one.shape)
        for side, holds in SIDES.items():
            there = [other for other in scene if holds(other, one)]
            if len(there) == 1:
                where = f"{side} the {one.name}?"
                yield Question("color beside", f"what color is the shape {where}", there[0].color)
                yield Question("shape beside", f"what shape is {where}", there[0].shape)
    for one, other in permutations(scene, 2):
        yield from _about_two(one, other, shapes)


def _about_two(one: Thing, other: Thing, shapes: Counter[str]) -> Iterator[Question]:
    for side, holds in SIDES.items():
        if holds(one, other) or holds(other, one):
            answer = "yes" if holds(one, other) else "no"
            yield Question("side", f"is the {one.name} {side} the {other.name}?", answer)
    if shapes[one.shape] == shapes[other.shape] == 1:
        answer = "yes" if one.color == other.color else "no"
        text = f"are the {one.shape} and the {other.shape} of the same color?"
        yield Question("same", text, answer)
    if one.shape != other.shape and one.size != other.size:
        answer = one.shape if one.size == "big" else other.shape
        text = f"which is larger, the {one.name} or the {other.name}?"
        yield Question("larger", text, answer)


def choose(scene: Scene, taken: Counter[tuple[str, str]], rng: random.Random) -> list[Question]:
    """Take at most one question of each kind, :data:`TURNS` in all, the rarest answers first.

    Args:
        scene: What the image shows.
        taken: How often each answer of each kind was taken; it is added to.
        rng: Of the order, and of what is taken among equals.
    """
    found = list(questions(scene))
    chosen = []
    for kind in rng.sample(list(ANSWERS), len(ANSWERS)):
        rarest = min(taken[kind, answer] for answer in ANSWERS[kind])
        left = [one for one in found if one.kind == kind]
        left = [one for one in left if taken[kind, one.answer] <= rarest + SLACK]
        if left and len(chosen) < TURNS:
            one = min(rng.sample(left, len(left)), key=lambda one: taken[kind, one.answer])
            taken[kind, one.answer] += 1
            chosen.append(one)
    return chosen


def caption(scene: Scene) -> str:
    """Say what is where, in the order of reading: "top left: big red circle; ..."."""
    ordered = sorted(scene, key=lambda one: (one.row, one.column))
    return "; ".join(
        f"{ROWS[one.row]} {COLUMNS[one.column]}: {one.size} {one.name}" for one in ordered
    )


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw a scene, without smooth edges: every pixel is a thing's colour or white."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    cell = size / GRID
    for one in scene:
        half = SIZES[one.size] * cell / 2
        x, y = ((at + 0.5 + d) * cell for at, d in ((one.column, one.dx), (one.row, one.dy)))
        box = [round(value) for value in (x - half, y - half, x + half, y + half)]
        left, top, right, bottom = box
        color = COLORS[one.color]
        if one.shape == "circle":
            pen.ellipse(box, fill=color)
        elif one.shape == "square":
            pen.rectangle(box, fill=color)
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=color)
    return image


def draft(settings: ShapesSettings) -> Draft:
    """Plan the files of the set."""
    rng = random.Random(settings.seed)
    wanted = {"train": settings.images, "test": settings.test_images}
    scenes: dict[str, list[Scene]] = {part: [] for part in wanted}
    while any(len(scenes[part]) < count for part, count in wanted.items()):
        scene = draw_scene(rng)
        part = "test" if in_test(scene, settings.seed) else "train"
        if len(scenes[part]) < wanted[part]:
            scenes[part].append(scene)
    about = {}
    for part, drawn in scenes.items():
        taken: Counter[tuple[str, str]] = Counter()
        about[part] = [choose(scene, taken, rng) for scene in drawn]
    captions = [caption(scene) for scene in scenes["train"]]
    rows = {
        "align.jsonl": [
            _messages("train", number, [("", text)]) for number, text in enumerate(captions)
        ],
        "tune.jsonl": [
            # Last, so that no question can be answered from the words instead of the image.
            _messages("train", number, [*((one.text, one.answer) for one in few), (DESCRIBE, text)])
            for number, (few, text) in enumerate(zip(about["train"], captions, strict=True))
        ],
        "train.jsonl": _singles("train", about["train"]),
        "test.jsonl": _singles("test", about["test"]),
    }

    def images(folder: Path) -> None:
        for part, drawn in scenes.items():
            (folder / part).mkdir(parents=True)
            for number, scene in enumerate(drawn):
                draw(scene, settings.size).save(folder / part / f"{number}.png")

    return Draft.of_rows(rows, images)


def _image(part: str, number: int) -> str:
    return f"images/{part}/{number}.png"


def _messages(part: str, number: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn, (text, answer) in enumerate(pairs):
        parts: list[dict[str, str]] = [{"type": "text", "text": text}] if text else []
        if turn == 0:
            parts.insert(0, {"type": "image", "image": _image(part, number)})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"id": f"{part}-{number}", "messages": messages}


def _singles(part: str, about: Sequence[Sequence[Question]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{part}-{number}-{turn}",
            "image": _image(part, number),
            "question": one.text,
            "answer": one.answer,
            "kind": one.kind,
            "group": f"{part}-{number}",
        }
        for number, few in enumerate(about)
        for turn, one in enumerate(few)
    ]


def main(args: list[str] | None = None) -> int:
    """Make the set as the command line says; return the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shapes"), help="folder")
    parser.add_argument("--force", action="store_true", help="write over files of the same names")
    for name in ("images", "test_images", "size", "seed"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(ShapesSettings, name))
    given = parser.parse_args(args)
    own = {name: getattr(given, name) for name in ("images", "test_images", "size", "seed")}
    try:
        made = draft(ShapesSettings(**own))
        about = {"licence": "none: drawn by this script", "options": own}
        names = write_set(made, given.out, "shapes", about, given.force)
    except MMGraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in names:
        rows = f" ({made.rows[name]:,} rows)" if name in made.rows else ""
        print(f"wrote {given.out / name}{rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
