"""Survivors that are mixed from others, and one strategy a cut (oracle: mixed by hand)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from mixing import Mixing
from models import FAMILIES, ROWS, batch, build, labelled
from oracles import DROPPING, MERGING, all_visual, assert_close, generate, runnable

import tokenprune as tp
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.tensors import causal


def by_hand(model, embeds, visual, trace, cut_at, positions):
    """Last hidden states of one row: layers run one by one, mixed at their cuts."""
    decoder = model.get_decoder()
    hidden, order = embeds, torch.arange(embeds.shape[1])[None]
    alive = visual[0].nonzero()[:, 0]
    for index, layer in enumerate(decoder.layers):
        if index in cut_at:
            stage = trace.stages[cut_at.index(index)]
            before = (order[0][:, None] == alive).nonzero()[:, 0]
            mixed = stage.weights[0] @ hidden[0, before]
            left = visual[0].nonzero()[:, 0][stage.kept[0]]
            gone = torch.isin(order[0], alive) & ~torch.isin(order[0], left)
            hidden = hidden.clone()
            hidden[0, (order[0][:, None] == left).nonzero()[:, 0]] = mixed
            hidden, order, alive = hidden[:, ~gone], order[:, ~gone], left
        own = torch.arange(order.shape[1])[None] if positions == "renumbered" else order
        allowed = causal(torch.arange(order.shape[1])[None], order.shape[1], 0)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=decoder.rotary_emb(hidden, own)
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return decoder.norm(hidden)


def embeddings(model, inputs):
    """What enters the decoder."""
    seen = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0].detach()), with_kwargs=True
        )
    )
    with torch.no_grad():
        model(**{key: value for key, value in inputs.items() if key != "visual_mask"})
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize(
    ("family", "strategy", "layers"),
    [
        *((family, Mixing(), at) for family in FAMILIES for at in ([0], [2], [0, 3], [1, 2, 4])),
        *((*pair, at) for pair in runnable(FAMILIES, MERGING) for at in ([2], [1, 2, 4])),
    ],
    ids=repr,
)
@pytest.mark.share(6)
def test_a_merged_cut_is_mixed_by_hand(family, strategy, layers, positions, attention):
    model = build(family, attention)
    schedule = tp.Schedule.pyramid(layers=layers, lam=0.6)
    for row in (ROWS[0], ROWS[2]):
        inputs = batch(model, [row])
        visual = all_visual(model, inputs)
        embeds = embeddings(model, inputs)
        with torch.no_grad(), tp.prune(model, strategy, schedule, positions) as trace:
            logits = model(**inputs).logits
        assert [stage.weights[0].shape[0] for stage in trace.stages] == [
            len(stage.kept[0]) for stage in trace.stages
        ]
        with torch.no_grad():
            hidden = by_hand(model, embeds, visual, trace, layers, positions)
            assert_close(logits, model.lm_head(hidden))


def test_at_layer_0_it_is_the_model_fed_mixed_embeddings():
    model = build("llava")
    inputs = batch(model, [ROWS[0]])
    visual, embeds = all_visual(model, inputs), embeddings(model, inputs)
    schedule = tp.Schedule.one_shot(layer=0, keep=0.4)
    with torch.no_grad(), tp.prune(model, Mixing(), schedule) as trace:
        ours = model(**inputs).logits
    stage = trace.stages[0]
    columns = visual[0].nonzero()[:, 0]
    embeds[0, columns[stage.kept[0]]] = stage.weights[0] @ embeds[0, columns]
    left = ~visual[0]
    left[columns[stage.kept[0]]] = True
    with torch.no_grad():
        whole = model.get_decoder()(
            inputs_embeds=embeds[:, left],
            attention_mask=torch.ones(1, int(left.sum())),  # or gaps pass for several sequences
            position_ids=left.nonzero()[:, 0][None],
        )
        theirs = model.lm_head(whole.last_hidden_state)
    assert_close(ours, theirs)


def test_methods_that_merge_are_known():
    assert {"pool", "sparsevlm"} <= {strategy.name for strategy in MERGING}
    assert {"divprune", "uniform"} <= {strategy.name for strategy in DROPPING}


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llama"])
@pytest.mark.share(3)
def test_a_merged_row_of_a_batch_is_the_row_alone(family, side, positions):
    model = build(family)
    schedule = tp.Schedule.pyramid(layers=[0, 2, 4], lam=0.6)
    inputs = batch(model, ROWS, side)
    with torch.no_grad(), tp.prune(model, Mixing(), schedule, positions) as trace:
        together = model(**inputs).logits
        kept, lengths = [stage.kept for stage in trace.stages], trace.lengths[-1]
        for number, row in enumerate(ROWS):
            alone = model(**batch(model, [row])).logits[0]
            count = int(lengths[number])
            own = together[number, -count:] if side == "left" else together[number, :count]
            assert_close(own, alone)
            if len(row.segments) > 1:
                for stage, others in zip(trace.stages, kept, strict=True):
                    assert torch.equal(stage.kept[0], others[number])


def test_a_cut_that_keeps_everything_is_mixed_as_well():
    @dataclass(frozen=True)
    class Doubling(tp.PruningStrategy):
        keeps_exactly = True

        def select(self, view, keep):
            return tp.Selection(view.valid, weights=2 * torch.eye(view.valid.shape[1])[None])

    model = build("llava")
    inputs = batch(model, [ROWS[0]])
    embeds, visual = embeddings(model, inputs), all_visual(model, inputs)
    embeds[visual] *= 2
    schedule = tp.Schedule.one_shot(layer=0, keep=1.0)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        with tp.prune(model, Doubling(), schedule):
            assert_close(model(**inputs).logits, expected)
        # Later layers run on what one cut has left, and mix it no second time.
        with tp.prune(model, tp.PerStage((Doubling(), tp.build_strategy("random"))),
                      tp.Schedule.pyramid(layers=[0, 2], lam=1.0)):  # fmt: skip
            assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_mixture_and_not_through_the_choice(checkpointing):
    model = build("llava").double()
    inputs = batch(model, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    schedule = tp.Schedule.pyramid(layers=[1, 3], lam=0.6)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()

    def loss():
        with tp.prune(model, Mixing(), schedule):
            return model(**inputs).logits.pow(2).mean()

    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    with tp.prune(model, Mixing(), schedule):
        model(**inputs).logits.pow(2).mean().backward()
    gradient = weight.grad.clone()
    direction = torch.zeros_like(weight)
    direction.view(-1)[gradient.abs().argmax()] = 1e-2
    with torch.no_grad():
        weight += direction
        above = loss()
        weight -= 2 * direction
        below = loss()
    slope = (above - below) / 2e-2
    largest = gradient.view(-1)[gradient.abs().argmax()]
    torch.testing.assert_close(slope, largest, rtol=1e-2, atol=0)


def test_what_is_known_of_a_mixed_token_is_mixed_alike():
    seen = []

    @dataclass(frozen=True)
    class Looking(tp.ScoreStrategy):
        def needs(self):
            return (tp.Projected(),)

        def score(self, view):
            seen.append(view.projected)
            return view.positions.float()

    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2]])
    embeds, visual = embeddings(model, inputs), all_visual(model, inputs)
    schedule = tp.Schedule.pyramid(layers=[0, 2], lam=0.6)
    strategy = tp.PerStage((Mixing(), Looking()))
    with torch.no_grad(), tp.prune(model, strategy, schedule) as trace:
        model(**inputs)
    for row, weights in enumerate(trace.stages[0].weights):
        expected = weights @ embeds[row, visual[row]]
        torch.testing.assert_close(seen[0][row, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.ones(1, 3, 3), torch.ones(1, 9, 16, dtype=torch.long)])
def test_weights_of_another_shape_are_refused(weights):
    strategy = dataclasses.make_dataclass("Wrong", [], bases=(Mixing,), frozen=True)
    original = Mixing.select
    strategy.select = lambda self, view, keep: dataclasses.replace(
        original(self, view, keep), weights=weights
    )
    model = build("llava")
    with (
        tp.prune(model, strategy(), tp.Schedule.one_shot(layer=2, keep=0.6)),
        pytest.raises(ValueError, match=r"Wrong.select: expected float weights of shape \(1, 10,"),
    ):
        model(**batch(model, [ROWS[0]]))


# ------------------------------------------------------------------------------- one strategy a cut


def test_each_cut_has_its_own_strategy():
    model = build("llava")
    inputs = batch(model, ROWS)
    schedule = tp.Schedule.pyramid(layers=[0, 2, 4], lam=0.6)
    fastv, pdrop = tp.build_strategy("fastv"), tp.build_strategy("pyramiddrop")
    uniform = tp.build_strategy("uniform")
    with torch.no_grad(), tp.prune(model, tp.PerStage((uniform, fastv, pdrop)), schedule) as trace:
        model(**inputs)
        kept = [stage.kept for stage in trace.stages]
    with torch.no_grad(), tp.prune(model, uniform, schedule) as trace:
        model(**inputs)
        assert all(map(torch.equal, kept[0], trace.stages[0].kept))
        assert not all(map(torch.equal, kept[1], trace.stages[1].kept))


def test_a_strategy_for_each_cut_is_asked_for():
    model = build("llava")
    two = tp.PerStage((tp.build_strategy("uniform"), tp.build_strategy("pyramiddrop")))
    with pytest.raises(ValueError, match=r"PerStage: expected a strategy for each of the cuts at"):
        tp.attach(model, two, tp.Schedule.one_shot(layer=2, keep=0.5))
    with pytest.raises(ValueError, match=r"PerStage: expected a strategy for each cut, got \(1"):
        tp.PerStage((1, 2))
    early = tp.PerStage((tp.build_strategy("fastv"), tp.build_strategy("pyramiddrop")))
    with pytest.raises(ValueError, match=r"at layer 1 or later for FastV"):
        tp.attach(model, early, tp.Schedule.pyramid(layers=[0, 2], lam=0.5))


# ----------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Reading(tp.ScoreStrategy):
    """Notes the text that it is shown and what that attends to."""

    seen: list = dataclasses.field(default_factory=list, compare=False)
    source: str = "next"

    def needs(self):
        return (tp.Text(), tp.DecoderRows("text", self.source), tp.DecoderRows("all", self.source))

    def score(self, view):
        rows = view.attend("text", self.source)
        self.seen.append((view.text, rows))
        return (rows.mean(1) * view.text.follows[..., None]).sum(1)


@pytest.mark.parametrize("source", ["next", "previous"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_shown_with_what_it_attends_to(side, source):
    model = build("llava", "eager")
    rows = [ROWS[0], ROWS[1], ROWS[2]]
    inputs = batch(model, rows, side)
    visual = all_visual(model, inputs)
    text = inputs["attention_mask"].bool() & ~visual
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True, output_hidden_states=True)
    strategy = Reading(source=source)
    with torch.no_grad(), tp.prune(model, strategy, tp.Schedule.one_shot(layer=2, keep=0.5)):
        model(**inputs)
    (view, attended), = strategy.seen  # fmt: skip
    attention = whole.attentions[2 if source == "next" else 1]
    embeds = embeddings(model, inputs)
    for row in range(3):
        columns, seats = text[row].nonzero()[:, 0], visual[row].nonzero()[:, 0]
        count = len(columns)
        assert view.valid[row].tolist() == [True] * count + [False] * (view.valid.shape[1] - count)
        last = int(seats.max()) if len(seats) else -1
        assert view.follows[row, :count].tolist() == (columns > last).tolist()
        torch.testing.assert_close(view.embeddings[row, :count], embeds[row, columns])
        ours = attended[row, :, :count, : len(seats)]
        theirs = attention[row][:, columns][:, :, seats]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not attended[row, :, count:].any()


def test_answers_and_guesses_are_no_prompt():
    model = build("llava")
    inputs, labels = labelled(model)
    inputs["labels"] = labels
    strategy = Reading()
    with tp.prune(model, strategy, tp.Schedule.one_shot(layer=2, keep=0.5)):
        model(**inputs)
    expected = inputs["attention_mask"].bool() & ~all_visual(model, inputs)
    expected &= inputs["labels"] == -100
    assert strategy.seen[0][0].valid.sum(1).tolist() == expected.sum(1).tolist()


def test_what_is_not_declared_is_not_shown():
    @dataclass(frozen=True)
    class Undeclared(tp.ScoreStrategy):
        def score(self, view):
            return view.projected.norm(dim=-1)

    model = build("llava")
    with (
        pytest.raises(ValueError, match=r"Undeclared: expected what is declared in needs"),
        tp.prune(model, Undeclared(), tp.Schedule.one_shot(layer=2, keep=0.5)),
    ):
        model(**batch(model, ROWS))


def test_a_need_that_nobody_knows_is_refused():
    @dataclass(frozen=True)
    class Dream(tp.Need):
        pass

    @dataclass(frozen=True)
    class Dreaming(Reading):
        def needs(self):
            return (Dream(),)

    with pytest.raises(ValueError, match=r"expected needs that the engine knows, got .*Dream"):
        tp.attach(build("llava"), Dreaming(), tp.Schedule.one_shot(layer=2, keep=0.5))


def test_positions_of_a_merged_row_go_on_from_its_length():
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3]])
    schedule = tp.Schedule.pyramid(layers=[1, 3], lam=0.6)
    for positions in ("original", "renumbered"):
        with torch.no_grad(), tp.prune(model, Mixing(), schedule, positions):
            cached = generate(model, inputs)
            whole = generate(model, inputs, use_cache=False)
        for ours, theirs in zip(cached.logits, whole.logits, strict=True):
            assert_close(ours, theirs, 3e-5)


def test_the_trace_says_which_token_went_into_which() -> None:
    """By the largest share; through two cuts, in the sample's own numbers, for pictures."""
    weights = torch.zeros(3, 6)
    weights[0, 0], weights[0, 1], weights[1, 2] = 0.5, 0.5, 1.0
    weights[2, 1], weights[2, 4], weights[2, 5] = 0.2, -0.7, 1.0
    kept = [torch.tensor([0, 2, 5]), torch.tensor([2])]
    then = torch.tensor([[0.4, 0.6, 0.0]])
    stages = [tp.TracedStage(0, [kept[0]], None, [weights]),
              tp.TracedStage(3, [kept[1]], None, [then]),
              tp.TracedStage(4, [kept[1]], None)]  # fmt: skip
    assert stages[0].into[0].tolist() == [0, 0, 1, -1, 2, 2]
    assert stages[1].into[0].tolist() == [0, 0, -1]
    assert stages[2].into is None
    trace = tp.Trace(stages=stages)
    entries = kept_tokens(trace, 0, 6)["stages"]
    assert [entry["into"] for entry in entries] == [
        [0, 0, 2, -1, 5, 5],
        [2, 2, 2, -1, -1, -1],
        [2, 2, 2, -1, -1, -1],
    ]
    alone = tp.Trace(stages=[tp.TracedStage(2, [kept[0]], None)])
    assert kept_tokens(alone, 0, 6)["stages"] == [{"layer": 2, "kept": [0, 2, 5]}]
