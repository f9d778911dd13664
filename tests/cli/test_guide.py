"""`COMMAND --help` of what reads configs, and `--cfg`."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenprune as tp
from tokenprune.cli import main as cli


def test_eval_help_lists_choices_config_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    names = ", ".join(sorted([*tp.available(), "none"]))
    assert f"strategy: {names}" in " ".join(text.split())
    assert "positions: auto" in text
    assert "tokenprune eval -m experiment=ablation" in text


def test_eval_help_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stands under the comment on it, in whichever file it is."""
    assert cli.main(["eval", "--help", "strategy=fastv", "schedule=one_shot"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for key in ("positions: auto", "keep: 0.5", "attention: sdpa", "batch_size: 32"):
        assert lines[lines.index(key) - 1].startswith("#"), key


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--cfg", "job", "strategy=fastv", "schedule=pyramid"]) == 0
    printed = capsys.readouterr().out
    assert "name: fastv" in printed
    assert "Schedule.pyramid" in printed
    assert "positions: auto" in printed
    assert list(Path().iterdir()) == []
