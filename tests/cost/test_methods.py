"""Figures that papers print of their methods and that need no weights."""

from __future__ import annotations

from statistics import mean

import pytest

import tokenprune as tp
from tokenprune.runs.compose import config_dir

TEXTS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
SAMPLES = {
    "llava-1.5-7b": [(text, 576) for text in TEXTS],
    "llava-1.5-13b": [(text, 576) for text in TEXTS],
    "llava-next-7b": list(
        zip(
            TEXTS,
            (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116),
            strict=True,
        )
    ),
}


@pytest.mark.parametrize(
    ("preset", "whole", "pruned", "ratio"),
    [
        ("llava-1.5-7b", 3.2280, 0.5122, 0.15630),
        ("llava-1.5-13b", 6.2813, 1.0020, 0.15713),
        ("llava-next-7b", 11.8489, 1.2659, 0.10797),
    ],
)
def test_divprune_s_teraflops(preset: str, whole: float, pruned: float, ratio: float) -> None:
    """Means over its data sets, of text and visual tokens: .098 of the tokens, not of the cost."""
    shape = tp.cost.DecoderShape.preset(preset)
    _, schedule, _ = tp.published("divprune", shape.num_layers)

    def tera(text: int, visual: int, cuts: tp.Schedule) -> float:
        lengths = cuts.lengths(shape.num_layers, visual)
        return tp.cost.flops(shape, lengths, text, convention="fastv") / 1e12

    before = [tera(*sample, tp.Schedule()) for sample in SAMPLES[preset]]
    after = [tera(*sample, schedule) for sample in SAMPLES[preset]]
    assert mean(before) == pytest.approx(whole, rel=1e-4)
    assert mean(after) == pytest.approx(pruned, rel=1e-4)
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    assert mean(ratios) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize(
    ("keeps", "counts", "outputs", "inputs"),
    [
        ((0.5365, 0.3542, 0.1962), (309, 204, 113), 192.03125, 206.5),
        ((0.5417, 0.2031, 0.0677), (312, 117, 39), 128.625, 145.40625),
        ((0.4323, 0.0955, 0.0469), (249, 55, 27), 96.9375, 114.09375),
        ((0.1424, 0.0556, 0.0313), (82, 32, 18), 64.8125, 82.25),
        # Version 2.0
        ((0.5208, 0.3472, 0.2049), (300, 200, 118), 192.4375, None),
        ((0.4132, 0.1875, 0.1042), (238, 108, 60), 128.0, None),
        ((0.4271, 0.0938, 0.0486), (246, 54, 28), 96.8125, None),
        ((0.1146, 0.059, 0.0347), (66, 34, 20), 64.4375, None),
    ],
)
def test_sparsevlm_s_averages(
    keeps: tuple[float, ...], counts: tuple[int, ...], outputs: float, inputs: float | None
) -> None:
    """The fractions that configs/schedule/sparsevlm.yaml lists give the released code's lists."""
    schedule = tp.Schedule.explicit(list(zip((3, 7, 16), keeps, strict=True)), "nearest")
    lengths = schedule.lengths(32, 576)
    assert tuple(sorted(set(lengths), reverse=True)) == (576, *counts)
    assert mean([*lengths[1:], lengths[-1]]) == outputs
    if inputs is not None:
        assert mean(lengths) == inputs
    listed = (config_dir() / "schedule" / "sparsevlm.yaml").read_text()
    assert all(f"{keep:g}" in listed for keep in keeps)


def test_sparsevlm_s_keys_and_values() -> None:
    """302.4 MB of 576 tokens, 100.8 of 192: a third, to the byte."""
    shape = tp.cost.DecoderShape.preset("llava-1.5-7b")
    whole, third = (tp.cost.kv_bytes(shape, [count] * 32) for count in (576, 192))
    assert (whole, whole) == (288 * 2**20, 3 * third)
    assert whole / 1e6 == pytest.approx(302.4, rel=5e-3)
    assert third / 1e6 == pytest.approx(100.8, rel=5e-3)


def test_cdpruner_s_teraflops() -> None:
    """41.7 for 2 880 tokens: of PyramidDrop's 20.8 each product and each sum is counted."""
    shape = tp.cost.DecoderShape.preset("llava-next-7b")
    found = 2 * tp.cost.flops(shape, [2880] * 32) / 1e12
    assert found == pytest.approx(41.65, rel=1e-3)
    assert found == pytest.approx(41.7, rel=5e-3)


def test_vscan_s_average_on_qwen() -> None:
    """A sixth of the tokens, and a third of these halfway: 11.13 %, of fractions."""
    assert mean([0.167] * 14 + [0.167 * 0.333] * 14) == pytest.approx(0.1113, rel=1e-3)
    stages = [(0, 0.167), (14, 0.0556)]
    lengths = tp.Schedule.explicit(stages, "nearest").lengths(28, 10_000)
    assert mean(lengths) / 10_000 == pytest.approx(0.1113, rel=5e-3)


def test_sparsevlm_s_teraflops() -> None:
    """Its table, by layer inputs, with 117 text tokens."""
    shape = tp.cost.DecoderShape.preset("llava-1.5-7b")
    _, schedule, _ = tp.published("sparsevlm", 32)
    found = tp.cost.flops(shape, schedule.lengths(32, 576), num_text=117) / 1e12
    assert found == pytest.approx(2.127, rel=5e-3)
