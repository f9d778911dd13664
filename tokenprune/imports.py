"""Imports what users name, a module or something in one, or says in a line why that fails."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sysconfig
import textwrap
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_NOTHING = object()
_STANDARD = sysconfig.get_path("stdlib")
_LONGEST = 300  # characters of an error's text: a compiler's may have thousands


def load_module(name: str) -> ModuleType:
    """Imports a module.

    Raises:
        ImportError: Whatever it was; one line, with the first cause and its place.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever is wrong in somebody's file
        raise ImportError(reason(error)) from error


def locate(path: str) -> Any:
    """What a dotted name such as `my_package.strategies.Norm` stands for.

    Raises:
        ImportError: If there is no such thing, or a module on the way cannot be imported; one line.
    """
    name, *rest = path.split(".")
    found: Any = load_module(name)
    for part in rest:
        parent, name = name, f"{name}.{part}"
        try:
            inside = getattr(found, part, _NOTHING)
        except Exception as error:  # of a module that loads its names when they are asked for
            raise ImportError(reason(error)) from error
        if inside is _NOTHING and hasattr(found, "__path__") and importlib.util.find_spec(name):
            inside = load_module(name)
        if inside is _NOTHING:
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f", but {near[0]!r}" if near else ""
            raise ImportError(f"{parent} has no {part!r}{hint}")
        found = inside
    return found


def reason(error: BaseException) -> str:
    """An error and what it came from in the first place, each with its place, in one line."""
    first = error
    while (before := _before(first)) is not None:
        first = before
    told = _told(error)
    return told if first is error else f"{told}, after {_told(first)}"


def _before(error: BaseException) -> BaseException | None:
    """What an error was raised from, or while handling."""
    hidden = error.__cause__ is None and error.__suppress_context__
    return None if hidden else error.__cause__ or error.__context__


def _told(error: BaseException) -> str:
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    place = "" if isinstance(error, SyntaxError) else _place(error.__traceback__)
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _place(frames: TracebackType | None) -> str:
    """Where an error was raised, Python's own files aside; empty where no other was run."""
    place = ""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        standard = file.startswith(_STANDARD) and "-packages" not in file
        if not (standard or file.startswith("<") or file == __file__):
            place = f" ({Path(file).name}, line {frames.tb_lineno})"
        frames = frames.tb_next
    return place
