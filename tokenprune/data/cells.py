"""What a cell of a row holds: a text, or an id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.data.errors import no_value


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text, or a number as text.

    Raises:
        ValueError: It is missing, empty or something else.
    """
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        got = f"only the keys {sorted(row)}" if key not in row else repr(value)
        raise no_value(key, where, got)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = repr(value)
        raise ValueError(
            f"{where}: expected text as {key!r}, got {shown[:60]}. Write one string per row."
        )
    return str(value)


def id_of(value: Any, number: int, where: str) -> str:
    """The id of a row: its own, or its number.

    Raises:
        ValueError: It is neither text nor an integer.
    """
    if value is None:
        return str(number)
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise ValueError(
        f"{where}: expected an id that is text or an integer, got {value!r}. Leave it out."
    )
