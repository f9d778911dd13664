"""Kinds of faults that public reports of neighbouring projects describe, each with its right value.

A test's name starts with the kind's: (a) padding and masks, (b) caches, (c) consumers of logits at
full length, (d) numbers, (j) training libraries, (k) words.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings

import pytest
import torch
from models import ROWS, Row, batch, build
from oracles import SCHEDULE, all_visual, decided, masked, split
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache
from zoo import ZOO
from zoo.flash import attention, stand_in

import tokenprune as tp
from tokenprune.engine.record import Held, Policy, Record

UNIFORM, PDROP = tp.build_strategy("uniform"), tp.build_strategy("pyramiddrop")
FROM_0 = tp.Schedule.pyramid(layers=[0, 3], lam=0.6)
FAMILIES = ("llava", "llava_next", "llama")
POLICIES = ("original", "renumbered")
SIDES = ("left", "right")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def answer(model, inputs, **options) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


def sure_answer(model, inputs, **options) -> Tensor:
    """One whose tokens no rounding chooses."""
    with decided():
        return answer(model, inputs, **options)


def over_pairs(mask: Tensor, form: str, pads: str = "eye") -> Tensor:
    """The mask over pairs of tokens that a 2-D mask stands for."""
    length = mask.shape[1]
    allowed = torch.ones(length, length).tril().bool() & mask[:, None].bool()
    if pads == "eye":
        allowed = allowed | torch.eye(length).bool()
    if pads == "open":
        allowed = allowed | ~mask[:, :, None].bool()
    allowed = allowed[:, None]
    if form == "bool":
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


# ------------------------------------------------------------------------------- (a) rows and masks


@pytest.mark.parametrize("form", ["2d", "bool", "float"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.share(4)
def test_a1_a_row_of_padding_alone_changes_no_other(family, side, policy, form) -> None:
    model = build(family)
    inputs, visual = split(batch(model, [ROWS[0], ROWS[2]], side))
    more = {key: pad(inputs[key], (0, 0, 0, 1)) for key in ("input_ids", "attention_mask")}
    mask = None if visual is None else pad(visual, (0, 0, 0, 1))
    if form != "2d":
        more["attention_mask"] = over_pairs(more["attention_mask"], form)
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE, policy, visual_mask=visual):
            expected = model(**inputs).logits
            said = sure_answer(model, inputs) if side == "left" else None
        with tp.prune(model, PDROP, SCHEDULE, policy, visual_mask=mask) as trace:
            got = model(**{**inputs, **more}).logits
            assert [len(stage.kept[2]) for stage in trace.stages] == [0, 0, 0]
            if said is not None and form == "2d":
                assert torch.equal(answer(model, {**inputs, **more})[:2], said)
    for row, length in enumerate(trace.lengths[-1].tolist()[:2]):
        ours, theirs = (
            logits[row, -length:] if side == "left" else logits[row, :length]
            for logits in (got, expected)
        )
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llava", "llama"])
def test_a2_a_row_that_hides_its_last_token_is_a_row_without_it(family, policy) -> None:
    model = build(family)
    inputs, visual = split(batch(model, [ROWS[0], ROWS[0]]))
    inputs["attention_mask"][1, -1] = 0
    mask = None if visual is None else visual[:1]  # the rows are alike
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, policy, visual_mask=mask) as trace:
        got = model(**inputs).logits
        kept = [stage.kept[1] for stage in trace.stages]
        alone = {key: value[:1].clone() for key, value in inputs.items()}
        torch.testing.assert_close(got[0], model(**alone).logits[0], **CLOSE)
        alone["input_ids"] = alone["input_ids"][:, :-1]
        alone["attention_mask"] = alone["attention_mask"][:, :-1]
        expected = model(**alone).logits[0]
        assert all(torch.equal(a, b.kept[0]) for a, b in zip(kept, trace.stages, strict=True))
    torch.testing.assert_close(got[1, : len(expected)], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.share(2)
def test_a2_rows_of_one_length_that_lose_different_numbers_are_what_they_are_alone(
    policy, kind
) -> None:
    """Nothing is padded before the cut, and no mask is given; after it, one row has pads."""
    model = build("llava", "eager" if kind.startswith("flash") else kind)
    rows = [Row([20, (30, 60), 1]), Row([3, (30, 60), 1, (30, 60), 1])]
    inputs = batch(model, rows)
    assert inputs.pop("attention_mask").all()
    with stand_in(), attention(model, kind), tp.prune(model, UNIFORM, SCHEDULE, policy):
        said = sure_answer(model, inputs)
        for number, row in enumerate(rows):
            alone = sure_answer(model, batch(model, [row]))
            assert torch.equal(said[number, -6:], alone[0, -6:])


@pytest.mark.parametrize("form", ["2d", "float"])
def test_a2_pads_on_both_sides_are_refused(form) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2]])
    inputs["attention_mask"][1, -3:] = 0
    if form == "float":
        inputs["attention_mask"] = over_pairs(inputs["attention_mask"], form, "row")
    with (
        pytest.raises(ValueError, match="expected rows padded on one side, got some that start"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**inputs)


@pytest.mark.parametrize("pads", ["eye", "open", "row"])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.share(3)
def test_a3_pads_by_a_mask_over_pairs(side, policy, form, pads) -> None:
    if form == "bool" and pads == "row":
        pads = "eye"  # rows that see nothing are no numbers, unpruned too
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2], ROWS[1]], side)
    given = {**inputs, "attention_mask": over_pairs(inputs["attention_mask"], form, pads)}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for more in ({}, {"position_ids": positions}):
        with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, policy) as trace:
            expected = model(**inputs, **more).logits
            kept = [k.tolist() for stage in trace.stages for k in stage.kept]
            got = model(**given, **more).logits
            assert [k.tolist() for stage in trace.stages for k in stage.kept] == kept
        lengths = trace.lengths[-1].tolist()
        for row, length in enumerate(lengths):
            ours, theirs = (
                logits[row, -length:] if side == "left" else logits[row, :length]
                for logits in (got, expected)
            )
            torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("by", ["bool", "float", "position_ids"])
def test_a4_each_of_several_sequences_in_a_row_is_pruned_as_alone(by, labels) -> None:
    """tests/engine/test_packed.py sees it of every strategy."""
    model = build("llava")
    samples = [batch(model, [ROWS[0]]), batch(model, [ROWS[3]])]
    ids = torch.cat([sample["input_ids"] for sample in samples], 1)
    call = {"input_ids": ids, "pixel_values": torch.cat([s["pixel_values"] for s in samples])}
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    block = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]
    if by == "position_ids":
        call["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    elif by == "bool":
        call["attention_mask"] = block
    else:
        call["attention_mask"] = torch.zeros(block.shape).masked_fill(~block, -1e9)
    if labels:
        for sample in samples:
            sample["labels"] = torch.full_like(sample["input_ids"], -100)
            sample["labels"][0, -3:] = sample["input_ids"][0, -3:]
        call["labels"] = torch.cat([sample["labels"] for sample in samples], 1)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        got = model(**call, use_cache=False)
        kept = [[own.tolist() for own in stage.kept] for stage in trace.stages]
        assert [list(map(len, stage)) for stage in kept] == [[9, 9], [5, 5], [3, 3]]
        losses, start = [], 0
        for number, sample in enumerate(samples):
            alone = model(**sample)
            losses.append(alone.loss)
            assert [stage[number] for stage in kept] == [s.kept[0].tolist() for s in trace.stages]
            own = got.logits[0, start : start + alone.logits.shape[1]]
            torch.testing.assert_close(own, alone.logits[0], **CLOSE)
            start += len(own)
    if labels:
        torch.testing.assert_close(got.loss, sum(losses) / 2)  # as many labels in each


# --------------------------------------------------------------------------------------- (b) caches


@pytest.mark.parametrize("kind", ["dynamic", "static", "copied"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
@pytest.mark.share(3)
def test_b1_generate_goes_on_from_its_own_cache(schedule, policy, kind) -> None:
    model = build("llava")
    one = batch(model, [ROWS[0]])
    cache = DynamicCache(config=model.config.get_text_config())
    options = {}
    if kind == "static":
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
        options = {"disable_compile": True}
    with tp.prune(model, UNIFORM, schedule, policy) as trace:
        ids = answer(model, one, past_key_values=cache, **options)
        for _ in range(2):  # two more turns
            ids = torch.cat([ids, torch.tensor([[7, 8, 9]])], 1)
            cache = copy.deepcopy(cache) if kind == "copied" else cache
            call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = answer(model, call, past_key_values=cache, **options)
    prompt = ids[:, : one["input_ids"].shape[1] + 18]
    whole = {**one, "input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if policy == "renumbered":  # a run in one piece, which the oracles hold to be right
        with tp.prune(model, UNIFORM, schedule, policy):
            expected = sure_answer(model, whole)
    else:
        visual = all_visual(model, whole)
        with masked(model, whole["attention_mask"], visual, trace, extra=7):
            expected = sure_answer(model, whole)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_b2_a_cache_rebuilt_from_its_tensors_is_refused(policy, keep) -> None:
    model = build("llava")
    with torch.no_grad():
        for schedule in (tp.Schedule.one_shot(0, keep), SCHEDULE):
            with tp.prune(model, UNIFORM, schedule, policy):
                cache = model(**batch(model, [ROWS[0]]), use_cache=True).past_key_values
                rebuilt = DynamicCache([(one.keys, one.values) for one in cache.layers])
                with pytest.raises(ValueError, match="expected a cache that this engine filled"):
                    model(input_ids=torch.tensor([[7]]), past_key_values=rebuilt)


@pytest.mark.parametrize("layerwise", [False, True], ids=["cache", "layers"])
@pytest.mark.parametrize("how", ["select", "reorder", "bool", "repeat", "crop", "copy"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
@pytest.mark.share(2)
def test_b3_the_record_follows_what_is_done_to_the_cache(schedule, policy, how, layerwise) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3], ROWS[2]])
    order = torch.tensor([2, 0, 1])
    wide = pad(inputs["attention_mask"], (0, 2), value=1)

    def step(cache, mask: Tensor) -> Tensor:
        ids = torch.tensor([[7, 8]]).expand(len(mask), -1)
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad(), tp.prune(model, UNIFORM, schedule, policy):
        cache = model(**inputs, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        parts = other.layers if layerwise else [other]  # of the latter the cache is not told
        if how == "crop":
            step(other, wide)
        for part in parts:
            if how == "select":
                part.batch_select_indices(order)
            elif how == "reorder":
                part.reorder_cache(order)
            elif how == "bool":
                part.batch_select_indices(torch.tensor([True, False, True]))
            elif how == "repeat":
                part.batch_repeat_interleave(2)
            elif how == "crop":
                part.crop(-2)
        if how in ("crop", "copy"):
            order = torch.arange(3)
        elif how == "bool":
            order = torch.tensor([0, 2])
        elif how == "repeat":
            order = torch.tensor([0, 0, 1, 1, 2, 2])
        if how == "copy":
            step(copy.deepcopy(other), wide)
        if layerwise:
            other = copy.deepcopy(other)  # nothing is lost on the way
        for _ in range(2):
            got, expected = step(other, wide[order]), step(cache, wide)[order]
            torch.testing.assert_close(got, expected, **CLOSE)
            wide = pad(wide, (0, 2), value=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
@pytest.mark.parametrize("how", ["reorder", "clone"])
@pytest.mark.share(3)
def test_b3_layers_of_a_fixed_size_are_reordered(schedule, policy, how) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3]])
    other = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    order = torch.tensor([1, 0] if how == "reorder" else [0, 1])
    ids, mask = torch.tensor([[7], [8]]), inputs["attention_mask"]
    with torch.no_grad(), tp.prune(model, UNIFORM, schedule, policy):
        cache = model(**inputs, use_cache=True).past_key_values
        model(**inputs, past_key_values=other)
        for layer in other.layers:
            if how == "reorder":
                layer.reorder_cache(order)
            else:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        for _ in range(2):  # what a step has written in place is no change of somebody's
            mask = pad(mask, (0, 1), value=1)
            expected = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            call = {"input_ids": ids[order], "attention_mask": mask[order]}
            got = model(**call, past_key_values=other).logits
            torch.testing.assert_close(got, expected[order], **CLOSE)


@pytest.mark.parametrize("then", ["crop", "reorder", "refused"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.share(2)
def test_b3_what_was_done_to_layers_is_followed_once(policy, then) -> None:
    """Before the cache's own methods, and before a call that is refused."""
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3], ROWS[2]])
    ids, wide = torch.tensor([[7]] * 3), pad(inputs["attention_mask"], (0, 1), value=1)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad(), tp.prune(model, UNIFORM, SCHEDULE, policy):
        cache = model(**inputs, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        if then == "crop":
            model(input_ids=ids, attention_mask=wide, past_key_values=other)
        for layer in other.layers:
            layer.reorder_cache(order)
        if then == "crop":
            other.crop(-1)
        elif then == "reorder":
            other.reorder_cache(order)
            order = order[order]
        else:
            with pytest.raises(ValueError, match="expected a cache of 2 rows"):
                model(input_ids=ids[:2], past_key_values=other)
        got, expected = (
            model(input_ids=ids, attention_mask=mask, past_key_values=own).logits
            for own, mask in ((other, wide[order]), (cache, wide))
        )
    torch.testing.assert_close(got, expected[order], **CLOSE)


def test_b3_a_branch_may_be_taken_up_again() -> None:
    """Layers are given back what they held; of text after the prompt the record says nothing."""
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3]])
    mask = inputs["attention_mask"]

    def step(cache, word: int, mask: Tensor) -> Tensor:
        ids = torch.full((2, 1), word)
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits

    def put(cache, held) -> None:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values

    with torch.no_grad(), tp.prune(model, UNIFORM, SCHEDULE, "renumbered"):
        cache = model(**inputs, use_cache=True).past_key_values
        root = [(layer.keys, layer.values) for layer in cache.layers]
        first, second = pad(mask, (0, 1), value=1), pad(mask, (0, 2), value=1)
        other = copy.deepcopy(cache)
        step(other, 7, first)
        expected = step(other, 8, second)
        step(cache, 7, first)
        branch = [(layer.keys, layer.values) for layer in cache.layers]
        put(cache, root)
        step(cache, 9, first)
        put(cache, branch)
        torch.testing.assert_close(step(cache, 8, second), expected, **CLOSE)


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0], [1, 2]])
def test_b3_rows_with_the_same_keys_and_other_prompts_are_refused(order) -> None:
    """What is left of them is the same, and what is gone is not."""
    model = build("llava")
    inputs = batch(model, [Row([(3, 6), 1]), Row([(3, 6), (3, 6), 1]), Row([(6, 3), 1])])
    inputs["input_ids"][:2, -1] = 7
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), tp.prune(model, UNIFORM, tp.Schedule.one_shot(0, 0.0), "renumbered"):
        cache = model(**inputs, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        for part in (cache, *other.layers):
            part.batch_select_indices(torch.tensor(order))
        step = {"input_ids": torch.tensor([[7]] * len(order))}
        step["attention_mask"] = pad(mask, (0, 1), value=1)[order]
        with pytest.raises(ValueError, match="are told apart by their keys, got rows 0 and 1 w"):
            model(**step, past_key_values=other)
        model(**step, past_key_values=cache)


def test_b3_rows_that_the_last_call_did_not_leave_are_refused() -> None:
    model = build("llava")
    step = {"input_ids": torch.tensor([[7]] * 2)}
    with torch.no_grad(), tp.prune(model, UNIFORM, SCHEDULE, "original"):
        cache = model(**batch(model, [ROWS[0], ROWS[3]]), use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys.clone()  # as if it had been elsewhere in between
        model(**step, past_key_values=cache)
        for layer in cache.layers:
            layer.keys = torch.cat([layer.keys[:1], layer.keys[1:] + 1])
        with pytest.raises(ValueError, match="got other keys in 1 of its 2 rows"):
            model(**step, past_key_values=cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
def test_b4_layers_that_were_emptied_one_by_one_are_refused(schedule, kind) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0]])
    size = {"max_cache_len": 96} if kind is StaticCache else {}
    cache = kind(config=model.config.get_text_config(), **size)
    with torch.no_grad(), tp.prune(model, UNIFORM, schedule):
        model(**inputs, past_key_values=cache)
        for layer in cache.layers:
            layer.reset()
        with pytest.raises(ValueError, match=r"layers were emptied\. Call its own reset"):
            model(**inputs, past_key_values=cache)
        cache.reset()
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
@pytest.mark.share(3)
def test_b4_a_cache_of_fixed_size_is_reset(schedule, policy, family) -> None:
    model = build(family)
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=256)
    options = {"disable_compile": True}
    with tp.prune(model, PDROP, schedule, policy):
        answer(model, batch(model, [ROWS[0], ROWS[2]]), past_key_values=cache, **options)
        cache.reset()
        inputs = batch(model, [ROWS[3], ROWS[1]])
        got = answer(model, inputs, past_key_values=cache, **options)
        assert torch.equal(got, sure_answer(model, inputs))


@pytest.mark.parametrize("queries", ["last", "all"])
def test_a1_flash_scores_do_not_see_a_pad_that_came_alone(queries) -> None:
    """A row that has no token in a call of one: only the mask says so, of a later image as well."""
    strategy = tp.build_strategy("pyramiddrop", queries=queries)
    told = []
    for kind in ("eager", "flash_attention_2"):
        model = build("llava", "eager")
        first, image = batch(model, [ROWS[1], ROWS[1]]), batch(model, ROWS[:1])
        pruning = tp.prune(model, strategy, SCHEDULE)
        with stand_in(), attention(model, kind), torch.no_grad(), pruning as trace:
            cache = model(**first, use_cache=True).past_key_values
            mask = torch.cat([first["attention_mask"], torch.tensor([[1], [0]])], 1)
            token = torch.full((2, 1), 7)
            model(input_ids=token, attention_mask=mask, past_key_values=cache)
            later = {name: torch.cat([value] * 2) for name, value in image.items()}
            later["attention_mask"] = torch.cat([mask, later["attention_mask"]], 1)
            model(**later, past_key_values=cache)
            told.append([row for stage in trace.stages for row in stage.scores])
    for ours, theirs in zip(*told, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def stepwise(model, inputs, schedule, policy, cache, steps: int = 6) -> torch.Tensor:
    """Logits of a prompt's last token, and of tokens after it, one a call."""
    said, mask = [], inputs["attention_mask"]
    with torch.no_grad(), tp.prune(model, UNIFORM, schedule, policy):
        said.append(model(**inputs, past_key_values=cache).logits[:, -1])
        for number in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = torch.full((len(mask), 1), 7 + number)
            output = model(input_ids=token, attention_mask=mask, past_key_values=cache)
            said.append(output.logits[:, -1])
    return torch.stack(said)


def assert_fixed_is_dynamic(model, inputs, schedule, policy, size: int) -> None:
    config = model.config.get_text_config()
    caches = DynamicCache(config=config), StaticCache(config=config, max_cache_len=size)
    given = (model, inputs, schedule, policy)
    torch.testing.assert_close(*(stepwise(*given, cache) for cache in caches), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_b4_a_fixed_cache_may_be_smaller_than_the_conversation(policy, attention) -> None:
    """Cut before its first layer, it holds less, and masks are as long as it is."""
    model = build("llava", attention)
    inputs = batch(model, ROWS[:1])
    size = inputs["input_ids"].shape[1] + 2
    assert_fixed_is_dynamic(model, inputs, tp.Schedule.one_shot(0, 0.25), policy, size)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [[0], [0, 2]], ids=["one", "ragged"])
def test_b4_a_fixed_cache_says_where_a_step_stands(rows, policy) -> None:
    """To layers that are given no positions, also when the first of them has taken the token in."""
    model = build("llava", "eager")

    def strip(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(strip, with_kwargs=True)
    inputs = batch(model, [ROWS[row] for row in rows])
    assert_fixed_is_dynamic(model, inputs, tp.Schedule.one_shot(2, 0.5), policy, 96)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3", "cohere2_vision"])
@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
def test_b4_layers_of_a_fixed_cache_may_be_of_several_sizes(name, attention) -> None:
    """Those that slide have no more entries than their window."""
    model = ZOO[name].build(attention)
    inputs = ZOO[name].batch(model, [(3, "image", 5)])
    inputs.pop("token_type_ids", None)
    assert_fixed_is_dynamic(model, inputs, tp.Schedule.one_shot(1, 0.5), "original", 200)


def test_b4_a_fixed_cache_that_is_too_small_is_refused() -> None:
    held = Held(5, torch.arange(5)[None], False, None)
    record = Record(Policy((0,), "original"), 9, [4], [False], 4, None, [held, held])
    with pytest.raises(ValueError, match="expected a cache of at least 5 entries, got one of 4"):
        record.lay_out([0, 4])


@pytest.mark.parametrize("schedule", [FROM_0, SCHEDULE], ids=["from_0", "from_1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_b4_a_cache_of_fixed_size_takes_a_padded_later_turn(policy, schedule) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2]])
    config = model.config.get_text_config()
    more = {
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[0, 7, 8], [5, 3, 7]])], 1),
        "attention_mask": torch.cat(
            [inputs["attention_mask"], torch.tensor([[0, 1, 1], [1, 1, 1]])], 1
        ),
    }
    said = []
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=96)):
        with torch.no_grad(), tp.prune(model, UNIFORM, schedule, policy):
            model(**inputs, past_key_values=cache)
            said.append(sure_answer(model, more, past_key_values=cache, disable_compile=True))
    assert torch.equal(*said)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_b4_a_cache_of_fixed_size_takes_a_prompt_of_which_one_token_is_left(kind) -> None:
    model = build("llava", kind)
    inputs = batch(model, [Row([(30, 60), 1])])
    schedule = tp.Schedule((tp.Stage(2, 0.5), tp.Stage(4, 0.0)))
    config = model.config.get_text_config()
    said = []
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=96)):
        with torch.no_grad(), tp.prune(model, UNIFORM, schedule) as trace:
            first = model(**inputs, past_key_values=cache).logits
            assert trace.lengths[:, 0].tolist() == [17, 17, 9, 9, 1, 1]
            more = model(torch.tensor([[7]]), past_key_values=cache).logits
        said.append(torch.cat([first, more]))
    torch.testing.assert_close(*said, **CLOSE)


def test_b4_flash_reads_of_a_cache_of_fixed_size_what_is_filled() -> None:
    model = build("llava", "eager")
    with stand_in(), attention(model, "flash_attention_2"):
        for rows in ([ROWS[0]], [ROWS[0], ROWS[2]]):
            inputs = batch(model, rows)
            with tp.prune(model, PDROP, SCHEDULE):
                expected = sure_answer(model, inputs)
                options = {"cache_implementation": "static", "disable_compile": True}
                assert torch.equal(answer(model, inputs, **options), expected)


# ----------------------------------------------------------------------- (c) logits at full length


def answered(model, side: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A ragged batch whose last three tokens are answers; the columns that predict them."""
    inputs = batch(model, [ROWS[0], ROWS[2], ROWS[1], ROWS[3]], side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, own in enumerate(inputs["attention_mask"]):
        columns = own.nonzero()[-3:, 0]
        labels[row, columns] = inputs["input_ids"][row, columns]
    return inputs, labels, pad(labels, (0, 1), value=-100)[:, 1:] != -100


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a trainer that shifts labels itself."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


@pytest.mark.parametrize("given", ["nothing", "labels", "shift_labels"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["pyramiddrop", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.share(3)
def test_c1_full_logits_stand_where_the_ids_stand(family, name, side, given) -> None:
    model = build(family)
    full, labels, predicts = answered(model, side)
    visual = all_visual(model, full)
    inputs, mask = split(full)
    more = {}
    if given != "nothing":
        more["labels"] = labels
    if given == "shift_labels":
        more["shift_labels"] = pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    strategy = tp.build_strategy(name)
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE, logits="full", visual_mask=mask) as trace:
            got = model(**inputs, **more)
        with masked(model, inputs["attention_mask"], visual, trace):
            expected = model(**inputs, **more)
    assert got.logits.shape == expected.logits.shape
    assert torch.isfinite(got.logits).all()
    torch.testing.assert_close(got.logits[predicts], expected.logits[predicts], **CLOSE)
    if given != "nothing":
        torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    ours, theirs = (shifted_loss(output.logits, labels) for output in (got, expected))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    # Log-likelihood of the answers, sliced by the columns of the prompt.
    ours, theirs = (
        output.logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None].clamp_min(0))[..., 0]
        for output in (got, expected)
    )
    own = predicts[:, :-1]
    torch.testing.assert_close((ours * own).sum(1), (theirs * own).sum(1), **CLOSE)


def test_c1_a_choice_that_is_none_lists_all() -> None:
    with pytest.raises(ValueError, match=r"one of \['all', 'supervised', 'full'\], got 'whole'"):
        tp.attach(build("llava"), PDROP, SCHEDULE, logits="whole")


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_c1_a_label_without_a_survivor_before_it_is_predicted_by_none(given) -> None:
    """Whatever the logits are: a first survivor cannot predict itself."""
    model = build("llava")
    inputs = batch(model, [Row([(30, 60), 6])])
    labels = inputs["input_ids"].clone()
    labels[:, :16] = labels[:, 17:19] = -100
    named = {"labels": labels}
    if given == "shift_labels":
        named["shift_labels"] = pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    losses = []
    for logits in ("all", "full", "supervised"):
        with torch.no_grad(), tp.prune(model, PDROP, tp.Schedule.one_shot(1, 0), logits=logits):
            losses.append(model(**inputs, **named).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


class Samples(torch.utils.data.Dataset):
    """Rows of a padded batch; the collator puts the batch together again."""

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        assert sorted(rows) == list(range(len(self)))
        return {**self.inputs, "labels": self.labels}


def trained(model, samples: Samples, folder, **options) -> tuple[dict, dict]:
    """What Hugging Face's Trainer measures, and what a step of it reports."""
    from transformers import Trainer, TrainingArguments

    def accuracy(prediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits)
        labels = torch.as_tensor(prediction.label_ids)
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
        return {"accuracy": float(right.float().mean()), "length": logits.shape[1]}

    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], remove_unused_columns=False,
        per_device_train_batch_size=len(samples), per_device_eval_batch_size=len(samples),
        max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
        label_names=["labels"], **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=samples.collate, train_dataset=samples,
        eval_dataset=samples, compute_metrics=accuracy,
    )  # fmt: skip
    before = trainer.evaluate()
    return before, trainer.train().metrics


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.share(6)
def test_c1_the_trainer_measures_what_the_masked_model_gives(side, smoothing, tmp_path) -> None:
    model, reference = build("llava"), build("llava")
    inputs, labels, _ = answered(model, side)
    visual, samples = all_visual(model, inputs), Samples(inputs, labels)
    handle = tp.attach(model, UNIFORM, SCHEDULE, logits="full")
    ours = trained(model, samples, tmp_path / "a", label_smoothing_factor=smoothing)
    handle.remove()
    with masked(reference, inputs["attention_mask"], visual, handle.trace):
        theirs = trained(reference, samples, tmp_path / "b", label_smoothing_factor=smoothing)
    for key in ("eval_loss", "eval_accuracy", "eval_length"):
        assert ours[0][key] == pytest.approx(theirs[0][key], abs=1e-4), key
    assert ours[1]["train_loss"] == pytest.approx(theirs[1]["train_loss"], abs=1e-4)
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


# ------------------------------------------------------------------------------------- (d) numbers


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llava", "llama"])
@pytest.mark.parametrize("source", ["next", "previous"])
@pytest.mark.parametrize("queries", ["last", "all"])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
@pytest.mark.share(3)
def test_d1_scores_under_autocast_are_single(name, queries, source, family, policy) -> None:
    model = build(family)
    inputs, mask = split(batch(model, ROWS))
    strategy = tp.build_strategy(name, queries=queries, source=source)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        tp.prune(model, strategy, SCHEDULE, policy, visual_mask=mask) as trace,
    ):
        model(**inputs)
    for stage in trace.stages:
        for scores in stage.scores:
            assert scores.dtype == torch.float32
            assert len(scores) == 0 or (scores != scores.bfloat16().float()).any()


# ---------------------------------------------------------------- (j) training libraries, (k) words


@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
def test_j1_labels_everywhere_are_told_of_once(logits) -> None:
    model = build("llava")
    one = batch(model, [ROWS[0]])
    with (
        warnings.catch_warnings(record=True) as told,
        torch.no_grad(),
        tp.prune(model, PDROP, SCHEDULE, logits=logits) as trace,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            loss = model(**one, labels=one["input_ids"]).loss
    assert trace.visual_lengths[-1].tolist() == [16]
    assert [str(one.message).split(", got")[0] for one in told] == [
        "prune: expected labels on answers alone"
    ]
    assert "completion_only_loss=True" in str(told[0].message)
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**one, labels=one["input_ids"]).loss, **CLOSE)


def test_j1_a_step_without_labels_is_told_of_once() -> None:
    """Label smoothing and losses of a trainer's own keep them back: an answer's end would ask."""
    model = build("llava").train()
    inputs, labels, _ = answered(model, "left")
    with warnings.catch_warnings(record=True) as told, tp.prune(model, PDROP, SCHEDULE):
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs).logits.sum().backward()
    assert ["the last token of its answer asks" in str(one.message) for one in told] == [True]
    by_all = tp.build_strategy("pyramiddrop", queries="all")
    for strategy, more in ((UNIFORM, {}), (by_all, {}), (PDROP, {"labels": labels})):
        with tp.prune(model, strategy, SCHEDULE):
            model(**inputs, **more)  # a warning would be an error
    with tp.prune(model.eval(), PDROP, SCHEDULE):
        model(**inputs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft
@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
@pytest.mark.parametrize("side", SIDES)
def test_j2_prefix_tuning_is_exact(side, logits) -> None:
    """A prefix is a cache from before the call, of tokens that no id stands for."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llava"), config).eval()
    inputs, labels, _ = answered(model, side)
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE, logits=logits) as trace:
            got = model(**inputs, labels=labels).loss
        real, visual = pad(inputs["attention_mask"], (3, 0), value=1), all_visual(model, inputs)
        with masked(model, real, pad(visual, (3, 0)), trace, extra=0):
            expected = model(**inputs, labels=labels).loss
    assert trace.visual_lengths[-1].tolist() == [3, 6, 0, 3]
    torch.testing.assert_close(got, expected)
    with (
        pytest.raises(ValueError, match=r"for a prefix of peft's, make the first cut later"),
        tp.prune(model, UNIFORM, FROM_0),
    ):
        model(**inputs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
def test_j3_a_head_of_a_trainers_own_reads_the_survivors_labels(logits, when) -> None:
    """TRL puts a forward in place of the model's, which asks for hidden states and scores them."""
    model = build("llava")
    inputs, labels, _ = answered(model, "right")

    @functools.wraps(type(model).forward)
    def fused(self, *args, labels, shift_labels=None, **kwargs) -> Tensor:
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        logits = self.lm_head(hidden).flatten(0, 1)
        return nn.functional.cross_entropy(logits, shift_labels.flatten(), ignore_index=-100)

    handle = tp.attach(model, PDROP, SCHEDULE, logits=logits) if when == "before" else None
    model.forward = types.MethodType(fused, model)
    handle = handle or tp.attach(model, PDROP, SCHEDULE, logits=logits)
    with torch.no_grad():
        got = model(**inputs, labels=labels)
        handle.remove()
        del model.forward
        visual = all_visual(model, inputs)
        with masked(model, inputs["attention_mask"], visual, handle.trace):
            expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_j2_prompt_tuning_is_refused_with_the_way_out(kind) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(build("llava"), config).eval()
    one = batch(model, [ROWS[0]])
    with (
        pytest.raises(ValueError, match=r"got 24: .* \(prompt tuning, p-tuning\)\. Pass visual_"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**one)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_k1_guidance_keeps_the_trace_of_the_image(scale) -> None:
    model = build("llava")
    one = batch(model, [ROWS[0]])
    with tp.prune(model, PDROP, SCHEDULE) as trace:
        answer(model, one)
        expected = [stage.kept[0].tolist() for stage in trace.stages]
        answer(model, one, guidance_scale=scale)
        assert [stage.kept[0].tolist() for stage in trace.stages] == expected


@pytest.mark.matrix
def test_k2_export_of_a_pruned_model_is_refused() -> None:
    model = build("llava")
    one = batch(model, [ROWS[0]])
    with (
        pytest.raises(ValueError, match=r"expected a call that runs, got torch\.export"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        torch.export.export(model, (), kwargs={**one, "use_cache": False}, strict=False)
