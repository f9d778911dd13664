"""`tokenprune verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import random_llava, refused

from tokenprune.cli import main as cli
from tokenprune.cli import prompt
from tokenprune.cli.configs import compose
from tokenprune.evaluation import loading, reference
from tokenprune.runs import devices


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
    monkeypatch.setattr(checks, "_masked_logits", lambda *given: exact(*given) * 1.5)
    assert cli.main(["verify", *random_llava(checkpoint)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_refuses_what_no_mask_does(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["verify", *random_llava(checkpoint), "strategy=pool"], capsys)
    assert "verify: expected a strategy that drops tokens, got Pool, which mixes them" in message


@pytest.mark.parametrize(
    ("given", "device"),
    [([], "meta"), (["trainer=gpu"], "meta"), (["trainer=cpu"], "cpu"), (["seed=1"], "meta")],
)
def test_a_gpu_is_used_if_there_is_one(
    given: list[str], device: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a machine that has one: the meta device takes its place.
    monkeypatch.setattr(devices, "default_device", lambda: "meta")
    config = compose("eval", [*random_llava(checkpoint), *given])
    loading.cached_model.cache_clear()
    assert prompt.load(config, given).model.device.type == device
    loading.cached_model.cache_clear()


def test_verify_says_where_and_in_which_precision(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["verify", *random_llava(checkpoint), "model.dtype=bfloat16"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "on cpu" in printed
    assert "drop = mask, prefill, bfloat16" in printed
    assert "drop = mask, prefill, float32" in printed
    assert "not checked" not in printed

    monkeypatch.setattr(reference, "_free_bytes", lambda device: 0)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "prefill, float32" not in printed
    assert "not checked with weights as float32: that takes" in printed
