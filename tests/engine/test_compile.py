"""A compiled decoding step of a pruned model gives what the plain one gives."""

from __future__ import annotations

import os
import sys

import pytest
from processes import run

CODE = """
import torch
from models import ROWS, batch, build

import tokenprune as tp

model, inputs = build("llava"), batch(build("llava"), ROWS[:1])
schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
compiled = torch.compile(model, backend="aot_eager", dynamic=True)


def decode(step):
    output = model(**inputs, use_cache=True)
    cache, logits = output.past_key_values, [output.logits[:, -1]]
    for _ in range(4):
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(step(input_ids=token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


with torch.no_grad(), tp.prune(model, tp.build_strategy("pyramiddrop"), schedule):
    torch.testing.assert_close(decode(compiled), decode(model))
frames = torch._dynamo.utils.counters["frames"]
assert frames["ok"] > 0, frames
print("same")
"""


@pytest.mark.matrix
def test_a_compiled_decoding_step() -> None:
    done = run([sys.executable, "-c", CODE], env=os.environ | {"TORCHDYNAMO_DISABLE": "0"})
    assert done.stdout.strip() == "same", done.stderr[-3000:]
