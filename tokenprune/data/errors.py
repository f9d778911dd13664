"""How errors name a row, and what went wrong below."""

from __future__ import annotations

from collections.abc import Sequence


def place_of(source: str, number: int, name: str | None) -> str:
    """What errors call a row."""
    return f"{source}, row {number}" + ("" if name in (None, str(number)) else f" (id {name!r})")


def first_line(error: Exception) -> str:
    """What an error of others says, without its full stop."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def no_value(key: str, where: str, got: str = "none") -> ValueError:
    """The error of a row that lacks something."""
    return ValueError(f"{where}: expected {key!r}, got {got}. Fill it in or remove the row.")
