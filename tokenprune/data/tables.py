"""Tables of cells, read row by row: from text files, or from Arrow as `datasets` keeps it.

Both give the same cells. What Arrow keeps in a form of its own is undone here: the numbers of class
labels become their names, and floating-point numbers of fewer bits the numbers they were written
as, so that 0.1 is not 0.10000000149011612.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from tokenprune.data.files import Line, parse_json
from tokenprune.data.references import Reference
from tokenprune.data.rows import MEDIA, holds_media

# Rows that are read at a time.
_BATCH = 1000


class Table(Protocol):
    """Rows with cells."""

    #: Whether images lie where `datasets` keeps what it fetched.
    fetched: bool
    #: The commit on the Hub that it came from, where that is known.
    commit: str | None

    def __len__(self) -> int: ...

    def scan(self) -> Iterator[Line]:
        """All rows, with `Reference` in place of pictures that are embedded."""

    def row(self, place: int) -> Mapping[str, Any]:
        """One row, whole."""


class WrittenTable:
    """The rows of text files."""

    def __init__(self, lines: Sequence[Line], fetched: bool, commit: str | None = None) -> None:
        self._lines, self.fetched, self.commit = lines, fetched, commit

    def __len__(self) -> int:
        return len(self._lines)

    def scan(self) -> Iterator[Line]:
        return iter(self._lines)

    def row(self, place: int) -> Mapping[str, Any]:
        row = self._lines[place][1]
        assert isinstance(row, Mapping)  # others were found bad
        return row


class ArrowTable:
    """The rows of a `datasets.Dataset`, of which some columns are read.

    Args:
        data: The data set.
        texts: Columns of texts.
        images: The column of images.
        commit: See `Table`.

    Raises:
        ValueError: The column of images holds something else; the message says what.
    """

    def __init__(
        self, data: Any, texts: Sequence[str], images: str, commit: str | None = None
    ) -> None:
        self.commit = commit
        self._texts, self._images = list(dict.fromkeys(texts)), images
        asked = list(dict.fromkeys((images, *texts)))
        self._media = [
            name for name in data.column_names if name.lower() in MEDIA and name not in asked
        ]
        self._convert = {name: _converter(data.features[name]) for name in self._texts}
        self._data = data.select_columns([*asked, *self._media]).with_format("arrow")
        feature = data.features[images]
        one = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        kind = data.features.arrow_schema.field(images).type
        if type(one).__name__ in ("Audio", "Video") or not _holds_images(kind):
            raise ValueError(str(one))
        self.fetched = type(one).__name__ == "Image"

    def __len__(self) -> int:
        return len(self._data)

    def scan(self) -> Iterator[Line]:
        number = 0
        for table in self._data.iter(batch_size=_BATCH):
            columns = self._cells(table)
            columns[self._images] = _references(table[self._images].combine_chunks())
            for name in self._media:
                columns[name] = _filled(table[name].combine_chunks(), name)
            for cells in zip(*columns.values(), strict=True):
                number += 1
                yield number, dict(zip(columns, cells, strict=True))

    def row(self, place: int) -> Mapping[str, Any]:
        table = self._data[place : place + 1]
        columns = self._cells(table) | {self._images: table[self._images].to_pylist()}
        return {name: cells[0] for name, cells in columns.items()}

    def _cells(self, table: Any) -> dict[str, list[Any]]:
        """The texts of some rows, by column."""
        found = {}
        for name in self._texts:
            cells, convert = _listed(table[name]), self._convert[name]
            found[name] = cells if convert is None else [convert(cell) for cell in cells]
        return found


def _listed(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # what is no text stays bytes, and is refused where it is
        import pyarrow as pa

        return [_decoded(cell) for cell in column.cast(pa.large_binary()).to_pylist()]


def _decoded(cell: bytes | None) -> str | bytes | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return cell


def _holds_images(kind: Any) -> bool:
    """Whether an Arrow type is that of paths, bytes, both, or lists of such."""
    import pyarrow as pa

    while (value := getattr(kind, "value_type", None)) is not None:  # of lists
        kind = value
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    return any(own in str(kind) for own in ("string", "binary", "null"))


def _references(column: Any) -> list[Any]:
    """Per row of an Arrow array the images it names; none is read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if "list" in str(kind).partition("<")[0]:
        found = iter(_references(column.flatten()))
        counts = pc.list_value_length(column).to_pylist()
        return [None if count is None else [next(found) for _ in range(count)] for count in counts]
    if pa.types.is_struct(kind):
        names = {field.name for field in kind}
        sizes = (
            _sizes(pc.struct_field(column, "bytes")) if "bytes" in names else [None] * len(column)
        )
        paths = (
            pc.struct_field(column, "path").to_pylist() if "path" in names else [None] * len(column)
        )
        return [
            None if size is None and not path else Reference(path, size)
            for size, path in zip(sizes, paths, strict=True)
        ]
    if "binary" in str(kind):
        return [None if size is None else Reference(None, size) for size in _sizes(column)]
    return list(column.to_pylist())


def _sizes(column: Any) -> list[int | None]:
    """How many bytes each cell holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return [None] * len(column)
    if "view" in str(column.type):
        column = column.cast(pa.large_binary())
    return list(pc.binary_length(column).to_pylist())


def _filled(column: Any, name: str) -> list[bool | None]:
    """Which rows hold anything that counts in a column that is not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind):
        fields = [pc.struct_field(column, place) for place in range(kind.num_fields)]
        parts = [_filled(field, "video") for field in fields]  # whatever they are called
        return [any(cells) or None for cells in zip(*parts, strict=True)]
    if "list" in str(kind).partition("<")[0]:
        counts = pc.list_value_length(column).to_pylist()
        if holds_media(name, [0]):
            return [bool(count) or None for count in counts]
        found, filled = iter(_filled(column.flatten(), name)), list[bool | None]()
        for count in counts:
            own = [next(found) for _ in range(count or 0)]
            filled.append(any(own) or None)
        return filled
    if not pa.types.is_nested(kind) and "binary" not in str(kind):
        return [holds_media(name, cell) or None for cell in column.to_pylist()]
    return [own or None for own in column.is_valid().to_pylist()]


def _converter(feature: Any) -> Callable[[Any], Any] | None:
    """What makes a cell of `datasets` the cell that was written; None where it is that."""
    name = type(feature).__name__
    if name == "ClassLabel":
        return partial(_label, tuple(feature.names))
    if name == "Json":
        return _parsed
    if getattr(feature, "dtype", None) in ("float16", "float32"):
        return partial(_short, feature.dtype)
    if isinstance(feature, dict):
        parts = {key: convert for key, own in feature.items() if (convert := _converter(own))}
        return partial(_by_key, parts) if parts else None
    one = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    each = None if one is None else _converter(one)
    return None if each is None else partial(_each, each)


def _label(names: Sequence[str], cell: int | None) -> str | None:
    return None if cell is None or cell < 0 else names[cell]


def _parsed(cell: str | None) -> Any:
    return None if cell is None else parse_json(cell)


def _short(kind: str, cell: float | None) -> float | None:
    return None if cell is None else float(str(np.dtype(kind).type(cell)))


def _by_key(parts: Mapping[str, Callable[[Any], Any]], cell: Any) -> Any:
    if not isinstance(cell, dict):
        return cell
    return cell | {key: convert(cell[key]) for key, convert in parts.items()}


def _each(convert: Callable[[Any], Any], cell: Any) -> Any:
    return [convert(own) for own in cell] if isinstance(cell, list) else cell
