"""Sizes of what is measured: named ones, and those of any checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benches import config
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tokenprune import cost
from tokenprune.bench.model import build_model
from tokenprune.bench.run import measure
from tokenprune.cli.configs import compose
from tokenprune.runs.shapes import decoder_shape, num_tokens, shape_config


@pytest.mark.parametrize(
    ("resolution", "tokens"),
    [("336x336", 576), ("672x672", 2880), ("672x1344", 5184), ("300x300", 576), ("337x336", 1728)],
)
def test_visual_tokens_of_a_resolution(resolution: str, tokens: int) -> None:
    assert num_tokens(resolution) == tokens


def test_shapes_are_those_of_the_models() -> None:
    for name, weights in (
        ("llava_1_5_7b", 6.7e9),
        ("llava_next_7b", 6.7e9),
        ("hidden_1024", 2.7e8),
    ):
        own = shape_config(compose("bench", [f"shape={name}"]))
        with torch.device("meta"):
            model = build_model(own, torch.bfloat16, "sdpa", torch.device("meta"))
        counted = sum(weight.numel() for weight in model.parameters())
        assert counted == pytest.approx(weights, rel=0.02)
        assert cost.DecoderShape.from_config(own).num_layers == len(model.get_decoder().layers)


@pytest.mark.parametrize("name", ["hidden_1024", "llava_1_5_7b", "llava_next_7b", "tiny"])
def test_sizes_are_read_without_transformers_as_with_it(name: str) -> None:
    own = compose("bench", [f"shape={name}"])
    assert decoder_shape(own) == cost.DecoderShape.from_config(shape_config(own))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shape.num_layers=0", "shape.num_layers: expected an integer >= 1, got 0"),
        ("shape.hidden_size=1e3", "shape.hidden_size: expected an integer >= 1, got 1000.0"),
        ("shape.num_heads=6", "shape.num_heads: expected a divisor of 64, got 6"),
        ("shape.num_kv_heads=3", "shape.num_kv_heads: expected a divisor of 4, got 3"),
    ],
)
def test_sizes_that_no_decoder_has(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_shape(compose("bench", ["shape=tiny", override]))


@pytest.mark.matrix
def test_any_checkpoint_s_config_will_do(tmp_path: Path) -> None:
    """A folder with nothing but config.json: the decoder of a vision-language model."""
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                       num_attention_heads=4, vocab_size=100)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                              num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    found = measure(config("shape=hub", f"shape.path={tmp_path}"))
    assert found["pruned_kv_mb"] == found["expected_kv_mb"]
    text.global_head_dim = 16  # what says that layers differ in size
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    found = measure(config("shape=hub", f"shape.path={tmp_path}"))
    assert found["pruned_kv_mb"] < found["unpruned_kv_mb"]
    assert found["flops_ratio"] is None
    assert "expected_kv_mb" not in found
