"""Costs: the figures that papers print, from their own formulas."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlavaConfig

import tokenprune as tp

SEVEN = tp.cost.DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
THIRTEEN = tp.cost.DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)


def pyramid(lam: float, layers=(8, 16, 24)) -> tp.Schedule:
    return tp.Schedule.pyramid(layers=list(layers), lam=lam)


def exact_lengths(schedule: tp.Schedule, num_layers: int, num_visual: int) -> list[float]:
    """Fractional counts: the published tables do not round."""
    lengths, alive = [], float(num_visual)
    cuts = {stage.layer: stage.keep for stage in schedule.stages}
    for layer in range(num_layers):
        alive = num_visual * cuts[layer] if layer in cuts else alive
        lengths.append(alive)
    return lengths


@pytest.mark.parametrize(
    ("shape", "schedule", "num_visual", "tera"),
    [
        (SEVEN, tp.Schedule(), 576, 3.8172),
        (SEVEN, pyramid(0.4), 576, 1.5403),
        (SEVEN, pyramid(0.5), 576, 1.7774),
        (SEVEN, pyramid(0.6), 576, 2.0626),
        (SEVEN, tp.Schedule(), 2880, 20.825),
        (SEVEN, pyramid(0.4), 2880, 8.219),
        (SEVEN, pyramid(0.5), 2880, 9.4646),
        (SEVEN, pyramid(0.6), 2880, 10.981),
        (SEVEN, tp.Schedule(), 5184, 40.616),
        (SEVEN, pyramid(0.5), 5184, 18.076),
        (SEVEN, pyramid(0.5, (10, 20)), 576, 2.134),
        (SEVEN, tp.Schedule(), 288, 1.887),
        (SEVEN, tp.Schedule.one_shot(2, 0.5), 576, 2.0075),
        (SEVEN, tp.Schedule.one_shot(2, 0.5), 2880, 10.554),
        (SEVEN, tp.Schedule(), 2048, 14.36),
        (SEVEN, tp.Schedule.one_shot(2, 0.5), 2048, 7.37),
        (SEVEN, pyramid(0.5), 2048, 6.58),
        (THIRTEEN, tp.Schedule(), 576, 7.444),
        (THIRTEEN, pyramid(0.5), 576, 2.960),
        (THIRTEEN, pyramid(0.5, (10, 20, 30)), 576, 3.471),
    ],
)
def test_pyramiddrop_tables(shape, schedule, num_visual, tera) -> None:
    lengths = exact_lengths(schedule, shape.num_layers, num_visual)
    assert tp.cost.flops(shape, lengths) / 1e12 == pytest.approx(tera, rel=0.005)


@pytest.mark.parametrize(("lam", "tera"), [(0.4, 1.5380), (0.6, 2.0604)])
def test_rounded_counts(lam: float, tera: float) -> None:
    lengths = pyramid(lam).lengths(32, 576)
    assert tp.cost.flops(SEVEN, lengths) / 1e12 == pytest.approx(tera, rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "removed", "ratio"),
    [
        (2, 0.9, 0.2027),
        (2, 0.75, 0.3322),
        (2, 0.5, 0.5516),
        (3, 0.5, 0.5666),
        (5, 0.5, 0.5964),
        (0, 0.9, 0.1496),
        (0, 0.5, 0.5217),
    ],
)
def test_fastv_table_1(layer: int, removed: float, ratio: float) -> None:
    lengths = tp.Schedule.one_shot(layer, 1 - removed).lengths(32, 576)
    full = tp.cost.flops(SEVEN, [576] * 32, num_text=36, convention="fastv")
    pruned = tp.cost.flops(SEVEN, lengths, num_text=36, convention="fastv")
    assert full / 32 / 1e9 == pytest.approx(99.33, rel=0.005)
    assert pruned / full == pytest.approx(ratio, rel=0.005)


def test_kv_bytes() -> None:
    assert tp.cost.kv_bytes(SEVEN, [1] * 32) == 524_288
    assert tp.cost.kv_bytes(THIRTEEN, [1] * 40) == 819_200
    assert tp.cost.kv_bytes(SEVEN, pyramid(0.5).lengths(32, 576)) == pytest.approx(
        141.6e6, rel=0.005
    )
    assert tp.cost.kv_bytes(SEVEN, [0] * 32, num_text=2, bytes_per_value=4) == 4 * 524_288
    qwen = tp.cost.DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)
    assert tp.cost.kv_bytes(qwen, [1] * 28) == 57_344


def test_average_tokens() -> None:
    assert sum(pyramid(0.5).lengths(32, 576)) / 32 == 270
    assert sum(tp.Schedule.one_shot(2, 0.5).lengths(32, 576)) / 32 == 306
    assert sum(tp.Schedule.one_shot(2, 0.1).lengths(32, 576)) / 32 == pytest.approx(90.4, rel=0.005)


def test_shape_from_config() -> None:
    text = LlamaConfig(
        num_hidden_layers=5,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=77,
    )
    shape = tp.cost.DecoderShape(5, 64, 96, 4, 2, 16, 77)
    assert tp.cost.DecoderShape.from_config(text) == shape
    assert tp.cost.DecoderShape.from_config(LlavaConfig(text_config=text)) == shape
    with pytest.raises(ValueError, match=r"DecoderShape.from_config: expected a decoder config"):
        tp.cost.DecoderShape.from_config(object())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"flops.lengths: expected 32 counts >= 0.*got 3"):
        tp.cost.flops(SEVEN, [1, 2, 3])
    with pytest.raises(KeyError, match=r"expected one of \['pyramiddrop', 'fastv'\], got 'fast'"):
        tp.cost.flops(SEVEN, [1] * 32, convention="fast")
