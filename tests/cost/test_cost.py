"""Costs: the figures that papers print, from their own formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LlamaConfig, LlavaConfig
from zoo import ZOO

import tokenprune as tp
from tokenprune.cost.figures import Workload
from tokenprune.families import projection
from tokenprune.families.anatomy import examine
from tokenprune.strategy import decoder_rows

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
    with pytest.raises(KeyError, match=r"expected one of .*'exact'\], got 'fast'. Did you mean"):
        tp.cost.flops(SEVEN, [1] * 32, convention="fast")
    with pytest.raises(KeyError, match=r"average_tokens.over: expected one of .*got 'middle'"):
        tp.cost.average_tokens([1], "middle")
    with pytest.raises(ValueError, match=r"average_tokens.lengths: expected at least one layer"):
        tp.cost.average_tokens([])
    with pytest.raises(KeyError, match=r"cost.dtype: expected one of .*got 'float61'"):
        tp.cost.kv_bytes(SEVEN, [1] * 32, dtype="float61")
    with pytest.raises(KeyError, match=r"cost.preset: .*Did you mean 'llava-1.5-7b'"):
        tp.cost.DecoderShape.preset("llava-1.5-7B")
    latent = tp.cost.DecoderShape(1, 8, 16, 2, 1, 4, 10, unlike="latent attention")
    with pytest.raises(ValueError, match=r"cost.exact: .*got latent attention. Use the convention"):
        tp.cost.flops(latent, [3], convention="exact")
    assert tp.cost.flops(latent, [3]) > 0


# ------------------------------------------------------------------- more of the published figures


@pytest.mark.parametrize(
    ("layer", "removed", "giga"),
    [(2, 0.9, 29.7), (2, 0.75, 50.2), (2, 0.5, 84.6), (3, 0.5, 86.4), (5, 0.5, 90.1)],
)
def test_fastv_table_1_of_13b(layer: int, removed: float, giga: float) -> None:
    """The paper's column is exact: 40 layers, 36 text tokens, fractional counts, mean per layer."""
    lengths = exact_lengths(tp.Schedule.one_shot(layer, 1 - removed), 40, 576)
    pruned = tp.cost.flops(THIRTEEN, lengths, num_text=36, convention="fastv")
    full = tp.cost.flops(THIRTEEN, [576] * 40, num_text=36, convention="fastv")
    assert full / 40 / 1e9 == pytest.approx(154.64, rel=0.005)
    assert pruned / 40 / 1e9 == pytest.approx(giga, rel=0.005)


def after_layers(counts: tuple[int, ...], layers: tuple[int, ...]) -> list[int]:
    """Lengths where SparseVLM shortens what these layers leave."""
    lengths = []
    for layer in range(32):
        passed = sum(layer > cut for cut in layers)
        lengths.append((576, *counts)[passed])
    return lengths


@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        ((309, 204, 113), 192.03125, 206.5),
        ((312, 117, 39), 128.625, 145.406),
        ((249, 55, 27), 96.9375, 114.094),
        ((82, 32, 18), 64.8125, 82.25),
        ((300, 200, 118), 192.4375, None),  # version 2, which merges nothing
        ((238, 108, 60), 128.0, None),
        ((246, 54, 28), 96.8125, None),
        ((66, 34, 20), 64.4375, None),
    ],
)
def test_sparsevlm_averages(counts, outputs: float, inputs: float | None) -> None:
    lengths = after_layers(counts, (2, 6, 15))
    assert tp.cost.average_tokens(lengths, "outputs") == pytest.approx(outputs, abs=1e-9)
    if inputs is not None:
        assert tp.cost.average_tokens(lengths) == pytest.approx(inputs, abs=1e-3)


def test_sparsevlm_flops() -> None:
    for counts, text, tera in [
        ((309, 204, 113), 70, 1.816),
        ((309, 204, 113), 117, 2.127),
        ((312, 117, 39), 117, 1.724),
        ((82, 32, 18), 117, 1.307),
    ]:
        cost = tp.cost.flops(SEVEN, after_layers(counts, (2, 6, 15)), num_text=text) / 1e12
        assert cost == pytest.approx(tera, rel=0.005)
    for tokens, text, tera in [
        (576, 118, 4.62),
        (192, 118, 2.033),
        (128, 118, 1.609),
        (64, 118, 1.187),
    ]:
        cost = tp.cost.flops(SEVEN, [tokens] * 32, num_text=text) / 1e12
        assert cost == pytest.approx(tera, rel=0.005)


TEXTS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
TILED = (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116)


@pytest.mark.parametrize(
    ("shape", "visual", "texts", "kept", "full", "pruned", "ratio"),
    [
        (SEVEN, (576,) * 11, TEXTS, 0.098, 3.2280, 0.5122, 0.15630),
        (THIRTEEN, (576,) * 11, TEXTS, 0.098, 6.2813, 1.0020, 0.15713),
        (SEVEN, TILED, TEXTS, 0.098, 11.8489, 1.2659, 0.10797),
        (SEVEN, (1152,) * 5, (28, 63, 21, 38, 196), 0.1, 6.5386, 0.9371, 0.14104),
    ],
)
def test_divprune_tables(shape, visual, texts, kept, full, pruned, ratio) -> None:
    wholes, parts = [], []
    for count, text in zip(visual, texts, strict=True):
        fewer = count - round((1 - kept) * count)
        for found, length in ((wholes, count), (parts, fewer)):
            lengths = [length] * shape.num_layers
            found.append(tp.cost.flops(shape, lengths, text, convention="fastv") / 1e12)
    assert sum(wholes) / len(wholes) == pytest.approx(full, rel=0.005)
    assert sum(parts) / len(parts) == pytest.approx(pruned, rel=0.005)
    ratios = [part / whole for part, whole in zip(parts, wholes, strict=True)]
    assert sum(ratios) / len(ratios) == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize(
    ("schedule", "num_visual", "mean"),
    [
        (tp.Schedule.one_shot(2, 0.25), 576, 171),
        (tp.Schedule.one_shot(3, 0.5), 576, 315),
        (tp.Schedule.one_shot(16, 96 / 288), 288, 192),  # VScan, after its first stage
        (tp.Schedule.one_shot(16, 64 / 192), 192, 128),
        (tp.Schedule.one_shot(16, 32 / 96), 96, 64),
    ],
)
def test_published_averages(schedule: tp.Schedule, num_visual: int, mean: float) -> None:
    lengths = schedule.lengths(32, num_visual)
    assert tp.cost.average_tokens(lengths) == pytest.approx(mean, rel=0.005)


@pytest.mark.parametrize(
    ("schedule", "num_visual", "megabytes"),
    [
        (tp.Schedule(), 576, 301.99),
        (tp.Schedule.one_shot(2, 0.5), 576, 160.4),
        (tp.Schedule.one_shot(3, 0.5), 576, 165.2),
        (tp.Schedule(), 2880, 1440 * 2**20 / 1e6),
        (pyramid(0.5), 2880, 707.8),
    ],
)
def test_published_kv(schedule: tp.Schedule, num_visual: int, megabytes: float) -> None:
    lengths = schedule.lengths(32, num_visual)
    assert tp.cost.kv_bytes(SEVEN, lengths) / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_bytes_by_type() -> None:
    per_token = {"float32": 1_048_576, torch.bfloat16: 524_288, "float8_e4m3fn": 262_144}
    for dtype, size in per_token.items():
        assert tp.cost.kv_bytes(SEVEN, [1] * 32, dtype=dtype) == size
    kv = {name: tp.cost.kv_bytes(p.shape, [1] * p.shape.num_layers) for name, p in PRESETS.items()}
    assert kv["qwen2-vl-7b"] == kv["qwen2.5-vl-7b"] == 57_344
    assert kv["qwen2.5-vl-3b"] == 36_864
    assert kv["llava-next-mistral-7b"] == 131_072


PRESETS = tp.cost.PRESETS


def test_presets_are_found_by_name_and_hub_id() -> None:
    counts = {name: preset.num_visual for name, preset in PRESETS.items()}
    assert {name: count for name, count in counts.items() if count is not None} == {
        "llava-1.5-7b": 576,
        "llava-1.5-13b": 576,
        "llava-next-7b": 2880,
        "llava-next-13b": 2880,
        "llava-next-mistral-7b": 2880,
        "video-llava-7b": 2048,
        "gemma-3-4b": 256,
    }
    for name, preset in PRESETS.items():
        assert tp.cost.find_preset(name) is preset
        for hub_id in preset.hub_ids:
            assert tp.cost.DecoderShape.preset(hub_id) == preset.shape


@pytest.mark.parametrize(
    ("name", "published", "padded", "tied", "biases", "norms"),
    [
        ("llava-1.5-7b", 6_738_415_616, 64, False, False, 0),  # LLaMA, whose vocabulary is 32 000
        ("llava-1.5-13b", 13_015_864_320, 64, False, False, 0),
        ("llava-next-mistral-7b", 7_241_732_096, 64, False, False, 0),
        ("qwen2-vl-2b", 1_543_714_304, 0, True, True, 0),
        ("qwen2-vl-7b", 7_615_616_512, 0, False, True, 0),
        ("qwen2.5-vl-3b", 3_085_938_688, 0, True, True, 0),
        ("qwen2.5-vl-7b", 7_615_616_512, 0, False, True, 0),
        ("qwen2.5-vl-72b", 72_706_203_648, 0, False, True, 0),
        ("llava-onevision-7b", 7_615_616_512, -64, False, True, 0),  # Qwen2's vocabulary is larger
        ("internvl3-8b", 7_615_616_512, -390, False, True, 0),
        ("smolvlm2-2.2b", 1_711_376_384, 128, True, False, 0),  # SmolLM2's is smaller
        ("qwen3-vl-4b", 4_022_468_096, 0, True, False, 2),
        ("qwen3-vl-8b", 8_190_735_360, 0, False, False, 2),
    ],
)
def test_presets_have_the_parameters_of_what_they_name(
    name, published, padded, tied, biases, norms
) -> None:
    """The language model's number of parameters, to the last one, from the sizes of a preset."""
    shape = tp.cost.DecoderShape.preset(name)
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    maps = heads + shape.num_heads * shape.head_dim + 3 * shape.intermediate_size + 2
    layer = shape.hidden_size * maps + biases * heads + norms * shape.head_dim
    vocabulary = (shape.vocab_size - padded) * (1 if tied else 2)
    assert shape.num_layers * layer + shape.hidden_size * (vocabulary + 1) == published


# ------------------------------------------------------------------------ exact: against a counter

#: torch's registry lacks the kernel of sdpa on a CPU, which would count as nothing.
CPU_SDPA = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *rest, out_shape=None, **others: sdpa_flop_count(
            query, key, value
        )
    )
}
#: What differs from the decoder in these types is in their specimen, not in the formula: towers
#: inside the decoder, fused heads whatever the config says, and modules the counter cannot watch.
NOT_COUNTED = {*("chameleon", "fuyu", "idefics2", "blip-2", "kosmos-2", "kosmos-2.5")}


def counted(model: Any, inputs: dict[str, Any], **options: Any) -> int:
    """FLOPs of the decoder and the vocabulary projection in a real forward."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_SDPA)
    with torch.no_grad(), counter:
        model(**inputs, **options)
    names = {module: name for name, module in model.named_modules()}
    parts = (examine(model).decoder, model.get_output_embeddings())
    found = [
        sum(counter.flop_counts.get(f"{type(model).__name__}.{names[part]}", {}).values())
        for part in parts
        if part is not None
    ]
    return sum(found)


def check_counts(name: str, attention: str) -> tp.cost.DecoderShape:
    specimen = ZOO[name]
    model = specimen.build(attention)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch does not count grouped products
    shape = tp.cost.DecoderShape.from_config(model.config)
    if shape.unlike:
        with pytest.raises(ValueError, match=r"cost.exact: expected decoder layers"):
            tp.cost.exact(shape, [4] * shape.num_layers)
        return shape
    inputs = specimen.batch(model, [(3, "image", 5)])
    visual = int(tp.visual_mask(model, inputs["input_ids"]).sum())
    text = inputs["input_ids"].shape[1] - visual
    whole = tp.cost.exact(
        shape, [visual] * shape.num_layers, text, causal=False, num_logits=visual + text
    )
    assert counted(model, inputs, use_cache=False) == pytest.approx(whole.total, rel=1e-3)
    schedule = tp.Schedule(
        tuple(tp.Stage(cut, 0.5 ** (number + 1)) for number, cut in enumerate(specimen.cuts))
    )
    for strategy in (
        tp.build_strategy("pyramiddrop"),
        tp.build_strategy("fastv"),
        tp.build_strategy("fastv", queries="all"),
        tp.build_strategy("random"),
    ):
        with tp.prune(model, strategy, schedule) as trace:
            with torch.no_grad():
                model(**inputs, use_cache=False)  # the first time, a layer is tried in both ways
            count = counted(model, inputs, use_cache=False)
        lengths = trace.visual_lengths[:, 0].tolist()
        assert lengths == schedule.lengths(shape.num_layers, visual)
        back = int(any(rows.source == "previous" for rows in decoder_rows(strategy)))
        layers = examine(model).layers
        captured = [
            cut
            for cut in specimen.cuts
            if not projection._is_ordinary.get(layers[cut - back], (True, 0))[0]
        ]
        pruned = tp.cost.exact(
            shape,
            lengths,
            text,
            causal=False,
            num_logits=lengths[-1] + text,
            cuts=specimen.cuts,
            strategy=strategy,
            captured=captured,
        )
        assert count == pytest.approx(pruned.total, rel=1e-3), strategy
        assert (pruned.scoring > 0) == bool(decoder_rows(strategy))
    return shape


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llava", "eager"),
        ("llava", "sdpa"),
        ("qwen2_5_vl", "sdpa"),
        ("qwen3_vl_moe", "eager"),
        ("gemma3", "sdpa"),
        ("cohere2_vision", "eager"),  # some of its layers have no rotation, and are captured
    ],
)
@pytest.mark.share(2)
def test_exact_is_what_a_forward_takes(name: str, attention: str) -> None:
    assert not check_counts(name, attention).unlike


def test_layers_with_sizes_of_their_own_are_not_counted_by_the_usual_ones() -> None:
    """Gemma 4's layers of full attention: wider heads, fewer for keys, none for values."""
    config = ZOO["gemma4_unified"].config()
    usual = {
        (layer.head_dim, layer.num_key_value_heads) for layer in config.text_config.per_layer_config
    }
    assert len(usual) == 2
    shape = tp.cost.DecoderShape.from_config(config)
    assert shape.unlike == "layers of several sizes"
    with pytest.raises(ValueError, match=r"layers of one size like LLaMA's, got layers of several"):
        tp.cost.decode_flops(shape, [4] * shape.num_layers)
    alike = {"head_dim": 128, "hidden_act": "gelu"}
    same = LlamaConfig(num_hidden_layers=2, per_layer_config={1: alike})
    assert not tp.cost.DecoderShape.from_config(same).unlike


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(set(ZOO) - NOT_COUNTED))
def test_exact_is_what_a_forward_takes_of_every_type(name: str) -> None:
    check_counts(name, "eager")


def test_decoding_is_what_a_step_takes() -> None:
    specimen = ZOO["llava"]
    model = specimen.build("sdpa")
    shape = tp.cost.DecoderShape.from_config(model.config)
    inputs = specimen.batch(model, [(3, "image", 5)])
    schedule = tp.Schedule.pyramid(layers=specimen.cuts, lam=0.5)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("pyramiddrop"), schedule):
        cache = model(**inputs).past_key_values
        step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
        count = counted(model, step)
    expected = tp.cost.decode_flops(shape, schedule.lengths(6, 16), num_text=8)
    assert count == pytest.approx(expected, rel=1e-3)


def test_scoring_at_layer_0_counts_all_tokens() -> None:
    strategy = tp.build_strategy("pyramiddrop")
    cost = tp.cost.exact(SEVEN, [57] * 32, 36, cuts=(0,), strategy=strategy, num_visual=576)
    assert cost.scoring == tp.cost.scoring_flops(SEVEN, 612)
    assert cost.total == cost.layers + cost.scoring + cost.vocabulary


@pytest.mark.parametrize(
    ("queries", "captured", "products"),
    [
        ("last", False, 10 * 4 * 3 + 7 * 10 * 2 * 3 + 7 * 4 * 3),
        ("all", False, 7 * 10 * 4 * 3 + 7 * 10 * 2 * 3 + 7 * 7 * 4 * 3 + 7 * 7 * 4),
        ("last", True, 7 * 10 * (4 + 2 + 2) * 3 + 7 * 4 * 3),
    ],
)
def test_scoring_counts_each_product(queries: str, captured: bool, products: int) -> None:
    """Queries, keys, logits and, of several rows, their mean: 7 tokens, 4 heads, 2 for keys."""
    shape = tp.cost.DecoderShape(1, 10, 16, 4, 2, 3, 50)
    assert tp.cost.scoring_flops(shape, 7, queries, captured) == 2 * products


def test_causal_attention_is_half() -> None:
    half, whole = (tp.cost.exact(SEVEN, [576] * 32, causal=causal) for causal in (True, False))
    assert (half.attention * 2, half.linear) == (whole.attention, whole.linear)
    # Two per multiply-add: twice the paper's, but for the attention, of which it counts all.
    assert whole.layers == 2 * tp.cost.flops(SEVEN, [576] * 32)
    assert tp.cost.flops(SEVEN, [576] * 32, convention="exact") == half.layers


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_type_has_a_shape(name: str) -> None:
    shape = tp.cost.DecoderShape.from_config(ZOO[name].config())
    assert (shape.num_layers, shape.hidden_size) == (6, 32)
    assert shape.num_heads in (2, 4)
    assert shape.vocab_size > 0


def test_the_cache_of_layers_that_differ_is_not_guessed() -> None:
    latent = tp.cost.DecoderShape(1, 8, 16, 2, 1, 4, 10, unlike="latent attention")
    with pytest.raises(ValueError, match="expected layers that cache keys and values of one size"):
        tp.cost.kv_bytes(latent, [4])
    gated = tp.cost.DecoderShape(1, 8, 16, 2, 1, 4, 10, unlike="a gate on the attention")
    assert tp.cost.kv_bytes(gated, [4]) == 2 * 4 * 1 * 4 * 2
    figures = Workload(latent, num_visual=4, num_text=0).figures(tp.Schedule())
    assert figures.kv_mb is None
    assert figures.kv_ratio is None
