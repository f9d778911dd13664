"""What `tokenprune verify` says of models of every type, and of an engine that is wrong."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compatibility import TABLE
from zoo import ZOO
from zoo.checks import schedule
from zoo.flash import attention, stand_in

import tokenprune as tp
from tokenprune.engine.levels import Level
from tokenprune.evaluation import reference
from tokenprune.evaluation import verify as checks
from tokenprune.evaluation.verify import Check, verify

#: Types that generate under pruning, with an attention implementation of theirs; the others are
#: refused where the answer begins, see docs/compatibility.md.
with TABLE.open(encoding="utf-8", newline="") as file:
    GENERATE = {
        row["model_type"]: row["attention"]
        for row in csv.DictReader(file)
        if row["mode"] == "greedy" and row["outcome"] == "exact"
        if row["attention"] in ("eager", "sdpa")  # the later one, where there are both
    }
PYRAMID = tp.build_strategy("pyramiddrop")


def run(model_type: str, dtype: str, named: str = "sdpa") -> list[Check]:
    specimen = ZOO[model_type]
    model = specimen.build(named if named in ("sdpa", "eager") else "eager")
    inputs = specimen.batch(model, [(6, "image", 5)])
    model.to(getattr(torch, dtype))
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    before = {name: own.clone() for name, own in model.state_dict().items()}
    pruning: Any = SimpleNamespace(
        strategy=PYRAMID, schedule=schedule(specimen), positions="original"
    )
    loaded: Any = SimpleNamespace(model=model)
    with nullcontext() if named in ("sdpa", "eager") else attention(model, named):
        said = verify(loaded, inputs, pruning)
        assert model.get_decoder().config._attn_implementation == named
    assert all(own.dtype == before[name].dtype for name, own in model.state_dict().items())
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    return said


@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", GENERATE)
@pytest.mark.share(8)
def test_an_exact_engine_passes(model_type: str, dtype: str) -> None:
    said = run(model_type, dtype, GENERATE[model_type])
    assert [check.name for check in said if not check.passed] == []
    assert len(said) == (3 if dtype == "float32" else 5)


# Whose images see themselves: in Gemma 3 each image, in PaliGemma all of the prompt.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["gemma3", "paligemma", "gemma4"])
def test_masks_are_the_models_own(model_type: str, dtype: str) -> None:
    assert all(check.passed for check in run(model_type, dtype, "eager"))


@pytest.fixture
def off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that keeps each token after the one that it was told to keep."""
    exact = Level.after

    def after(level, chosen, *rest):
        moved = (chosen + 1) % max(level.num_visual)
        return exact(level, moved.sort(1).values, *rest)

    monkeypatch.setattr(Level, "after", after)


@pytest.mark.usefixtures("off_by_one")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "gemma3"])
def test_a_wrong_engine_fails(model_type: str, dtype: str) -> None:
    failed = [check.name for check in run(model_type, dtype) if not check.passed]
    assert {"drop = mask, prefill, float32", "drop = mask, decoding, float32"} <= set(failed)


@pytest.mark.usefixtures("off_by_one")
def test_a_wrong_engine_fails_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_free_bytes", lambda device: 1000)
    failed = [check.name for check in run("llava", "bfloat16") if not check.passed]
    assert failed == ["drop = mask, prefill, bfloat16", "drop = mask, decoding, bfloat16"]


def test_why_there_is_no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZOO["llava"].build()
    assert reference.why_not_float32(model.bfloat16()) is None
    monkeypatch.setattr(reference, "_free_bytes", lambda device: 1000)
    why = reference.why_not_float32(model)
    assert why == "that takes 0.0 GiB more on cpu, and 0.0 are free"


@pytest.mark.filterwarnings("ignore")  # flex_attention warns that it is not compiled
@pytest.mark.parametrize("named", ["flash_attention_2", "flex_attention"])
def test_other_attention_is_judged_by_sdpa(named: str) -> None:
    with stand_in():
        said = run("llava", "bfloat16" if "flash" in named else "float32", named)
    assert all(check.passed for check in said)
    assert len(said) == 3  # flash attention has no float32


def test_limits_are_the_models_own_noise() -> None:
    by_name = {check.name: check.limit for check in run("llava", "bfloat16")}
    assert by_name["drop = mask, prefill, float32"] == checks._LIMIT
    assert 1e-3 < by_name["drop = mask, prefill, bfloat16"] < 0.08
