"""A row of each layout, files of each kind that hold it, and what is seen of rows again."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from mmgraft.data.images import open_image
from mmgraft.data.rows import Row

COLOURS = {"red.png": (255, 0, 0), "blue.png": (0, 0, 255), "green.png": (0, 255, 0)}
RED, BLUE, GREEN = ({"image": colour} for colour in COLOURS.values())
KINDS = ("json", "jsonl", "parquet", "tar", "saved")

Turns = list[tuple[str, list[Any]]]


def png(name: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), COLOURS[name]).save(file, kind, lossless=True, quality=100)
    return file.getvalue()


def users(role: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: who, {"from": "value", "role": "content"}[role]: text} for who, text in pairs]


def image(**more: Any) -> dict[str, Any]:
    return {"type": "image", **more}


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


WORDS = [("user", "is <image> as\n<image> bright?"), ("assistant", "no"), ("user", "so <image>")]
WORD_TURNS: Turns = [
    ("user", ["is ", RED, " as\n", BLUE, " bright?"]),
    ("assistant", ["no"]),
    ("user", ["so ", GREEN]),
]
FIRST = [("system", "Be kind."), ("user", "Which?"), ("assistant", "red")]
FIRST_TURNS: Turns = [
    ("system", ["Be kind."]),
    ("user", [RED, BLUE, "Which?"]),
    ("assistant", ["red"]),
]
PARTS = [{"role": "user", "content": [image(), text("and"), image(), text("a <image> tag")]}]
PARTS_TURNS: Turns = [("user", [RED, "and", BLUE, "a <image> tag"])]

ROWS: dict[str, tuple[str, dict[str, Any], Turns]] = {
    "swift": (
        "swift",
        {"messages": users("role", *WORDS), "images": list(COLOURS)},
        WORD_TURNS,
    ),
    "swift-one": (
        "swift",
        {"messages": users("role", ("user", "<image>")), "image": "blue.png"},
        [("user", [BLUE])],
    ),
    "swift-first": (
        "swift",
        {"messages": users("role", *FIRST), "images": ["red.png", "blue.png"]},
        FIRST_TURNS,
    ),
    "swift-words-in-text-parts": (
        "swift",
        {
            "messages": [{"role": "user", "content": [text("a <image> b")]}],
            "images": ["green.png"],
        },
        [("user", ["a ", GREEN, " b"])],
    ),
    "conversations-role": (
        "swift",
        {"conversations": users("role", *WORDS), "images": list(COLOURS)},
        WORD_TURNS,
    ),
    "conversations-role-first": (
        "swift",
        {"conversations": users("role", *FIRST), "images": ["red.png", "blue.png"]},
        FIRST_TURNS,
    ),
    "conversations-from": (
        "llava",
        {"conversations": users("from", *WORDS), "images": list(COLOURS)},
        WORD_TURNS,
    ),
    "alpaca": (
        "alpaca",
        {
            "system": "Be kind.",
            "instruction": "Which colour?",
            "input": "This: <image>",
            "output": "green",
            "history": [["<image>?", "red"], ["And now?", "still"]],
            "images": ["red.png", "green.png"],
        },
        [
            ("system", ["Be kind."]),
            ("user", [RED, "?"]),
            ("assistant", ["red"]),
            ("user", ["And now?"]),
            ("assistant", ["still"]),
            ("user", ["Which colour?\nThis: ", GREEN]),
            ("assistant", ["green"]),
        ],
    ),
    "alpaca-first": (
        "alpaca",
        {"instruction": "Which?", "input": "", "output": "red", "images": ["red.png"]},
        [("user", [RED, "Which?"]), ("assistant", ["red"])],
    ),
    "cauldron": (
        "cauldron",
        {
            "images": ["blue.png", "red.png"],
            "texts": [
                {"user": "Both?", "assistant": "Yes.", "source": "x"},
                {"user": "And?", "assistant": "No.", "source": "y"},
            ],
            "source": "vqav2",
            "relevance_ratings": [4, 5],
            "relevance_min": 4,
        },
        [
            ("user", [BLUE, RED, "Both?"]),
            ("assistant", ["Yes."]),
            ("user", ["And?"]),
            ("assistant", ["No."]),
        ],
    ),
    "trl-parts": (
        "trl",
        {
            "prompt": PARTS,
            "completion": [{"role": "assistant", "content": [text("blue")]}],
            "images": ["red.png", "blue.png"],
        },
        [*PARTS_TURNS, ("assistant", ["blue"])],
    ),
    "trl-strings": (
        "trl",
        {"prompt": "Which?", "completion": "green", "images": ["green.png"]},
        [("user", [GREEN, "Which?"]), ("assistant", ["green"])],
    ),
    "trl-messages": (
        "messages",
        {"messages": PARTS, "images": ["red.png", "blue.png"]},
        PARTS_TURNS,
    ),
    "trl-one-image": (
        "messages",
        {"messages": [{"role": "user", "content": [image()]}], "image": "green.png"},
        [("user", [GREEN])],
    ),
}


TABLE = {
    "id": "t1",
    "pic": "green.png",
    "q": "Which colour?",
    "given": ["lime", "green", "green"],
    "choices": ["red", "green"],
    "split_name": "val",
}
COLUMNS = {"image": "pic", "question": "q", "answer": "given"}


def with_images(folder: Path) -> Path:
    """Put the images of all rows into a folder."""
    for name in COLOURS:
        (folder / name).write_bytes(png(name))
    return folder


def _inside(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table, with its images as ``datasets`` keeps them."""

    def held(value: Any) -> Any:
        if isinstance(value, list):
            return [held(one) for one in value]
        return {"bytes": png(value), "path": None} if value in COLOURS else value

    return {key: held(one) if key.startswith(("image", "pic")) else one for key, one in row.items()}


def written(folder: Path, row: dict[str, Any], kind: str) -> Path:
    """Write a row to a file of some kind, twice."""
    path = folder / f"rows.{kind}"
    if kind in ("json", "jsonl"):
        lines = [json.dumps(row)] * 2
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number in range(2):
                members = {f"{number}.json": json.dumps(row).encode()}
                members |= {f"{number}.{name}": png(name) for name in COLOURS}
                for name, data in members.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        from datasets import Dataset

        table = Dataset.from_list([_inside(row)] * 2)
        table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    return path


def seen(row: Row) -> Turns:
    """Return roles and contents, each image as the colour of its pixels."""

    def part(one: Any) -> Any:
        if one["type"] == "text":
            return one["text"]
        return {"image": open_image(one["image"], row.where).getpixel((1, 1))}

    turns: Turns = []
    for message in row.messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part(one) for one in content]
        turns.append((message["role"], parts))
    return turns
