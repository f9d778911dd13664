"""Time in turn, time in hooks, memory: what the clock and the allocator are asked."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import pytest
import torch
from benches import CPU, made

from tokenprune.bench.memory import peak_bytes
from tokenprune.bench.summary import summarise
from tokenprune.bench.timing import interleave
from tokenprune.bench.variants import Variant


def test_unpruned_and_pruned_take_turns() -> None:
    """A B, B A, A B: whatever slows the machine down hits both."""
    order = []
    variants = {name: Variant(nullcontext, lambda name=name: name, order.append) for name in "AB"}
    one = made()
    with one.pruned():
        pass
    timing = interleave(one, variants, rounds=3, warmup=2)
    assert order == list("AB") + list("BA") + list("AB") + list("BA") + list("AB")
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {"A": 3, "B": 3}
    assert set(timing.peaks) == {"A", "B"}


def test_time_of_the_hooks_is_the_strategy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that sleeps 20 ms at each of its three cuts is seen to."""
    one = made("strategy=uniform", "schedule=pyramid")
    kind = type(one.pruning.strategy)
    original = kind.select

    def slow(self, view, keep):
        time.sleep(0.02)
        return original(self, view, keep)

    monkeypatch.setattr(kind, "select", slow)
    timing = interleave(one, one.variants("prefill", None), rounds=2, warmup=1)
    assert all(0.06 < hooks < whole for hooks, whole in zip(timing.hooks, timing.seconds["pruned"],
                                                           strict=True))  # fmt: skip
    assert "keys" not in timing.seconds  # it reads no attention


def test_the_model_is_left_as_it_was() -> None:
    one = made()
    before = [len(module._forward_pre_hooks) for module in one.model.modules()]
    interleave(one, one.variants("prefill", None), rounds=1, warmup=1)
    assert [len(module._forward_pre_hooks) for module in one.model.modules()] == before


def test_peak_memory_is_the_allocator_s(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        large = torch.empty(2**20, dtype=torch.float32)  # 4 MiB
        both = large + 1  # 4 more
        del large
        both.add_(1)

    # Allocations are rounded up to a cache line or so.
    assert peak_bytes(CPU, work) == pytest.approx(8 * 2**20, rel=1e-3)
    assert capfd.readouterr().err == ""


def test_decoding_is_timed_without_marks() -> None:
    """Two device events per layer would be seen in a step; time in hooks has rounds of its own."""
    one = made("measure=decode")
    variants = one.variants("decode", None)
    for name, per_step in (("pruned", 0), ("marked", 2 * 5)):  # a decoder and four layers
        context, prepare, work = variants[name]
        with context():
            cache = prepare()
            one.marks.clear()
            work(cache)
        assert len(one.marks) == 3 * per_step
    timing = interleave(one, variants, rounds=2, warmup=1)
    told = summarise(one, "decode", timing)
    shares = [a / b for a, b in zip(timing.hooks, timing.seconds["marked"], strict=True)]
    assert told["pruning_share"] == pytest.approx(statistics.median(shares))


def test_no_copy_of_a_cache_outlives_its_round() -> None:
    """Two copies at a time of a large batch's cache would not fit where one does."""
    alive: set[int] = set()
    most = 0

    class State:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    variants = {name: Variant(nullcontext, State, lambda _: None) for name in "AB"}
    one = made()
    interleave(one, variants, rounds=2, warmup=2)
    assert most == 1
