"""What a call asks of the device: one transfer and one upload, and of a decoding step nothing.

A GPU that is waited for stands still, and a CUDA graph cannot be captured at all. Without one, what
would wait or upload is seen where Python asks for it.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from models import ROWS, batch, build, labelled
from oracles import tiny
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune as tp

#: Ways from a tensor to a number in Python, which wait for the device.
READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")
#: Ways from Python's lists and arrays to a tensor, each an upload of its own.
UPLOADS = ("tensor", "as_tensor")
#: Operations whose result has a shape that only the device knows.
UNSHAPED = ("nonzero", "masked_select", "unique", "_local_scalar_dense", "is_nonzero")


def ours() -> str | None:
    """The function of the package that asks, if any does."""
    frame = sys._getframe()
    while frame is not None:
        if "tokenprune" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            return frame.f_code.co_name
        if "transformers/models" in frame.f_code.co_filename:
            return None
        frame = frame.f_back
    return None


class Reads(TorchFunctionMode):
    """Counts what is read from the device, or uploaded to it, by the package."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS + UPLOADS and (where := ours()) is not None:
            self.counts[f"{where}: {name}"] += 1
        return function(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Counts operations whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name in UNSHAPED and (where := ours()) is not None:
            self.counts[f"{where}: {name}"] += 1
        return function(*args, **(kwargs or {}))


def asked(work) -> Counter[str]:
    with Reads() as reads, Shapes() as shapes, pytest.MonkeyPatch.context() as patch:

        def from_numpy(array):
            reads.counts[f"{ours()}: from_numpy"] += 1
            return original(array)

        original = torch.from_numpy
        patch.setattr(torch, "from_numpy", from_numpy)
        work()
    return reads.counts + shapes.counts


#: What a call with images asks: its tokens, and the upload of the plan.
PLAN = {"fetch: numpy": 1, "_upload: from_numpy": 1}
#: Beside it, of the host alone: numbers by chance are drawn there, places and tiles found.
ON_THE_HOST = {"draw: numpy", "<lambda>: from_numpy", "make_signals: numpy"}


@pytest.fixture(scope="module")
def model():
    return build("llava")


def test_it_sees_what_waits(model, monkeypatch) -> None:
    def score(self, view):
        if view.hidden.sum().item() and view.hidden.any():
            return view.hidden[view.valid.nonzero()[:, 0]][:1, :, 0] + torch.tensor([1.0])
        return None

    kind = type(tp.build_strategy("random"))
    monkeypatch.setattr(kind, "score", score)
    monkeypatch.setattr("test_waits.ours", lambda: "score")
    schedule = tp.Schedule.one_shot(layer=2, keep=0.5)
    with torch.no_grad(), tp.prune(model, kind(), schedule):
        found = asked(lambda: model(**batch(model, ROWS[:1])))
    for what in ("item", "__bool__", "nonzero", "tensor", "from_numpy", "numpy"):
        assert found[f"score: {what}"], what


@pytest.mark.parametrize("rows", [[0], [0, 0], [0, 1, 2, 3]], ids=["one", "alike", "ragged"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", tp.available())
def test_a_call_with_images_asks_once(model, name, positions, rows) -> None:
    inputs = batch(model, [ROWS[row] for row in rows])
    schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
    strategy = tiny(name)
    with torch.no_grad(), tp.prune(model, strategy, schedule, positions) as trace:
        model(**inputs)  # the first call compares two ways to the same queries and keys
        found = asked(lambda: model(**inputs, use_cache=True))
        assert len(trace.stages) == 3
    counted = {} if strategy.keeps_exactly else {"_checked: tolist": 3}  # how many it kept, by cut
    assert {what: n for what, n in found.items() if what not in ON_THE_HOST} == PLAN | counted


@pytest.mark.parametrize("rows", [[0], [0, 0], [0, 1, 2, 3]], ids=["one", "alike", "ragged"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_decoding_step_asks_nothing(model, positions, rows) -> None:
    inputs = batch(model, [ROWS[row] for row in rows])
    schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
    strategy = tp.build_strategy("pyramiddrop")
    one = torch.full((len(rows), 1), 7)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with torch.no_grad(), tp.prune(model, strategy, schedule, positions):
        cache = model(**inputs, use_cache=True).past_key_values

        def step(columns):
            model(input_ids=one, attention_mask=mask[:, :columns], past_key_values=cache)

        step(mask.shape[1] - 1)
        cache.reorder_cache(torch.arange(len(rows)).flip(0))
        assert not asked(lambda: step(mask.shape[1]))


@pytest.mark.parametrize("logits", ["all", "supervised"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_asks_once(logits, checkpointing) -> None:
    model = build("llava").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs, labels = labelled(model)
    schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
    strategy = tp.build_strategy("pyramiddrop")
    with tp.prune(model, strategy, schedule, logits=logits):
        model(**inputs, labels=labels).loss.backward()
        found = asked(lambda: model(**inputs, labels=labels).loss.backward())
    assert found == Counter(PLAN)
