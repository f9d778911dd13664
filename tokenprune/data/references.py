"""Which images a row names, and where they may be.

A cell names an image by a path relative to the data, by an address, by the bytes of its file, or by
`{"bytes": ..., "path": ...}` as Hugging Face's data sets hold them, where the bytes come first; or
it is a list of such. Evaluation copies pictures into its results, so a data set may name no image
outside its own folder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.data.cells import is_missing
from tokenprune.data.errors import no_value, shown
from tokenprune.data.images import open_image, unreadable

#: Ends of files that hold moving pictures.
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")


@dataclass(frozen=True)
class Reference:
    """An image as a row names it: a path, or how many bytes are embedded."""

    path: str | None
    size: int | None = None


def cells_of(cell: Any) -> list[Any]:
    """The images of a cell that holds one, several or none."""
    return cell if isinstance(cell, list) else [] if is_missing(cell) else [cell]


def reference_of(cell: Any, key: str, where: str) -> Reference:
    """What one image's cell says.

    Raises:
        ValueError: It is no image, path or address.
    """
    if isinstance(cell, Reference):
        return cell
    if isinstance(cell, bytes):
        return Reference(None, len(cell))
    if isinstance(cell, Mapping) and {"bytes", "path"} & set(cell):
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, bytes | None) and isinstance(path, str | None):
            return Reference(path, None if data is None else len(data))
    if isinstance(cell, str | None):
        return Reference(cell)
    raise ValueError(
        f"{where}: expected the path of an image as {key!r}, got {shown(cell)}. "
        "Write one string, or a list of strings."
    )


def check_reference(
    reference: Reference,
    key: str,
    folder: Path,
    roots: Sequence[Path] | None,
    where: str,
    remedy: str = "",
) -> None:
    """Refuses an image that cannot be there, without opening it.

    Args:
        reference: The image.
        key: What the row calls it.
        folder: What its path is relative to.
        roots: Folders it may be in; None for any. Links inside are the owner's own doing.
        where: Names the row.
        remedy: Another way out than moving the image into a root.

    Raises:
        ValueError: It is missing, empty, a video, or elsewhere.
    """
    if reference.size is not None:
        if reference.size == 0:
            raise no_value(key, where, "an image of 0 bytes")
        return
    if reference.path is None or is_missing(reference.path):
        raise no_value(key, where, repr(reference.path))
    if reference.path.lower().endswith(VIDEOS):
        raise ValueError(
            f"{where}: expected an image as {key!r}, got the video {shown(reference.path)}. Videos "
            "are not read: give some of its frames as images, or remove the row."
        )
    if is_address(reference.path):
        return
    path = folder / reference.path
    own = os.path.abspath(path)
    if roots is not None and not any(
        Path(own).is_relative_to(os.path.abspath(root)) for root in roots
    ):
        raise ValueError(
            f"{where}: expected an image in the data's own folder, got {_path(path)}. "
            f"Move it there{remedy}."
        )
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        size = None
    if not size:
        problem = "does not exist" if size is None else "is empty"
        raise ValueError(
            f"{where}: expected an image file, got {_path(path)}, which {problem}. "
            "Check the path or remove the row."
        )


def _path(path: Path) -> str:
    """A path in an error: whole, but where it is none at all."""
    text = repr(str(path))
    return text if len(text) <= 400 else f"{text[:400]}..."


def is_address(path: str) -> bool:
    """Whether an image is fetched; `file://` and chains such as `zip://a.png::/b.zip` are not."""
    return path.startswith(("https://", "http://", "hf://")) and "::" not in path


def open_cell(cell: Any, folder: Path, where: str) -> Image.Image:
    """Opens an image whose reference was checked.

    Raises:
        ValueError: It cannot be fetched or read.
    """
    data: Any = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes):
        return open_image(io.BytesIO(data), where)
    path: str = cell["path"] if isinstance(cell, Mapping) else cell
    if not is_address(path):
        return open_image(folder / path, where)
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            fetched = io.BytesIO(file.read())
    except Exception as error:  # whatever the file systems behind an address make of it
        raise unreadable(path, where, error) from error
    return open_image(fetched, where)
