"""`tokenprune list`."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenprune as tp
from tokenprune import strategies
from tokenprune.cli import main as cli


def test_list_shows_every_strategy_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for word in [*tp.available(), "llava_next_7b", "ablation", "one_shot", "arXiv 2410.17247"]:
        assert word in listed


def test_a_strategy_that_cannot_be_loaded_is_listed_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    assert cli.main(["list"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "broken (no YAML file) (cannot be loaded: ModuleNotFoundError: No module" in listed
    assert "arXiv 2410.17247" in listed
