"""A folder of stamps as Tux Paint's package has them, and photographs to paste them on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

MARGIN = 6
"""Clear pixels around each cut-out stamp."""

COLORS = ("red", "green", "blue", "gold", "purple", "orange")
THINGS = ("ball", "cup", "hat", "leaf", "key")


def make_stamps(folder: Path) -> Path:
    """30 cut-out stamps of 40 x 30 pixels, and some that cannot be grounded.

    Those are a letter, one without a clear pixel, one with a long caption, one too narrow, a
    mirrored second version without a caption, and a text whose picture is drawn as SVG.
    """
    for number, color in enumerate(COLORS):
        for thing in THINGS:
            path = folder / ("food" if number % 2 else "animals/birds") / f"{color}_{thing}.png"
            save_stamp(path, f"A {color} {thing}.", (40, 30), color)
    save_stamp(folder / "symbols/a.png", "The letter A.", (30, 30), "black")
    save_stamp(folder / "town/sign.png", "A sign that says a great many things.", (30, 30), "red")
    save_stamp(folder / "town/needle.png", "A needle.", (40, 4), "gray")
    (folder / "town").mkdir(exist_ok=True)
    Image.new("RGB", (30, 30), "gray").save(folder / "town/wall.png")
    (folder / "town/wall.txt").write_text("A wall.\n")
    Image.new("RGBA", (30, 30), "gray").save(folder / "town/sign_mirror.png")
    (folder / "town/drawn.txt").write_text("A drawing.\n")
    return folder


def save_stamp(path: Path, caption: str, size: tuple[int, int], color: str) -> None:
    """A filled ellipse with a clear margin, and its caption with a translation below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    picture = Image.new("RGBA", (width + 2 * MARGIN, height + 2 * MARGIN), (0, 0, 0, 0))
    box = (MARGIN, MARGIN, MARGIN + width - 1, MARGIN + height - 1)
    ImageDraw.Draw(picture).ellipse(box, fill=color)
    picture.save(path)
    path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas.\n", encoding="utf-8")


def make_photographs(folder: Path) -> Path:
    """Two: one white and one black, in two formats and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (120, 90), "white").save(folder / "white.png")
    Image.new("L", (80, 100), 0).save(folder / "black.jpg")
    return folder
