"""Memory: the most that a piece of work takes, what a cache holds, and errors of too little."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most memory that was allocated at a time while `work` ran, beyond what was before.

    From torch's allocator: on a GPU by its statistics, on a CPU by the profiler's record of every
    allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    # Its library tells of its start and end on standard error, past Python.
    with (
        _silent(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that a library writes to the process's standard error; exceptions come through."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cache_bytes(cache: Any) -> int:
    """Memory behind the keys and values of a cache, every storage once."""
    storages = [
        tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device was full: torch's allocator says so by type, libraries and CPUs by text."""
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    full = isinstance(error, torch.OutOfMemoryError)
    return full or any(text in str(error) for text in texts)
