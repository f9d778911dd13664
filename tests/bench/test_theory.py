"""Theory beside the measurements: FLOPs against torch's counter, bytes against a real cache."""

from __future__ import annotations

import pytest
import torch
from benches import made

from tokenprune.bench.memory import cache_bytes


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("strategy", ["pyramiddrop", "fastv", "random"])
def test_bytes_in_the_cache_are_the_cost_model_s(strategy: str, positions: str) -> None:
    one = made(f"strategy={strategy}", f"positions={positions}", "schedule.num_stages=4",
               "schedule=pyramid", "batch_size=3")  # fmt: skip
    with one.pruned():
        held = cache_bytes(one.prefill())
    assert held == one.theory.cache_bytes()
    # 4 layers with 2 key heads of 16 entries, keys and values in float32.
    assert held == 3 * 2 * (96 + 48 + 24 + 12 + 4 * 16) * 2 * 16 * 4


def test_flops_are_those_of_the_model() -> None:
    """Against torch's own counter, with attention in matrix products that it sees."""
    from torch.utils.flop_counter import FlopCounterMode

    one = made()
    one.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        one.prefill()
    masked = 112**2 * 64 * 4 * 2  # eager attention computes the half that the mask hides
    assert counter.get_total_flops() == one.theory.flops("prefill", False) + masked
    cache = one.prefill()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one.model(input_ids=torch.tensor([[1]]), past_key_values=cache)
    assert counter.get_total_flops() == one.theory.flops("decode", False)


def test_training_counts_the_logits_that_are_made() -> None:
    every, supervised = made("logits=all"), made("logits=supervised")
    rows = 12 + 16 - supervised.load.num_labels  # survivors of the last layer without a label
    saved = every.theory.flops("train", True) - supervised.theory.flops("train", True)
    assert saved == 2 * rows * 64 * 1000
    assert every.theory.flops("train", False) == supervised.theory.flops("train", False)
    full = made("logits=full")
    more = full.theory.flops("train", True) - every.theory.flops("train", True)
    assert more == 2 * (96 - 12) * 64 * 1000  # of the visual tokens that were dropped
