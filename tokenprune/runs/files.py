"""Files that appear whole or not at all; what cannot be written is an OSError that names its path.

A full disk, a limit on sizes (`ulimit -f`) or a library's own writer say what is wrong, but not
where. The command tells all of them in one line (`cli/mistakes.py`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Ends of names that nobody reads; a killed process may leave one behind.
DRAFT = ".draft"


@contextmanager
def draft(path: Path, either: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to, which takes its place in the end.

    After an error, `path` is what it was before.

    Args:
        path: Where it goes.
        either: Whether a file may take a folder's place, and a folder a file's.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    beside = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{DRAFT}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        if beside.exists():  # in the process that writes, of several
            _put(beside, path, either)
    except Exception as error:
        told = locate(error, path, beside)
        if told is None:
            raise
        raise told from error
    finally:
        _remove(beside)


@contextmanager
def together(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write files to, which take their places in `folder` once all of them are whole.

    Args:
        folder: Where they go.
        last: The file that says that the others belong together: it goes first and comes last.

    Raises:
        OSError: One cannot be written; names its place.
    """
    stage = folder / f".{uuid.uuid4().hex}{DRAFT}"
    try:
        stage.mkdir(parents=True)
        yield stage
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        for parent in {(folder / name).parent for name in files}:
            parent.mkdir(parents=True, exist_ok=True)
        for place in (folder / name for name in files):
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        (folder / last).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name == Path(last)):
            os.replace(stage / name, folder / name)
    except Exception as error:
        told = locate(error, folder, stage)
        if told is None:
            raise
        raise told from error
    finally:
        _remove(stage)


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """Inside its `with` a file is added to; after an error it is as long as before.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    size = path.stat().st_size if path.is_file() else None
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            path.unlink() if size is None else os.truncate(path, size)
        told = locate(error, path, path)
        if told is None:
            raise
        raise told from error


def locate(error: BaseException, path: Path, beside: Path) -> OSError | None:
    """The error of a writer as an OSError that names a path; None where it is another kind.

    Args:
        error: What was raised.
        path: What was to be written.
        beside: The draft that stood for it; nobody knows its name.
    """
    number = re.search(r"\(os error (\d+)\)", str(error))  # Rust's words: safetensors
    if number and not isinstance(error, OSError):
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    if not isinstance(error, OSError):
        return None
    named = path if error.filename is None else str(error.filename)
    place = str(named).replace(str(beside), str(path))
    if error.errno is None:  # a library's own words
        return OSError(errno.EIO, str(error), place)
    return OSError(error.errno, error.strerror, place)


def clear(folder: Path) -> None:
    """Removes drafts that killed processes have left in a folder, where no other one is at work.

    What was on its way out when its process was killed, with nothing in its place yet, comes back.
    """
    for pattern in (f".*{DRAFT}", f"*/.*{DRAFT}"):
        for path in folder.glob(pattern):
            before = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{32}}{_OLD}", path.name)
            if before and not path.with_name(before[1]).exists():
                os.replace(path, path.with_name(before[1]))
            else:
                _remove(path)


_OLD = f".old{DRAFT}"


def _put(beside: Path, path: Path, either: bool) -> None:
    both = beside.is_dir() and path.is_dir()
    if not path.exists() or not (both or either):
        os.replace(beside, path)
        return
    old = beside.with_name(f"{beside.name.removesuffix(DRAFT)}{_OLD}")
    os.replace(path, old)  # a folder with files in it takes no other's place
    os.replace(beside, path)
    _remove(old)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all in it, if there is one.

    Raises:
        OSError: It stays.
    """
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
