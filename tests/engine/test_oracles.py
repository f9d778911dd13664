"""The five oracles: what a correct pruned run is, on tiny random models."""

from __future__ import annotations

import itertools
import operator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import FAMILIES, NUM_LAYERS, ROWS, Row, batch, build
from oracles import (
    DROPPING,
    EVERY,
    SCHEDULE,
    STEPS,
    Frozen,
    all_visual,
    assert_close,
    assert_same_choice,
    assert_same_tokens,
    counted,
    generate,
    is_decided,
    masked,
    runnable,
    seed_of,
    split,
    survivors,
)

import tokenprune as tp

ATTENTIONS = ("eager", "sdpa")
POLICIES = ("original", "renumbered")
SIDES = ("left", "right")
# Of the largest logit. Unpruned, a row alone and in a batch differ by a third of that already:
# more of the matrix products are of another shape than where tokens are masked.
ALONE = 3e-5
VARIANTS = [
    tp.build_strategy("fastv", queries="all"),
    tp.build_strategy("pyramiddrop", source="previous", queries="all"),
    tp.build_strategy("dart", exact_budget=True),
    tp.build_strategy("divprune", exact_reference=True),
    tp.build_strategy("sparsevlm", version="2.0"),
]
STRATEGIES = [*EVERY, *VARIANTS]
RUNNABLE = runnable(FAMILIES, STRATEGIES)
RUNNABLE_DROPPING = runnable(FAMILIES, [*DROPPING, *VARIANTS])
CORE = ("fastv", "pyramiddrop", "random", "uniform")


def ids(value) -> str:
    return value if isinstance(value, str) else repr(value).replace("'", "")


def fair(pairs, **axes):
    """Every family with every strategy, in every way by `make test-all`.

    By default the published pair and the baselines in a third of the ways, the others in a
    sixteenth, so that each way is tried with some.
    """
    cases = []
    for number, (family, strategy) in enumerate(pairs):
        for place, way in enumerate(itertools.product(*axes.values())):
            core = strategy.name in CORE and (number + place) % 3 == 0
            often = core or (number + place) % 16 == 0
            cases.append(
                pytest.param(family, strategy, *way, marks=() if often else pytest.mark.matrix)
            )
    return pytest.mark.parametrize(("family", "strategy", *axes), cases, ids=ids)


# ------------------------------------------------------------------------------------ 1. identity


@fair(RUNNABLE, attention=ATTENTIONS, side=SIDES, policy=POLICIES)
@pytest.mark.share(2)
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


@fair(RUNNABLE_DROPPING, attention=ATTENTIONS, side=SIDES)
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
        assert_close(ours, reference[row, columns])
    if side == "left":
        with tp.prune(model, strategy, SCHEDULE, visual_mask=mask) as trace:
            got = generate(model, inputs)
        with masked(model, inputs["attention_mask"], visual, trace):
            expected = generate(model, inputs)
        assert_same_tokens(got, expected)


@fair(RUNNABLE_DROPPING, side=SIDES)
@pytest.mark.share(2)
def test_drop_is_mask_to_the_last_digit(family, strategy, side) -> None:
    """In float64, where rounding hides nothing: what differs by 1e-10 is not the same."""
    model = build(family, "sdpa").double()
    inputs, mask = split(batch(model, ROWS, side))
    visual = all_visual(model, batch(model, ROWS, side))
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE, visual_mask=mask) as trace:
            pruned = model(**inputs).logits
        with masked(model, inputs["attention_mask"], visual, trace):
            reference = model(**inputs).logits
    for row in range(len(ROWS)):
        columns = survivors(trace, inputs["attention_mask"], visual, row)
        ours = pruned[row, -len(columns) :] if side == "left" else pruned[row, : len(columns)]
        assert_close(ours, reference[row, columns], 1e-10)


# -------------------------------------------------------------------------------- 3. batch = alone


@fair(RUNNABLE, attention=ATTENTIONS, side=SIDES, policy=POLICIES)
@pytest.mark.share(2)
def test_batch_is_alone(family, strategy, attention, side, policy) -> None:
    seed = seed_of(strategy)
    model = build(family, attention, seed)
    inputs, mask = split(batch(model, ROWS, side, seed))
    with (
        torch.no_grad(),
        tp.prune(model, strategy, SCHEDULE, positions=policy, visual_mask=mask) as trace,
    ):
        together = model(**counted(strategy, inputs))
    tokens = None
    if side == "left":
        with tp.prune(model, strategy, SCHEDULE, positions=policy, visual_mask=mask):
            tokens = generate(model, inputs)
    for row, sample in enumerate(ROWS):
        single, own_mask = split(batch(model, [sample], side, seed))
        with tp.prune(
            model, strategy, SCHEDULE, positions=policy, visual_mask=own_mask
        ) as alone_trace:
            with torch.no_grad():
                alone = model(**single)
            if alone_trace.stages:
                assert_same_choice(trace.stages, alone_trace.stages, [(row, 0)])
            assert trace.lengths[:, row].tolist() == alone_trace.lengths[:, 0].tolist()
            assert (
                trace.visual_lengths[:, row].tolist() == alone_trace.visual_lengths[:, 0].tolist()
            )
            length = alone.logits.shape[1]
            in_batch = together.logits[row]
            ours = in_batch[-length:] if side == "left" else in_batch[:length]
            assert_close(ours, alone.logits[0], ALONE)
            if tokens is not None:
                assert_same_tokens(of_row(tokens, row), of_row(generate(model, single), 0), ALONE)


def of_row(output, row: int) -> SimpleNamespace:
    """What one row of a generation says, and the logits it says it by."""
    return SimpleNamespace(
        sequences=output.sequences[row, -STEPS:], logits=[step[row] for step in output.logits]
    )


# ----------------------------------------------------------------------------- 4. cache = no cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("strategy", [Frozen(), tp.build_strategy("uniform")], ids=ids)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.share(2)
def test_cache_is_no_cache(family, strategy, attention, policy) -> None:
    model = build(family, attention)
    inputs = batch(model, ROWS, "left")
    with tp.prune(model, strategy, SCHEDULE, positions=policy):
        cached = generate(model, inputs)
        plain = generate(model, inputs, use_cache=False)
    assert_same_tokens(cached, plain, ALONE)


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
        together = model(**counted(strategy, batch(model, rows, side))).logits
        stages = list(trace.stages)
        visual = trace.visual_lengths
        for row, sample in enumerate(rows):
            alone = model(**batch(model, [sample], side)).logits[0]
            if trace.stages:
                assume(is_decided(stages, trace.stages, row, 0))
                assert_same_choice(stages, trace.stages, [(row, 0)])
            length = len(alone)
            ours = together[row, -length:] if side == "left" else together[row, :length]
            assert_close(ours, alone, ALONE)
            count = 16 * sum(segment == (30, 60) for segment in sample.segments)
            budgets, left = schedule.lengths(NUM_LAYERS, count), visual[:, row].tolist()
            assert left == budgets or (
                not strategy.keeps_exactly and all(map(operator.le, left, budgets))
            )


# ------------------------------------------------------------------------- layer 0, several stages


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["cdpruner", "divprune", "pyramiddrop", "random", "uniform"])
def test_cut_at_layer_0_is_exact(name, attention) -> None:
    model = build("llava", attention)
    inputs = batch(model, ROWS, "left")
    visual = all_visual(model, inputs)
    schedule = tp.Schedule(stages=(tp.Stage(0, 0.5), tp.Stage(3, 0.0)))
    with tp.prune(model, tp.build_strategy(name), schedule) as trace:
        got = generate(model, inputs)
    with masked(model, inputs["attention_mask"], visual, trace):
        expected = generate(model, inputs)
    assert_same_tokens(got, expected)
