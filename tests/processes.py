"""Processes that tests start: new ones, each in a session of its own, with a time limit.

None is a fork of the tests' own process, whose torch may run threads that a fork would wait for in
vain. A process ends with its test, and all that it has started with it. Should the tests' process
be killed before that, a warden ends them: another process, which waits for nothing else.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
Process = subprocess.Popen[str]
#: Seconds that a process has, unless told otherwise: many times what any needs.
LIMIT = 240

#: Reads which groups of processes are alive, and ends them when nobody is left to write it.
_WARDEN = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

_SERVER = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Lets servers of this process import what their forks need; they run nothing."""
    _SERVER.set_forkserver_preload(["server"])


preload()


@cache
def _warden() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _WARDEN], stdin=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    atexit.register(process.wait, 10)
    atexit.register(process.stdin.close)
    return process


def _tell_warden(line: str) -> None:
    file = _warden().stdin
    assert file is not None
    file.write(f"{line}\n")


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@contextmanager
def _watched(group: int, limit: float) -> Iterator[None]:
    """A group of processes that ends with the `with`, or after `limit` seconds, which fails."""
    late = threading.Event()

    def end_late() -> None:
        late.set()
        _end(group)

    timer = threading.Timer(limit, end_late)
    timer.daemon = True
    _tell_warden(f"+{group}")
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _end(group)
        _tell_warden(f"-{group}")
    if late.is_set():
        pytest.fail(f"the process was not done after {limit} s")


@contextmanager
def started(
    command: Sequence[str], limit: float = LIMIT, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs beside the test, and no longer than its `with`.

    Args:
        command: Program and arguments.
        limit: Seconds after which it is killed.
        options: Further ones of `subprocess.Popen`.
    """
    with (
        subprocess.Popen(command, text=True, start_new_session=True, **options) as process,
        _watched(process.pid, limit),
    ):
        yield process


def run(
    command: Sequence[str],
    code: int | None = 0,
    limit: float = LIMIT,
    text: str | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        code: The exit code that it must have; None takes any.
        limit: Seconds after which it is killed.
        text: What it is given to read.
        options: Further ones of `subprocess.Popen`.
    """
    given = subprocess.DEVNULL if text is None else subprocess.PIPE
    streams = {"stdin": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command, limit, **streams | options) as process:
        output, error = process.communicate(text, timeout=limit + 10)
    assert code in (None, process.returncode), f"{process.returncode}\n{output}\n{error}"
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def call(
    function: Callable[..., object], *arguments: object, limit: float = LIMIT, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs a function in a process of its own, forked from a server that has run nothing.

    Cheaper than a command, whose imports take seconds. The environment is that of all tests.

    Args:
        function: Of a module that can be imported; its value is lost.
        arguments: Picklable.
        limit: Seconds after which it is killed.
        options: Picklable, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        child = _SERVER.Process(
            target=_work, args=(str(output), partial(function, *arguments, **options))
        )
        child.start()
        assert child.pid is not None
        with _watched(child.pid, limit):
            child.join(limit + 10)
            if child.exitcode is None:
                child.kill()
                pytest.fail(f"{function.__qualname__} did not end")
        child.join(10)
        text = output.read_text(encoding="utf-8") if output.exists() else ""
        code = child.exitcode
        child.close()
    assert code is not None
    return subprocess.CompletedProcess(function.__qualname__, code, text)


def _work(output: str, function: Callable[[], object]) -> None:
    os.setsid()
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # So that workers of loaders are no forks of this process either.
    multiprocessing.set_start_method("forkserver", force=True)
    function()
