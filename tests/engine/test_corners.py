"""Corners that went wrong once, each with what a user would notice."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from models import NUM_LAYERS, ROWS, Row, batch, build, labelled, text_config, turns
from oracles import PDROP, SCHEDULE, Frozen, assert_close, generate
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from zoo import ZOO

import tokenprune as tp
from tokenprune.families import projection
from tokenprune.families.anatomy import Anatomy
from tokenprune.tensors import to_device

# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_callers_4d_mask_is_honoured_with_and_without_a_cache(attention) -> None:
    model = build("llava", attention)
    prompt = batch(model, ROWS[:1])
    ids = torch.cat([prompt["input_ids"], torch.tensor([[5, 6]])], 1)
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[10:, 4:8] = False  # later tokens must not see these
    allowed[-1, 1] = False
    full = allowed[None, None]
    if attention == "eager":
        full = torch.zeros(1, 1, length, length).masked_fill(~full, torch.finfo(torch.float32).min)
    pixels = prompt["pixel_values"]
    with torch.no_grad(), tp.prune(model, Frozen(), SCHEDULE):
        whole = model(input_ids=ids, pixel_values=pixels, attention_mask=full).logits[:, -2:]
        cache = model(
            input_ids=ids[:, :-2],
            pixel_values=pixels,
            attention_mask=full[..., :-2, :-2],
            use_cache=True,
        ).past_key_values
        steps = [
            model(
                input_ids=ids[:, i : i + 1],
                attention_mask=full[:, :, i : i + 1, : i + 1],
                past_key_values=cache,
            ).logits[:, -1]
            for i in (length - 2, length - 1)
        ]
        plain = model(input_ids=ids, pixel_values=pixels).logits[:, -2:]
    assert_close(torch.stack(steps, 1), whole)
    assert not torch.allclose(plain, whole, atol=1e-2)


def test_a_masked_one_token_turn_is_no_token() -> None:
    model = build("llava")
    prompt = batch(model, ROWS[:1])
    length = prompt["input_ids"].shape[1]
    hole = torch.ones(1, length + 2, dtype=torch.int64)
    hole[0, length] = 0
    with torch.no_grad(), tp.prune(model, Frozen(), SCHEDULE):
        cache = model(**prompt, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), attention_mask=hole[:, :-1], past_key_values=cache)
        got = model(
            input_ids=torch.tensor([[7]]),
            attention_mask=hole,
            past_key_values=cache,
            position_ids=torch.tensor([[length + 1]]),
        ).logits
        cache = model(**prompt, use_cache=True).past_key_values
        expected = model(
            input_ids=torch.tensor([[7]]),
            past_key_values=cache,
            position_ids=torch.tensor([[length + 1]]),
        ).logits
    assert_close(got, expected)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_flash_attention_is_not_handed_gapped_position_ids(attention, monkeypatch) -> None:
    """It would take the gaps for several packed sequences; others get the survivors' own."""
    model = build("llava")
    seen = {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: seen.update({index: kwargs["position_ids"]}),
            with_kwargs=True,
        )
    monkeypatch.setattr(Anatomy, "attention", attention)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**batch(model, ROWS[:1]))
    assert seen[0] is not None
    for index in range(1, NUM_LAYERS):
        if attention == "sdpa":
            assert seen[index].shape == (1, trace.lengths[index])
        else:
            assert seen[index] is None


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_callers_shift_labels_are_what_the_loss_reads(side) -> None:
    model = build("llava")
    inputs, labels = labelled(model, side)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    other = torch.where(shifted != -100, (shifted + 1) % 90, shifted)
    keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
    with torch.no_grad():
        expected = model(**inputs, labels=labels, shift_labels=other).loss
        with tp.prune(model, PDROP, keep_all):
            got = model(**inputs, labels=labels, shift_labels=other).loss
        with tp.prune(model, PDROP, SCHEDULE):
            plain = model(**inputs, labels=labels).loss
            same = model(**inputs, labels=labels, shift_labels=shifted).loss
            differs = model(**inputs, labels=labels, shift_labels=other).loss
    assert torch.equal(got, expected)
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, differs)


def test_tensor_logits_to_keep_is_refused() -> None:
    model = build("llava")
    with (
        pytest.raises(ValueError, match="expected an integer logits_to_keep, got a tensor"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**batch(model, ROWS), logits_to_keep=torch.tensor([1]))


def test_a_prompt_that_ends_in_an_image_keeps_asking() -> None:
    model = build("llava")
    inputs = batch(model, [Row([3, (30, 60)])])
    with torch.no_grad(), tp.prune(model, PDROP, tp.Schedule.pyramid(layers=[1, 3], lam=0.25)) as t:
        model(**inputs)
    assert all(stage.scores[0].max() > 0 for stage in t.stages)
    with (
        pytest.raises(ValueError, match="expected at least one token to be left"),
        tp.prune(model, PDROP, tp.Schedule.one_shot(1, 0.0)),
    ):
        model(**batch(model, [Row([(30, 60)])]))


# ------------------------------------------------------------------------------------------ caches


def test_a_cache_is_continued_the_way_it_began() -> None:
    model = build("llava")
    step = {"input_ids": torch.tensor([[7]])}
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE, positions="renumbered"):
            cache = model(**batch(model, ROWS[:1]), use_cache=True).past_key_values
        with (
            pytest.raises(
                ValueError, match=r"with original positions, got one pruned at .* renumb"
            ),
            tp.prune(model, PDROP, SCHEDULE),
        ):
            model(**step, past_key_values=cache)
        with pytest.raises(ValueError, match="continued inside prune"):
            model(**step, past_key_values=cache)
        cache.layers[3].crop(-1)  # behind the engine's back
        with (
            pytest.raises(ValueError, match="Something else changed this cache"),
            tp.prune(model, PDROP, SCHEDULE, positions="renumbered"),
        ):
            model(**step, past_key_values=cache)


def test_positions_of_several_axes_that_a_caller_gives_cannot_be_counted_anew() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with (
        pytest.raises(ValueError, match='with positions="renumbered", got 3-dimensional ones'),
        tp.prune(model, PDROP, SCHEDULE, positions="renumbered"),
    ):
        model(**inputs)


def test_a_cache_cropped_into_the_prompt_is_refused() -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE):
        cache = model(**batch(model, ROWS[:1]), use_cache=True).past_key_values
        step = model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        cache.crop(-1)
        again = model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert torch.equal(step.logits, again.logits)
        cache.crop(-7)
        with pytest.raises(ValueError, match="expected a cache cropped by text after the pruned"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_a_later_turn_chooses_by_attention_to_everything_before() -> None:
    """With nothing dropped before it, the second turn scores as one long prompt does."""
    model = build("llava")
    calls = turns(model)[:3]
    cut = tp.Schedule((tp.Stage(3, 1.0),))
    with torch.no_grad(), tp.prune(model, PDROP, cut) as trace:
        cache = DynamicCache(config=model.config.get_text_config())
        for call in calls:
            model(**call, past_key_values=cache)
        late = trace.stages[0].scores[0]
        ids = torch.cat([call["input_ids"] for call in calls], 1)
        pixels = torch.cat([c["pixel_values"] for c in calls if "pixel_values" in c])
        model(input_ids=ids, pixel_values=pixels)
        at_once = trace.stages[0].scores[0][16:]
    assert_close(late, at_once)


# --------------------------------------------------------------------------------- what is refused


def test_conversations_beyond_a_sliding_window_are_refused() -> None:
    sizes = {k: v for k, v in text_config().to_dict().items() if k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    torch.manual_seed(0)
    config = MistralConfig(**sizes, sliding_window=24, eos_token_id=None)  # it goes on
    model = MistralForCausalLM(config).eval()
    prompt, visual = torch.arange(1, 23)[None], torch.zeros(1, 22, dtype=torch.bool)
    visual[:, 2:18] = True
    with tp.prune(model, PDROP, SCHEDULE, visual_mask=visual):
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        with pytest.raises(
            ValueError, match=r"expected at most 24 tokens, up to which every layer of Mist"
        ):
            model.generate(prompt, max_new_tokens=4, do_sample=False)


def test_select_must_respect_keep() -> None:
    @dataclass(frozen=True)
    class Greedy(tp.ScoreStrategy):
        def score(self, view):
            return view.positions

        def select(self, view, keep):
            return tp.Selection(kept=view.valid)

    model = build("llava")
    with (
        pytest.raises(ValueError, match=r"Greedy.select: expected at most \[.*\] tokens per row"),
        tp.prune(model, Greedy(), SCHEDULE),
    ):
        model(**batch(model, ROWS))


@pytest.mark.parametrize(
    ("answer", "got"),
    [(lambda view: None, "a NoneType"), (lambda view: view.valid, "a Tensor")],
    ids=["nothing", "a mask"],
)
def test_select_must_return_a_selection(answer, got) -> None:
    @dataclass(frozen=True)
    class Bare(tp.PruningStrategy):
        def select(self, view, keep):
            return answer(view)

    model = build("llava")
    with (
        pytest.raises(ValueError, match=f"Bare.select: expected a Selection, got {got}. Return"),
        tp.prune(model, Bare(), SCHEDULE),
    ):
        model(**batch(model, ROWS))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "answer",
    [
        lambda view: None,
        lambda view: view.hidden,
        lambda view: view.positions[:, 1:],
        lambda view: view.num_original,
    ],
    ids=["nothing", "states", "too few", "a row"],
)
def test_scores_are_one_a_token(answer, rows) -> None:
    @dataclass(frozen=True)
    class Odd(tp.ScoreStrategy):
        def score(self, view):
            return answer(view)

    model = build("llava")
    wanted = rf"Odd.score: expected scores of shape \({len(rows)}, \d+\), got "
    with pytest.raises(ValueError, match=wanted), tp.prune(model, Odd(), SCHEDULE):
        model(**batch(model, rows))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_whoever_looks_at_a_trace_is_told_of_scores_that_are_no_numbers(share) -> None:
    """Some may be NaN, which come last; of a row without any number the first tokens stay."""

    @dataclass(frozen=True)
    class Odd(tp.ScoreStrategy):
        def score(self, view):
            bad = torch.rand(view.positions.shape) < share
            return torch.where(bad, torch.nan, view.positions)

    model = build("llava")
    with tp.prune(model, Odd(), tp.Schedule.one_shot(2, 0.5)) as trace:
        model(**batch(model, ROWS))
    if share < 1:
        assert trace.stages
    else:
        with pytest.warns(UserWarning, match=r"Odd.score: expected numbers, got NaN .* layer 2"):
            assert trace.stages


@pytest.mark.parametrize("where", ["its class", "the base class"])
def test_who_chooses_is_asked_wherever_it_comes_from(where, monkeypatch) -> None:
    """The engine ranks scores by itself only where nobody has a way of their own."""

    @dataclass(frozen=True)
    class Last(tp.ScoreStrategy):
        def score(self, view):
            return view.positions.float()

    def first(self, view, keep):
        return tp.Selection(view.valid & (view.valid.cumsum(1) <= keep[:, None]))

    model, schedule = build("llava"), tp.Schedule.one_shot(2, 0.5)
    with torch.no_grad(), tp.prune(model, Last(), schedule) as trace:
        model(**batch(model, ROWS[:1]))
        own = trace.stages[0].kept[0].tolist()
        monkeypatch.setattr(Last if where == "its class" else tp.ScoreStrategy, "select", first)
        model(**batch(model, ROWS[:1]))
        theirs = trace.stages[0].kept[0].tolist()
    assert own == list(range(len(own), 2 * len(own)))
    assert theirs == list(range(len(own)))


@pytest.mark.parametrize("name", ["pyramiddrop", "uniform", "dart", "divprune"])
def test_a_cut_that_finds_no_image_left_changes_nothing(name) -> None:
    """Nobody is asked: there is nothing to choose from."""
    model, strategy = build("llava"), tp.build_strategy(name)
    found = []
    for cuts in ([(2, 0.0)], [(2, 0.0), (4, 0.0)]):
        with torch.no_grad(), tp.prune(model, strategy, tp.Schedule.explicit(cuts)) as trace:
            found.append(model(**batch(model, ROWS)).logits)
    assert torch.equal(*found)
    first, last = trace.stages
    assert [len(row) for row in last.kept] == [0] * len(ROWS)
    assert (last.scores is None) == (first.scores is None)
    assert all(len(row) == 0 for row in last.scores or [])


@pytest.mark.parametrize("ranks", [True, False])
def test_choices_are_made_in_single_precision_under_autocast(ranks) -> None:
    kinds = []

    @dataclass(frozen=True)
    class Product(tp.ScoreStrategy):
        def score(self, view):
            hidden = view.hidden.float()
            kinds.append((hidden @ hidden.mT).dtype)
            return hidden.sum(2)

    @dataclass(frozen=True)
    class Asked(Product):
        def select(self, view, keep):
            return super().select(view, keep)

    model, strategy = build("llava"), Product() if ranks else Asked()
    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast, tp.prune(model, strategy, tp.Schedule.one_shot(2, 0.5)):
        model(**batch(model, ROWS[:1]))
    assert kinds == [torch.float32]


def test_attention_must_be_declared() -> None:
    @dataclass(frozen=True)
    class Undeclared(tp.ScoreStrategy):
        def score(self, view):
            return view.attend("all", "next").mean(1)

    model = build("llava")
    with (
        pytest.raises(ValueError, match=r"Undeclared: expected what is declared in needs"),
        tp.prune(model, Undeclared(), SCHEDULE),
    ):
        model(**batch(model, ROWS))


def test_a_pruned_model_cannot_be_copied() -> None:
    model = build("llava")
    with (
        tp.prune(model, PDROP, SCHEDULE),
        pytest.raises(ValueError, match="expected a model without pruning attached to copy"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)


# ----------------------------------------------------------------------------- interrupts, memory


def test_an_interrupt_leaves_no_stale_inputs() -> None:
    model = build("llava")
    rows = [ROWS[2]]
    expected_model = build("llava")
    with tp.prune(expected_model, PDROP, SCHEDULE):
        expected = generate(expected_model, batch(model, rows)).sequences
    handle = tp.attach(model, PDROP, SCHEDULE)

    def interrupt(*_):
        raise KeyboardInterrupt

    stop = model.get_decoder().layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch(model, [ROWS[0]]))
    stop.remove()
    assert torch.equal(generate(model, batch(model, rows)).sequences, expected)
    handle.remove()


def test_a_trace_keeps_no_model_alive_and_can_be_pickled() -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**batch(model, ROWS))
    places = trace.places
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    copied = pickle.loads(pickle.dumps(trace))
    assert all(torch.equal(a, b) for a, b in zip(copied.places, places, strict=True))
    assert torch.equal(copied.lengths, trace.lengths)


def test_a_model_dropped_while_pruned_is_freed() -> None:
    model = build("llava")
    tp.attach(model, PDROP, SCHEDULE)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------------- chance, precision


def test_random_depends_on_seed_layer_and_own_tokens() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] += 1

    def kept(seed: int, layer: int, call: dict[str, Tensor]) -> list[int]:
        schedule = tp.Schedule.one_shot(layer, 0.5)
        with (
            torch.no_grad(),
            tp.prune(model, tp.build_strategy("random", seed=seed), schedule) as t,
        ):
            model(**call)
        return t.stages[0].kept[0].tolist()

    first = kept(0, 2, inputs)
    assert first == kept(0, 2, inputs)
    assert first != kept(1, 2, inputs)
    assert first != kept(0, 3, inputs)
    assert first != kept(0, 2, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_in_single(dtype) -> None:
    model = build("llava").to(dtype)
    inputs = batch(build("llava"), ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**inputs)
    scores = trace.stages[0].scores[0]
    assert scores.dtype == torch.float32
    assert (scores != scores.to(dtype).float()).any()


def test_attention_over_all_rows_in_chunks(monkeypatch) -> None:
    strategy = tp.build_strategy("pyramiddrop", queries="all")
    model = build("llava")
    inputs = batch(model, ROWS)
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE) as trace:
        model(**inputs)
        whole = [s.clone() for s in trace.stages[0].scores]
        monkeypatch.setattr("tokenprune.engine.attention.CHUNK_BYTES", 4 * 4 * 4 * 60 * 7)
        model(**inputs)
    for ours, theirs in zip(trace.stages[0].scores, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
    # A mean of probabilities over real rows: each row of attention sums to at most one.
    assert all(score.sum() <= 1 for score in whole)


def test_wrappers_around_a_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = build("llava")
    inputs, labels = labelled(model)
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE):
            expected = model(**inputs, labels=labels)
        with tp.prune(Wrapper(model), PDROP, SCHEDULE) as trace:
            pass
        wrapped = Wrapper(model)
        with tp.prune(wrapped, PDROP, SCHEDULE) as trace:
            ids = inputs.pop("input_ids")
            got = wrapped(ids, **inputs, labels=labels)
            assert trace.stages
        with tp.prune(wrapped, PDROP, SCHEDULE, logits="supervised"):
            lean = wrapped(ids, **inputs, labels=labels)
    assert torch.equal(got.loss, expected.loss)
    torch.testing.assert_close(lean.loss, expected.loss)
    assert lean.logits is None


def test_a_bare_decoder() -> None:
    model: LlamaForCausalLM = build("llama")
    inputs = batch(model, ROWS)
    mask = inputs.pop("visual_mask")
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE, visual_mask=mask) as whole:
            model(**inputs)
        with tp.prune(model.model, PDROP, SCHEDULE, visual_mask=mask) as bare:
            model.model(**inputs)
    for ours, theirs in zip(bare.stages, whole.stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))


# ---------------------------------------------------------------------------------------- devices


class Spread:
    """Puts layers on another device as accelerate does: their forward moves what it is given.

    The meta device has no values: it shows that all tensors of an operation are on one device.
    """

    def __init__(self, layer: nn.Module, device: str) -> None:
        self.execution_device = device
        self.forward = layer.forward
        layer.to(device)
        layer._hf_hook = self
        layer.forward = functools.wraps(layer.forward)(self)

    def __call__(self, *args, **kwargs):
        def move(value):
            return to_device(value, torch.device(self.execution_device))

        return self.forward(*map(move, args), **{k: move(v) for k, v in kwargs.items()})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", ["original", "renumbered"])
@pytest.mark.parametrize("name", ["uniform", "pyramiddrop", "fastv"])
@pytest.mark.share(3)
def test_side_tensors_follow_the_layers_of_a_model_spread_over_devices(
    name, policy, attention, monkeypatch
) -> None:
    monkeypatch.setattr(projection, "_agrees", lambda *args: True)  # compares values
    model = build("llava", attention)
    decoder = model.get_decoder()
    for layer in decoder.layers[2:]:
        Spread(layer, "meta")
    decoder.norm.to("meta")
    model.lm_head.to("meta")
    inputs = batch(model, ROWS)
    step = {"input_ids": torch.full((len(ROWS), 1), 7)}
    step["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad(), tp.prune(model, tp.build_strategy(name), SCHEDULE, policy) as trace:
        output = model(**inputs, use_cache=True)
        lengths = trace.lengths.clone()
        again = model(**step, past_key_values=output.past_key_values)
    assert output.logits.shape[1] == lengths[-1].max()
    assert again.logits.shape[1] == 1
    held = [output.past_key_values.get_seq_length(layer) for layer in range(NUM_LAYERS)]
    assert held == (lengths.max(1).values + 1).tolist()


# ------------------------------------------------------------------------ what calls leave behind


@pytest.mark.parametrize("name", ["uniform", "pyramiddrop"])
@pytest.mark.parametrize("policy", ["original", "renumbered"])
@pytest.mark.share(4)
def test_training_steps_leave_no_pass_behind(name, policy) -> None:
    model = build("llava").train()
    inputs, labels = labelled(model, "left")
    handle = tp.attach(model, tp.build_strategy(name), SCHEDULE, policy)
    for _ in range(3):
        model(**inputs, labels=labels).loss.backward()
        gc.collect()
    assert len(handle._passes) == 0
    handle.remove()


def test_training_steps_of_a_decoder_without_rotations_leave_no_pass_behind() -> None:
    """Its layers find their pass by the positions that they are handed."""
    specimen = ZOO["blip-2"]
    model = specimen.build("sdpa").train()
    inputs = specimen.batch(model, [(3, "image", 5)])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    handle = tp.attach(model, tp.build_strategy("uniform"), tp.Schedule.one_shot(3, 0.5))
    positions = torch.arange(labels.shape[1])[None].clone()  # no view of another tensor
    model(**inputs, labels=labels, position_ids=positions).loss.backward()
    assert len(handle._passes) == 1
    del positions
    gc.collect()
    assert len(handle._passes) == 0
    handle.remove()


@pytest.mark.parametrize("labels", [-100, 7], ids=["none", "all"])
def test_rows_of_which_none_asks_stay_whole(labels) -> None:
    """Where all is labelled, as trainers do by default, the user is told once what to set."""
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    with (
        torch.no_grad(),
        tp.prune(model, PDROP, SCHEDULE) as trace,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs, labels=torch.full_like(inputs["input_ids"], labels))
    assert trace.visual_lengths[-1].tolist() == [16]
    assert [str(warning.message)[:56] for warning in told] == [
        "prune: expected labels on answers alone, got rows in whi"
    ] * (labels == 7)


def test_an_image_divided_between_calls_is_refused() -> None:
    model = build("llava")
    with (
        pytest.raises(ValueError, match="expected an image in one call"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model.generate(**batch(model, ROWS[:1]), max_new_tokens=2, prefill_chunk_size=8)


def test_the_number_of_logits_asked_for_changes_no_choice() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        whole = model(**inputs).logits
        stages = list(trace.stages)
        last = model(**inputs, logits_to_keep=4).logits
    for ours, theirs in zip(trace.stages, stages, strict=True):
        assert torch.equal(ours.kept[0], theirs.kept[0])
    assert_close(last, whole[:, -4:])


def test_dropout_of_adapters_does_not_choose() -> None:
    """Keeping everything changes nothing, though attention is read through layers with dropout."""
    model = build("llava").train()
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj, nn.Dropout(0.5))
    inputs, labels = labelled(model, "left")
    keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**inputs, labels=labels).loss
        with tp.prune(model, PDROP, keep_all):
            torch.manual_seed(0)
            got = model(**inputs, labels=labels).loss
    assert torch.equal(got, expected)
    assert model.get_decoder().layers[1].self_attn.q_proj[1].training


def test_a_router_loss_takes_a_mask_of_ones() -> None:
    specimen = ZOO["qwen3_vl_moe"]
    model = specimen.build("sdpa")
    inputs = specimen.batch(model, [(3, "image", 5)])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with torch.no_grad(), tp.prune(model, Frozen(), tp.Schedule.one_shot(3, 0.5)):
        with_mask = model(**inputs, labels=labels, output_router_logits=True)
        del inputs["attention_mask"]
        without = model(**inputs, labels=labels, output_router_logits=True)
    torch.testing.assert_close(with_mask.loss, without.loss)
    torch.testing.assert_close(with_mask.aux_loss, without.aux_loss)


def test_a_router_loss_takes_no_padding() -> None:
    """Its terms read the mask of the whole call, beside logits of what is left."""
    specimen = ZOO["qwen3_vl_moe"]
    model = specimen.build("sdpa")
    inputs = specimen.batch(model, [(3, "image", 5), (3, "image", 7)])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with torch.no_grad(), tp.prune(model, Frozen(), tp.Schedule.one_shot(3, 0.5)):
        model(**inputs, labels=labels)
        with pytest.raises(ValueError, match="without padding for a loss with router terms"):
            model(**inputs, labels=labels, output_router_logits=True)
