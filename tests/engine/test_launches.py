"""How many kernels pruning launches: on a GPU at batch 1, a layer takes as long as launching it."""

from __future__ import annotations

import pytest
import torch
from oracles import tiny
from torch.utils._python_dispatch import TorchDispatchMode
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
#: Operations that only look at a tensor in another way.
VIEWS = (
    *("view", "expand", "slice", "select.int", "unsqueeze", "transpose", "permute", "detach"),
    *("t.default", "alias", "reshape", "squeeze", "as_strided", "split", "unbind", "lift_fresh"),
)
#: At most so many a cut, by rows of the batch: original positions, renumbered.
PER_CUT = {
    "pyramiddrop": {1: (34, 44), 8: (41, 49)},
    "fastv": {1: (34, 44), 8: (41, 49)},
    "random": {1: (8, 18), 8: (20, 28)},
    "uniform": {1: (74, 84), 8: (93, 101)},
    "fastervlm": {1: (60, 70), 8: (68, 76)},
    "prumerge": {1: (106, 116), 8: (115, 123)},
    "prumerge_plus": {1: (169, 179), 8: (178, 186)},
    "visionzip": {1: (135, 145), 8: (143, 151)},
    "vscan": {1: (138, 148), 8: (168, 176)},
    "vispruner": {1: (417, 427), 8: (428, 436)},
    # Of these, for each of 19 picks, 18 and 4; the eight pivots of dart take turns.
    "cdpruner": {1: (364, 374), 8: (411, 419)},
    "dart": {1: (153, 163), 8: (166, 174)},
    "divprune": {1: (93, 103), 8: (119, 127)},
    "pool": {1: (110, 120), 8: (131, 139)},
    "sparsevlm": {1: (177, 187), 8: (196, 204)},
    "vtw": {1: (9, 19), 8: (14, 22)},
}
READS_TOWER = {name for name in PER_CUT if vision_needs(tp.build_strategy(name))}
#: At most so many in a decoding step beyond the unpruned model's.
PER_STEP = {"original": 0, "renumbered": 9}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel or allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(name in str(function) for name in VIEWS)
        return function(*args, **(kwargs or {}))


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
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.Generator().manual_seed(0)
    embeds = torch.randn(num_rows, VISUAL + TEXT, 64, generator=own) * 0.02
    mask = torch.zeros(num_rows, VISUAL + TEXT, dtype=torch.bool)
    mask[:, BEFORE : BEFORE + VISUAL] = True
    return embeds, mask


@torch.no_grad()
def prefill(model, embeds):
    return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def step(model, cache):
    ids = torch.zeros(cache.layers[0].keys.shape[0], 1, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache, use_cache=True)


def launches(work) -> int:
    with Launches() as counter:
        work()
    return counter.count


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
        return kind._from_config(config, attn_implementation="sdpa").eval()


def test_every_strategy_has_a_count() -> None:
    assert sorted(PER_CUT) == tp.available()


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", sorted(set(PER_CUT) - READS_TOWER))
def test_launches_of_a_cut(model, name, positions, num_rows) -> None:
    embeds, mask = inputs(num_rows)
    prefill(model, embeds)
    plain = launches(lambda: prefill(model, embeds))
    with tp.prune(model, tiny(name), SCHEDULE, positions, visual_mask=mask):
        prefill(model, embeds)  # the first call compares two ways to the same queries and keys
        pruned = launches(lambda: prefill(model, embeds))
    assert (pruned - plain) / CUTS <= PER_CUT[name][num_rows][positions == "renumbered"]


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("name", sorted(READS_TOWER))
def test_launches_of_a_cut_that_reads_the_tower(seeing, name, positions, num_rows) -> None:
    """What is heard of the tower is counted, too."""
    ids = torch.randint(1, 90, (num_rows, VISUAL + TEXT), generator=torch.Generator())
    ids[:, BEFORE : BEFORE + VISUAL] = 99
    pixels = torch.randn(num_rows, 3, 64, 64, generator=torch.Generator())

    @torch.no_grad()
    def call() -> None:
        seeing(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

    call()
    plain = launches(call)
    with tp.prune(seeing, tiny(name), SCHEDULE, positions):
        call()
        pruned = launches(call)
    assert (pruned - plain) / CUTS <= PER_CUT[name][num_rows][positions == "renumbered"]


@pytest.mark.parametrize("positions", PER_STEP)
def test_launches_of_a_decoding_step(model, positions) -> None:
    embeds, mask = inputs(1)
    plain_cache = prefill(model, embeds)
    plain = launches(lambda: step(model, plain_cache))
    strategy = tp.build_strategy("pyramiddrop")
    with tp.prune(model, strategy, SCHEDULE, positions, visual_mask=mask):
        cache = prefill(model, embeds)
        step(model, cache)
        pruned = launches(lambda: step(model, cache))
    assert pruned - plain <= PER_STEP[positions]
