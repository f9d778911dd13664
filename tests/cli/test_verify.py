"""`tokenprune verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import random_llava, refused

from tokenprune.cli import main as cli


@pytest.mark.parametrize("stages", ["[]", "[{layer:2,keep:1}]"])
def test_verify_needs_a_cut(
    stages: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", *random_llava(checkpoint), "schedule=explicit"]
    message = refused([*command, f"schedule.stages={stages}"], capsys)
    assert "verify: expected a schedule that drops visual tokens" in message


def test_verify_passes_on_an_exact_engine_and_fails_otherwise(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["verify", *random_llava(checkpoint), "strategy=pyramiddrop"]) == 0
    printed = capsys.readouterr().out
    assert "identity, renumbered positions" in printed
    assert "drop = mask, decoding" in printed
    assert "FAILED" not in printed

    import tokenprune.evaluation.verify as checks

    exact = checks._masked_logits
    monkeypatch.setattr(checks, "_masked_logits", lambda *given: exact(*given) * 1.01)
    assert cli.main(["verify", *random_llava(checkpoint)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_refuses_what_no_mask_does(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["verify", *random_llava(checkpoint), "strategy=pool"], capsys)
    assert "verify: expected a strategy that drops tokens, got Pool, which mixes them" in message
