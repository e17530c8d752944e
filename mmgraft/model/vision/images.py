"""Image files and PIL images of any mode, to plain RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmgraft.errors import UsageError


def load_image(path: str | Path) -> Image.Image:
    """Read an image file whole and make it RGB, turned upright as its EXIF data says.

    Raises:
        UsageError: No such file, not an image, a broken one, or one so large that decoding it
            could exhaust the memory (Pillow's limit, 89 million pixels); names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"Image file not found: {path}. Check the path (relative ones count from the folder of "
            "the data file) or leave the row out."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UsageError(
            f"Image file too large: {path} ({error}). Scale it down before using it."
        ) from error
    # Decoders raise nearly anything on broken bytes: SyntaxError, struct.error, zlib.error ...
    except Exception as error:
        raise UsageError(
            f"Image file cannot be read: {path} ({type(error).__name__}: {error}). Replace it with "
            "a PNG, JPEG, WebP or another format that Pillow reads, or leave the row out."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # convert("RGB") would clip at 255 and turn every brighter pixel white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
