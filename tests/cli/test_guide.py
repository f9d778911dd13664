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


@pytest.mark.parametrize(
    ("choices", "key", "comment"),
    [
        (["strategy=pyramiddrop"], "queries: last", "last (the last prompt token) or all."),
        (["strategy=fastervlm"], "queries: class", "class, or all for towers without a class"),
        (["strategy=fastv"], "layer: 2", "The cut happens before this layer;"),
        (["schedule=cdpruner"], "layer: 0", "Before the decoder."),
        (["--config-dir", "own", "strategy=mine"], "power: 3", "Order of my norm."),
        (["--config-dir", "own", "experiment=mine"], "lam: 0.25", "A quarter goes on."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.share(2)
def test_help_has_the_comments_of_the_chosen_files(
    choices: list[str], key: str, comment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not those that another choice has on a key of that name."""
    own = {
        "strategy/mine": "# Order of my norm.\npower: 3\n",
        "experiment/mine": "# @package _global_\nschedule:\n  # A quarter goes on.\n  lam: 0.25\n",
    }
    for name, text in own.items():
        path = Path("own", f"{name}.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert cli.main(["eval", "--help", *choices]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(key)
    while lines[at - 1].startswith("#"):
        at -= 1
    assert comment in " ".join(lines[at : lines.index(key)])


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--cfg", "job", "strategy=fastv", "schedule=pyramid"]) == 0
    printed = capsys.readouterr().out
    assert "name: fastv" in printed
    assert "Schedule.pyramid" in printed
    assert "positions: auto" in printed
    assert list(Path().iterdir()) == []
