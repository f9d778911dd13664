"""How many kernels pruning launches: on a GPU at batch 1, a layer takes as long as launching it.

Counted on a device that is far away (`far.py`), so that what the host does is in no figure.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from far import Device, far
from oracles import tiny
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import tokenprune as tp
from tokenprune.strategy import vision_needs

LAYERS, BEFORE, VISUAL, TEXT = 8, 8, 64, 16
SCHEDULE = tp.Schedule.pyramid(num_layers=LAYERS, num_stages=4, lam=0.5)
CUTS = len(SCHEDULE.stages)
#: At most so many a cut, by rows of the batch: original positions, renumbered.
PER_CUT = {
    # Those that pick one token after another launch more with more picks.
    "cdpruner": {1: (471, 469), 8: (471, 469)},
    "dart": {1: (192, 190), 8: (192, 190)},
    "divprune": {1: (145, 143), 8: (145, 143)},
    "evs": {1: (60, 58), 8: (60, 58)},
    "fastervlm": {1: (71, 69), 8: (72, 70)},
    "fastv": {1: (35, 33), 8: (36, 34)},
    "hiprune": {1: (168, 166), 8: (170, 168)},
    "holov": {1: (169, 167), 8: (170, 168)},
    "mmtok": {1: (372, 370), 8: (373, 371)},
    "pool": {1: (117, 115), 8: (117, 115)},
    "priortr": {1: (85, 83), 8: (87, 85)},
    "prumerge": {1: (128, 126), 8: (128, 126)},
    "prumerge_plus": {1: (187, 185), 8: (187, 185)},
    "pyramiddrop": {1: (35, 33), 8: (36, 34)},
    "random": {1: (4, 2), 8: (4, 2)},
    "scope": {1: (339, 337), 8: (340, 338)},
    "sparsevlm": {1: (203, 201), 8: (205, 203)},
    "uniform": {1: (4, 2), 8: (4, 2)},
    "v2drop": {1: (16, 14), 8: (16, 14)},
    "vidcom2": {1: (186, 184), 8: (186, 184)},
    "visionzip": {1: (149, 147), 8: (150, 148)},
    "vispruner": {1: (474, 472), 8: (476, 474)},
    "vscan": {1: (205, 203), 8: (207, 205)},
    "vtw": {1: (4, 2), 8: (4, 2)},
}
#: And where images say how many tokens survive, of the dearest of 60: rows of several lengths are.
BY_IMAGE = {
    "prumerge": {1: (197, 195), 8: (218, 231)},
    "prumerge_plus": {1: (289, 287), 8: (317, 337)},
}
READS_TOWER = {name for name in PER_CUT if vision_needs(tp.build_strategy(name))}
#: At most so many beside the tower's own, by images, for what strategies read of it.
BESIDE_TOWER = {
    "fastervlm": {1: 11, 8: 14},
    "hiprune": {1: 30, 8: 36},
    "holov": {1: 11, 8: 14},
    "mmtok": {1: 8, 8: 9},
    "prumerge": {1: 21, 8: 23},
    "prumerge_plus": {1: 21, 8: 23},
    "scope": {1: 19, 8: 23},
    "visionzip": {1: 19, 8: 23},
    "vispruner": {1: 19, 8: 23},
    "vscan": {1: 22, 8: 28},
}
#: At most so many in a decoding step beyond the unpruned model's.
PER_STEP = {"original": 0, "renumbered": 11}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return far(LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval())


def inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.Generator().manual_seed(0)
    embeds = torch.randn(num_rows, VISUAL + TEXT, 64, generator=own) * 0.02
    mask = torch.zeros(num_rows, VISUAL + TEXT, dtype=torch.bool)
    mask[:, BEFORE : BEFORE + VISUAL] = True
    return far((embeds, mask))


@torch.no_grad()
def prefill(model, embeds):
    """Launches of a prompt, and the cache."""
    with Device() as device:
        cache = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
    return device.launches, cache


@torch.no_grad()
def step(model, cache) -> int:
    """Launches of a decoding step."""
    ids = far(torch.zeros(cache.layers[0].keys.shape[0], 1, dtype=torch.long))
    with Device() as device:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return device.launches


@pytest.fixture(scope="module")
def seeing() -> LlavaForConditionalGeneration:
    """One with a vision tower, for strategies that read it."""
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = LlavaForConditionalGeneration
        return far(kind._from_config(config, attn_implementation="sdpa").eval())


def test_every_strategy_has_a_count() -> None:
    assert sorted(PER_CUT) == tp.available()
    assert set(BESIDE_TOWER) == READS_TOWER


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", sorted(set(PER_CUT) - READS_TOWER))
@pytest.mark.share(12)
def test_launches_of_a_cut(model, name, positions, num_rows) -> None:
    embeds, mask = inputs(num_rows)
    plain, _ = prefill(model, embeds)
    with tp.prune(model, tiny(name), SCHEDULE, positions, visual_mask=mask):
        prefill(model, embeds)  # the first call compares two ways to the same queries and keys
        pruned, _ = prefill(model, embeds)
    assert (pruned - plain) / CUTS <= PER_CUT[name][num_rows][positions == "renumbered"]


def seen(seeing, strategy, positions, num_rows, seed: int = 0) -> float:
    """Launches of a cut, and of what is heard of the tower."""
    own = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 90, (num_rows, VISUAL + TEXT), generator=own)
    ids[:, BEFORE : BEFORE + VISUAL] = 99
    ids, pixels = far((ids, torch.randn(num_rows, 3, 64, 64, generator=own)))

    @torch.no_grad()
    def call() -> int:
        with Device() as device:
            seeing(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
        return device.launches

    plain = call()
    with tp.prune(seeing, strategy, SCHEDULE, positions):
        call()
        pruned = call()
    return (pruned - plain) / CUTS


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", sorted(READS_TOWER))
@pytest.mark.share(12)
def test_launches_of_a_cut_that_reads_the_tower(seeing, name, positions, num_rows) -> None:
    strategy = tiny(name)
    if name in BY_IMAGE:
        strategy = replace(strategy, count="schedule")
    launches = seen(seeing, strategy, positions, num_rows)
    assert launches <= PER_CUT[name][num_rows][positions == "renumbered"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", BY_IMAGE)
@pytest.mark.share(12)
def test_launches_of_a_cut_whose_images_say_how_many(
    seeing, name, positions, num_rows, seed
) -> None:
    """How many outliers an image has, rounding may decide: no count is of one image alone."""
    launches = seen(seeing, tiny(name), positions, num_rows, seed)
    assert launches <= BY_IMAGE[name][num_rows][positions == "renumbered"]


@pytest.mark.parametrize("num_images", [1, 8])
@pytest.mark.parametrize("name", sorted(PER_CUT))
@pytest.mark.share(6)
def test_launches_beside_the_tower(seeing, name, num_images) -> None:
    """However deep the tower and however many its images; none for what does not read it."""
    pixels = far(torch.randn(num_images, 3, 64, 64, generator=torch.Generator()))

    @torch.no_grad()
    def call() -> int:
        with Device() as device:
            seeing.model.get_image_features(pixel_values=pixels)
        return device.launches

    plain = call()
    with tp.prune(seeing, tiny(name), SCHEDULE):
        call()
        pruned = call()
    assert pruned - plain <= BESIDE_TOWER.get(name, {}).get(num_images, 0)


@pytest.mark.parametrize("positions", PER_STEP)
def test_launches_of_a_decoding_step(model, positions) -> None:
    embeds, mask = inputs(1)
    plain = step(model, prefill(model, embeds)[1])
    strategy = tp.build_strategy("pyramiddrop")
    with tp.prune(model, strategy, SCHEDULE, positions, visual_mask=mask):
        _, cache = prefill(model, embeds)
        step(model, cache)
        pruned = step(model, cache)
    assert pruned - plain <= PER_STEP[positions]
