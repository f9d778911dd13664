"""`tokenprune list`."""

from __future__ import annotations

import pytest

import tokenprune as tp
from tokenprune.cli import main as cli


def test_list_shows_every_strategy_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for word in [*tp.available(), "llava_next_7b", "ablation", "one_shot", "arXiv 2410.17247"]:
        assert word in listed
