"""Questions and conversations about images, from a local JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.data.cells import id_of, text_of
from tokenprune.data.checked import CheckedRows, Row
from tokenprune.data.errors import first_line, no_value, place_of
from tokenprune.data.images import check_file, check_inside, open_image
from tokenprune.data.rows import Columns, turns_of
from tokenprune.data.sample import Turn


class FolderDataset(CheckedRows):
    """A JSON list, or JSON lines, of questions or conversations about images in a folder.

    A row has `image` or `images` (a path, or several), what `tokenprune.data.rows` describes and,
    if wanted, an `id`. Rows without an image are for training.

    Args:
        path: The .json or .jsonl file, or a folder that holds exactly one.
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
        super().__init__(str(self.path), turns, skip_bad)
        self.folder = self.path.parent
        if image_folder is not None:
            self.folder = Path(image_folder).expanduser()
            if not self.folder.is_dir():
                raise ValueError(
                    f"data.image_folder: expected a folder, got {str(image_folder)!r}, which is "
                    "none. Check the path."
                )
        self.allow_outside = allow_outside
        self._rows: list[tuple[int, str, tuple[Turn, ...], tuple[Path, ...]]] = []
        self._ids: dict[str, int] = {}
        rows = self._read()
        for number, row in rows:
            try:
                self._add(number, row)
            except ValueError as error:
                self._skip(error)
        self._finish(len(rows), "Write JSON objects with image, question and answer.")

    def _read(self) -> list[tuple[int, Any]]:
        """Numbers and contents of all rows: mappings, or text that is no JSON."""
        try:
            # Not splitlines: JSON text may hold U+2028 and others that split there.
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"FolderDataset: expected a file with UTF-8 text, got {str(self.path)!r}: "
                f"{first_line(error)}. Save it as UTF-8."
            ) from error
        if self.path.suffix == ".json":
            try:
                whole = json.loads(text)
            except json.JSONDecodeError as error:
                # Many files of JSON lines are called .json.
                if error.msg != "Extra data":
                    raise ValueError(
                        f"{self.path.name}, line {error.lineno}: expected a JSON list, got "
                        f"{error.msg} at character {error.colno}. Correct the file."
                    ) from error
            else:
                if not isinstance(whole, list):
                    raise ValueError(
                        f"{self.path.name}: expected a JSON list of rows, got "
                        f"{type(whole).__name__}. Put the rows into one list."
                    )
                return list(enumerate(whole, 1))
        return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def _add(self, number: int, row: Any) -> None:
        where = f"{self.path.name}, row {number}"
        shown = repr(row)[:40] if not isinstance(row, str) else repr(row[:40])
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected a JSON object, got {shown}: {error.msg}. "
                    "Write one object per line."
                ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: expected a JSON object, got {shown}. "
                "Write one object with image, question and answer per line."
            )
        name = id_of(row.get("id"), number, where)
        where = place_of(self.path.name, number, name)
        if self._ids.setdefault(name, number) != number:
            raise ValueError(
                f"{where}: expected an id of its own, got that of row {self._ids[name]}. "
                "Leave out id to number the rows."
            )
        talks = next((key for key in ("conversations", "messages") if key in row), None)
        answer = "answers" if "answers" in row and "answer" not in row else "answer"
        kind = "kind" if "kind" in row else None
        turns = turns_of(row, Columns("question", answer, talks, kind), where)
        images = []
        for own in _images(row, where, needed=talks is None):
            image = self.folder / own
            if not self.allow_outside:
                remedy = ", or set data.allow_outside=true"
                check_inside(image, [self.folder], where, remedy)
            check_file(image, where)
            images.append(image)
        self._keep(len(self._rows), turns, len(images), where)
        self._rows.append((number, name, turns, tuple(images)))

    def _row(self, place: int) -> Row:
        number, name, turns, images = self._rows[place]
        where = place_of(self.path.name, number, name)
        return name, turns, [partial(open_image, image, where) for image in images]


def _data_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"FolderDataset: expected a .jsonl file or its folder, got {str(path)!r}, which does "
            "not exist. Check the path."
        )
    files = sorted(path.glob("*.jsonl")) or sorted(path.glob("*.json"))
    if len(files) != 1:
        raise ValueError(
            f"FolderDataset: expected exactly one .jsonl or .json file in {str(path)!r}, got "
            f"{[file.name for file in files]}. Give the path of the file."
        )
    return files[0]


def _images(row: Mapping[str, Any], where: str, needed: bool) -> list[str]:
    """Paths of a row's images."""
    key = "images" if "images" in row and "image" not in row else "image"
    value = row.get(key)
    if isinstance(value, list):
        if not value and needed:
            raise no_value(key, where, "[]")
        return [text_of({key: own}, key, where) for own in value]
    if not needed and value in (None, ""):
        return []
    return [text_of(row, key, where)]
