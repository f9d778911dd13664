"""Times and peak memory of everything that is compared, taken in turn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from tokenprune.bench.memory import peak_bytes
from tokenprune.bench.variants import Bench, Variant


class Timing(NamedTuple):
    """Seconds of every round and the peak memory of the warm-up, by variant; time in the hooks."""

    seconds: dict[str, list[float]]
    hooks: list[float]
    peaks: dict[str, int]


def interleave(bench: Bench, variants: Mapping[str, Variant], rounds: int, warmup: int) -> Timing:
    """Times the variants in turn, the order reversed every other round: A B B A A B.

    Args:
        bench: Whose clock and hooks are read.
        variants: By name.
        rounds: How often each is timed.
        warmup: How often each runs before, at least once; the last time its peak memory is read.
    """
    hooked = "marked" if "marked" in variants else "pruned"
    timing = Timing({name: [] for name in variants}, [], {})
    names = list(variants)
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            context, prepare, work = variants[name]
            with context():
                state = prepare()
                if number == -1:
                    timing.peaks[name] = peak_bytes(bench.device, partial(work, state))
                    del state
                    continue
                bench.marks.clear()
                bench.clock.wait()
                start = bench.clock.mark()
                work(state)
                end = bench.clock.mark()
                bench.clock.wait()
                del state  # a copy of a cache; the next one is made before this name is bound anew
            if number >= 0:
                timing.seconds[name].append(bench.clock.seconds(start, end))
                if name == hooked:
                    timing.hooks.append(bench.hook_seconds())
    bench.marks.clear()
    return timing
