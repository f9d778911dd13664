"""What strategies may ask for besides attention: keys, normed states, what entered the decoder."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch
from models import ROWS, Row, batch, build
from oracles import all_visual

import tokenprune as tp

CUTS = tp.Schedule.pyramid(layers=[2, 4], lam=0.6)


@dataclass(frozen=True)
class Asking(tp.ScoreStrategy):
    """Notes what it is shown, and keeps the first tokens."""

    own: tuple[tp.Need, ...]
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def needs(self):
        return self.own

    def score(self, view):
        self.seen.append(view)
        found = {
            tp.DecoderKeys("next"): lambda: view.keys("next"),
            tp.DecoderKeys("previous"): lambda: view.keys("previous"),
            tp.Normed(): lambda: view.normed,
            tp.Change(): lambda: view.change,
            tp.Entered(): lambda: view.entered,
            tp.Text(): lambda: view.text,
            tp.Question(): lambda: view.question,
        }
        self.seen.append({need: found[need]() for need in self.own})
        return -view.positions.float()


def shown(model, inputs, *needs):
    """What a strategy is shown at each cut: the view, and its answers."""
    strategy = Asking(needs)
    with torch.no_grad(), tp.prune(model, strategy, CUTS):
        model(**inputs)
    return list(zip(strategy.seen[::2], strategy.seen[1::2], strict=True))


def columns(model, inputs):
    """Columns of each row's text, and of its visual tokens."""
    visual = all_visual(model, inputs)
    text = inputs["attention_mask"].bool() & ~visual
    return [(t.nonzero()[:, 0], v.nonzero()[:, 0]) for t, v in zip(text, visual, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source", ["previous", "next"])
def test_keys_are_those_that_a_layer_caches(source, side):
    model = build("llava")
    inputs = batch(model, ROWS, side)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    whole = cache.layers[1 if source == "previous" else 2].keys.transpose(1, 2)
    (_, answers), _ = shown(model, inputs, tp.DecoderKeys(source))
    keys = answers[tp.DecoderKeys(source)]
    for row, (text, visual) in enumerate(columns(model, inputs)):
        for ours, own in ((keys.text, text), (keys.visual, visual)):
            torch.testing.assert_close(ours[row, : len(own)], whole[row, own])


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_normed_as_the_last_layer_s(side):
    model = build("llava")
    inputs = batch(model, ROWS, side)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[2]
        whole = model.get_decoder().norm(hidden)
    (_, answers), (later, others) = shown(model, inputs, tp.Normed())
    for row, (text, visual) in enumerate(columns(model, inputs)):
        normed = answers[tp.Normed()]
        torch.testing.assert_close(normed.text[row, : len(text)], whole[row, text])
        torch.testing.assert_close(normed.visual[row, : len(visual)], whole[row, visual])
    # Of those alive, at a later cut.
    assert others[tp.Normed()].visual.shape == later.hidden.shape
    torch.testing.assert_close(others[tp.Normed()].visual, model.get_decoder().norm(later.hidden))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_is_what_the_layer_before_has_added(side, dtype):
    """In float32, whatever the model's own: two numbers of bfloat16 are apart by less than one."""
    model = build("llava").to(dtype)
    inputs = batch(model, ROWS, side)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    whole = hidden[2].float() - hidden[1].float()
    (_, answers), (later, others) = shown(model, inputs, tp.Change())
    assert answers[tp.Change()].dtype == torch.float32
    for row, (_, visual) in enumerate(columns(model, inputs)):
        torch.testing.assert_close(answers[tp.Change()][row, : len(visual)], whole[row, visual])
    # Of those alive, by the layer that has run on them.
    assert others[tp.Change()].shape == later.hidden.shape


def test_what_entered_is_shown_of_dropped_tokens_too():
    model = build("llava")
    inputs = batch(model, ROWS)
    (first, now), (second, later) = shown(model, inputs, tp.Entered())
    assert second.valid.sum() < first.valid.sum()
    assert torch.equal(now[tp.Entered()], later[tp.Entered()])
    assert now[tp.Entered()].shape[1] == int(first.num_original.max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_and_image_are_counted_alike(side):
    model = build("llava")
    inputs = batch(model, ROWS, side)
    (view, answers), _ = shown(model, inputs, tp.Text())
    starts = inputs["attention_mask"].argmax(1)
    for row, (text, visual) in enumerate(columns(model, inputs)):
        ours = answers[tp.Text()].positions[row, : len(text)]
        assert torch.equal(ours, text - starts[row])
        assert torch.equal(view.positions[row, : len(visual)], visual - starts[row])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_question_is_what_follows_the_last_image(side):
    """Its ids, at each cut; all of the text of a row without an image, and no answer."""
    model = build("llava")
    inputs = batch(model, ROWS, side)
    expected = []
    for ids, (text, visual) in zip(inputs["input_ids"], columns(model, inputs), strict=True):
        last = int(visual[-1]) if len(visual) else -1
        expected.append(tuple(ids[text[text > last]].tolist()))
    assert [len(own) for own in expected] == [5, 9, 7, 12]
    for _, answers in shown(model, inputs, tp.Question()):
        assert answers[tp.Question()] == tuple(expected)
    answered = batch(model, [ROWS[0]], side)
    answered["labels"] = answered["input_ids"].clone()
    answered["labels"][:, :-2] = -100
    (_, answers), _ = shown(model, answered, tp.Question())
    assert answers[tp.Question()] == (expected[0][:-2],)


def test_a_question_without_ids_is_refused():
    model = build("llama")
    inputs = batch(model, [ROWS[0]])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    call = {"inputs_embeds": embeds, "visual_mask": inputs["visual_mask"]}
    call["attention_mask"] = inputs["attention_mask"]
    with pytest.raises(ValueError, match="Asking: expected input_ids, for a strategy that reads"):
        shown(model, call, tp.Question())


#: By its words, rows whose image text precedes alone, and one that is nothing but an image.
WORDLESS = {"before": Row([4, (32, 32)]), "none": Row([(32, 32)])}
REFUSES = {
    ("sparsevlm", "before"): " after the last image",
    ("sparsevlm", "none"): " after the last image",
    ("cdpruner", "none"): "",
}


@pytest.mark.parametrize("where", WORDLESS)
@pytest.mark.parametrize("name", ["sparsevlm", "cdpruner", "dart", "fastv", "pyramiddrop"])
def test_a_row_without_the_text_that_a_choice_reads(name, where):
    """Refused where nothing else can take its place; never answered as if it were there."""
    model = build("llava")
    strategy = tp.build_strategy(name, **({"exact_budget": True} if name == "dart" else {}))
    inputs = batch(model, [WORDLESS[where], ROWS[1], ROWS[0]])
    refused = REFUSES.get((name, where))
    if refused is not None:
        message = (
            f"prune: expected text of the prompt{refused} in every row that loses tokens, for "
            f"{type(strategy).__name__}, got none in row 0. Put the question there, in the "
            "same call, or choose another strategy."
        )
        with tp.prune(model, strategy, CUTS), pytest.raises(ValueError, match=re.escape(message)):
            model(**inputs)
    else:
        with torch.no_grad(), tp.prune(model, strategy, CUTS) as trace:
            model(**inputs)
        counts = [len(kept) for kept in trace.stages[0].kept]
        assert counts[1] == 0
        assert counts[0] == counts[2] > 0
    # A row that keeps all of its tokens lacks nothing, nor one without an image.
    for asked, schedule in ((inputs, tp.Schedule()), (batch(model, [ROWS[1], ROWS[0]]), CUTS)):
        with torch.no_grad(), tp.prune(model, strategy, schedule):
            model(**asked)
    whole = tp.Schedule.one_shot(2, 1.0)
    with torch.no_grad(), tp.prune(model, strategy, whole) as trace:
        model(**inputs)
    assert [len(kept) for kept in trace.stages[0].kept] == [16, 0, 16]


def test_an_answer_is_no_text_that_is_asked_for():
    """With labels, words after the image that are all learned are none of the prompt's."""
    model, strategy = build("llava"), tp.build_strategy("sparsevlm")
    inputs = batch(model, [ROWS[0]])
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with tp.prune(model, strategy, CUTS):
        model(**inputs, labels=torch.full_like(labels, -100))  # nothing learned: the row stays
        with pytest.raises(ValueError, match="expected text of the prompt after the last image"):
            model(**inputs, labels=labels)


def test_a_step_and_a_turn_without_an_image_need_no_text():
    """Of a conversation whose image is cut; an image of a later turn needs words of its own."""
    model, strategy = build("llava"), tp.build_strategy("sparsevlm")
    first, bare = batch(model, [ROWS[0]]), batch(model, [WORDLESS["before"]])
    with torch.no_grad(), tp.prune(model, strategy, CUTS):
        assert model.generate(**first, max_new_tokens=3).shape[1] == first["input_ids"].shape[1] + 3
        cache = model(**first, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=cache)
        bare.pop("attention_mask")
        with pytest.raises(ValueError, match="expected text of the prompt after the last image"):
            model(**bare, past_key_values=cache)


def test_the_most_that_a_row_keeps_is_known_beforehand():
    model = build("llava")
    inputs = batch(model, ROWS)  # 16, 0, 32 and 16 visual tokens
    assert [view.max_keep for view, _ in shown(model, inputs)] == [19, 11]


def test_a_last_norm_that_is_not_known_is_refused():
    model = build("llama")
    del model.model.norm
    with pytest.raises(ValueError, match=r"whose last norm is known, .* got LlamaModel in Llama"):
        tp.attach(model, Asking((tp.Normed(),)), CUTS)


@pytest.mark.parametrize("need", [tp.DecoderKeys("previous"), tp.Change()], ids=str)
def test_a_layer_before_the_first_is_refused(need):
    strategy = Asking((need,))
    with pytest.raises(ValueError, match=r"expected cuts at layer 1 or later for Asking"):
        tp.attach(build("llama"), strategy, tp.Schedule.one_shot(0, 0.5))


def test_a_source_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"DecoderKeys.source: expected one of .*, got 'own'"):
        tp.DecoderKeys("own")


# ------------------------------------------------------------------------------- blind strategies


@dataclass(frozen=True)
class Blind(tp.ScoreStrategy):
    """Says that it looks at no content."""

    looks: str = "places"
    own: tuple[tp.Need, ...] = ()
    blind = True

    def needs(self):
        return self.own

    def score(self, view):
        looks = {"places": lambda: view.places[..., 3], "random": lambda: view.random(3)}
        looks |= {"hidden states": lambda: view.hidden[..., 0], "positions": lambda: view.positions}
        return looks[self.looks]().float()


@dataclass(frozen=True)
class Seeing(Blind):
    """The same, asked when its cut comes."""

    blind = False


@pytest.mark.parametrize("looks", ["places", "random"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "ragged"])
def test_a_choice_ahead_is_the_choice_at_the_cut(looks, rows):
    """Where nothing is read of the content, it does not matter when a strategy is asked."""
    model, needs = build("llava_next"), (tp.RandomNumbers(3),)
    inputs = batch(model, rows)

    def run(*strategies):
        mixed = tp.PerStage(tuple(kind(looks, needs) for kind in strategies))
        schedule = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
        with torch.no_grad(), tp.prune(model, mixed, schedule) as trace:
            logits = model(**inputs).logits
        return logits, [(stage.kept, stage.scores) for stage in trace.stages]

    logits, stages = run(Seeing, Seeing, Seeing)
    for kinds in ((Blind, Blind, Blind), (Seeing, Blind, Blind), (Blind, Seeing, Blind)):
        found, chosen = run(*kinds)
        assert torch.equal(found, logits)
        for stage, (ours, scores) in enumerate(chosen):
            assert all(map(torch.equal, ours, stages[stage][0]))
            assert all(map(torch.equal, scores, stages[stage][1]))


@pytest.mark.parametrize("looks", ["hidden states", "positions"])
def test_a_blind_strategy_that_looks_is_refused(looks):
    model = build("llava")
    message = f"Blind: expected a strategy with blind = True to look at no content.* reads {looks}"
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=message),
        tp.prune(model, Blind(looks), CUTS),
    ):
        model(**batch(model, ROWS))


def test_a_blind_strategy_needs_nothing_but_chance():
    message = r"Blind: expected needs of random numbers alone where blind is True, got \[Projected"
    with pytest.raises(ValueError, match=message):
        tp.attach(build("llava"), Blind("places", (tp.Projected(),)), CUTS)
