"""Faults that nothing else noticed: each of these tests was written for one, and fails with it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from models import NUM_LAYERS, ROWS, Row, batch, build, labelled, text_config
from oracles import Frozen, assert_close, decided, tiny
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
)
from zoo import ZOO

import tokenprune as tp
from tokenprune.engine.cuts import listen

PDROP = tp.build_strategy("pyramiddrop")
SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)


def hand_no_mask(model) -> None:
    """As a decoder that leaves masks to its layers."""

    def before(module, args, kwargs):
        return args, kwargs | {"attention_mask": None}

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("form", ["steered", "steered a little", "by distance", "away", "heads"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bias_hides_nothing_and_what_one_head_sees_is_there(form, attention) -> None:
    """Additive masks may steer, and heads may differ: each layer sees its own part of them."""
    model = build("llava", attention)
    inputs = batch(model, [ROWS[0]])
    length = inputs["input_ids"].shape[1]
    visual = tp.visual_mask(model, inputs["input_ids"])[0]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    order = torch.arange(length)
    bias = {
        "steered": visual * 0.5,
        "steered a little": visual * 1e-6,
        "by distance": (order - order[:, None]) * 0.05,
        "away": (order == length - 3) * -0.5,
        "heads": torch.zeros(length),
    }[form]
    low = torch.finfo(torch.float32).min
    mask = torch.where(allowed, bias, torch.tensor(low)).expand(1, 4, -1, -1).clone()
    if form == "heads":
        mask[:, 0, :, length - 3] = low
        mask[:, 0, length - 3, length - 3] = 0
    call = dict(inputs) | {"attention_mask": mask, "use_cache": False}
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        ours = model(**call).logits
    stages = trace.stages
    assert [stage.kept[0].numel() for stage in stages] == [9, 5, 3]
    columns = visual.nonzero()[:, 0]

    def hide(layer):
        gone = torch.zeros(length, dtype=torch.bool)
        for stage in stages:
            if stage.layer <= layer:
                gone[columns] = True
                gone[columns[stage.kept[0]]] = False

        def before(module, args, kwargs):
            return args, kwargs | {"attention_mask": mask.masked_fill(gone, low)}

        return before, gone

    for number, layer in enumerate(model.get_decoder().layers):
        before, gone = hide(number)
        layer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        assert_close(ours[0], model(**call).logits[0, ~gone])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", tp.available())
def test_what_torch_makes_tensors_of_changes_no_choice(name, dtype) -> None:
    """Scores, shares and chance are float32, whatever `torch.set_default_dtype` says."""
    model = ZOO["llava"].build("sdpa")
    inputs, strategy = ZOO["llava"].batch(model), tiny(name)
    layers = (0, 5) if name == "vscan" else (3, 5)
    schedule = tp.Schedule(tuple(tp.Stage(n, 0.5**k) for k, n in enumerate(layers, 1)))
    found = []
    for kind in (torch.float32, dtype):
        torch.set_default_dtype(kind)
        try:
            with torch.no_grad(), tp.prune(model, strategy, schedule) as trace:
                found.append((model(**inputs, use_cache=False).logits, trace.stages))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert all(map(torch.equal, one.kept, other.kept))


@pytest.mark.parametrize("given", ["mask", "pads", "nothing"])
def test_scores_are_of_squeezed_attention(given) -> None:
    """Gemma 2 squeezes the logits of attention, in rows with a mask and in those that see all."""
    shape = text_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = Gemma2Config(
        **{name: shape[name] for name in names},
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=8,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=1.0,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    ids, padding = torch.randint(1, 90, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    padding[1, : 3 if given == "pads" else 0] = 0
    if given == "nothing":  # what the last row of a layer makes of that is the same
        hand_no_mask(model)
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 5:13] = True
    call = {"input_ids": ids, "attention_mask": padding}
    with torch.no_grad():
        weights = model(**call, output_attentions=True).attentions[0]
        strategy = tp.build_strategy("pyramiddrop", source="previous")
        with tp.prune(model, strategy, tp.Schedule.one_shot(1, 0.5), visual_mask=visual) as trace:
            model(**call)
    for row, scores in enumerate(trace.stages[0].scores):
        assert_close(scores, weights[row, :, -1, 5:13].mean(0))


@dataclass(frozen=True)
class Deaf(tp.AttentionStrategy):
    """Drops the end of an image, whoever asks there, and listens afterwards."""

    def score(self, view: tp.TokenView) -> Tensor:
        heard = view.attend(self.queries, self.source).mean(1)
        return heard if view.layer > 1 else -view.positions.float()


def test_where_the_token_that_asks_is_gone_the_last_one_asks() -> None:
    """An answer right after an image is asked for by the image's last token."""
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with torch.no_grad(), tp.prune(model, Deaf(), SCHEDULE) as trace:
        model(**inputs)
        expected = trace.stages[1].scores[0]
        model(**inputs, labels=labels)
    assert_close(trace.stages[1].scores[0], expected)


def test_where_nothing_asks_nothing_is_paid_whoever_else_asks() -> None:
    """A row without labels beside one whose answer comes right after its image."""
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[0]])
    labels = inputs["input_ids"].clone()
    labels[0, :-5] = -100
    labels[1] = -100
    schedule = tp.Schedule((tp.Stage(1, 0.9), tp.Stage(3, 0.7)))
    with torch.no_grad(), tp.prune(model, Deaf(), schedule) as trace:
        model(**inputs, labels=labels)
    scores = trace.stages[1].scores
    assert scores[0].all()
    assert not scores[1].any()
    assert [len(kept) for kept in trace.stages[1].kept] == [11, 16]


def test_a_mark_where_a_row_has_no_token_counts_for_nothing() -> None:
    @dataclass(frozen=True)
    class Careless(tp.PruningStrategy):
        def select(self, view, keep):
            return tp.Selection(kept=torch.ones_like(view.valid))

    model = build("llava")
    keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
    with torch.no_grad(), tp.prune(model, Careless(), keep_all) as trace:
        model(**batch(model, ROWS))
    assert trace.visual_lengths[-1].tolist() == [16, 0, 32, 16]


def test_random_numbers_of_rows_without_ids_are_fixed_by_their_counts() -> None:
    model = build("llama")
    ids, visual = torch.randint(1, 90, (3, 20)), torch.zeros(3, 20, dtype=torch.bool)
    visual[:2, 2:12] = True
    visual[2, 2:14] = True
    call = {"inputs_embeds": model.get_input_embeddings()(ids), "visual_mask": visual}
    with (
        torch.no_grad(),
        tp.prune(model, tp.build_strategy("random"), tp.Schedule.one_shot(2, 0.5)) as trace,
    ):
        model(**call)
        first, same, other = (scores[:10] for scores in trace.stages[0].scores)
        model(**{name: value[1:2] for name, value in call.items()})
        alone = trace.stages[0].scores[0]
    assert torch.equal(first, same)
    assert torch.equal(first, alone)
    assert not torch.equal(first, other)


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_later_tokens_of_one_call_do_not_see_each_others_future(attention) -> None:
    """Where a decoder hands its layers no mask, the engine's own holds for several new tokens."""
    model = build("llava", attention)
    hand_no_mask(model)
    prompt = batch(model, ROWS[:1])
    del prompt["attention_mask"]
    tokens = torch.tensor([[7, 8, 9]])
    with torch.no_grad(), tp.prune(model, Frozen(), tp.Schedule.one_shot(0, 0.5)):
        cache = model(**prompt, use_cache=True).past_key_values
        at_once = model(input_ids=tokens, past_key_values=cache).logits
        cache = model(**prompt, use_cache=True).past_key_values
        one_by_one = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(3)
        ]
    assert_close(at_once, torch.cat(one_by_one, 1))


def test_pads_are_what_the_caller_says_whatever_the_decoder_is_handed() -> None:
    """A model may hide more from its layers than pads."""
    model = build("llava")
    inputs = batch(model, ROWS)
    padding = inputs["attention_mask"].bool()

    def hide(module, args, kwargs):
        allowed = padding[:, None] & torch.ones(padding.shape[1], padding.shape[1]).tril().bool()
        allowed[:, :, -3] = False
        allowed = allowed | torch.eye(padding.shape[1]).bool()
        return args, kwargs | {"attention_mask": allowed[:, None]}

    model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**inputs)
    assert trace.lengths[0].tolist() == padding.sum(1).tolist()


# ------------------------------------------------------------------------------- calls that break


class Broken(Exception):
    """What a call of these tests ends with."""


def break_in(model, layer: int):
    def hook(*_):
        raise Broken

    return model.get_decoder().layers[layer].register_forward_pre_hook(hook)


def test_a_call_that_breaks_keeps_nothing_alive() -> None:
    model = build("llava")
    handle = tp.attach(model, PDROP, SCHEDULE)
    cache = DynamicCache(config=model.config.get_text_config())
    alive = weakref.ref(cache)
    stop = break_in(model, 3)
    with torch.no_grad(), pytest.raises(Broken):
        model(**batch(model, ROWS[:1]), past_key_values=cache)
    stop.remove()
    del cache
    gc.collect()
    assert alive() is None
    handle.remove()


def test_a_cache_tells_what_a_layer_holds_after_a_call_that_broke() -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        cache = model(**batch(model, ROWS[:1]), use_cache=True).past_key_values
        lengths = trace.lengths[:, 0].tolist()
        stop = break_in(model, 0)
        with pytest.raises(Broken):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        stop.remove()
        assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == lengths
        assert cache.get_seq_length() == lengths[0]


# --------------------------------------------------------------------------------------- gradients


def test_a_choice_takes_no_part_in_gradients() -> None:
    """A strategy may hold weights of its own: the trace keeps no graph of what it made of them."""
    direction = torch.ones(32, requires_grad=True)

    @dataclass(frozen=True)
    class Learned(tp.ScoreStrategy):
        def score(self, view: tp.TokenView) -> Tensor:
            return view.hidden @ direction

    model = build("llava").train()
    with tp.prune(model, Learned(), SCHEDULE) as trace:
        model(**batch(model, ROWS)).logits.sum().backward()
    assert not any(score.requires_grad for stage in trace.stages for score in stage.scores)
    assert direction.grad is None


def test_a_layer_recomputed_with_its_hooks_finds_its_pass_and_is_not_asked_again(
    monkeypatch,
) -> None:
    """As older models recompute theirs, and wrappers around layers do."""
    asked, gradients = [], []

    def counted(*args):
        asked.append(args[-1])
        listen(*args)

    monkeypatch.setattr("tokenprune.engine.layers.listen", counted)
    strategy = tp.build_strategy("pyramiddrop", queries="all", source="previous")
    for wrap in (lambda layer: layer, checkpoint_wrapper):
        model = build("llava").train()
        layers = model.get_decoder().layers
        weights = list(layers.parameters())
        with tp.prune(model, strategy, SCHEDULE, positions="renumbered"):
            for index, layer in enumerate(layers):
                layers[index] = wrap(layer)
            model(**batch(model, ROWS), use_cache=False).logits.sum().backward()
        gradients.append([weight.grad for weight in weights])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)
    assert asked == [1, 2, 4] * 2


# ------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_cache_of_fixed_size_gives_what_a_growing_one_gives(attention, layer) -> None:
    """Its mask has to hide what is not filled yet, in the form that each kernel reads."""
    model = build("llava", attention)
    prompt = batch(model, ROWS[:1])
    options = {"max_new_tokens": 5, "do_sample": False}
    with tp.prune(model, Frozen(), tp.Schedule.one_shot(layer, 0.5)):
        with decided():
            growing = model.generate(**prompt, **options)
        fixed = model.generate(
            **prompt, **options, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(fixed, growing)


def test_a_cache_cropped_by_text_of_the_prompt_is_that_of_a_shorter_prompt() -> None:
    """Under eager attention, whose masks ask the record for the columns of what is held."""
    model = build("llava", "eager")
    inputs, turn = batch(model, ROWS[:1]), torch.tensor([[7, 8, 9]])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad(), tp.prune(model, Frozen(), SCHEDULE):
        cache = model(ids, pixel_values=pixels, use_cache=True).past_key_values
        cache.crop(-2)
        got = model(input_ids=turn, past_key_values=cache).logits
        cache = model(ids[:, :-2], pixel_values=pixels, use_cache=True).past_key_values
        assert_close(got, model(input_ids=turn, past_key_values=cache).logits)


class Terse(LlamaForCausalLM):
    """A model that gives all logits, whatever number is asked for."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


@pytest.mark.parametrize("name", ["pyramiddrop", "fastv", "random", "cdpruner"])
def test_guesses_are_refused_where_a_model_cannot_say_which_they_are(name) -> None:
    torch.manual_seed(0)
    model = Terse(text_config()).eval()
    prompt, visual = torch.arange(1, 25)[None], torch.zeros(1, 24, dtype=torch.bool)
    visual[:, 2:18] = True
    guess = {"max_new_tokens": 3, "do_sample": False, "prompt_lookup_num_tokens": 2}
    with (
        tp.prune(model, tp.build_strategy(name), SCHEDULE, visual_mask=visual),
        pytest.raises(ValueError, match="expected a model that takes logits_to_keep"),
    ):
        model.generate(prompt, **guess)
    with tp.prune(model, Frozen(), SCHEDULE, visual_mask=visual):  # reads no prompt
        model.generate(prompt, **guess)


@pytest.mark.parametrize(
    "strategy",
    [
        PDROP,
        tp.build_strategy("fastv", queries="all"),
        tp.build_strategy("random"),
        tp.build_strategy("cdpruner"),
        tp.build_strategy("dart"),
    ],
    ids=lambda own: own.name,
)
def test_guesses_choose_nothing(strategy) -> None:
    """Decoding with guesses appends the first of them to the prompt."""
    model = build("llava")
    inputs = batch(model, [Row([6, (30, 60), 5])])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, 1:3]  # what followed once is guessed again
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE) as trace:
        model(**inputs)
        expected = list(trace.stages)
        model.generate(**inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
    assert trace.lengths[0].tolist() == [inputs["input_ids"].shape[1] + 2]
    for ours, theirs in zip(trace.stages, expected, strict=True):
        assert torch.equal(ours.kept[0], theirs.kept[0])
        if theirs.scores is not None:
            assert_close(ours.scores[0], theirs.scores[0])


# ------------------------------------------------------------------------------ other models' ways


def test_the_loss_alone_comes_out_of_a_model_around_a_causal_model() -> None:
    """Llama 4 takes its logits from a causal language model inside, and makes its own loss."""
    specimen, losses = ZOO["llama4"], []
    model = specimen.build("sdpa")
    inputs = specimen.batch(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    for logits in ("all", "supervised"):
        schedule = tp.Schedule.one_shot(3, 0.5)
        with torch.no_grad(), tp.prune(model, PDROP, schedule, logits=logits):
            output = model(**inputs, labels=labels, use_cache=False)
        losses.append(output.loss)
    assert output.logits is None
    torch.testing.assert_close(*losses)


def test_a_reentrant_checkpoint_is_given_by_place_what_the_model_gives_so() -> None:
    """Gemma 4 hands each layer an input of its own, and gradients flow through all of them."""
    specimen = ZOO["gemma4"]
    model = specimen.build("sdpa").train()
    inputs, gradients = specimen.batch(model), []
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    for reentrant in (None, True):
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.zero_grad()
        with tp.prune(model, PDROP, tp.Schedule.one_shot(3, 0.5)):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        weight = model.get_decoder().per_layer_model_projection.weight
        gradients.append(weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_positions_are_integers_where_a_model_counts_in_floats() -> None:
    """Qwen3-Omni does; SparseVLM 2.0 takes biases by how far two tokens are apart."""
    specimen = ZOO["qwen3_omni_moe_thinker"]
    model, seen = specimen.build("sdpa"), []

    @dataclass(frozen=True)
    class Looking(tp.ScoreStrategy):
        def score(self, view):
            seen.append(view.positions)
            return view.positions.float()

    with torch.no_grad(), tp.prune(model, Looking(), tp.Schedule.one_shot(3, 0.5)):
        model(**specimen.batch(model, [(2, "image", 6)]))
    assert seen[0].dtype == torch.int64
    assert seen[0].tolist() == [list(range(3, 9))]


def test_given_positions_count_from_a_row_s_first_token_without_pads_too() -> None:
    model, seen = build("llava"), []

    @dataclass(frozen=True)
    class Looking(tp.ScoreStrategy):
        def score(self, view):
            seen.append(view.positions[0].tolist())
            return view.positions.float()

    with torch.no_grad(), tp.prune(model, Looking(), tp.Schedule.one_shot(3, 0.5)):
        for rows in (ROWS[:1], [ROWS[0], ROWS[1]], [ROWS[0], ROWS[2]]):
            inputs = batch(model, rows)
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0) + 7
            model(**inputs, position_ids=positions)
    assert [row[:16] for row in seen] == [list(range(3, 19))] * 3


# --------------------------------------------------------------------------------------- positions


def test_a_rotary_module_keeps_its_other_arguments_when_positions_are_counted_anew() -> None:
    """Gemma 3 tells its rotary module which kind of layer it turns for."""
    shape = text_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = Gemma3TextConfig(
        **{name: shape[name] for name in names},
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    ids, visual = torch.randint(1, 90, (1, 20)), torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 5:13] = True
    without = ids[:, ~visual[0]]
    nothing = tp.Schedule.one_shot(0, 0.0)
    with torch.no_grad():
        expected = model(input_ids=without).logits
        with tp.prune(model, Frozen(), nothing, "renumbered", visual_mask=visual):
            got = model(input_ids=ids).logits
    assert_close(got, expected)


# ------------------------------------------------------------------------- what a review turned up


def test_text_alone_goes_beyond_a_window() -> None:
    """Nothing is cut, so layers with a window hold what they hold without pruning."""
    sizes = {
        name: value
        for name, value in text_config().to_dict().items()
        if name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads")
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8)).eval()
    ids = torch.arange(1, 13)[None]
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    with tp.prune(model, PDROP, SCHEDULE, visual_mask=nothing):
        assert torch.equal(model.generate(ids, **options), plain)


def test_a_call_beside_a_generation_leaves_the_trace() -> None:
    model = build("llava")

    class Beside(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
            return scores

    with tp.prune(model, PDROP, SCHEDULE) as trace:
        model.generate(
            **batch(model, ROWS[:1]),
            max_new_tokens=3,
            do_sample=False,
            logits_processor=LogitsProcessorList([Beside()]),
        )
    assert [stage.layer for stage in trace.stages] == [1, 2, 4]


def test_logits_to_keep_of_a_plain_call_moves_no_question() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**inputs)
        scores = trace.stages[0].scores[0]
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache, logits_to_keep=4)
        assert_close(trace.stages[0].scores[0], scores)


def test_a_method_that_somebody_sets_meanwhile_stays() -> None:
    model = build("llava")
    handle = tp.attach(model, PDROP, SCHEDULE)

    def own(*_: object) -> None:
        """Somebody's."""

    model.generate = own
    handle.remove()
    assert model.generate is own
    del model.generate
    with tp.prune(model, PDROP, SCHEDULE):
        del model.generate
    with tp.prune(model, PDROP, SCHEDULE):
        pass


def test_what_a_mixin_selects_is_counted() -> None:
    class Two:
        def select(self, view, keep):
            order = torch.arange(view.valid.shape[1])
            return tp.Selection(kept=(order < 2) & view.valid)

    @dataclass(frozen=True)
    class Mixed(Two, tp.ScoreStrategy):
        def score(self, view):
            return view.positions

    model = build("llava")
    with torch.no_grad(), tp.prune(model, Mixed(), SCHEDULE) as trace:
        model(**batch(model, ROWS[:1]))
    assert [len(stage.kept[0]) for stage in trace.stages] == [2, 2, 2]


def test_the_last_of_shifted_labels_has_a_question() -> None:
    model = build("llava")
    inputs = batch(model, ROWS[:1])
    labels = torch.full_like(inputs["input_ids"], -100)
    shifted = labels.clone()
    shifted[0, -1] = 7
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**inputs, labels=labels, shift_labels=shifted)
    assert trace.visual_lengths[-1].tolist() == [3]


def test_a_stage_of_a_trace_cannot_be_changed() -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
        model(**batch(model, ROWS[:1]))
    with pytest.raises(AttributeError):
        trace.stages[0].layer = 3


@pytest.mark.parametrize("form", ["all but the first", "all text", "all text after"])
def test_labels_on_all_text_leave_nothing_that_asks(form) -> None:
    """Neither what stands before an image, nor an image between labelled words."""
    model = build("llava")
    inputs = batch(model, [ROWS[0]])
    visual = tp.visual_mask(model, inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    if form == "all but the first":
        labels[:, 0] = -100
    else:
        labels[visual] = -100
    if form == "all text after":  # a caption: what it follows is the image, as without labels
        labels[:, : visual[0].int().argmax()] = -100
        with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE) as trace:
            model(**inputs, labels=labels)
        assert trace.stages[0].scores[0].max() > 0
        return
    with (
        pytest.warns(UserWarning, match="no unlabelled token after an image comes just before"),
        torch.no_grad(),
        tp.prune(model, PDROP, SCHEDULE) as trace,
    ):
        model(**inputs, labels=labels)
    assert [stage.kept[0].numel() for stage in trace.stages] == [16, 16, 16]


@pytest.mark.parametrize("logits", ["all", "full", "supervised"])
def test_labels_of_pads_count_for_nothing(logits) -> None:
    model = build("llava")
    inputs, labels = labelled(model)
    careless = labels.masked_fill(inputs["attention_mask"] == 0, 7)
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE, logits=logits):
        expected = model(**inputs, labels=labels).loss
        got = model(**inputs, labels=careless).loss
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chosen", [[1, 0], slice(1, 2), [1, 1, 0]], ids=str)
def test_rows_of_a_cache_are_chosen_by_a_list_or_a_slice(chosen) -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2]])
    step = torch.tensor([[7], [9]])[chosen]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)[chosen]
    found = []
    for kind in (list, torch.tensor):
        with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE):
            cache = model(**inputs, use_cache=True).past_key_values
            own = torch.arange(2)[chosen] if kind is torch.tensor else chosen
            cache.batch_select_indices(own)
            call = {"input_ids": step, "attention_mask": mask, "past_key_values": cache}
            found.append(model(**call).logits)
    assert torch.equal(*found)


def test_a_cache_cropped_into_an_image_is_refused_though_nothing_was_cut() -> None:
    model = build("llava")
    keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
    with torch.no_grad(), tp.prune(model, PDROP, keep_all):
        cache = model(**batch(model, ROWS[:1]), use_cache=True).past_key_values
        cache.crop(-15)
        with pytest.raises(ValueError, match="expected a cache cropped by text"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
