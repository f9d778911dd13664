"""What strategies may ask for besides attention: keys, normed states, what entered the decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from models import ROWS, batch, build
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
            tp.Entered(): lambda: view.entered,
            tp.Text(): lambda: view.text,
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


def test_the_most_that_a_row_keeps_is_known_beforehand():
    model = build("llava")
    inputs = batch(model, ROWS)  # 16, 0, 32 and 16 visual tokens
    assert [view.max_keep for view, _ in shown(model, inputs)] == [19, 11]


def test_a_last_norm_that_is_not_known_is_refused():
    model = build("llama")
    del model.model.norm
    with pytest.raises(ValueError, match=r"whose last norm is known, .* got LlamaModel in Llama"):
        tp.attach(model, Asking((tp.Normed(),)), CUTS)


def test_keys_before_the_first_layer_are_refused():
    strategy = Asking((tp.DecoderKeys("previous"),))
    with pytest.raises(ValueError, match=r"expected cuts at layer 1 or later for Asking"):
        tp.attach(build("llama"), strategy, tp.Schedule.one_shot(0, 0.5))
    with pytest.raises(ValueError, match=r"DecoderKeys.source: expected one of .*, got 'own'"):
        tp.DecoderKeys("own")
