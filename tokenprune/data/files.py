"""JSON, JSON lines and CSV as rows of cells, each as its file writes it.

No column is given a type: `007`, `1.50`, `None` and `nan` stay what they are, and an empty cell is
missing. A row that cannot be read is an error in its place, so that others can go on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.data.cells import Number
from tokenprune.data.errors import first_line, place_of, shown

#: Ends of files that are read here. A .json file holds a list, or lines, as many do.
CSV, LINES, JSON = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".json",)
#: Number and cells of a row, or what is wrong with it.
Line = tuple[int, Mapping[str, Any] | ValueError]


@dataclass(frozen=True)
class Form:
    """How a file writes its rows.

    Attributes:
        end: What it is: one of `CSV`, `LINES` or `JSON`.
        separator: Between cells of a CSV file.
        columns: Names of a CSV file's columns, where its first line holds none.
        field: Where in a JSON file its list of rows is.
        encoding: Of the text.
    """

    end: str
    separator: str = ","
    columns: tuple[str, ...] | None = None
    field: str | None = None
    encoding: str = "utf-8-sig"


def form_of(name: str) -> Form:
    """The usual form of files so called, packed ones included; any other file is JSON lines."""
    ends = [end for end in Path(name.lower()).suffixes if end in (*CSV, *LINES, *JSON)]
    end = ends[-1] if ends else LINES[0]
    return Form(end, "\t" if end == ".tsv" else ",")


def read_rows(path: Path, source: str, form: Form | None = None, before: int = 0) -> Iterator[Line]:
    """All rows of a file.

    Args:
        path: The file.
        source: Names the data in errors.
        form: How it is written; None goes by its name.
        before: How many rows other files had; these are counted on.

    Raises:
        ValueError: The file as a whole cannot be read.
    """
    form = form_of(path.name) if form is None else form
    try:
        with path.open(encoding=form.encoding, newline="") as file:
            text = file.read()
    except (OSError, UnicodeError, LookupError) as error:
        raise ValueError(
            f"{source}: expected a file with UTF-8 text, got {str(path)!r}: {first_line(error)}. "
            "Save it as UTF-8."
        ) from error
    read = _csv_rows if form.end in CSV else _json_rows
    return read(text, source, form, before)


def parse_json(text: str) -> Any:
    """JSON with its numbers as they are written; NaN and infinities are floats."""
    return json.loads(text, parse_int=Number, parse_float=Number, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceError(f"the key {twice!r} twice in one object")
    return whole


class _TwiceError(ValueError):
    """A key that occurs twice, so that it has two values."""


def _json_rows(text: str, source: str, form: Form, before: int) -> Iterator[Line]:
    if form.end in JSON or form.field is not None:
        try:
            whole = parse_json(text)
        except json.JSONDecodeError as error:
            # Many files of JSON lines are called .json.
            if error.msg != "Extra data" or form.field is not None:
                raise ValueError(
                    f"{source}, line {error.lineno}: expected a JSON list, got {error.msg} at "
                    f"character {error.colno}. Correct the file."
                ) from error
        except (_TwiceError, RecursionError) as error:
            raise ValueError(
                f"{source}: expected a JSON list of rows, got {first_line(error)}. Correct the "
                "file."
            ) from error
        else:
            if form.field is not None and isinstance(whole, dict):
                whole = whole.get(form.field)
            if whole and isinstance(whole, dict) and "\n" not in text.strip():
                whole = [whole]  # one line
            if not isinstance(whole, list):
                raise ValueError(
                    f"{source}: expected a JSON list of rows, got "
                    f"{type(whole).__name__}. Put the rows into one list."
                )
            for number, row in enumerate(whole, before + 1):
                yield number, _checked(row, source, number, shown(row))
            return
    # Not splitlines: JSON text may hold U+2028 and others that split there.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, before + 1):
        if line.strip():
            try:
                row = parse_json(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                yield (
                    number,
                    ValueError(
                        f"{place_of(source, number, None)}: expected a JSON object, got "
                        f"{line[:40]!r}: {reason}. Write one object per line."
                    ),
                )
            else:
                yield number, _checked(row, source, number, repr(line[:40]))


def _checked(row: Any, source: str, number: int, got: str) -> Mapping[str, Any] | ValueError:
    if isinstance(row, dict):
        return row
    return ValueError(
        f"{place_of(source, number, None)}: expected a JSON object, got {got}. "
        "Write one object with image, question and answer per line."
    )


def _csv_rows(text: str, source: str, form: Form, before: int) -> Iterator[Line]:
    # Line breaks inside quotes are the cell's own.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=form.separator, strict=True)
    columns = form.columns
    number = before
    try:
        for cells in reader:
            if not cells:  # an empty line
                continue
            if columns is None:
                columns = _columns(cells, source)
                continue
            number += 1
            if len(cells) == len(columns):
                yield number, {key: cell or None for key, cell in zip(columns, cells, strict=True)}
                continue
            where = place_of(source, number, None)
            yield (
                number,
                ValueError(
                    f"{where}: expected {len(columns)} cells, one a column, got {len(cells)}. "
                    f"Put a cell that holds {form.separator!r} in quotes."
                ),
            )
    except csv.Error as error:
        raise ValueError(
            f"{source}, line {reader.line_num}: expected CSV, got {error}. Correct the quotes, or "
            "leave out a column with longer cells."
        ) from error


def _columns(cells: Sequence[str], source: str) -> tuple[str, ...]:
    twice = next((name for name in cells if name and cells.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{source}: expected columns with names of their own, got {twice!r} twice. Rename one."
        )
    return tuple(cells)
