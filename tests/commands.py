"""Commands: ones that must fail, and ones in a process of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tokenprune.cli import main as cli
from tokenprune.cli.__main__ import console

#: Makes a run short.
TINY = ["trainer.callbacks=[]", "max_new_tokens=2", "num_pictures=1", "data.batch_size=4"]
#: The command as the console script starts it.
COMMAND = [sys.executable, "-c", "from tokenprune.cli.__main__ import console; console()"]


def random_llava(checkpoint: Path) -> list[str]:
    return ["model=hub", f"model.path={checkpoint}"]


def console_in(folder: Path, arguments: list[str]) -> None:
    """What the console script does, in this folder; for a process of its own (`processes.call`)."""
    os.chdir(folder)
    sys.argv = ["tokenprune", *arguments]
    console()


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
