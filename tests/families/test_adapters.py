"""What the adapters know of a family."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, NUM_LAYERS, ROWS, Row, batch, build
from torch import nn
from zoo import ZOO

import tokenprune as tp
from tokenprune.families import projection
from tokenprune.families.anatomy import examine

#: Types some of whose layers do more than LLaMA's to make queries and keys: heard as they run.
CAPTURED = {
    *("aya_vision", "blip-2", "cohere2_vision", "exaone4_5", "fuyu", "gemma4", "gemma4_unified"),
    *("hunyuan_vl", "instructblip", "instructblipvideo", "kimi_k25", "llama4", "mistral4"),
    *("kosmos-2", "kosmos-2.5", "molmo2", "muse_glimmer", "muse_spark"),
}


def test_anatomy() -> None:
    model = build("llava")
    anatomy = examine(model)
    assert anatomy.decoder is model.model.language_model
    assert anatomy.entries == (model, model.model)
    assert len(anatomy.layers) == NUM_LAYERS
    assert anatomy.visual_ids == (IMAGE,)
    assert examine(model.model.language_model).entries == ()
    assert examine(build("llama")).visual_ids == ()


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.share(8)
def test_layers_like_llamas_are_not_run_to_be_heard(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cheaper way to queries and keys is right for them, for partly rotated heads, too; of one
    query in a short prompt, which is rotated beside the keys, as in a long one."""
    specimen = ZOO[name]
    model = specimen.build("sdpa")
    schedule = tp.Schedule(tuple(tp.Stage(cut, 0.5) for cut in specimen.cuts))
    inputs = specimen.batch(model, [(3, "image", 5)])
    mask = inputs.get("image_embeds_position_mask")  # the Kosmos types know no placeholder ids
    mask = None if mask is None else mask.bool()
    exact, asked = projection.ordinary, []
    monkeypatch.setattr(projection, "ordinary", lambda *own: asked.append(own) or exact(*own))
    with (
        torch.no_grad(),
        tp.prune(model, tp.build_strategy("pyramiddrop"), schedule, visual_mask=mask),
    ):
        model(**inputs)
        asked.clear()
        model(**inputs)
    layers = [examine(model).layers[cut] for cut in specimen.cuts]
    assert all(projection._is_ordinary[layer][0] for layer in layers) == (name not in CAPTURED)
    for layer, hidden, rows, named in asked:
        theirs = projection.captured(layer, hidden, rows, named)
        for most in (projection._SHORT, 0):
            monkeypatch.setattr(projection, "_SHORT", most)
            ours = exact(layer, hidden, rows, named)
            torch.testing.assert_close(ours.queries, theirs.queries)
            torch.testing.assert_close(ours.keys, theirs.keys)
        monkeypatch.undo()


def test_one_query_is_rotated_beside_all_keys_where_they_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a long prompt that would take as much memory as the queries of all tokens."""
    from transformers.models.llama import modeling_llama as llama

    model, rotate, turned = build("llava"), llama.apply_rotary_pos_emb, []

    def noted(queries, *others):
        turned.append(queries.shape[2])
        return rotate(queries, *others)

    strategy, schedule = tp.build_strategy("pyramiddrop"), tp.Schedule.one_shot(2, 0.5)
    with torch.no_grad(), tp.prune(model, strategy, schedule):
        inputs = batch(model, ROWS[:1])
        length = model(**inputs).logits.shape[1]
        monkeypatch.setattr(llama, "apply_rotary_pos_emb", noted)
        model(**inputs)
        assert turned[2] > length
        turned.clear()
        monkeypatch.setattr(projection, "_SHORT", 0)
        model(**inputs)
        assert turned[2] == 1


def test_visual_mask() -> None:
    model = build("llava")
    inputs = batch(model, ROWS)
    assert torch.equal(tp.visual_mask(model, inputs["input_ids"]), inputs["input_ids"] == IMAGE)


def traced_places(model, rows):
    with torch.no_grad(), tp.prune(model, tp.build_strategy("uniform"), tp.Schedule()) as trace:
        model(**batch(model, rows))
    return trace.places


def test_llava_places() -> None:
    none, two = traced_places(build("llava"), [ROWS[1], ROWS[2]])
    assert none.shape == (0, 4)
    assert two[:, 0].tolist() == [0] * 16 + [1] * 16
    assert two[:16, 2].tolist() == [r for r in range(4) for _ in range(4)]
    assert two[16:, 3].tolist() == list(range(4)) * 4


@pytest.mark.parametrize("size", [(30, 60), (50, 20), (64, 64), (40, 41), (64, 10), (11, 64)])
def test_llava_next_places(size: tuple[int, int]) -> None:
    model = build("llava_next")
    _height, _width = size
    pinpoints = model.config.image_grid_pinpoints
    from transformers.image_processing_utils import select_best_resolution

    tall, wide = select_best_resolution(size, pinpoints)
    tiles = 1 + (tall // 32) * (wide // 32)
    # Features that say where they come from: the tower gives tile, row and column.
    features = torch.zeros(tiles, 16, 3)
    features[..., 0] = torch.arange(tiles)[:, None]
    features[..., 1] = torch.arange(4).repeat_interleave(4)
    features[..., 2] = torch.arange(4).repeat(4)
    newline = torch.full((3,), -1.0)
    (packed,), _ = model.model.pack_image_features(
        [features], torch.tensor([size]), "default", image_newline=newline
    )
    from tokenprune.families.adapter import Run
    from tokenprune.families.places import places

    anatomy, runs = examine(model), [[Run(len(packed), False)]]
    sizes = {"image_sizes": torch.tensor([size])}
    (found,) = places(anatomy.adapter.layout, anatomy.config, sizes, runs)
    base, mosaic = found[found[:, 1] == 0], found[found[:, 1] == 1]
    assert len(base) == 16
    columns = int(mosaic[:, 3].max())
    tiles_wide = wide // 32
    top = left = None
    for (tile, row, column), place in zip(packed[16:].tolist(), mosaic.tolist(), strict=True):
        if tile == -1:
            assert place[3] == columns  # newline tokens end each row of the mosaic
            continue
        full_row = (int(tile) - 1) // tiles_wide * 4 + int(row)
        full_column = (int(tile) - 1) % tiles_wide * 4 + int(column)
        if top is None:
            top, left = full_row, full_column
        assert place[2:] == [full_row - top, full_column - left]


def test_places_are_known_in_generation_too() -> None:
    model = build("llava_next")
    rows = [ROWS[1], ROWS[2], ROWS[3]]
    with tp.prune(model, tp.build_strategy("uniform"), tp.Schedule.one_shot(2, 0.5)) as trace:
        model.generate(**batch(model, rows), max_new_tokens=2, do_sample=False)
    for ours, expected in zip(trace.places, traced_places(model, rows), strict=True):
        assert torch.equal(ours, expected)
        assert (ours[:, 1] >= 0).all()


def test_unknown_grids_count_runs_as_images() -> None:
    model = build("llama")
    inputs = batch(model, [Row([2, (1, 1), 3, (1, 1)])])
    with torch.no_grad(), tp.prune(model, tp.build_strategy("uniform"), tp.Schedule()) as trace:
        model(**inputs)
    (places,) = trace.places
    assert places[:, 0].tolist() == [0] * 16 + [1] * 16
    assert (places[:, 1:] == -1).all()


def test_register_adapter() -> None:
    with pytest.raises(ValueError, match="expected a new model type, got 'llava'"):
        tp.register_adapter("llava", tp.Adapter())


def test_models_without_a_usable_decoder_are_refused() -> None:
    class Config:
        model_type = "odd"

        def get_text_config(self, decoder):
            return self

    class Odd(nn.Module):
        config = Config()

        def get_decoder(self):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"expected a decoder with attention layers .* register"):
        examine(Odd())
