"""The command as a process: Ctrl-C at any time, and readers that go away.

Whatever is being imported, Ctrl-C takes one line and exit code 130. An exception would not do: C
code that is interrupted while it is imported makes other errors of it. Only while a run has files
to tidy up is Ctrl-C an exception (`Interruptible`).
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading

TYPE_CHECKING = False  # as typing's, which takes a moment to load
if TYPE_CHECKING:
    from typing import TextIO

STOPPED = "tokenprune: stopped"
INTERRUPTED = 130
_ROOM = 2**26  # bytes; all of the package's and its dependencies' .pyc files
#: What threads could not write, such as those of a logger, whose caller need not hear of it.
_unwritten: list[OSError] = []


def begin() -> None:
    """Takes charge of the process; called once, before anything that takes time."""
    # Where Ctrl-C is ignored (nohup, a script's background) it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    outlive()
    threading.excepthook = _note
    _spare_bytecode()
    # Says on every start that it cannot keep a list of fonts, where that is so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def outlive() -> None:
    """Readers of this process's output may go away; a second time changes nothing."""
    for name in ("stdout", "stderr"):
        buffer = getattr(getattr(sys, name), "buffer", None)
        if not isinstance(getattr(buffer, "raw", buffer), _Pipe):
            setattr(sys, name, _outliving(getattr(sys, name)))


def end(code: int) -> int:
    """Writes what is left to write; the exit code, which says so where that was impossible."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pipe = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
    failure = pipe.failure if isinstance(pipe, _Pipe) else None
    if failure is not None:
        print(f"tokenprune: output: expected to write it, got: {failure}.", file=sys.stderr)
        return code or 2
    if _unwritten and code == 0:  # else it has been told
        from tokenprune.cli.mistakes import explain

        print(f"tokenprune: {explain(_unwritten[0])}", file=sys.stderr)
        return 2
    return code


def follow() -> None:
    """In a process that a run has started, Ctrl-C ends it without a word: its parent has that."""
    _spare_bytecode()
    module = sys.modules.get("multiprocessing.process")
    # Where a process is being set up its parent is not known yet, but its name is.
    if module is not None and module.current_process().name != "MainProcess":
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave() -> None:
    """Of several processes of one command, all but the first end by Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _spare_bytecode() -> None:
    """Keeps Python from writing .pyc files where they may be cut off.

    It takes a file that was written in part for a whole one (python/cpython#126606), and no later
    process can import the module.
    """
    try:
        import resource
    except ImportError:  # no Unix
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    disk = os.statvfs(__file__)
    if limit == resource.RLIM_INFINITY and disk.f_bavail * disk.f_frsize >= _ROOM:
        return
    sys.dont_write_bytecode = True
    for name, module in list(sys.modules.items()):  # what was imported before this could be said
        spec = getattr(module, "__spec__", None)
        if name.partition(".")[0] == "tokenprune" and spec is not None and spec.cached:
            _remove_cut(spec.cached)


def _remove_cut(path: str) -> None:
    """Removes a .pyc file that was cut off."""
    import marshal

    try:
        with open(path, "rb") as file:
            content = file.read()
        try:
            marshal.loads(content[16:])
        except (EOFError, TypeError, ValueError):
            os.unlink(path)
    except OSError:  # there is none
        pass


def _note(thread: threading.ExceptHookArgs) -> None:
    """Keeps what a thread could not write, for the end; prints any other exception."""
    from tokenprune.cli.mistakes import explain

    error = thread.exc_value
    if isinstance(error, OSError) and explain(error) is not None:
        _unwritten.append(error)
    else:
        threading.__excepthook__(thread)


class Interruptible:
    """Inside its `with`, Ctrl-C raises KeyboardInterrupt, for there is something to tidy up."""

    def __enter__(self) -> None:
        self._ours = signal.getsignal(signal.SIGINT) is _stop
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, frame: object) -> None:
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)


class _Pipe(io.FileIO):
    """A standard stream. Where it can no longer be written it leads nowhere; the command goes on.

    What a run leaves in its folder does not depend on who watches (`tokenprune eval | head`).

    Attributes:
        failure: Why it leads nowhere, unless its reader has gone, which is none.
    """

    failure: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes  # type: ignore[arg-type]


def _outliving(stream: TextIO | None) -> TextIO:
    """The same stream on a `_Pipe`; one that the process was started without leads nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        return stream
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        pipe if stream.write_through else io.BufferedWriter(pipe),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
