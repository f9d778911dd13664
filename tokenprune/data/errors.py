"""How errors name a row, and what went wrong below."""

from __future__ import annotations


def place_of(source: str, number: int, name: str | None) -> str:
    """What errors call a row."""
    return f"{source}, row {number}" + ("" if name in (None, str(number)) else f" (id {name!r})")


def shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def first_line(error: Exception) -> str:
    """What an error of others says, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def no_value(key: str, where: str, got: str = "none") -> ValueError:
    """The error of a row that lacks something."""
    return ValueError(f"{where}: expected {key!r}, got {got}. Fill it in or remove the row.")
