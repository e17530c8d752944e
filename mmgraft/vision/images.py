"""Image files and PIL images of any mode, to plain RGB.

A file may lie inside a file of many: a member of a tar, a cell of a table.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmgraft.errors import UsageError, brief
from mmgraft.frozen import Frozen


class StoredImage(Frozen):
    """Place of an image's bytes, which are read on demand.

    Two are the same where their names are.

    Attributes:
        name: As an error says it: "shard.tar/0001.jpg".
        data: The bytes, or a buffer of a file that is mapped into memory; None: they are in
            ``file``.
        file: That holds them.
        offset: Of the first byte in ``file``.
        size: In bytes.
    """

    name: str
    data: Any = field(default=None, compare=False, repr=False)
    file: str = field(default="", compare=False)
    offset: int = field(default=0, compare=False)
    size: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: The file cannot be read; EOFError, if it has become shorter.
        """
        if self.data is not None:
            return bytes(self.data)
        with Path(self.file).open("rb") as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            raise EOFError(f"{self.file} is shorter than it was")
        return found

    def open(self) -> io.BytesIO:
        """Return the bytes as a file."""
        return io.BytesIO(self.read())

    def digest(self) -> str:
        """SHA-256 of the bytes, which is the same in whatever file they lie."""
        return hashlib.sha256(self.read()).hexdigest()

    def __str__(self) -> str:
        return self.name


Fault = Literal["missing", "broken", "enormous", "outside"]

#: Last bytes of a whole file. One that ends otherwise may be whole, or cut short.
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}

_DRAWINGS = ("EPS", "WMF")

#: Formats whose head says the size and how the image is turned.
_HEADS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

#: Modes whose every value has a colour; of others the pixels are looked at.
_PLAIN = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV")

#: Largest ratio of an image's sides: resized by its short side, an image grows as much.
_LONGEST = 200

T = TypeVar("T")


class BadImage(UsageError):
    """An image that cannot be used.

    Attributes:
        fault: In one word.
    """

    def __init__(self, message: str, fault: Fault = "broken") -> None:
        super().__init__(message)
        self.fault: Fault = fault


def load_image(path: str | Path | StoredImage) -> Image.Image:
    """Read an image file whole and make it RGB, turned upright as its EXIF data says.

    Raises:
        BadImage: No such file, not an image, a broken one, or one so large that decoding it
            could exhaust the memory (Pillow's limit, 89 million pixels); names the file.
    """
    return read_file(path, decode)


def look(file: IO[bytes]) -> tuple[int, int]:
    """Width and height of an image file, without decoding it where its two ends are in order.

    The head says that it is an image, and how large; the end, whether it was cut short. Only a
    file whose end is odd, or that ends in no known way, is decoded. Bytes that are wrong in between
    are not seen: only ``load_image`` finds them.
    """
    with _opened(file) as image:
        size, ending = image.size, _ENDS.get(str(image.format))
        if image.mode not in _PLAIN:
            ending = None
    file.seek(-min(16, file.seek(0, os.SEEK_END)), os.SEEK_END)
    if ending is None or not file.read().endswith(ending):
        file.seek(0)
        decode(file)
    return size


def size_in(file: IO[bytes]) -> tuple[int, int]:
    """Width and height of an image's bytes as they are shown, decoded only where heads may lie."""
    with _opened(file) as image:
        if image.format not in _HEADS or (image.format == "PNG" and _says_more(file)):
            image.load()
            return ImageOps.exif_transpose(image).size
        # Not its own getexif: that of a PNG reads the pixels.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        width, height = image.size
        return (height, width) if turn in (5, 6, 7, 8) else (width, height)


def _says_more(file: IO[bytes]) -> bool:
    """Return whether a PNG has chunks behind its pixels, which may say how it is turned."""
    before = file.tell()
    file.seek(8)
    kind, pixels = b"", False
    while len(head := file.read(8)) == 8 and kind != b"IEND":
        kind = head[4:]
        if pixels and kind not in (b"IDAT", b"IEND"):
            break
        pixels = kind == b"IDAT"
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(before)
    return pixels and kind not in (b"IDAT", b"IEND")


def decode(file: IO[bytes]) -> Image.Image:
    """Return an image's bytes as upright RGB; raises whatever the decoder does, for a bomb
    Pillow's.
    """
    with _opened(file) as image:
        image.load()
        return to_rgb(image)


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """Yield an image whose pixels are not read yet; one of too many of them, or a program, is
    refused.

    Pillow hands PostScript to another program, which would do what a stranger's file says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if image.format in _DRAWINGS:
                raise ValueError(f"a drawing ({image.format}), not an image")
            refuse_thin(image.size)
            yield image


def refuse_thin(size: tuple[int, int]) -> None:
    """Raise BadImage for an image of a size that a resize would make enormous."""
    if max(size) > _LONGEST * min(size):
        raise BadImage(
            f"{size[0]} x {size[1]} pixels are more than {_LONGEST} times as long as wide, and a "
            "vision tower's resize would make gigabytes of it; crop it",
            "enormous",
        )


def read_file(path: str | Path | StoredImage, read: Callable[[IO[bytes]], T]) -> T:
    """Return what a reader makes of an image file.

    Raises:
        BadImage: Naming the file, and what is wrong with it.
    """
    path = path if isinstance(path, StoredImage) else Path(path)
    if isinstance(path, Path) and not os.path.isfile(path):  # which no name is too long for
        raise BadImage(
            f"Image file not found: {brief(path)}. Check the path (relative ones count from the "
            f"folder of the data file{path_hint(str(path))}) or leave the row out.",
            "missing",
        )
    try:
        with path.open() if isinstance(path, StoredImage) else path.open("rb") as file:
            return read(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(
            f"Image file too large: {path} ({error}). Scale it down before using it.", "enormous"
        ) from error
    except BadImage as error:
        raise BadImage(f"Image file {path}: {error}", error.fault) from error
    # Decoders raise nearly anything on broken bytes: SyntaxError, struct.error, zlib.error ...
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition(" <_io.")[0]
        raise BadImage(
            f"Image file cannot be read: {path} ({why}). Replace it with a PNG, JPEG, "
            "WebP or another format that Pillow reads, or leave the row out."
        ) from error


def path_hint(path: str) -> str:
    """Say what is wrong with a path of Windows where there is no such file."""
    hints = {"\\": "write / in place of each backslash", "~": "write your home folder for ~",
             "%": "write the letter itself for each %"}  # fmt: skip
    return "".join(f"; {hint}" for sign, hint in hints.items() if sign in path)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright RGB: transparency over white, other ranges scaled to 8 bits.

    Raises:
        BadImage: Its values have no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_bytes_of(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _bytes_of(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey values to bytes by the range they are in: 0 to 1 (of floats), 8 bits or 16 bits.

    ``convert("RGB")`` would clip at 255 and turn every brighter pixel white, or all of them black.
    """
    low, high = float(values.min()), float(values.max())
    whole = mode != "F" or bool(np.all(values == np.floor(values)))
    if low >= 0 and high <= 1 and mode == "F":
        scaled = np.rint(values * 255.0)
    elif low >= 0 and high <= 255 and whole:
        scaled = values
    elif low >= 0 and high <= 65535 and whole:
        scaled = values // 257
    else:  # nan too
        raise BadImage(
            f"grey values from {low:g} to {high:g} (mode {mode}) are neither 0 to 1 nor whole "
            "numbers of 8 or 16 bits; scale them to 0 to 255 and save the image as PNG"
        )
    return scaled.astype(np.uint8)
