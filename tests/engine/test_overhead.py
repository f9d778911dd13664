"""What pruning costs beside its gain: synchronisations, masks, work per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import NUM_LAYERS, ROWS, batch, build
from torch import Tensor, nn

import tokenprune as tp

SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
#: Whatever makes the host wait for a device.
WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often the host asked for the value of a tensor."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITING:
            original = getattr(Tensor, name)

            def counting(self, *args, name=name, original=original, **kwargs):
                calls[name] += 1
                return original(self, *args, **kwargs)

            patch.setattr(Tensor, name, counting)
        yield calls


@pytest.mark.parametrize(
    "strategy",
    [
        *map(tp.build_strategy, ("cdpruner", "divprune", "fastv", "pyramiddrop", "sparsevlm")),
        tp.build_strategy("sparsevlm", version="2.0"),
        tp.build_strategy("dart", exact_budget=True),
        tp.build_strategy("vtw"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["alone", "padded"])
@pytest.mark.share(3)
def test_a_call_waits_once_more_whatever_its_cuts(strategy, rows) -> None:
    """Counts of visual and real tokens come in one transfer; no layer waits for anything."""
    model = build("llava")
    inputs = batch(model, rows)
    step = {"input_ids": torch.full((len(rows), 1), 7)}
    step["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def waits() -> list[int]:
        with counted() as prefill:
            cache = model(**inputs, use_cache=True).past_key_values
        with counted() as decode:
            model(**step, past_key_values=cache)
        return [sum(prefill.values()), sum(decode.values())]

    with torch.no_grad():
        plain = waits()
        with tp.prune(model, strategy, SCHEDULE):
            model(**inputs)  # the first call compares two ways to the same queries and keys
            pruned = waits()
    assert all(b <= a + 1 for a, b in zip(plain, pruned, strict=True))


def test_no_mask_is_made_where_none_is_needed() -> None:
    """So that sdpa goes on choosing its flash kernel."""
    model = build("llava")
    masks = []
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with tp.prune(model, tp.build_strategy("pyramiddrop"), SCHEDULE):
        model.generate(**batch(model, ROWS[:1]), max_new_tokens=4, do_sample=False)
    assert masks[: NUM_LAYERS * 4] == [None] * NUM_LAYERS * 4


def test_decoding_makes_nothing_per_layer() -> None:
    """With original positions and no padding, no tensor is made for any layer."""
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    step = {"input_ids": torch.tensor([[7]])}

    class Operations(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    def operations(cuts: list[int]) -> int:
        schedule = tp.Schedule(tuple(tp.Stage(cut, 0.5) for cut in cuts))
        with torch.no_grad(), tp.prune(model, tp.build_strategy("uniform"), schedule):
            cache = model(**inputs, use_cache=True).past_key_values
            model(**step, past_key_values=cache)
            with Operations() as seen:
                model(**step, past_key_values=cache)
        return seen.count

    assert operations([1, 2, 4]) == operations([4]) == operations([5])
