"""A benchmark of a tiny model: its config, and what is measured in it."""

from __future__ import annotations

import torch

from tokenprune.bench.load import Load
from tokenprune.bench.model import build_model
from tokenprune.bench.variants import Bench
from tokenprune.cli.configs import compose
from tokenprune.runs.compose import build_pruning
from tokenprune.runs.shapes import shape_config

TINY = ["shape=tiny", "num_visual=96", "num_text=16", "rounds=2", "new_tokens=3"]
CPU = torch.device("cpu")


def config(*overrides: str):
    return compose("bench", [*TINY, *overrides])


def made(*overrides: str) -> Bench:
    own = config(*overrides)
    torch.manual_seed(0)
    model = build_model(shape_config(own), torch.float32, "sdpa", CPU)
    pruning = build_pruning(own, 4)
    assert pruning is not None
    load = Load(own.num_visual, own.num_text, own.batch_size, own.new_tokens)
    return Bench(model, pruning, load, own.logits, list(own.ways), own.graph)
