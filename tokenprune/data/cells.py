"""What a cell of a row holds: a text, or an id. Every reader follows these rules.

A text is what the file writes, `007`, `1.50`, `None` and `true` included; nothing and blanks are
missing. Where a file holds typed numbers instead of text, as parquet does, integers, decimals and
booleans have one way to be written; floating-point numbers have one unless they are whole: 3.0 may
have been 3, or 3.00. docs/data.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tokenprune.data.errors import no_value, shown

# Beyond, a floating-point number stands for several integers.
_EXACT = 2**53


class Number(str):
    """A number of a JSON file, as it is written there."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty or blank."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A cell as text.

    Raises:
        ValueError: It is missing, no text, or a number whose text is not known.
    """
    value = row.get(key)
    if is_missing(value):
        got = f"only the keys {sorted(row)}" if key not in row else repr(value)
        raise no_value(key, where, got)
    if isinstance(value, str):
        _check_unicode(value, key, where)
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(
                f"{where}: expected text as {key!r}, got the number {value}, which stands for "
                "nothing. Fill it in or remove the row."
            )
        if not float(value).is_integer():
            return repr(value)
        raise ValueError(
            f"{where}: expected text as {key!r}, got {value!r}, a floating-point number that may "
            "have been written in other ways. Save the column as text, or as integers."
        )
    raise ValueError(
        f"{where}: expected text as {key!r}, got {shown(value)}. Write one string per row."
    )


def id_of(value: Any, number: int, where: str) -> str:
    """The id of a row: its own, or its number where it has none.

    Raises:
        ValueError: It is neither text nor an integer.
    """
    if is_missing(value):
        return str(number)
    if isinstance(value, Number) and not value.removeprefix("-").isdecimal():
        value = float(value)
    if isinstance(value, str):
        _check_unicode(value, "id", where)
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # Ids become such where a table's column had gaps.
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return str(int(value))
    raise ValueError(
        f"{where}: expected an id that is text or an integer, got {shown(value)}. Leave it out."
    )


def _check_unicode(text: str, key: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected text as {key!r}, got {shown(text)} with half a character "
            f"({text[error.start]!r}). Correct the escapes of the file."
        ) from error
