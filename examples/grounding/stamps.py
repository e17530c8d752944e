"""Read Tux Paint's stamps: small images with a caption each, most of them cut out.

They come from the folder of Debian's package tuxpaint-stamps-default (GPL-2): images made of them
are not to be passed on without its notices. Beside ``owl.png`` stands ``owl.txt``, whose first line
is the caption in English. Stamps drawn as SVG are left out, because nothing here draws them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmgraft.errors import UsageError

SOURCE = Path("/usr/share/tuxpaint/stamps")
PACKAGE = "tuxpaint-stamps-default"

SYMBOLS = "symbols"
"""The category of letters, digits and coins: printed signs rather than things."""

SMALLEST = 64
"""Side in pixels of the smallest image that is made of stamps."""

OPAQUE = 32
"""Alpha from which a pixel belongs to a stamp, of 255."""

_ARTICLE = re.compile(r"(?:an?|the|some)\s+(\S.*)", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")


@dataclass(frozen=True)
class Stamp:
    """One stamp and its caption.

    Attributes:
        name: Path below the source, without its ending: ``food/fruit/apple_red``.
        path: The file.
        caption: The English one, as it stands there.
    """

    name: str
    path: Path
    caption: str

    @property
    def category(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]

    @property
    def phrase(self) -> str | None:
        """The caption as a sentence refers to it, see :func:`phrase_of`."""
        return phrase_of(self.caption)


def phrase_of(caption: str, words: int = 4) -> str | None:
    """Turn a short caption into the way a sentence refers to it: "A red apple." is "the red apple".

    Args:
        caption: One that begins with an article or "some".
        words: The most there may be after the article.

    Returns:
        None for a caption that is longer, or is no plain noun phrase.
    """
    found = _ARTICLE.fullmatch(caption.strip().rstrip(".!").strip())
    if found is None:
        return None
    rest = " ".join(re.sub(r"[“”\"‘’]", " ", found[1]).split())
    if len(rest.split()) > words or not _WORDS.fullmatch(rest):
        return None
    return f"the {rest}"


def read_stamps(source: Path) -> list[Stamp]:
    """Return every captioned PNG below a folder, in the order of names.

    Raises:
        UsageError: There is no such folder, or no stamp in it.
    """
    stamps = []
    for path in sorted(source.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file():  # a mirrored second version of a stamp has none
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        if caption and "=" not in caption:
            name = path.relative_to(source).with_suffix("").as_posix()
            stamps.append(Stamp(name, path, caption))
    if not stamps:
        raise UsageError(
            f"no stamps in {source}: install Debian's package {PACKAGE} (apt-get install "
            f"{PACKAGE}), or give the folder of its stamps with --source"
        )
    return stamps


def open_stamp(stamp: Stamp) -> Image.Image:
    """Open a stamp as RGBA.

    Raises:
        UsageError: The file cannot be read as an image.
    """
    try:
        with Image.open(stamp.path) as opened:
            return opened.convert("RGBA")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the stamp {stamp.path} cannot be read ({error}); install {PACKAGE} again"
        ) from error


def cut_out(stamp: Stamp, longest: int) -> Image.Image | None:
    """Return a stamp without the clear margin around it.

    Args:
        stamp: Any.
        longest: Its longer side is made at most this many pixels.

    Returns:
        An RGBA image whose every edge has a pixel of the stamp; None for one that fills its
        whole rectangle, so that it is not cut out.

    Raises:
        UsageError: The file cannot be read as an image.
    """
    image = open_stamp(stamp)
    if image.getchannel("A").getextrema()[0] == 255:
        return None
    image = _trimmed(image)
    if image is None:
        return None
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _trimmed(image)


def _trimmed(image: Image.Image) -> Image.Image | None:
    visible = [255 * (alpha >= OPAQUE) for alpha in range(256)]
    box = image.getchannel("A").point(visible).getbbox()
    return None if box is None else image.crop(box)


def split_by_phrase(
    stamps: Iterable[Stamp], share: float, seed: int
) -> tuple[list[Stamp], list[Stamp]]:
    """Split stamps into those to train on and those to test on, no phrase in both.

    Args:
        stamps: Those with a phrase.
        share: Of the phrases that are kept for the test.
        seed: Seed of the phrases that are chosen.
    """
    found = list(stamps)
    phrases: Sequence[str] = sorted({_key(stamp) for stamp in found})
    kept = set(random.Random(seed).sample(phrases, round(share * len(phrases))))
    train = [stamp for stamp in found if _key(stamp) not in kept]
    return train, [stamp for stamp in found if _key(stamp) in kept]


def _key(stamp: Stamp) -> str:
    return (stamp.phrase or stamp.caption).lower()
