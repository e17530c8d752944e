"""Images of a row: from a path, a data URI or PIL, with errors that name the row."""

import base64
import os
import re
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from mmgraft.errors import UsageError, brief
from mmgraft.vision.images import (
    BadImage,
    StoredImage,
    decode,
    look,
    read_file,
    refuse_thin,
    size_in,
    to_rgb,
)

T = TypeVar("T")

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def open_images(images: Sequence[Any], where: str) -> list[Image.Image]:
    """Open what image parts hold.

    Raises:
        UsageError: Naming the row and the image, for one that is missing, broken or on the web.
    """
    return [open_image(image, where) for image in images]


def open_image(image: Any, where: str) -> Image.Image:
    """Open one path, data URI, stored or PIL image as RGB; see ``open_images``."""
    return _read(image, where, decode, to_rgb)


def check_image(image: Any, where: str) -> tuple[int, int]:
    """Width and height of what an image part holds, looked at and not decoded; see ``look``.

    Raises:
        UsageError: As ``open_image``.
    """
    return _read(image, where, look, lambda i: to_rgb(i).size)


def size_of(image: Any, where: str) -> tuple[int, int]:
    """Width and height of what ``open_image`` gives, from the head of a file; no pixel is decoded.

    Raises:
        UsageError: As ``open_image``, where the head is wrong.
    """
    return _read(image, where, size_in, lambda i: to_rgb(i).size)


def image_bytes(image: Any, where: str) -> bytes:
    """Return the bytes of a path, a data URI or a stored image, as they are.

    Raises:
        UsageError: As ``open_image``, for a kind of image that has none.
    """
    return _read(image, where, lambda file: file.read(), lambda opened: opened.tobytes())


def _read(
    image: Any, where: str, file: Callable[[IO[bytes]], T], opened: Callable[[Image.Image], T]
) -> T:
    """Return what a reader of the image's kind gives; an error names the row as well."""
    try:
        if isinstance(image, Image.Image):
            refuse_thin(image.size)
            return opened(image)
        if isinstance(image, StoredImage):
            return read_file(image, file)
        if not isinstance(image, str | os.PathLike):
            raise UsageError(f"{where}: an image of type {type(image).__name__}; give a path")
        name = os.fspath(image)
        if is_data_uri(name):
            return _from_data_uri(name, where, file)
        refuse_web(name, where)
        return read_file(path_of(name), file)
    except BadImage as error:
        raise BadImage(f"{where}: {error}", error.fault) from error
    except (ValueError, OSError) as error:  # a PIL image whose file is gone, or of an odd mode
        raise BadImage(f"{where}: the image cannot be read ({error}); give another") from error


def path_of(name: str) -> str:
    """Return the path that a ``file://`` address or a plain path names."""
    if name[:7].lower() != "file://":
        return name
    decoded = url2pathname(urlsplit(name).path)
    return decoded if os.path.isfile(decoded) else name[7:]


def is_data_uri(name: str) -> bool:
    """Return whether an image is given as its own bytes in text."""
    return name[:5].lower() == "data:"


def refuse_web(name: str, where: str) -> None:
    """Raise UsageError for an image that is an address, not a file."""
    scheme, colon, _ = name.partition("://")
    if colon and scheme.lower() != "file":
        raise UsageError(
            f"{where}: the image is an address ({brief(name)}); download it first and give the file"
        )


def _from_data_uri(uri: str, where: str, read: Callable[[IO[bytes]], T]) -> T:
    head = _DATA_URI.match(uri)
    if head is None:
        raise UsageError(f"{where}: a data URI ({uri[:40]}...) not in base64; write ;base64, in it")
    try:
        data = base64.b64decode("".join(uri[head.end() :].split()), validate=True)
    except ValueError as error:
        raise BadImage(
            f"a data URI ({uri[:40]}...) that is no image ({error}); encode the file again"
        ) from error
    return read_file(StoredImage(f"a data URI ({uri[:40]}...)", data), read)
