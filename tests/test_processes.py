"""What tests start ends with them, and what hangs fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from processes import call, run, started

#: Starts a process, says which, and hangs; both in one session.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
#: A test's process that starts the one above, and does not get to ending it.
STARTS = f"""
import sys, time
from processes import started
with started([sys.executable, "-S", "-c", {HANGS!r}], stdout=sys.stdout):
    time.sleep(600)
"""


def assert_gone(pid: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and nobody has asked for its exit code
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


def hanging(limit: float, error: type[Exception] | None = None) -> None:
    """Waits for the command that hangs, or fails beside it; nothing of it is left."""
    pids = []
    try:
        with started([sys.executable, "-S", "-c", HANGS], limit, stdout=PIPE) as process:
            assert process.stdout is not None
            pids += [process.pid, int(process.stdout.readline())]
            if error is not None:
                raise error("in a test")
            process.wait()
    finally:
        for pid in pids:
            assert_gone(pid)


def test_a_command_that_hangs_fails_and_ends_with_all_it_started() -> None:
    with pytest.raises(pytest.fail.Exception, match="not done after 2 s"):
        hanging(2)


def test_a_command_ends_with_its_test() -> None:
    with pytest.raises(RuntimeError, match="in a test"):
        hanging(100, RuntimeError)


def test_what_tests_start_ends_with_them() -> None:
    with started([sys.executable, "-c", STARTS], stdout=PIPE) as tests:
        assert tests.stdout is not None
        pid = int(tests.stdout.readline())
        os.kill(tests.pid, signal.SIGKILL)
        tests.wait()
        assert_gone(pid)


def test_a_function_runs_in_a_process_that_has_run_nothing() -> None:
    done = call(print, "said", os.getpid())
    assert (done.returncode, done.stdout) == (0, f"said {os.getpid()}\n")
    assert call(sys.exit, 7).returncode == 7
    with pytest.raises(pytest.fail.Exception, match="not done after 1 s"):
        call(time.sleep, 600, limit=1)


def test_an_exit_code_that_was_not_expected_fails() -> None:
    code = "import sys; print('why', file=sys.stderr); sys.exit(3)"
    with pytest.raises(AssertionError, match=r"(?s)3\n.*why"):
        run([sys.executable, "-S", "-c", code])
