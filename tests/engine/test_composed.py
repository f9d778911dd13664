"""What several cuts, mixtures and needs do to each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models import ROWS, Row, batch, build
from oracles import EVERY
from transformers import DynamicCache

import tokenprune as tp
from tokenprune.engine.caches import record_of
from tokenprune.strategy import HasPatches, Tiles, TileShape


@dataclass(frozen=True)
class Tail(tp.ScoreStrategy):
    """Keeps the last tokens."""

    def score(self, view):
        return torch.arange(view.valid.shape[1]).float().expand(view.valid.shape)


@dataclass(frozen=True)
class Means(tp.PruningStrategy):
    """Mixes all tokens of a row into the first ones, and divides 0 by 0 beyond a row's own."""

    space: str = "decoder"

    def needs(self):
        tower = (tp.VisionRows(), tp.BeforeProjector())
        return tower if self.space != "decoder" else ()

    def select(self, view, keep):
        place = torch.arange(view.valid.shape[1])
        kept = (place < keep[:, None]) & view.valid
        own = torch.arange(view.max_keep)[None, :, None] < keep[:, None, None]
        weights = (own & view.valid[:, None]).float()
        weights = weights / weights.sum(-1, keepdim=True)
        return tp.Selection(kept, weights=weights, space=self.space)


def cuts(*stages: tuple[int, float]) -> tp.Schedule:
    return tp.Schedule.explicit(num_layers=6, stages=stages)


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "vispruner", "prumerge"])
@pytest.mark.parametrize("images", [3, 4, 6])
def test_few_tokens_of_many_tiles(name, images) -> None:
    """A tile's number may be as large as the number of tokens that are left."""
    fields = {"space": "decoder"} if name in ("visionzip", "prumerge") else {}
    model = build("llava", "eager")
    inputs = batch(model, [Row([3] + [(32, 32)] * images + [4])])
    count = 16 * images
    strategy = tp.PerStage((Tail(), tp.build_strategy(name, **fields)))
    with torch.no_grad():
        seen = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        with tp.prune(model, strategy, cuts((2, 2.01 / count), (4, 1.01 / count))) as trace:
            model(**inputs)
    assert trace.stages[0].kept[0].tolist() == [count - 2, count - 1]
    layer = -1 if name == "prumerge" else -2
    attention = seen.attentions[layer][-1, :, 0, 1:].mean(0)[-2:]
    if name == "fastervlm":
        expected = count - 2 + int(attention.argmax())
        assert trace.stages[1].kept[0].tolist() == [expected]
    assert len(trace.stages[1].kept[0]) == 1


def test_what_stands_beyond_a_row_s_survivors_reaches_no_gradient() -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[2]])
    with tp.prune(model, Means(), cuts((2, 0.25))):
        model(**inputs).logits[:, -1].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:prune. expected labels on answers alone")
def test_a_row_that_its_labels_keep_whole_is_not_mixed() -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    labels[1, -17:] = inputs["input_ids"][1, -17:]
    labels[1, : -16 - 1] = -100
    ids = inputs["input_ids"][1]
    labels[1] = torch.where(inputs["attention_mask"][1].bool(), ids, -100)  # nobody asks
    with torch.no_grad():
        whole = model(**inputs).logits
        with tp.prune(model, Means(), cuts((2, 0.25)), logits="full"):
            ours = model(**inputs, labels=labels).logits
    assert (ours[1, -1] - whole[1, -1]).abs().max() < 1e-4
    assert (ours[0, -1] - whole[0, -1]).abs().max() > 1e-2


def test_a_space_that_there_is_not_is_refused() -> None:
    model = build("llava")
    with (
        pytest.raises(ValueError, match=r"Selection.space: expected one of .*got 'projector'"),
        tp.prune(model, Means("projector"), cuts((0, 0.25))),
    ):
        model(**batch(model, [ROWS[0]]))


def test_what_entered_is_what_was_projected_of_the_mixture() -> None:
    entered, shown = [], []

    @dataclass(frozen=True)
    class Looking(tp.ScoreStrategy):
        def needs(self):
            return (tp.Projected(),)

        def score(self, view):
            shown.append(view.projected)
            return view.positions.float()

    model = build("llava")
    first = model.get_decoder().layers[0].input_layernorm
    hook = first.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    strategy = tp.PerStage((tp.build_strategy("visionzip", contextual=0.5), Looking()))
    with torch.no_grad(), tp.prune(model, strategy, cuts((0, 0.5), (3, 0.25))):
        model(**batch(model, [ROWS[0]]))
    hook.remove()
    torch.testing.assert_close(shown[0][0], entered[0][0, 3:11], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need", [HasPatches(), Tiles(), TileShape(), tp.BeforeProjector()])
def test_what_goes_with_others_is_not_asked_for_alone(need) -> None:
    @dataclass(frozen=True)
    class Alone(Tail):
        def needs(self):
            return (need,)

    with pytest.raises(ValueError, match=r"Alone.needs: expected VisionRows or VisionStates"):
        tp.attach(build("llava"), Alone(), cuts((2, 0.5)))


def test_a_need_may_be_declared_twice() -> None:
    @dataclass(frozen=True)
    class Twice(Tail):
        def needs(self):
            return (tp.DecoderRows(), tp.DecoderRows())

        def score(self, view):
            return view.attend().mean(1)

    model = build("llava")
    with torch.no_grad(), tp.prune(model, Twice(), cuts((2, 0.5))) as trace:
        model(**batch(model, [ROWS[0]]))
    assert len(trace.stages[0].kept[0]) == 8


def test_features_can_be_had_as_a_tuple() -> None:
    model = build("llava")
    pixels = batch(model, [ROWS[0]])["pixel_values"]
    with torch.no_grad():
        whole = model.get_image_features(pixels, return_dict=False)
        with tp.prune(model, tp.build_strategy("fastervlm"), cuts((2, 0.5))):
            ours = model.get_image_features(pixels, return_dict=False)
    assert len(ours) == len(whole)


@pytest.mark.parametrize("strategy", EVERY, ids=lambda strategy: strategy.name)
def test_a_cut_after_which_nothing_was_left_chooses_nothing(strategy) -> None:
    model = build("llava")
    with torch.no_grad(), tp.prune(model, strategy, cuts((1, 0.0), (3, 0.0))) as trace:
        logits = model(**batch(model, [ROWS[0], ROWS[2]])).logits
    assert logits.isfinite().all()
    assert [[len(row) for row in stage.kept] for stage in trace.stages] == [[0, 0], [0, 0]]


# ------------------------------------------------------------------------------ rows of a cache


def test_rows_move_whatever_the_caller_writes_on_the_index() -> None:
    model, cache = build("llava"), None
    inputs = batch(model, [ROWS[0], ROWS[2]])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("random"), cuts((2, 0.3))):
        model(**inputs, past_key_values=cache)
        index = torch.tensor([1, 0])
        cache.reorder_cache(index)
        index.zero_()
    assert record_of(cache).num_visual == [32, 16]


def test_rows_that_end_alike_again_are_selected_anew() -> None:
    model = build("llava")
    inputs = batch(model, [Row([3, (32, 32)])] * 2)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5], [5]])], 1)
    ids[0] = torch.cat([torch.tensor([4]), ids[0, :-1]])  # row 0 ends in its image
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("random"), cuts((2, 0.26))):
        model(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        model(input_ids=torch.full((6, 1), 7), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 5]))
        model(input_ids=torch.full((2, 1), 7), past_key_values=cache)
    assert record_of(cache).num_rows == 2
