"""Commands that must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.cli import main as cli


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail: code 2, one line, nothing left behind."""
    capsys.readouterr()
    code = cli.main(arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("tokenprune: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    assert list(Path().iterdir()) == []
    return error
