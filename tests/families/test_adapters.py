"""What the adapters know of a family."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, NUM_LAYERS, ROWS, Row, batch, build
from torch import nn

import tokenprune as tp
from tokenprune.families.anatomy import examine


def test_anatomy() -> None:
    model = build("llava")
    anatomy = examine(model)
    assert anatomy.decoder is model.model.language_model
    assert anatomy.entries == (model, model.model)
    assert len(anatomy.layers) == NUM_LAYERS
    assert anatomy.visual_ids == (IMAGE,)
    assert examine(model.model.language_model).entries == ()
    assert examine(build("llama")).visual_ids == ()


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
