"""Schedules: the only place where a fraction becomes an integer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenprune as tp


def test_pyramid_cuts_where_the_paper_does() -> None:
    schedule = tp.Schedule.pyramid(num_layers=32, num_stages=4, lam=0.5)
    assert schedule.stages == (tp.Stage(8, 0.5), tp.Stage(16, 0.25), tp.Stage(24, 0.125))
    assert schedule.rounding == "floor"
    lengths = schedule.lengths(num_layers=32, num_visual=576)
    assert lengths == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


def test_powers_of_lam_are_rounded_before_use() -> None:
    schedule = tp.Schedule.pyramid(num_layers=4, num_stages=4, lam=0.6)
    assert schedule.lengths(4, 125) == [125, 75, 45, 27]
    fine = tp.Schedule.pyramid(layers=[1, 2, 3], lam=0.37)  # to 12 decimals, not to three
    assert fine.lengths(4, 2880) == [2880, 1065, 394, 145]


def test_one_shot_rounds_half_to_even() -> None:
    assert tp.Schedule.one_shot(layer=2, keep=0.5).lengths(4, 5) == [5, 5, 2, 2]
    assert tp.Schedule.one_shot(layer=2, keep=0.5).lengths(4, 7) == [7, 7, 4, 4]
    assert tp.Schedule.one_shot(2, 0.5, rounding="floor").lengths(4, 7) == [7, 7, 3, 3]


def test_there_is_no_minimum_of_one() -> None:
    schedule = tp.Schedule(stages=(tp.Stage(1, 0.125),))
    assert schedule.lengths(2, 7) == [7, 0]
    assert tp.Schedule().lengths(3, 7) == [7, 7, 7]


def test_pyramid_with_layers() -> None:
    schedule = tp.Schedule.pyramid(layers=[2, 5], lam=0.5)
    assert schedule.stages == (tp.Stage(2, 0.5), tp.Stage(5, 0.25))
    assert tp.Schedule.pyramid(num_layers=8, num_stages=3, layers=[2, 5]) == schedule
    nearest = tp.Schedule.pyramid(layers=[1], lam=0.5, rounding="nearest")
    assert nearest.lengths(2, 7) == [7, 4]


def test_explicit_cuts_of_a_shallower_decoder_lie_at_the_same_depth() -> None:
    cuts = ((3, 0.5), (7, 0.3), (16, 0.2))
    as_given = tp.Schedule(tuple(tp.Stage(*cut) for cut in cuts), "nearest")
    for num_layers in (None, 32, 40):
        assert tp.Schedule.explicit(cuts, "nearest", 32, num_layers) == as_given
    assert tp.Schedule.explicit(cuts, "nearest", num_layers=8) == as_given
    eight = tp.Schedule.explicit(cuts, of_layers=32, num_layers=8)
    assert eight.stages == (tp.Stage(1, 0.5), tp.Stage(2, 0.3), tp.Stage(4, 0.2))
    assert eight.rounding == "floor"
    # No cut moves to layer 0, and of two at one layer the later stays.
    four = tp.Schedule.explicit(cuts, of_layers=32, num_layers=4)
    assert four.stages == (tp.Stage(1, 0.3), tp.Stage(2, 0.2))
    with pytest.raises(ValueError, match=r"expected layers below 16, .* got \[16\]"):
        tp.Schedule.explicit(cuts, of_layers=16, num_layers=8)
    with pytest.raises(ValueError, match="of_layers: expected an integer >= 1, got 0"):
        tp.Schedule.explicit(cuts, of_layers=0)


@given(
    num_layers=st.integers(1, 48),
    num_stages=st.integers(1, 48),
    lam=st.floats(0.01, 1.0),
    num_visual=st.integers(0, 6000),
)
def test_pyramid_lengths(num_layers: int, num_stages: int, lam: float, num_visual: int) -> None:
    if num_stages > num_layers:
        with pytest.raises(ValueError, match="Every stage needs a layer"):
            tp.Schedule.pyramid(num_layers=num_layers, num_stages=num_stages, lam=lam)
        return
    schedule = tp.Schedule.pyramid(num_layers=num_layers, num_stages=num_stages, lam=lam)
    lengths = schedule.lengths(num_layers, num_visual)
    assert len(lengths) == num_layers
    assert lengths[0] == num_visual
    assert lengths == sorted(lengths, reverse=True)
    cuts = num_stages - 1
    assert len(schedule.stages) == cuts
    if cuts:
        assert lengths[-1] == int(num_visual * round(lam**cuts, 12))


@given(
    keeps=st.lists(st.floats(0, 1), max_size=6),
    rounding=st.sampled_from(["floor", "nearest"]),
    num_visual=st.integers(0, 3000),
)
def test_counts_follow_python(keeps: list[float], rounding: str, num_visual: int) -> None:
    keeps = sorted(keeps, reverse=True)
    stages = tuple(tp.Stage(2 * i + 1, keep) for i, keep in enumerate(keeps))
    lengths = tp.Schedule(stages, rounding).lengths(14, num_visual)
    for stage in stages:
        exact = num_visual * stage.keep
        expected = int(exact) if rounding == "floor" else round(exact)
        assert lengths[stage.layer] == min(expected, num_visual)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tp.Schedule((tp.Stage(16, 0.5), tp.Stage(8, 0.5))),
            r"Schedule.stages: expected strictly rising layers, got \[16, 8\]. Sort the stages",
        ),
        (lambda: tp.Schedule((tp.Stage(8, 0.5), tp.Stage(8, 0.2))), "strictly rising"),
        (lambda: tp.Schedule((tp.Stage(1, 0.2), tp.Stage(2, 0.5))), "keep never to rise"),
        (lambda: tp.Schedule(rounding="up"), "Schedule.rounding: expected one of"),
        (lambda: tp.Schedule(((1, 0.5),)), "expected Stage objects"),
        (lambda: tp.Stage(-1, 0.5), "Stage.layer: expected an integer >= 0, got -1"),
        (lambda: tp.Stage(1.5, 0.5), "Stage.layer"),
        (lambda: tp.Stage(True, 0.5), "Stage.layer"),
        (lambda: tp.Stage(1, 1.5), r"Stage.keep: expected a number in \[0, 1\], got 1.5"),
        (lambda: tp.Stage(1, math.nan), "Stage.keep"),
        (lambda: tp.Stage(1, "half"), "Stage.keep"),
        (lambda: tp.Schedule.pyramid(8, 4, lam=0.0), r"lam: expected a number in \(0, 1\], got 0"),
        (lambda: tp.Schedule.pyramid(8, 4, lam=1.01), "lam"),
        (lambda: tp.Schedule.pyramid(lam=0.5), "expected num_layers and num_stages, or layers"),
        (lambda: tp.Schedule.pyramid(3, 4), "num_stages: expected at most num_layers=3, got 4"),
        (lambda: tp.Schedule.pyramid(num_stages=4, layers=[1, 2]), "one cut fewer than stages"),
        (lambda: tp.Schedule.pyramid(num_layers=2, layers=[1, 2]), "expected layers below 2"),
        (lambda: tp.Schedule.pyramid(0, 1), "num_layers: expected an integer >= 1, got 0"),
        (lambda: tp.Schedule.one_shot(9, 0.5).lengths(8, 5), "expected layers below 8"),
        (lambda: tp.Schedule().lengths(0, 5), "lengths.num_layers: expected an integer >= 1, got"),
        (lambda: tp.Schedule().lengths(8, -1), "num_visual: expected an integer >= 0"),
    ],
)
def test_bad_values(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen_and_hashable() -> None:
    schedule = tp.Schedule.pyramid(8, 4)
    assert hash(schedule) == hash(tp.Schedule.pyramid(8, 4))
    with pytest.raises(AttributeError):
        schedule.rounding = "nearest"
