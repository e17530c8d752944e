"""Parts of the recorded grafts: tiny bases, one tower, mixed rows, and runs on them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from tiny import save_base
from tiny_towers import picture, save_tower
from unchanged.inside import command_line

METHODS: dict[str, tuple[str, list[str]]] = {
    # Base, and options of `mmgraft graft`. Tied tables, a sliding window, grouped heads.
    "iaa": ("qwen2", ["--layers", "0,2", "--structure", "c"]),
    "wings": ("llama", ["--rank", "4", "--heads", "2", "--max-length", "120"]),
    "llava": ("gemma3", []),
}
VISION = ["--projector-norm", "--feature-layer", "-2"]
_SIZES = {
    # What bitsandbytes' kernel for 4-bit weights on a CPU takes: 64 into a layer, 32 out of it.
    "llama": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64},
    "gemma3": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64},
}

_LONG = "Look at the square in the picture. Which colour has it"


def command(*arguments: object, code: int = 0) -> str:
    """Run a command line in this process, which must end with `code`; gives what it said."""
    said, out = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        ended = command_line([str(one) for one in arguments])
    assert ended == code, f"mmgraft {' '.join(map(str, arguments))}: {ended}\n{said.getvalue()}"
    return said.getvalue()


def make_parts(folder: Path) -> Path:
    """Bases, a tower of 4 patches, and rows, in `folder`."""
    for base, _ in METHODS.values():
        save_base(folder / base, base, **_SIZES.get(base, {}))
    save_tower(folder / "tower", "clip", image_size=16)
    make_rows(folder)
    return folder


def make_graft(parts: Path, run: Path, method: str, *options: str) -> Path:
    """A fresh graft."""
    base, own = METHODS[method]
    given = ["graft", parts / base, "--method", method, "--vision", parts / "tower"]
    command(*given, *VISION, *own, *options, "--out", run)
    return run


def make_rows(folder: Path) -> None:
    """`rows.jsonl` of messages, `llava.json` of LLaVA's rows, and their pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(6):
        size = (16 + 9 * number, 40 - 5 * number)
        picture(*size, which=number % 2).save(images / f"{number}.png")
    lines = [json.dumps({"id": f"m{at}", "messages": row}) for at, row in enumerate(_messages())]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "llava.json").write_text(json.dumps(_llava()))


def write_recipe(
    run: Path, parts: Path, method: str, stages: list[dict[str, Any]], **more: Any
) -> None:
    """`recipe.yaml` of a run: both files of rows, every step logged."""
    images = str(parts / "images")
    data = [
        {"path": str(parts / "rows.jsonl"), "images": images},
        {"path": str(parts / "llava.json"), "images": images, "weight": 1.5},
    ]
    recipe = {
        "name": "unchanged",
        "method": method,
        "precision": "fp32",
        "seed": 7,
        "text_rows": "graft",
        "log_every": 1,
        "data": data,
        "stages": stages,
        **more,
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def _picture(number: int) -> dict[str, str]:
    return {"type": "image", "image": f"{number}.png"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _messages() -> list[list[dict[str, Any]]]:
    """Pictures of one row, two in one turn, two in two turns; text alone, short, long, in turns."""
    one = [
        [_turn("user", [_picture(at), _text(_LONG[: 20 + 12 * at] + "?")]),
         _turn("assistant", ["Blue.", "It is green", "red, and a circle"][at])]
        for at in range(3)
    ]  # fmt: skip
    together = [
        _turn("user", [_picture(3), _text("How does it differ from "), _picture(4), _text("?")]),
        _turn("assistant", "The other is taller."),
    ]
    in_turns = [
        _turn("system", "Be short."),
        _turn("user", [_text("What is this? "), _picture(5)]),
        _turn("assistant", "A square."),
        _turn("user", [_picture(0), _text("And this one?")]),
        _turn("assistant", "No square."),
    ]
    then_text = [
        _turn("user", [_picture(1), _text("Colour?")]),
        _turn("assistant", "Grey."),
        _turn("user", "Are you sure?"),
        _turn("assistant", "Yes, it is grey."),
    ]
    texts = [
        [_turn("user", "One, two?"), _turn("assistant", "Three.")],
        [_turn("user", "What does the dog mind? " * 2), _turn("assistant", "Nothing at all.")],
        [
            _turn("user", "An <image> tag?"),
            _turn("assistant", "Text."),
            _turn("user", "Why?"),
            _turn("assistant", "No picture came with it."),
        ],
    ]
    return [*one, together, in_turns, then_text, *texts]


def _llava() -> list[dict[str, Any]]:
    """Rows as LLaVA writes them, of one picture, of two, and of none."""

    def row(index: str, images: list[str], *values: str) -> dict[str, Any]:
        speakers = ("human", "gpt")
        turns = [{"from": speakers[at % 2], "value": value} for at, value in enumerate(values)]
        pictures = {} if not images else {"image": images if len(images) > 1 else images[0]}
        return {"id": index, **pictures, "conversations": turns}

    return [
        row("l0", ["2.png"], "<image>\nDescribe it.", "A circle and a rectangle."),
        row("l1", ["4.png", "5.png"], "<image> and <image>: alike?", "No.", "Why?", "Size."),
        row("l2", [], "Say nothing.", "So be it."),
        row("l3", ["3.png"], "Is it blue?\n<image>", "It is."),
    ]
