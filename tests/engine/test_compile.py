"""A compiled decoding step of a pruned model: one graph, and what the plain one gives."""

from __future__ import annotations

import os
import sys

import pytest
from processes import run

CODE = """
import sys

import torch
from models import ROWS, Row, batch, build
from transformers import StaticCache

import tokenprune as tp

positions, kind = sys.argv[1:]
model = build("llava")
schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
compiled = torch.compile(model, backend="eager", fullgraph=True)
graphs = torch._dynamo.utils.counters["stats"]


def decode(step, inputs):
    fixed = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    output = model(**inputs, use_cache=True, past_key_values=fixed if kind == "static" else None)
    cache, logits = output.past_key_values, [output.logits[:, -1]]
    for _ in range(4):
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(step(input_ids=token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def compare(row):
    inputs = batch(model, [row])
    del inputs["attention_mask"]
    torch.testing.assert_close(decode(compiled, inputs), decode(model, inputs))
    return graphs["unique_graphs"]


with torch.no_grad(), tp.prune(model, tp.build_strategy("pyramiddrop"), schedule, positions):
    first, second = compare(ROWS[0]), compare(ROWS[2])
    # A number is taken for fixed until it changes, and 0 and 1 always.
    assert 0 < first <= 3 and second <= 6, (first, second)
    for row in (ROWS[3], Row([5, (30, 30), 9])):
        assert compare(row) == second
print("same")
"""


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_decoding_step_compiles_as_a_whole_and_not_again(positions, kind) -> None:
    """Neither for the next token nor for another prompt."""
    command = [sys.executable, "-c", CODE, positions, kind]
    done = run(command, env=os.environ | {"TORCHDYNAMO_DISABLE": "0"})
    assert done.stdout.strip() == "same", done.stderr[-3000:]
