"""The ways of published code: the product's tokens, and the work that each names."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch
from benches import TINY, made
from oracles import assert_same_choice
from torch import nn

import tokenprune as tp
from tokenprune import cost
from tokenprune.bench import ways
from tokenprune.bench.memory import cache_bytes
from tokenprune.bench.table import PRODUCT_ONLY
from tokenprune.bench.variants import Bench
from tokenprune.cli import main as cli

PREVIOUS = ["schedule=pyramid", "schedule.num_stages=4", "strategy.source=previous"]


def answer(one: Bench, way: str | None) -> tuple[torch.Tensor, list[tp.TracedStage], int]:
    """Logits of the first new token, the cuts, bytes in the cache."""
    with one.pruned(way) as trace, torch.no_grad():
        output = one.model(inputs_embeds=one.embeds, use_cache=True, logits_to_keep=1)
    return output.logits, list(trace.stages), cache_bytes(output.past_key_values)


@pytest.mark.parametrize("strategy", ["pyramiddrop", "fastv"])
@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.share(3)
def test_a_way_keeps_what_the_product_keeps(way: str, strategy: str) -> None:
    one = made(f"strategy={strategy}", *PREVIOUS, "batch_size=2")
    one.embeds *= 50  # embeddings of scale 1, so that attention is not flat
    with one.pruned() as trace:
        one.prefill()
    for stage in trace.stages:  # rounding decides about no survivor
        for own, scores in zip(stage.kept, stage.scores, strict=True):
            ranked = scores.sort(descending=True).values
            assert ranked[len(own) - 1] > (1 + 1e-5) * ranked[len(own)]
    logits, stages, held = answer(one, None)
    own_logits, own_stages, own_held = answer(one, way)
    assert [len(stage.kept) for stage in stages] == [2] * 3
    assert_same_choice(own_stages, stages)
    assert not torch.equal(*stages[0].kept)
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-5)
    # Before the three cuts 112, 64 and 40 tokens; a layer holds two tensors of 2 heads of 16.
    twice = 2 * (112 + 64 + 40) * 2 * 2 * 16 * 4 if way == "cached_twice" else 0
    assert own_held == held + twice
    again_logits, again_stages, again_held = answer(one, None)
    torch.testing.assert_close(again_logits, logits, rtol=0, atol=0)  # and nothing is left behind
    for first, again in zip(stages, again_stages, strict=True):
        assert all(map(torch.equal, first.kept, again.kept))
    assert again_held == held


@pytest.mark.parametrize("way", ways.WAYS)
def test_a_way_does_the_work_that_it_names(way: str) -> None:
    """Products that torch counts; on a CPU it does not see into sdpa, only into eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    one = made(*PREVIOUS)
    counts = []
    for name in (None, way):
        answer(one, name)  # the first call compares two ways to queries and keys
        with FlopCounterMode(display=False) as counter:
            answer(one, name)
        counts.append(counter.get_total_flops())
    lengths = (112, 64, 40)  # hidden size 64, 4 heads of 16, 2 key heads, MLP of 176
    scoring = sum(cost.scoring_flops(one.shape, n, "last") for n in lengths)
    extra = {
        "eager_layer": sum(4 * n * n * 64 for n in lengths) - scoring,
        "full_maps": sum(2 * n * 64 * (64 + 32) + 2 * n * n * 64 for n in lengths) - scoring,
        "all_projections": sum(2 * n * 64 * (64 + 2 * 32 + 1) for n in lengths) - scoring,
        "dense_masks": 0,
        "cached_twice": sum(2 * n * 64 * (2 * 64 + 2 * 32 + 3 * 176) for n in lengths),
    }
    assert counts[1] - counts[0] == extra[way]


@pytest.mark.parametrize("way", [None, *ways.WAYS])
def test_masks_that_sdpa_gets(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(*PREVIOUS, "schedule.num_stages=2", "batch_size=2")
    answer(one, way)
    seen = []
    original = nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        seen.append((attn_mask, options["is_causal"]))
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    answer(one, way)
    # 4 layers; one of them eager, or run twice.
    assert len(seen) == {"eager_layer": 3, "cached_twice": 5}.get(way or "", 4)
    if way != "dense_masks":
        assert all(mask is None and causal for mask, causal in seen)
        return
    assert [tuple(mask.shape) for mask, _ in seen] == [(2, 1, n, n) for n in (112, 112, 64, 64)]
    assert all(mask.dtype == torch.float32 and not causal for mask, causal in seen)
    first, second, third, fourth = (mask for mask, _ in seen)
    assert first is second  # made once per stage
    assert third is fourth


@pytest.mark.matrix
def test_rows_of_the_ways() -> None:
    names = list(ways.WAYS)
    listed = ",".join(names)
    command = ["bench", "prefill", *TINY, "strategy.source=previous", f"ways=[{listed}]"]
    assert cli.main([*command, "hydra.run.dir=here"]) == 0
    product, *rows = csv.DictReader(Path("here/bench.csv").read_text().splitlines())
    rounds = json.loads(Path("here/bench.json").read_text())["rounds_s"]
    assert product["way"] == product["over_product"] == ""
    assert [row["way"] for row in rows] == names
    for row in rows:
        ratios = [b / a for a, b in zip(rounds["pruned"], rounds[row["way"]], strict=True)]
        assert float(row["over_product"]) == pytest.approx(statistics.median(ratios), rel=1e-4)
        assert float(row["over_product_low"]) == pytest.approx(min(ratios), rel=1e-4)
        median = 1e3 * statistics.median(rounds[row["way"]])
        assert float(row["pruned_ms"]) == pytest.approx(median, rel=1e-4)
        assert row["unpruned_ms"] == product["unpruned_ms"]
        assert all(row[name] == "" for name in PRODUCT_ONLY)
    held = {row["way"]: float(row["pruned_kv_mb"]) for row in rows}
    assert held.pop("cached_twice") > float(product["pruned_kv_mb"])
    assert set(held.values()) == {float(product["pruned_kv_mb"])}
    maps = {row["way"]: float(row["pruned_peak_mb"]) for row in rows}
    assert min(maps["eager_layer"], maps["full_maps"]) > float(product["pruned_peak_mb"])
