"""A compiled decoding step of a pruned model: one graph, and what the plain one gives."""

from __future__ import annotations

import os
import sys

import pytest
from processes import run

START = """
import sys

import torch
from models import ROWS, Row, batch, build
from transformers import CompileConfig, StaticCache

import tokenprune as tp

positions = sys.argv[1]
model = build("llava")
schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
pruning = tp.prune(model, tp.build_strategy("pyramiddrop"), schedule, positions)
graphs = []


def backend(graph, inputs):
    graphs.append([each for each in inputs if not isinstance(each, torch.Tensor)])
    return graph.forward


def fixed():
    return StaticCache(config=model.config.get_text_config(), max_cache_len=96)
"""

STEPS = """
compiled = torch.compile(model, backend=backend, fullgraph=True)


def decode(step, inputs):
    cache = fixed() if sys.argv[2] == "static" else None
    output = model(**inputs, use_cache=True, past_key_values=cache)
    cache, logits = output.past_key_values, [output.logits[:, -1]]
    for _ in range(4):
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(step(input_ids=token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def compare(row):
    inputs = batch(model, [row])
    del inputs["attention_mask"]
    torch.testing.assert_close(decode(compiled, inputs), decode(model, inputs), rtol=0, atol=1e-3)
    return len(graphs)


with torch.no_grad(), pruning:
    first, second = compare(ROWS[0]), compare(ROWS[2])
    if sys.argv[2] == "static":  # nothing in it is a number of the host
        assert graphs == [[]], graphs
    # A number is taken for fixed until it changes, and 0 and 1 always.
    assert 0 < first <= 3 and second <= 6, (first, second)
    for row in (ROWS[3], Row([5, (30, 30), 9])):
        assert compare(row) == second
print("same")
"""

GENERATE = """
compiles = CompileConfig(backend=backend, mode=None)
compiles._compile_all_devices = True  # which it does by itself on a GPU alone


def generate(rows, **options):
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    return model.generate(**batch(model, rows), **plain, past_key_values=fixed(), **options)


with pruning:
    for number, rows in enumerate(([0], [2], [3], [0, 3], [2, 3], [0])):
        rows = [ROWS[row] for row in rows]
        expected = generate(rows, disable_compile=True)
        assert torch.equal(generate(rows, compile_config=compiles), expected)
        assert graphs == [[]] * (1 if number < 3 else 2), graphs  # one for each number of rows
print("same")
"""


def says(code: str, *arguments: str) -> str:
    """What a process prints that may compile."""
    command = [sys.executable, "-c", START + code, *arguments]
    done = run(command, env=os.environ | {"TORCHDYNAMO_DISABLE": "0"})
    return done.stdout.strip() or done.stderr[-3000:]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_decoding_step_compiles_as_a_whole_and_not_again(positions, kind) -> None:
    """Neither for the next token nor for another prompt."""
    assert says(STEPS, positions, kind) == "same"


@pytest.mark.matrix
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_generate_compiles_its_steps_once(positions) -> None:
    """By what transformers does with a cache of fixed size: like those of the unpruned model."""
    assert says(GENERATE, positions) == "same"
