"""A run's folder: one run at a time.

What holds a folder is the kernel's lock on a file in it, which ends with its process, however that
ends: nothing has to be tidied up after `kill -9`. Between machines it holds where their file system
passes locks on, as NFS does. Where locks are not to be had (some mounts of Lustre) runs go on
without.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenprune.runs import files

#: Lies in a folder while a run is at work there.
LOCK = ".running"
_PAUSE = 0.5  # seconds between looks at a folder that is another run's


@contextmanager
def occupied(folder: Path, part: str = "", waits: bool = False) -> Iterator[None]:
    """Holds a run's folder inside its `with`; makes it where it does not exist.

    Processes that the holder has started itself belong to its run.

    Args:
        folder: The run's folder.
        part: What of it is held, where several work at parts of it at once.
        waits: For the end of another run there, instead of refusing.

    Raises:
        ValueError: Another run holds it, and that is not waited for.
        OSError: It cannot be written.
    """
    path = folder / f"{LOCK}{part}"
    descriptor = _lock(path, waits)
    if descriptor is None:
        yield
        return
    try:
        if not part:
            files.clear(folder)
        yield
    finally:
        # First, so that nobody who waits for the lock gets that of a file that is gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, waits: bool) -> int | None:
    """The open file that holds a folder; None where a process above this one has it."""
    folder, told = path.parent, False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has failed and removed its folder
            continue
        try:
            if not _take(descriptor):
                holder = os.read(descriptor, 200).decode(errors="replace")
                if holder == _name(os.getppid()):
                    os.close(descriptor)
                    return None
                if waits:
                    if not told:
                        print(f"{folder}: waits for {holder or 'another run'}", flush=True)
                    told = True
                    os.close(descriptor)
                    time.sleep(_PAUSE)
                    continue
                raise ValueError(
                    f"hydra.run.dir: expected a folder of its own, got {str(folder)!r}, where "
                    f"another run is at work ({holder or 'just started'}). Wait for its end, or "
                    "choose another folder (hydra.run.dir, hydra.sweep.dir)."
                )
            if _is(path, descriptor):
                os.ftruncate(descriptor, 0)
                with files.growing(path):
                    os.write(descriptor, _name(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a run that has ended since


def _take(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no Unix
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"
