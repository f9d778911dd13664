"""The command as a process: Ctrl-C at any time, and readers that go away.

Whatever is being imported, Ctrl-C takes one line and exit code 130. An exception would not do: C
code that is interrupted while it is imported makes other errors of it. Only while a run has files
to tidy up is Ctrl-C an exception (`interruptible`).
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

STOPPED = "tokenprune: stopped"
INTERRUPTED = 130


def begin() -> None:
    """Prepares the process; called once, before anything that takes time."""
    # Where Ctrl-C is ignored (nohup, a script's background) it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def end(code: int) -> int:
    """Writes what is left to write; the exit code, which says so where that was impossible."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            print(f"tokenprune: output: expected to write it, got: {error}.", file=sys.stderr)
            return 2
    return code


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside its `with`, Ctrl-C raises KeyboardInterrupt, for there is something to tidy up."""
    ours = signal.getsignal(signal.SIGINT) is _stop
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, frame: object) -> None:
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)


class _Pipe(io.FileIO):
    """A standard stream. When its reader has gone it leads nowhere, and the command goes on.

    What a run writes into its folder does not depend on who watches (`tokenprune eval | head`).
    """

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                return memoryview(data).nbytes  # type: ignore[arg-type]
            raise  # a full disk is told, once


def _outliving(stream: TextIO) -> TextIO:
    """The same stream on a `_Pipe`."""
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
