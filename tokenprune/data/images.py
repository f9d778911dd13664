"""How a picture is opened, by data sets and by `tokenprune show`.

Pictures become upright RGB with 8 bits a channel. Pillow's own conversion clips grey levels of more
than 8 bits to white, so these are scaled here: by the range of their file, never by what a picture
happens to hold. Otherwise its rules hold: transparent pixels keep the colour that is stored under
them, and of several frames or pages the first is read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tokenprune.data.errors import first_line

# Formats whose 16-bit grey levels go from 0 to 65535, whatever Pillow calls their mode.
_SIXTEEN = ("PNG", "TIFF", "JPEG2000", "PPM")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2


def read_image(source: Path | io.BytesIO) -> Image.Image:
    """An upright RGB image, read in full.

    Raises:
        ValueError: Why it cannot be read.
    """
    try:
        with Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
            plain = _eight_bits(upright, image)
            if plain.mode == "P":  # else Pillow warns of what is transparent in it
                plain = plain.convert("RGBA")
            return plain.convert("RGB")
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and others
        raise ValueError(first_line(error).split("<_io", 1)[0].strip()) from error


def check_scale(value: object) -> float:
    """`data.image_scale`, a share of the pixels.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"data.image_scale: expected a share of the pixels in (0, 1], got {value!r}. "
            "Set data.image_scale=0.25 for half of each side."
        )
    return float(value)


def shrink(image: Image.Image, scale: float) -> Image.Image:
    """The image with a share of its pixels: both sides by the root of it, to whole pixels.

    Args:
        image: Any.
        scale: In (0, 1]; 1 gives the image itself.
    """
    if scale == 1:
        return image
    width, height = (max(1, round(side * math.sqrt(scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def open_image(source: Path | io.BytesIO, where: str) -> Image.Image:
    """The same for the row that `where` names.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return read_image(source)
    except ValueError as error:
        raise unreadable(
            source.name if isinstance(source, Path) else "its bytes", where, error
        ) from error


def num_pixels(source: Path, where: str) -> int:
    """Pixels of a picture, by the header of its file.

    Raises:
        ValueError: It is no picture; names its place.
    """
    try:
        with Image.open(source) as image:
            return image.width * image.height
    except (OSError, ValueError) as error:
        raise unreadable(source.name, where, error) from error


def unreadable(name: str, where: str, error: Exception) -> ValueError:
    """The error of an image that could not be opened."""
    return ValueError(
        f"{where}: expected an image that Pillow reads, got {name}: {first_line(error)}. "
        "Replace the image or remove the row."
    )


def _eight_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Grey levels that need more than 8 bits as 8; other images as they are.

    Args:
        image: The picture.
        file: As it was opened, with the format and the tags of its file.

    Raises:
        ValueError: It is not known which level is white.
    """
    tags: Mapping[int, Any] = getattr(file, "tag_v2", {})
    if _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise ValueError("signed grey levels, whose black and white are unknown; save 8 or 16 bits")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    if image.mode == "F":
        # Pictures of floating-point numbers go from 0 to 1; some are kept as 0 to 255.
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise ValueError(
                f"floating-point levels from {levels.min():g} to {levels.max():g}, of which it is "
                "unknown what is white; scale them to 0 to 1, or save 8 or 16 bits"
            )
        white = 1.0
    elif file.format in _SIXTEEN and (image.mode != "I" or file.format in ("PNG", "PPM")):
        white = 2.0 ** int(np.atleast_1d(tags.get(_BITS, 16))[0]) - 1
    else:
        raise ValueError(
            f"{file.format} levels of mode {image.mode} from {levels.min()} to {levels.max()}, of "
            "which it is unknown what is white; save 8 or 16 bits"
        )
    levels = np.rint(levels * (255 / white))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns 8 bits itself
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))
