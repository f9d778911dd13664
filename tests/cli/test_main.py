"""The command: what it says of itself, exit codes, the commands of the documents."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import random_llava

from tokenprune.cli import main as cli
from tokenprune.cli.configs import compose
from tokenprune.cli.guide import EXAMPLES


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"tokenprune {command}" in usage for command in cli.COMMANDS)
    assert cli.main([]) == 2


@pytest.mark.parametrize("command", ["report", "list", "show", "verify"])
def test_help_of_other_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: tokenprune {command}" in capsys.readouterr().out


def commands() -> list[str]:
    """Every command in the README and in the help of eval and train."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + EXAMPLES
    found = re.findall(r"^ *`?(tokenprune \S.*?)(?:`|  |$)", text, re.MULTILINE)
    return [line for line in dict.fromkeys(found) if " COMMAND" not in line]


@pytest.mark.parametrize("command", commands())
@pytest.mark.share(3)
def test_commands_in_the_documents_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(commands()) > 10
    monkeypatch.setattr("tokenprune.cli.checks.check", lambda *arguments: None)  # needs models
    monkeypatch.setattr("tokenprune.cli.hydra_start.start", lambda *arguments: None)
    name, *rest = shlex.split(command)[1:]
    if name in ("eval", "train", "bench"):
        assert cli.main([name, *rest]) == 0
    elif name == "benchmark":
        compose(name, rest)
    elif name in ("verify", "show"):
        compose("eval", [item for item in rest if "=" in item])
    else:
        assert name in ("collect", "list", "report")


def test_bugs_keep_their_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("tokenprune.evaluation.run.evaluate", broken)
    assert cli.main(["eval", *random_llava(checkpoint)]) == 1
    assert "AssertionError: ours" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_an_interruption_is_told_as_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning's loops do

    monkeypatch.setattr("tokenprune.evaluation.run.evaluate", interrupted)
    assert cli.main(["eval", *random_llava(checkpoint)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
