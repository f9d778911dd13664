"""Tables: whole numbers wherever they go."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
from processes import run

from tokenprune.runs.tables import print_table

TEXTS, NUMBERS = ("a strategy and its fields", "schedule"), ("accuracy", "KV cache")
ROWS = [
    ("fastv(queries=all)", "pyramid λ=0.5, 4 stages [red]", "99.1 %", "123.4 -> 56.78 MB"),
    ("none", "", "100.0 %", ""),
]
CODE = (
    "from tokenprune.runs.tables import print_table\n"
    f"print_table('All', {TEXTS}, {NUMBERS}, {ROWS})"
)


@pytest.mark.parametrize("columns", ["10", "80", "1000"])
def test_in_a_file_every_row_is_a_line(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    print_table("All", TEXTS, NUMBERS, ROWS)
    title, _, head, _, *lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert title == "All"
    assert re.split(" {2,}", head) == [*TEXTS, *NUMBERS]
    assert re.split(" {2,}", lines[0]) == list(ROWS[0])


@pytest.mark.parametrize("columns", [20, 50, 200])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_in_a_terminal_texts_wrap_and_numbers_do_not(columns: int, term: str) -> None:
    terminal, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "LINES")}
    own |= {"TERM": term, "NO_COLOR": "1"}
    run([sys.executable, "-c", CODE], env=own, stdin=child_end, stdout=child_end)
    os.close(child_end)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", os.read(terminal, 100_000).decode())
    os.close(terminal)
    assert "123.4 -> 56.78 MB" in printed
    assert "100.0 %" in printed
    assert ("pyramid λ=0.5, 4 stages [red]" in printed) == (columns == 200)
    assert "…" not in printed
    letters = [c for c in printed if c.isalpha()]
    assert sorted(letters) == sorted(
        c for part in ("All", *TEXTS, *NUMBERS, *sum(ROWS, ())) for c in part if c.isalpha()
    )
