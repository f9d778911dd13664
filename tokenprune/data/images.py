"""Image files: where they may lie, and how they are opened."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from tokenprune.data.errors import first_line


def is_address(path: str) -> bool:
    """Whether an image is fetched; `file://` and chains such as `zip://a.png::/b.zip` are not."""
    return path.startswith(("https://", "http://", "hf://")) and "::" not in path


def check_inside(path: Path, roots: Sequence[Path], where: str, remedy: str = "") -> None:
    """Refuses absolute paths and `..` that lead out; links inside are the owner's own doing."""
    own = Path(os.path.abspath(path))
    if not any(own.is_relative_to(os.path.abspath(root)) for root in roots):
        raise ValueError(
            f"{where}: expected an image in the data's own folder, got {str(path)!r}. "
            f"Move it there{remedy}."
        )


def check_file(path: Path, where: str) -> None:
    """Refuses a path that leads nowhere."""
    if not path.is_file():
        raise ValueError(
            f"{where}: expected an image file, got {str(path)!r}, which does not exist. "
            "Check the path or remove the row."
        )


def open_image(source: Path | io.BytesIO, where: str) -> Image.Image:
    """An upright RGB image, read in full."""
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and others
        shown = source.name if isinstance(source, Path) else "its bytes"
        raise unreadable(shown, where, error) from error


def unreadable(shown: str, where: str, error: Exception) -> ValueError:
    """The error of an image that could not be opened."""
    reason = first_line(error).split("<_io", 1)[0].strip()
    return ValueError(
        f"{where}: expected an image that Pillow reads, got {shown}: {reason}. "
        "Replace the image or remove the row."
    )
