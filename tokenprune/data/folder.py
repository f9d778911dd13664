"""Questions and conversations about images, from a local file of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.data.cells import is_missing
from tokenprune.data.checked import CheckedRows, Content
from tokenprune.data.errors import no_value, shown
from tokenprune.data.files import CSV, form_of, read_rows
from tokenprune.data.images import num_pixels, open_image
from tokenprune.data.references import cells_of, check_reference, is_address, reference_of
from tokenprune.data.rows import Columns, images_of, turns_of
from tokenprune.data.sample import Turn

_COLUMNS = {"image", "images", "question", "answer", "answers", "conversations", "messages"}


class FolderDataset(CheckedRows):
    """A JSON list, JSON lines or CSV: questions or conversations about images in a folder.

    A row has `image` or `images` (a path, or several), what `tokenprune.data.rows` describes and,
    if wanted, an `id`. Rows without an image are for training. Texts are read as they are written.

    Args:
        path: The .json, .jsonl or .csv file, or a folder that holds exactly one of JSON.
        allow_outside: Opens images outside the folder, too: absolute paths, and `..`.
        image_folder: What image paths are relative to; None for the file's own folder.
        turns: See `CheckedRows`.
        skip_bad: See `CheckedRows`.

    Raises:
        ValueError: The file is missing or empty, or a row is not as expected.
    """

    def __init__(
        self,
        path: str | Path,
        allow_outside: bool = False,
        *,
        image_folder: str | Path | None = None,
        turns: str = "all",
        skip_bad: bool = False,
    ) -> None:
        self.path = _data_file(Path(path).expanduser())
        super().__init__(str(self.path), turns, skip_bad, called=self.path.name)
        self.folder = self.path.parent
        if image_folder is not None:
            self.folder = Path(image_folder).expanduser()
            if not self.folder.is_dir():
                raise ValueError(
                    f"data.image_folder: expected a folder, got {str(image_folder)!r}, which is "
                    "none. Check the path."
                )
        self.allow_outside = allow_outside
        self._rows: dict[int, tuple[tuple[Turn, ...], tuple[Path, ...]]] = {}
        written = form_of(self.path.name).end in CSV
        for number, row in read_rows(self.path, self.path.name):
            if written and isinstance(row, Mapping):
                _check_header(row, self.path.name)
            self._look(number, row, "id")
        what = "a line of columns, then rows" if written else "JSON objects"
        self._finish(f"Write {what} with image, question and answer.")

    def _check(self, place: int, row: Mapping[str, Any], where: str) -> tuple[Sequence[Turn], int]:
        talks = _filled(row, "conversations", "messages")
        if talks is None and is_missing(row.get("question")):
            talks = next((key for key in ("conversations", "messages") if key in row), None)
        answer = _filled(row, "answer", "answers") or "answer"
        accepted = "answers" if answer == "answer" else None
        columns = Columns("question", answer, talks, _filled(row, "kind"), accepted)
        turns = turns_of(row, columns, where)
        roots = None if self.allow_outside else [self.folder]
        images = []
        own = _images(row, where, needed=talks is None)
        for cell in images_of(row, columns, own, "image", where):
            reference = reference_of(cell, "image", where)
            if reference.path is not None and is_address(reference.path):
                raise ValueError(
                    f"{where}: expected an image file, got the address {shown(reference.path)}. "
                    "Download the image, or set data=hub."
                )
            check_reference(
                reference, "image", self.folder, roots, where, ", or set data.allow_outside=true"
            )
            images.append(self.folder / str(reference.path))
        self._rows[place] = (turns, tuple(images))
        return turns, len(images)

    def sizes(self) -> list[int]:
        """Pixels of each sample's images, by their files' headers: no image is decoded."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._size, self._samples))

    def _size(self, sample: tuple[int, int]) -> int:
        place, _ = sample
        return sum(num_pixels(image, self._where(place)) for image in self._rows[place][1])

    def _content(self, place: int, where: str) -> Content:
        turns, images = self._rows[place]
        return turns, [partial(open_image, image, where) for image in images]


def _check_header(row: Mapping[str, Any], source: str) -> None:
    """Refuses a table whose first line names no column of ours: it is a row, or cut elsewhere.

    Raises:
        ValueError: So it is.
    """
    if not _COLUMNS & set(row):
        raise ValueError(
            f"{source}: expected a first line that names the columns image, question and answer, "
            f"got {shown(list(row))}. Write it above the rows."
        )


def _filled(row: Mapping[str, Any], *keys: str) -> str | None:
    """The first of some columns that a row has filled."""
    return next((key for key in keys if not is_missing(row.get(key))), None)


def _images(row: Mapping[str, Any], where: str, needed: bool) -> list[Any]:
    """The cells of a row's images."""
    found = {key: cells for key in ("image", "images") if (cells := cells_of(row.get(key)))}
    own, *more = found.values() or [[]]
    if more and more != [own]:
        raise ValueError(
            f"{where}: expected image or images, got both: {shown(row['image'])} and "
            f"{shown(row['images'])}. Leave one out."
        )
    if needed and not own:
        key = "images" if "images" in row and "image" not in row else "image"
        got = f"only the keys {sorted(row)}" if key not in row else repr(row[key])
        raise no_value(key, where, got)
    return own


def _data_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() in (".parquet", ".arrow"):
            raise ValueError(
                f"FolderDataset: expected a file of text, got {str(path)!r}. Set data=hub."
            )
        return path
    if not path.is_dir():
        raise ValueError(
            f"FolderDataset: expected a .json, .jsonl, .ndjson, .csv or .tsv file, or a folder "
            f"with one of JSON, got {str(path)!r}, which does not exist. Check the path."
        )
    files = sorted(path.glob("*.jsonl")) or sorted(path.glob("*.json"))
    if len(files) != 1:
        raise ValueError(
            f"FolderDataset: expected exactly one .jsonl or .json file in {str(path)!r}, got "
            f"{[file.name for file in files]}. Give the path of the file."
        )
    return files[0]
