"""Behaviour of the engine around a call: caches, labels, errors, what is left behind."""

from __future__ import annotations

import copy
import random as python_random

import numpy as np
import pytest
import torch
from models import IMAGE, NUM_LAYERS, ROWS, Row, batch, build, labelled, turns
from oracles import (
    DROPPING,
    PDROP,
    SCHEDULE,
    STEPS,
    Frozen,
    all_visual,
    assert_close,
    assert_steady,
    decided,
    generate,
    masked,
    survivors,
    tiny,
)
from torch import nn

import tokenprune as tp

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


# ------------------------------------------------------------------------------------------ labels


def survivors_loss(model, inputs, labels, trace, logits, side):
    """Shifted cross-entropy over the survivors, by hand."""
    visual = all_visual(model, inputs)
    losses = []
    for row in range(len(ROWS)):
        columns = survivors(trace, inputs["attention_mask"], visual, row)
        length = len(columns)
        own = logits[row, -length:] if side == "left" else logits[row, :length]
        own_labels = labels[row, columns]
        losses.append(
            nn.functional.cross_entropy(
                own[:-1], own_labels[1:], reduction="none", ignore_index=-100
            )
        )
    return torch.cat(losses).sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.share(3)
def test_loss_is_over_survivors(family, train, attention, side) -> None:
    model = build(family, attention).train(train)
    inputs, labels = labelled(model, side)
    before = labels.clone()
    with tp.prune(model, PDROP, SCHEDULE) as trace:
        output = model(**inputs, labels=labels)
        summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(4))
    assert torch.equal(labels, before)
    assert output.logits.shape[1] == trace.lengths[-1].max()
    expected = survivors_loss(model, inputs, labels, trace, output.logits, side)
    count = (labels != -100).sum()
    torch.testing.assert_close(output.loss, expected / count, **CLOSE)
    torch.testing.assert_close(summed.loss, expected / 4, **CLOSE)
    # A row that has labels but nothing that asks stays whole.
    counts = all_visual(model, inputs).sum(1).tolist()
    assert [len(kept) for kept in (s[-1] for s in (st.kept for st in trace.stages))] == [
        counts[-1]
    ] * len(trace.stages)


def test_labels_decide_the_query_rows() -> None:
    model = build("llava")
    inputs, labels = labelled(model)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**inputs, labels=labels)
        with_labels = [s[:3] for s in trace.stages[0].scores]
        model.train()(**inputs, labels=labels)
        in_training = [s[:3] for s in trace.stages[0].scores]
        model.eval()(**inputs)
        without = [s[:3] for s in trace.stages[0].scores]
    assert all(torch.equal(a, b) for a, b in zip(with_labels, in_training, strict=True))
    assert not torch.allclose(with_labels[0], without[0])


def test_shift_labels() -> None:
    model = build("llava")
    inputs, labels = labelled(model)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE):
        plain = model(**inputs, labels=labels)
        given = model(**inputs, labels=labels, shift_labels=shifted)
    torch.testing.assert_close(given.loss, plain.loss)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("schedule", [SCHEDULE, tp.Schedule()], ids=["cuts", "none"])
def test_supervised_logits(family, schedule) -> None:
    model = build(family)
    inputs, labels = labelled(model)
    results = {}
    for logits in ("all", "supervised"):
        model.zero_grad()
        with tp.prune(model, PDROP, schedule, logits=logits):
            output = model(**inputs, labels=labels)
            output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[logits] = output, grads
    assert results["supervised"][0].logits is None
    torch.testing.assert_close(results["all"][0].loss, results["supervised"][0].loss, **CLOSE)
    for name, grad in results["all"][1].items():
        torch.testing.assert_close(grad, results["supervised"][1][name], atol=1e-5, rtol=1e-4)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, logits="supervised"):
        assert model(**inputs).logits is not None  # without labels nothing is left out


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", tp.available())
@pytest.mark.share(4)
def test_gradient_checkpointing(name, reentrant) -> None:
    strategy = tiny(name)
    gradients = []
    for checkpointing in (False, True):
        model = build("llava").train()
        inputs, labels = labelled(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with tp.prune(model, strategy, SCHEDULE, positions="renumbered"):
            loss = model(**inputs, labels=labels).loss
            with torch.no_grad():  # another call before the backward pass must not confuse it
                model(**batch(model, ROWS[:2], "right"))
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((loss, grads))
    (plain_loss, plain), (loss, checkpointed) = gradients
    assert torch.equal(plain_loss, loss)
    decoder = [n for n in plain if "language_model" in n]
    assert decoder
    for key in decoder:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6, rtol=1e-5)


def test_tensor_logits_to_keep_is_refused_with_labels() -> None:
    model = build("llava")
    inputs, labels = labelled(model)
    with (
        pytest.raises(ValueError, match="expected an integer logits_to_keep"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**inputs, labels=labels, logits_to_keep=torch.tensor([1]))


# ------------------------------------------------------------------------------------------ caches


def converse(model, calls, cache=None, trace=None):
    logits, stages = [], []
    for call in calls:
        output = model(**call, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
        if trace is not None and "pixel_values" in call:
            stages.append(list(trace.stages))
    return torch.stack(logits), stages, cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("strategy", DROPPING, ids=lambda strategy: strategy.name)
@pytest.mark.share(3)
def test_images_in_a_later_turn(strategy, attention) -> None:
    model = build("llava", attention)
    calls = turns(model)
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE) as trace:
            ours, (first, second), _ = converse(model, calls, trace=trace)
        # Coordinates go on through the conversation.
        assert all(16 <= i < 32 for stage in second for i in stage.kept[0].tolist())
        both = tp.Trace(
            stages=[
                type(a)(a.layer, [torch.cat([a.kept[0], b.kept[0]])], None)
                for a, b in zip(first, second, strict=True)
            ]
        )
        ids = torch.cat([call["input_ids"] for call in calls[:3]], 1)
        with masked(model, torch.ones_like(ids), ids == IMAGE, both):
            theirs, _, _ = converse(model, calls)
    assert_close(ours, theirs)


@pytest.mark.parametrize("policy", ["original", "renumbered"])
def test_turns_equal_one_prompt_under_a_frozen_selection(policy) -> None:
    model = build("llava")
    calls = turns(model)
    keep_none = tp.Schedule((tp.Stage(1, 0.0),))  # every split of the prompt drops the same
    with torch.no_grad(), tp.prune(model, Frozen(), keep_none, positions=policy):
        in_turns, _, _ = converse(model, calls)
        ids = torch.cat([call["input_ids"] for call in calls], 1)
        pixels = torch.cat([c["pixel_values"] for c in calls if "pixel_values" in c])
        at_once = model(input_ids=ids, pixel_values=pixels).logits[:, -1]
    assert_close(in_turns[-1], at_once, 3e-5)


def test_one_token_prompt_and_text_only() -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        assert trace.lengths.shape == trace.visual_lengths.shape == (0, 0)  # before any call
        one = torch.tensor([[5]])
        pruned = model(input_ids=one).logits
        assert trace.stages == []
        assert trace.lengths.tolist() == [[1]] * NUM_LAYERS
    assert torch.equal(pruned, model(input_ids=one).logits)
    inputs = batch(model, [ROWS[1]])
    with tp.prune(model, PDROP, SCHEDULE) as trace:
        got = generate(model, inputs)
        assert trace.stages == []
    assert torch.equal(got.sequences, generate(model, inputs).sequences)


def test_trace_survives_decoding_and_is_renewed_by_the_next_prompt() -> None:
    model = build("llava")
    with tp.prune(model, PDROP, SCHEDULE) as trace:
        generate(model, batch(model, ROWS))
        assert [stage.layer for stage in trace.stages] == [1, 2, 4]
        assert trace.lengths.shape == (NUM_LAYERS, len(ROWS))
        generate(model, batch(model, [ROWS[1]]))
        assert trace.stages == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.share(2)
def test_ways_to_generate(options) -> None:
    model = build("llava")
    rows = ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS
    inputs = batch(model, rows)

    def run(**others):
        torch.manual_seed(3)
        own = {"do_sample": False, **options, **others}
        return model.generate(**inputs, max_new_tokens=8, **own)

    with tp.prune(model, Frozen(), SCHEDULE) as trace:
        ours = run()
    with masked(
        model,
        torch.repeat_interleave(
            inputs["attention_mask"], len(trace.stages[0].kept) // len(rows), 0
        ),
        torch.repeat_interleave(
            all_visual(model, inputs), len(trace.stages[0].kept) // len(rows), 0
        ),
        trace,
        extra=12,
    ):
        theirs = run()
        assert_steady(run, theirs)
    assert torch.equal(ours, theirs)


def test_a_copied_cache_keeps_its_record() -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    step = torch.full((len(ROWS), 1), 7)
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    longer = nn.functional.pad(mask, (0, 1), value=1)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, positions="renumbered"):
        cache = model(**inputs, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        first = model(input_ids=step, attention_mask=mask, past_key_values=cache)
        model(input_ids=step + 1, attention_mask=longer, past_key_values=cache)
        second = model(input_ids=step, attention_mask=mask, past_key_values=copied)
    assert torch.equal(first.logits, second.logits)


def test_two_interleaved_generations() -> None:
    model = build("llava")
    prompts = [batch(model, ROWS), batch(model, ROWS[2:], seed=5)]
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, positions="renumbered"):
        with decided():
            alone = [generate(model, prompt).sequences[:, -STEPS:].tolist() for prompt in prompts]
        states = [
            {"inputs": p, "mask": p["attention_mask"], "cache": None, "tokens": []} for p in prompts
        ]
        for _ in range(STEPS):
            for state in states:
                position = state["mask"].cumsum(1) - 1
                position = position.masked_fill(state["mask"] == 0, 0)
                length = state["inputs"]["input_ids"].shape[1]
                call = state["inputs"] | {"attention_mask": state["mask"]}
                output = model(
                    **call,
                    position_ids=position[:, -length:],
                    past_key_values=state["cache"],
                    use_cache=True,
                )
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                state["cache"] = output.past_key_values
                state["tokens"].append(token)
                state["inputs"] = {"input_ids": token}
                state["mask"] = nn.functional.pad(state["mask"], (0, 1), value=1)
    for state, expected in zip(states, alone, strict=True):
        assert torch.cat(state["tokens"], 1).tolist() == expected


def test_caches_that_cannot_be_continued() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    step = {"input_ids": torch.tensor([[7]])}
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE):
            cache = model(**inputs, use_cache=True).past_key_values
        other = tp.Schedule.one_shot(layer=3, keep=0.5)
        with (
            pytest.raises(ValueError, match=r"expected a cache pruned at layers \[3\] with"),
            tp.prune(model, PDROP, other),
        ):
            model(**step, past_key_values=cache)
        del cache._tokenprune_record
        with (
            pytest.raises(ValueError, match="no record of which"),
            tp.prune(model, PDROP, SCHEDULE),
        ):
            model(**step, past_key_values=cache)


def test_an_unpruned_cache_can_be_continued() -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    step = {
        "input_ids": torch.full((len(ROWS), 1), 7),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with tp.prune(model, PDROP, SCHEDULE):
            got = model(**step, past_key_values=cache).logits
    assert torch.equal(got, expected)


# ----------------------------------------------------------------------------- nothing left behind


def state_of(model) -> list:
    hooks = [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    ]
    return hooks


def test_model_is_left_as_found() -> None:
    model = build("llava")
    generate(model, batch(model, ROWS))  # transformers fills its own caches at the first call
    before = state_of(model)
    with tp.prune(model, PDROP, SCHEDULE):
        generate(model, batch(model, ROWS))
        assert state_of(model) != before
    assert state_of(model) == before
    handle = tp.attach(model, PDROP, SCHEDULE)
    handle.remove()
    handle.remove()
    assert state_of(model) == before


def test_an_exception_leaves_the_model_as_found() -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    expected = generate(model, inputs).sequences
    before = state_of(model)

    class Broken(tp.ScoreStrategy):
        def score(self, view):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), tp.prune(model, Broken(), SCHEDULE):
        model(**inputs)
    assert state_of(model) == before
    assert torch.equal(generate(model, inputs).sequences, expected)
    # And a handle that stays attached works in the next call.
    handle = tp.attach(model, PDROP, SCHEDULE)
    with pytest.raises(ValueError, match="tokens"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])
    with_handle = generate(model, inputs).sequences
    handle.remove()
    with tp.prune(model, PDROP, SCHEDULE):
        assert torch.equal(generate(model, inputs).sequences, with_handle)


def test_nested_pruning_is_refused() -> None:
    model = build("llava")
    with (
        tp.prune(model, PDROP, SCHEDULE),
        pytest.raises(ValueError, match="not pruned already"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        pass
    with tp.prune(model, PDROP, SCHEDULE):
        pass


@pytest.mark.parametrize("name", tp.available())
def test_global_random_state_is_untouched(name) -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    states = torch.get_rng_state(), python_random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad(), tp.prune(model, tiny(name), SCHEDULE):
        model(**inputs)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == python_random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


# ---------------------------------------------------------------------------------------- requests


def test_bad_requests() -> None:
    model = build("llava")
    with pytest.raises(ValueError, match=r"expected layers below 6.*got \[6\]"):
        tp.attach(model, PDROP, tp.Schedule.one_shot(6, 0.5))
    fastv = tp.build_strategy("fastv")
    with pytest.raises(ValueError, match=r"expected cuts at layer 1 or later for FastV"):
        tp.attach(model, fastv, tp.Schedule.one_shot(0, 0.5))
    with pytest.raises(ValueError, match=r"positions to be one of \['original', 'renumbered'\]"):
        tp.attach(model, PDROP, SCHEDULE, positions="new")
    with pytest.raises(ValueError, match="expected logits to be one of"):
        tp.attach(model, PDROP, SCHEDULE, logits="some")
    with pytest.raises(ValueError, match="expected a PruningStrategy, got 'fastv'"):
        tp.attach(model, "fastv", SCHEDULE)
    with pytest.raises(ValueError, match="expected a Schedule"):
        tp.attach(model, PDROP, 0.5)
    with pytest.raises(ValueError, match="expected a Hugging Face model, got Linear"):
        tp.attach(nn.Linear(2, 2), PDROP, SCHEDULE)
    assert state_of(model) == state_of(build("llava"))


def test_positions_that_start_anew_beside_a_mask_are_refused() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    packed = torch.arange(inputs["input_ids"].shape[1])[None] % 12
    with (
        pytest.raises(ValueError, match="got position_ids that start anew within one, beside"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**inputs, position_ids=packed)


def test_a_language_model_needs_a_visual_mask() -> None:
    model = build("llama")
    inputs = batch(model, ROWS)
    mask = inputs.pop("visual_mask")
    with (
        pytest.raises(ValueError, match="got neither for LlamaConfig"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**inputs)
    with (
        pytest.raises(ValueError, match="expected visual_mask of dtype bool and shape"),
        tp.prune(model, PDROP, SCHEDULE, visual_mask=mask.long()),
    ):
        model(**inputs)


def test_cross_attention_models_are_refused() -> None:
    class Config:
        model_type = "mllama"

    class Fake(nn.Module):
        config = Config()

        def get_decoder(self):
            return self

    with pytest.raises(ValueError, match="cross-attention"):
        tp.attach(Fake(), PDROP, SCHEDULE)


def test_pruning_shortens_what_the_layers_hold() -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        cache = model(**inputs, use_cache=True).past_key_values
    held = [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)]
    longest = trace.lengths.max(1).values.tolist()
    assert held[1:] == longest[1:]
    assert held[0] == inputs["input_ids"].shape[1]
    counts = all_visual(model, inputs).sum(1).tolist()
    for layer, row in enumerate(trace.visual_lengths.tolist()):
        assert row == [SCHEDULE.lengths(NUM_LAYERS, count)[layer] for count in counts]


@pytest.mark.filterwarnings("ignore:prune. expected labels on answers alone")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["text", "anywhere", "first", "image", "nowhere"])
def test_supervised_logits_learn_what_all_logits_do(where, side) -> None:
    """Labelled are tokens that surely survive, that may go, that nothing precedes."""
    model = build("llava")
    inputs = batch(model, [ROWS[3], ROWS[2], Row([(30, 60), 9])], side)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    first = real & (real.cumsum(1) == 1)
    chosen = {
        "text": chosen & (ids != IMAGE) & ~first,
        "anywhere": chosen,
        "first": first,
        "image": chosen & (ids == IMAGE),
        "nowhere": torch.zeros_like(chosen),
    }[where]
    labels = torch.where(chosen & real, ids % 90, -100)
    losses, gradients = [], []
    for logits in ("all", "supervised"):
        model.zero_grad()
        with tp.prune(model, Frozen(), tp.Schedule.pyramid(layers=[1, 3], lam=0.4), logits=logits):
            loss = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(20)).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
