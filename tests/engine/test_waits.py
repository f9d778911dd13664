"""What a call asks of the device: one transfer and one upload, and of a decoding step nothing.

A GPU that is waited for stands still, and a CUDA graph cannot be captured at all. What would wait
or upload is seen on a device that is far away (`far.py`).
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from far import FAR, Device, far, near
from models import ROWS, batch, build, labelled
from oracles import tiny
from zoo import ZOO

import tokenprune as tp
from tokenprune.strategy import vision_needs

SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
READS_PLACES = ("evs", "hiprune", "pool", "vidcom2", "vscan")
BATCHES = {"one": [0], "alike": [0, 0], "ragged": [0, 1, 2, 3]}
#: Of each strategy by default.
SOME = [("original", "one"), ("renumbered", "ragged")]


def asked(work) -> Counter[str]:
    with Device() as device:
        work()
    return device.crossings


@pytest.fixture(scope="module")
def models():
    return {family: (model := build(family), far(model)) for family in ("llava", "llava_next")}


def test_it_sees_what_waits(models, monkeypatch) -> None:
    def score(self, view):
        hidden = view.hidden
        if hidden.sum().item() and hidden.any() and int(hidden.shape[0]) and hidden[0, 0, 0] < 9:
            places = torch.from_numpy(hidden.numpy(force=True)[0].argsort(0)).to(FAR)
            return hidden[view.valid.nonzero()[:, 0]][:1, :, 0] + places.sum().tolist()
        return None

    kind = type(tp.build_strategy("pyramiddrop"))
    monkeypatch.setattr(kind, "score", score)
    monkeypatch.setattr("far.ours", lambda: "score")
    near_model, model = models["llava"]
    inputs = far(batch(near_model, ROWS[:1]))
    with torch.no_grad(), tp.prune(model, kind(), tp.Schedule.one_shot(layer=2, keep=0.5)):
        plain = asked(lambda: model(**inputs))
        monkeypatch.setattr(kind, "score", lambda self, view: view.attend().mean(1))
        own = asked(lambda: model(**inputs))
    # item, any, a comparison, numpy, nonzero and tolist wait; from_numpy's array goes up.
    assert plain - own == {"score: read": 6, "score: upload": 1}


def cases():
    for name, positions, rows in itertools.product(tp.available(), tp.POSITIONS, BATCHES):
        usual = name == "pyramiddrop" or (positions, rows) in SOME
        yield pytest.param(name, positions, rows, marks=[] if usual else pytest.mark.matrix)


@pytest.mark.parametrize(("name", "positions", "rows"), [*cases()])
@pytest.mark.share(12)
def test_a_call_with_images_asks_once(models, name, positions, rows) -> None:
    """Of the tower there goes up which patches make a token, of a grid where each token is."""
    near_model, model = models["llava_next" if rows == "one" else "llava"]
    inputs = batch(near_model, [ROWS[row] for row in BATCHES[rows]])
    strategy, remote = tiny(name), far(inputs)
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE, positions) as trace:
        with Device():
            model(**remote)  # the first call compares two ways to the same queries and keys
        with Device() as device:
            logits = model(**remote, use_cache=True).logits
        with Device():
            assert len(trace.stages) == 3
        assert len(trace.stages) == 3
    expected = {"fetch: read": 1, "_moved: upload": 1}
    expected |= {"_placed: upload": 1} if vision_needs(strategy) else {}
    expected |= {"places_on: upload": 1} if name in READS_PLACES else {}
    expected |= {} if strategy.keeps_exactly else {"_choose: read": 3}  # how many it kept, by cut
    assert device.crossings == expected
    with torch.no_grad(), tp.prune(near_model, strategy, SCHEDULE, positions):
        torch.testing.assert_close(near(logits), near_model(**inputs).logits, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
@pytest.mark.parametrize("model_type", ["mistral3", "gemma4", "llava_onevision", "molmo2"])
@pytest.mark.share(2)
def test_sizes_of_images_come_with_what_is_asked_anyway(model_type) -> None:
    """Also in a generation, which has the images encoded before the call."""
    near_model = ZOO[model_type].build("sdpa")
    model = far(near_model)
    inputs = far(ZOO[model_type].batch(near_model, [(3, "image", 5)]))
    schedule = tp.Schedule.one_shot(layer=2, keep=0.5)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("pool"), schedule) as trace:
        with Device():
            model(**inputs)  # the first call compares two ways to the same queries and keys
        found = [asked(lambda: model(**inputs)), trace.places]
        found += [asked(lambda: model.generate(**inputs, max_new_tokens=1)), trace.places]
    assert found[0] == {"fetch: read": 1, "_moved: upload": 1, "places_on: upload": 1}
    del found[2]["noted: read"]  # by `generate` itself
    assert found[2] == found[0]
    assert torch.equal(found[1][0], found[3][0])
    assert (found[1][0] >= 0).all()


@pytest.mark.parametrize("rows", BATCHES)
def test_a_blind_choice_after_another_asks_what_that_left(models, rows) -> None:
    near_model, model = models["llava"]
    inputs = batch(near_model, [ROWS[row] for row in BATCHES[rows]])
    mixed = tp.PerStage(tuple(map(tp.build_strategy, ("pyramiddrop", "uniform", "random"))))

    with torch.no_grad(), tp.prune(near_model, mixed, SCHEDULE) as expected:
        near_model(**inputs)
    with torch.no_grad(), tp.prune(model, mixed, SCHEDULE) as trace:
        with Device():
            model(**far(inputs))
        found = asked(lambda: model(**far(inputs)))
        with Device():
            stages = trace.stages
    assert found == {"fetch: read": 1, "_moved: upload": 2, "_moved: read": 1}
    for ours, theirs in zip(stages, expected.stages, strict=True):
        assert all(torch.equal(near(a), b) for a, b in zip(ours.kept, theirs.kept, strict=True))


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_decoding_step_asks_nothing(models, positions, rows) -> None:
    near_model, model = models["llava"]
    inputs = batch(near_model, [ROWS[row] for row in BATCHES[rows]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    one, inputs, mask = far(torch.full((len(mask), 1), 7)), far(inputs), far(mask)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("pyramiddrop"), SCHEDULE, positions):
        with Device():
            cache = model(**inputs, use_cache=True).past_key_values

        def step(columns):
            model(input_ids=one, attention_mask=mask[:, :columns], past_key_values=cache)

        asked(lambda: step(mask.shape[1] - 1))
        with Device():
            cache.reorder_cache(far(torch.arange(len(one)).flip(0)))
        assert not asked(lambda: step(mask.shape[1]))


@pytest.mark.parametrize("logits", ["all", "supervised"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.share(2)
def test_a_training_step_asks_once(logits, checkpointing) -> None:
    near_model = build("llava").train()
    if checkpointing:
        near_model.gradient_checkpointing_enable()
    inputs, labels = labelled(near_model)
    model, inputs, labels = far(near_model), far(inputs), far(labels)
    with tp.prune(model, tp.build_strategy("pyramiddrop"), SCHEDULE, logits=logits):
        with Device():
            model(**inputs, labels=labels).loss.backward()
        found = asked(lambda: model(**inputs, labels=labels).loss.backward())
    assert found == {"fetch: read": 1, "_moved: upload": 1}
