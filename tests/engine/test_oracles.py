"""The five oracles: what a correct pruned run is, on tiny random models."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, NUM_LAYERS, ROWS, Row, batch, build
from torch import Tensor

import tokenprune as tp

ATTENTIONS = ("eager", "sdpa")
POLICIES = ("original", "renumbered")
SIDES = ("left", "right")
SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Unpruned, a row alone and in a batch already differ by 2e-5 here: the matrix products differ.
ALONE = {"atol": 1e-4, "rtol": 1e-4}
STEPS = 5


def split(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs that `generate` takes, and the visual mask beside them."""
    inputs = dict(inputs)
    return inputs, inputs.pop("visual_mask", None)


def generate(model, inputs, **options):
    inputs, _ = split(inputs)
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def all_visual(model, inputs) -> Tensor:
    if "visual_mask" in inputs:
        return inputs["visual_mask"]
    return tp.visual_mask(model, inputs["input_ids"])


@dataclass(frozen=True)
class Frozen(tp.ScoreStrategy):
    """A choice that depends on nothing but a token's place in the conversation."""

    def score(self, view: tp.TokenView) -> Tensor:
        return (view.positions * 37 % 101).float()


STRATEGIES = [tp.build_strategy(name) for name in tp.available()] + [
    tp.build_strategy("fastv", queries="all"),
    tp.build_strategy("pyramiddrop", source="previous", queries="all"),
]


def ids(value) -> str:
    return value if isinstance(value, str) else repr(value).replace("'", "")


# ------------------------------------------------------------------------------------ 1. identity


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=ids)
@pytest.mark.parametrize("family", FAMILIES)
def test_identity(family, strategy, attention, side, policy) -> None:
    model = build(family, attention)
    inputs, mask = split(batch(model, ROWS, side))
    keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
    with torch.no_grad():
        plain = model(**inputs).logits
        with tp.prune(model, strategy, keep_all, positions=policy, visual_mask=mask) as trace:
            pruned = model(**inputs).logits
    assert torch.equal(plain, pruned)
    assert [s.layer for s in trace.stages] == [1, 2, 4]
    counts = all_visual(model, batch(model, ROWS, side)).sum(1).tolist()
    for stage in trace.stages:
        assert [len(k) for k in stage.kept] == counts
    if side == "left":
        expected = generate(model, inputs)
        with tp.prune(model, strategy, keep_all, positions=policy, visual_mask=mask):
            got = generate(model, inputs)
        assert torch.equal(expected.sequences, got.sequences)
        assert all(torch.equal(a, b) for a, b in zip(expected.logits, got.logits, strict=True))


# --------------------------------------------------------------------------------- 2. drop = mask


@contextmanager
def masked(model, padding: Tensor, visual: Tensor, trace: tp.Trace, extra: int = STEPS + 1):
    """The unmodified model whose layers are given masks that hide what the trace dropped."""
    decoder = model.get_decoder()
    num_rows, prompt = visual.shape
    hidden_BLK = torch.zeros(num_rows, NUM_LAYERS, prompt + extra, dtype=torch.bool)
    for stage in trace.stages:
        for row, kept in enumerate(stage.kept):
            columns = visual[row].nonzero()[:, 0]
            dropped = torch.ones(len(columns), dtype=torch.bool)
            dropped[kept] = False
            hidden_BLK[row, stage.layer :, columns[dropped]] = True
    offsets = {}

    def hook(index):
        def before(module, args, kwargs):
            length = args[0].shape[1]
            cache = kwargs.get("past_key_values")
            offset = cache.get_seq_length(index) if cache is not None else 0
            offsets[index] = offset
            total = offset + length
            real = torch.nn.functional.pad(padding.bool(), (0, extra), value=True)[:, :total]
            causal = torch.arange(total) <= torch.arange(offset, total)[:, None]
            allowed = causal & (real & ~hidden_BLK[:, index, :total])[:, None, None]
            allowed = allowed | torch.eye(total, dtype=torch.bool)[offset:]
            low = torch.finfo(torch.float32).min
            kwargs["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, low)
            return args, kwargs

        return before

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(decoder.layers)
    ]
    yield
    for handle in hooks:
        handle.remove()


def survivors(trace: tp.Trace, padding: Tensor, visual: Tensor, row: int) -> Tensor:
    """Columns of a row that reach the last layer."""
    alive = padding[row].bool() & ~visual[row]
    alive[visual[row].nonzero()[:, 0][trace.stages[-1].kept[row]]] = True
    return alive.nonzero()[:, 0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=ids)
@pytest.mark.parametrize("family", FAMILIES)
def test_drop_is_mask(family, strategy, attention, side) -> None:
    model = build(family, attention)
    full = batch(model, ROWS, side)
    visual = all_visual(model, full)
    inputs, mask = split(full)
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE, visual_mask=mask) as trace:
            pruned = model(**inputs).logits
        with masked(model, inputs["attention_mask"], visual, trace):
            reference = model(**inputs).logits
    lengths = trace.lengths[-1].tolist()
    for row in range(len(ROWS)):
        columns = survivors(trace, inputs["attention_mask"], visual, row)
        assert len(columns) == lengths[row]
        ours = pruned[row, -len(columns) :] if side == "left" else pruned[row, : len(columns)]
        torch.testing.assert_close(ours, reference[row, columns], **CLOSE)
    if side == "left":
        with tp.prune(model, strategy, SCHEDULE, visual_mask=mask) as trace:
            got = generate(model, inputs)
        with masked(model, inputs["attention_mask"], visual, trace):
            expected = generate(model, inputs)
        assert torch.equal(got.sequences, expected.sequences)
        for ours, theirs in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


# -------------------------------------------------------------------------------- 3. batch = alone


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=ids)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_alone(family, strategy, attention, side, policy) -> None:
    model = build(family, attention)
    inputs, mask = split(batch(model, ROWS, side))
    with (
        torch.no_grad(),
        tp.prune(model, strategy, SCHEDULE, positions=policy, visual_mask=mask) as trace,
    ):
        together = model(**inputs)
    tokens = None
    if side == "left":
        with tp.prune(model, strategy, SCHEDULE, positions=policy, visual_mask=mask):
            tokens = generate(model, inputs).sequences[:, -STEPS:]
    for row, sample in enumerate(ROWS):
        single, own_mask = split(batch(model, [sample], side))
        with tp.prune(
            model, strategy, SCHEDULE, positions=policy, visual_mask=own_mask
        ) as alone_trace:
            with torch.no_grad():
                alone = model(**single)
            if alone_trace.stages:
                for ours, theirs in zip(trace.stages, alone_trace.stages, strict=True):
                    assert torch.equal(ours.kept[row], theirs.kept[0])
            assert trace.lengths[:, row].tolist() == alone_trace.lengths[:, 0].tolist()
            assert (
                trace.visual_lengths[:, row].tolist() == alone_trace.visual_lengths[:, 0].tolist()
            )
            length = alone.logits.shape[1]
            in_batch = together.logits[row]
            ours = in_batch[-length:] if side == "left" else in_batch[:length]
            torch.testing.assert_close(ours, alone.logits[0], **ALONE)
            if tokens is not None:
                assert torch.equal(generate(model, single).sequences[0, -STEPS:], tokens[row])


# ----------------------------------------------------------------------------- 4. cache = no cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("strategy", [Frozen(), tp.build_strategy("uniform")], ids=ids)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_cache_is_no_cache(family, strategy, attention, policy) -> None:
    model = build(family, attention)
    inputs = batch(model, ROWS, "left")
    with tp.prune(model, strategy, SCHEDULE, positions=policy):
        cached = generate(model, inputs)
        plain = generate(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- any batch, any schedule


@st.composite
def rows_and_schedules(draw) -> tuple[list[Row], tp.Schedule]:
    image = st.just((30, 60))
    segments = st.lists(st.one_of(st.integers(1, 6), image), max_size=4)
    rows = [Row([draw(st.integers(1, 5)), *draw(segments), draw(st.integers(1, 5))])
            for _ in range(draw(st.integers(1, 4)))]  # fmt: skip
    layers = sorted(draw(st.sets(st.integers(1, NUM_LAYERS - 1), max_size=3)))
    keeps = sorted((draw(st.floats(0, 1)) for _ in layers), reverse=True)
    stages = tuple(tp.Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True))
    return rows, tp.Schedule(stages, draw(st.sampled_from(["floor", "nearest"])))


@settings(max_examples=25, deadline=None)
@given(
    case=rows_and_schedules(),
    strategy=st.sampled_from(STRATEGIES),
    side=st.sampled_from(SIDES),
    policy=st.sampled_from(POLICIES),
)
def test_any_batch_is_its_rows_alone(case, strategy, side, policy) -> None:
    rows, schedule = case
    model = build("llava", "sdpa")
    with torch.no_grad(), tp.prune(model, strategy, schedule, positions=policy) as trace:
        together = model(**batch(model, rows, side)).logits
        kept = [stage.kept for stage in trace.stages]
        visual = trace.visual_lengths
        for row, sample in enumerate(rows):
            alone = model(**batch(model, [sample], side)).logits[0]
            length = len(alone)
            ours = together[row, -length:] if side == "left" else together[row, :length]
            torch.testing.assert_close(ours, alone, **ALONE)
            assert visual[:, row].tolist() == schedule.lengths(
                NUM_LAYERS, 16 * sum(segment == (30, 60) for segment in sample.segments)
            )
            for stage, own in zip(kept, trace.stages, strict=False):
                assert torch.equal(stage[row], own.kept[0])


# ------------------------------------------------------------------------- layer 0, several stages


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["pyramiddrop", "random", "uniform"])
def test_cut_at_layer_0_is_exact(name, attention) -> None:
    model = build("llava", attention)
    inputs = batch(model, ROWS, "left")
    visual = all_visual(model, inputs)
    schedule = tp.Schedule(stages=(tp.Stage(0, 0.5), tp.Stage(3, 0.0)))
    with tp.prune(model, tp.build_strategy(name), schedule) as trace:
        got = generate(model, inputs)
    with masked(model, inputs["attention_mask"], visual, trace):
        expected = generate(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
