"""Ways to generate that are not one call: threads, streams, loops of one's own, other caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import IMAGE, ROWS, SEED, Row, batch, build
from oracles import PDROP, SCHEDULE, decided
from torch import nn
from transformers import DynamicCache, QuantizedCache, cache_utils
from transformers.generation.streamers import BaseStreamer

import tokenprune as tp


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("policy", ["original", "renumbered"])
def test_threads_share_a_pruned_model(policy) -> None:
    model = build("llava")
    calls = [batch(model, [row], seed=seed) for row in ROWS for seed in (0, 1)]
    with tp.prune(model, PDROP, SCHEDULE, policy):
        expected = [generate(model, call) for call in calls]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda call: generate(model, call), calls))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_streams() -> None:
    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    model, heard = build("llava"), Heard()
    with tp.prune(model, PDROP, SCHEDULE):
        whole = generate(model, batch(model, ROWS[:1]), streamer=heard)
    assert heard.tokens == whole[0].tolist()


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")  # transformers' own
@pytest.mark.parametrize("policy", ["original", "renumbered"])
@pytest.mark.parametrize(("family", "seed"), [("llava", SEED), ("llava", 7), ("llama", 7)])
def test_an_assistant_changes_no_word(family, seed, policy) -> None:
    """Not pruned, it guesses right or wrong; what was wrong is taken back."""
    model, assistant = build("llava"), build(family, seed=seed)
    inputs, calls = batch(model, ROWS[:1]), []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    with tp.prune(model, PDROP, SCHEDULE, policy) as trace, decided():
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        kept, alone = [stage.kept[0].tolist() for stage in trace.stages], len(calls)
        calls.clear()
        options = {"max_new_tokens": 12, "do_sample": False, "assistant_model": assistant}
        got = model.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert [stage.kept[0].tolist() for stage in trace.stages] == kept
    assert alone == 12
    assert 1 < len(calls) <= 12


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")  # transformers' own
def test_a_guess_is_no_image_whatever_its_number() -> None:
    """The assistant says a placeholder's id, in the first call already."""
    model, assistant = build("llava_next"), build("llava_next")
    with torch.no_grad():
        assistant.lm_head.weight.zero_()
        head = assistant.lm_head.weight[IMAGE]
        assistant.get_decoder().norm.register_forward_hook(
            lambda module, args, output: torch.ones_like(output)
        )
        head.fill_(1.0)
    inputs = batch(model, [Row([9])])
    options = {"max_new_tokens": 6, "do_sample": False}
    with tp.prune(model, PDROP, SCHEDULE):
        expected = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, assistant_model=assistant)
    assert torch.equal(got, expected)


class KeepFirst(tp.ScoreStrategy):
    """Keeps the first tokens, so that the last one goes."""

    def score(self, view):
        return -torch.arange(view.valid.shape[1]).expand(view.valid.shape).float()


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")  # transformers' own
def test_no_guess_asks_in_place_of_an_image_that_ends_the_prompt() -> None:
    """Its last token asks, and is dropped: then the last one before the guesses does."""
    model = build("llava")
    inputs = batch(model, [Row([5, (30, 60)])])
    strategy = tp.PerStage((KeepFirst(), PDROP, PDROP))
    schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
    kept, said = [], []
    with tp.prune(model, strategy, schedule) as trace:
        for own in ({}, {"assistant_model": build("llava")}):
            said.append(model.generate(**inputs, max_new_tokens=8, do_sample=False, **own))
            kept.append([stage.kept[0].tolist() for stage in trace.stages])
    assert kept[0] == kept[1]
    assert torch.equal(*said)


@pytest.mark.parametrize("policy", ["original", "renumbered"])
def test_a_loop_of_ones_own_with_the_prompt_in_chunks(policy) -> None:
    """Text before the image, the image with its question, and then token by token."""
    model = build("llava")
    prompt = batch(model, [ROWS[0]])
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, policy):
        with decided():
            expected = generate(model, prompt)
        cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=ids[:, :2], past_key_values=cache)
        logits = model(
            input_ids=ids[:, 2:], pixel_values=prompt["pixel_values"], past_key_values=cache
        ).logits
        for _ in range(5):
            token = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            logits = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, expected)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="newer transformers")
def test_a_quantised_cache() -> None:
    """Layers of unequal length quantise what they hold; a later turn cannot read its keys."""
    model = build("llava")
    config = model.config.get_text_config()
    prompt = batch(model, ROWS[:1])

    def decode(cache):
        logits = [model(**prompt, past_key_values=cache).logits[:, -1]]
        for token in (7, 8, 9):
            step = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            logits.append(step.logits[:, -1])
        return torch.stack(logits)

    def error() -> float:
        """What quantisation changes; a prefill is attended to as it is."""
        plain, quantised = (
            decode(DynamicCache(config=config)),
            decode(QuantizedCache("fp8", config)),
        )
        assert torch.equal(plain[0], quantised[0])
        return float((plain - quantised).norm() / plain.norm())

    with torch.no_grad():
        unpruned = error()
        with tp.prune(model, PDROP, SCHEDULE) as trace:
            assert 0 < error() < 2 * unpruned
            cache = QuantizedCache("fp8", config)
            decode(cache)
            held = [cache.get_seq_length(layer) for layer in range(config.num_hidden_layers)]
            assert held == (trace.lengths[:, 0] + 3).tolist()
            with pytest.raises(ValueError, match="expected an attention_mask of 51 columns"):
                model(**prompt, past_key_values=cache)
            del prompt["attention_mask"]
            with pytest.raises(ValueError, match="expected a cache of keys as they are attended"):
                model(**prompt, past_key_values=cache)
