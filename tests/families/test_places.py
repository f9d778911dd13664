"""Where each visual token sits in its image, held to what the model makes it of."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compatibility import exists
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution
from zoo import PROMPTS, ZOO, Prompt, Specimen
from zoo.checks import forward, generate
from zoo.pixels import expected, made_of
from zoo.specimen import IMAGE, Picture, pixels

import tokenprune as tp
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.families.adapter import Run, adapter_of
from tokenprune.families.places import find_runs, in_order, of_shapes

#: Types whose grids are known, by a tower or convolutions that show of which pixels a token is.
KNOWN = [
    name
    for name in ZOO
    if exists(ZOO[name])
    and adapter_of(name if name != "mistral4" else "mistral3").layout is not None
    and name not in ("emu3", "chameleon")
]
WITH_VIDEOS = [name for name in KNOWN if "video" in ZOO[name].pictures]
MIXED: tuple[Prompt, ...] = (
    (1, "video", 2, "image", 3),
    (4, "image", 1),
    (2, "image", 1, "video", 2),
    (5,),
    (3, "video", 1),
)
#: Types whose images are of many sizes; a GLM's, in the zoo, are alike.
SIZED = [
    *(name for name in KNOWN if name.startswith(("qwen", "ernie", "kimi", "muse", "minimax"))),
    *("paddleocr_vl", "hunyuan_vl", "cohere_compass", "cosmos3_edge", "exaone4_5"),
    *("hyperclovax_vision_v2", "mistral3", "lighton_ocr"),
]

pytestmark = pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair


def traced(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[list[list[int]]]:
    with tp.prune(model, tp.build_strategy("random"), tp.Schedule()) as trace:
        forward(model, inputs)
    return [own.tolist() for own in trace.places]


def hold(specimen: Specimen, model: PreTrainedModel, prompts: Any, side: str = "left") -> None:
    """Places of a batch are those of the pixels."""
    inputs = specimen.batch(model, prompts, side)
    made, found = made_of(model, inputs), traced(model, inputs)
    for row, prompt in enumerate(prompts):
        assert found[row] == expected(specimen, model, made[row], prompt)


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.share(7)
def test_places_are_those_of_the_pixels(model_type: str) -> None:
    specimen = ZOO[model_type]
    hold(specimen, specimen.build("sdpa"), PROMPTS)


@pytest.mark.parametrize("model_type", WITH_VIDEOS)
@pytest.mark.share(6)
def test_places_in_videos_beside_images_are_those_of_the_pixels(model_type: str) -> None:
    specimen = ZOO[model_type]
    hold(specimen, specimen.build("sdpa"), MIXED, "right")


def sized(specimen: Specimen) -> Specimen:
    """The same type with images of drawn sizes."""

    def image(model: Any, own: torch.Generator) -> Picture:
        given = specimen.pictures["image"](model, own)
        rows, columns = (2 * torch.randint(1, 4, (2,), generator=own)).tolist()
        if "image_grid_thw" in given.inputs:
            shape = rows * columns, *given.inputs["pixel_values"].shape[1:]
            sizes = {"image_grid_thw": torch.tensor([[1, rows, columns]])}
        else:
            shape = 1, 3, 24, 24
            sizes = {"image_sizes": torch.tensor([[4 * rows, 4 * columns]])}
        newlines = rows // 2 + 2 if specimen.model_type == "hunyuan_vl" else 0
        first, last = (own if own != IMAGE else 109 for own in (given.ids[0], given.ids[-1]))
        ids = [first, *[IMAGE] * (rows * columns // 4 + newlines), last]
        return Picture(ids, given.inputs | {"pixel_values": pixels(own, *shape)} | sizes)

    return replace(specimen, pictures=specimen.pictures | {"image": image})


@pytest.mark.parametrize("model_type", SIZED)
@pytest.mark.share(6)
def test_places_in_images_of_many_sizes_are_those_of_the_pixels(model_type: str) -> None:
    specimen = sized(ZOO[model_type])
    model = specimen.build("sdpa")
    hold(specimen, model, PROMPTS)
    if model_type in WITH_VIDEOS:
        hold(specimen, model, MIXED)


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.share(7)
def test_places_in_generation_are_those_of_a_forward_pass(model_type: str) -> None:
    """In transformers 5.23 `generate` encodes images ahead, and the call shows no sizes."""
    specimen = sized(ZOO[model_type]) if model_type in SIZED else ZOO[model_type]
    model = specimen.build("sdpa")
    for prompts in (PROMPTS, *([MIXED] if model_type in WITH_VIDEOS else [])):
        inputs = specimen.batch(model, prompts)
        expected = traced(model, inputs)
        assert any(place[1] >= 0 for own in expected for place in own)
        with tp.prune(model, tp.build_strategy("random"), tp.Schedule()) as trace:
            generate(model, inputs, max_new_tokens=2)
            assert [own.tolist() for own in trace.places] == expected
            # transformers finds no videos to repeat where some of their tokens are left out.
            if "beams" not in specimen.unable and model_type != "video_llama_3":
                generate(model, inputs, max_new_tokens=1, num_beams=2)
                beams = [own.tolist() for own in trace.places]
                assert beams == [own for own in expected for _ in range(2)]


def test_one_of_several_images_stays_whole_in_llava_onevision() -> None:
    """Its newline, after the last row alone, is in no grid."""

    def image(model: Any, own: torch.Generator) -> Picture:
        sizes = {"image_sizes": torch.tensor([[16, 32]])}
        return Picture([IMAGE] * 5, {"pixel_values": pixels(own, 1, 1, 3, 16, 16)} | sizes)

    given = ZOO["llava_onevision"]
    specimen = replace(
        given,
        pictures=given.pictures | {"image": image},
        extras=lambda model, inputs: {"batch_num_images": torch.tensor([2])},
    )
    model, prompts = specimen.build("sdpa"), [(2, "image", 3, "image", 1)]
    hold(specimen, model, prompts)
    (own,) = traced(model, specimen.batch(model, prompts))
    assert own[4:6] == [[0, -1, -1, -1], [1, 0, 0, 0]]


@pytest.mark.parametrize("model_type", WITH_VIDEOS)
@pytest.mark.share(6)
def test_rows_have_the_places_that_they_have_alone(model_type: str) -> None:
    specimen = ZOO[model_type]
    model, prompts = specimen.build("sdpa"), [*MIXED, *PROMPTS]
    together = traced(model, specimen.batch(model, prompts))
    for prompt, found in zip(prompts, together, strict=True):
        assert traced(model, specimen.batch(model, [prompt])) == [found]


def test_a_part_of_an_image_has_no_grid() -> None:
    """Nor has an image whose size nobody says, where images are of many."""
    for model_type, length in (("llava", 10), ("llava", 22), ("llava_next", 14), ("qwen2_5_vl", 6)):
        model = ZOO[model_type].build("sdpa")
        embeds = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(1, 30, dtype=torch.bool)
        mask[:, 2 : 2 + length] = True
        with tp.prune(model, tp.build_strategy("random"), tp.Schedule()) as trace:
            forward(model, {"inputs_embeds": embeds, "visual_mask": mask})
        assert trace.places[0].tolist() == [[0, -1, -1, -1]] * length


IMAGES, VIDEOS = [of_shapes([(1, 2)]), of_shapes([(2, 2)])], [of_shapes([(1, 3)] * 2)]


@pytest.mark.parametrize(
    ("runs", "numbers"),
    [
        ([[Run(2, False), Run(4, False), Run(6, True)]], [[0] * 2 + [1] * 4 + [2] * 6]),
        ([[Run(3, True), Run(2, False), Run(3, True)], [Run(4, False)]],
         [[0] * 3 + [1] * 2 + [0] * 3, [0] * 4]),
        ([[Run(6, False), Run(6, True)]] * 2, [[0] * 2 + [1] * 4 + [2] * 6] * 2),  # repeated
        ([[Run(6, False)], [Run(6, True)]], [[0] * 2 + [1] * 4, [0] * 6]),
        ([[Run(6), Run(6)]], None),  # of which kind?
        ([[Run(2, False), Run(4, False)]], None),  # where is the video?
        ([[Run(2, False), Run(4, False), Run(5, True)]], None),
        ([[Run(2, False), Run(4, False), Run(6, True), Run(2, False)]], None),
        ([[Run(3, False), Run(6, True)], [Run(3, False)]], None),  # an image in two rows
        ([[Run(2, False), Run(4, True)], [Run(4, False), Run(2, True)]], None),
        ([[Run(6, False), Run(6, True)], [Run(6, True), Run(6, False)]], None),
    ],
)  # fmt: skip
def test_images_and_videos_are_handed_out_in_order(runs, numbers) -> None:
    found = in_order(IMAGES, VIDEOS, runs)
    assert (found and [own[:, 0].tolist() for own in found]) == numbers


def test_runs_are_of_one_kind_and_without_text() -> None:
    visual = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool().numpy()
    video = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool().numpy()
    assert find_runs(visual, video) == [[(1, False), (2, True), (1, False)], []]
    assert find_runs(visual) == [[(3, None), (1, None)], []]


def test_queries_of_a_window_sit_where_the_patches_do_that_they_begin_as() -> None:
    """Granite Vision's: of 2 x 2 in a window of 4 x 4 patches, each reads all of the window."""
    given = ZOO["granite4_vision"]

    def config() -> Any:
        made = given.config()
        made.downsample_rate, made.image_grid_pinpoints = "2/4", [[64, 64]]
        made.vision_config.image_size = 32
        return made

    def image(model: Any, own: torch.Generator) -> Picture:
        # Of the mosaic's 8 rows one falls away at each end.
        inputs = {"pixel_values": pixels(own, 1, 5, 3, 32, 32)}
        inputs["image_sizes"] = torch.tensor([[48, 64]])
        return Picture([IMAGE] * (16 + 6 * 9), inputs)

    specimen = replace(given, config=config, pictures={"image": image})
    model, prompts = specimen.build("sdpa"), [(2, "image", 3)]
    hold(specimen, model, prompts)
    inputs = specimen.batch(model, prompts)
    (begins,), (reads,) = made_of(model, inputs), made_of(model, inputs, within=True)
    for own, seen in zip(begins[:16], reads[:16], strict=True):
        for begun, read in zip(own[1:], seen[1:], strict=True):
            first = min(begun) // 4 * 4
            assert begun == {min(begun), min(begun) + 1}
            assert read == {*range(first, first + 4)}


def test_a_mosaic_that_is_shrunk_has_the_places_of_what_it_is_shrunk_to() -> None:
    """LLaVA-OneVision's own packing, of rows and columns instead of features."""
    config = ZOO["llava_onevision"].config()
    config.image_grid_pinpoints = [[48, 48], [16, 64], [64, 16], [32, 64]]
    config.vision_aspect_ratio = "anyres_max_2"
    model = ZOO["llava_onevision"].build("sdpa").model
    model.config = config
    layout, shrunk = adapter_of("llava_onevision").layout, 0
    for size in ((40, 41), (20, 60), (64, 10), (11, 64), (48, 48), (30, 47), (33, 17)):
        tall, wide = select_best_resolution(size, config.image_grid_pinpoints)
        tiles = 1 + tall // 16 * (wide // 16)
        spots = torch.zeros(tiles, 2, 2, 2)
        spots[1:, ..., 0] = (torch.arange(tiles - 1) // (wide // 16) * 2)[:, None, None]
        spots[1:, ..., 1] = (torch.arange(tiles - 1) % (wide // 16) * 2)[:, None, None]
        spots += torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"), -1)
        (packed,), _ = model.pack_image_features(
            [spots.flatten(1, 2)],
            torch.tensor([size]),
            image_newline=torch.full((2,), -1.0),
            vision_aspect_ratio=config.vision_aspect_ratio,
        )
        (found,) = layout(
            config, {"image_sizes": torch.tensor([size])}, [[Run(len(packed), False)]]
        )
        mosaic, places = packed[4:], found[4:]
        is_patch = mosaic[:, 0] >= 0
        for axis in (0, 1):
            _, rank = mosaic[is_patch][:, axis].unique(return_inverse=True)
            assert torch.equal(rank, places[is_patch][:, 2 + axis])
        assert (places[~is_patch][:, 3] == places[:, 3].max()).all()
        assert places[~is_patch][:, 2].tolist() == list(range(int((~is_patch).sum())))
        shrunk += len(mosaic) < tall // 8 * (wide // 8)
    assert shrunk > 2


def test_codes_are_in_raster_order_with_a_token_after_each_row() -> None:
    model = ZOO["emu3"].build("sdpa")
    (own, _, _, _) = traced(model, ZOO["emu3"].batch(model))
    assert own == [[0, 0, row, column] for row in range(2) for column in range(4)]
    model = ZOO["chameleon"].build("sdpa")
    (own, _, two, _) = traced(model, ZOO["chameleon"].batch(model))
    assert own == [[0, 0, row, column] for row in range(4) for column in range(4)]
    assert two[16:] == [[1, *place[1:]] for place in own]


def test_images_of_many_sizes_are_no_tiles() -> None:
    """LLaVA with a tower that takes any size: Pixtral's calls say them, others' do not."""
    layout, runs = adapter_of("llava").layout, [[Run(24), Run(4)]]
    vision = SimpleNamespace(model_type="pixtral", image_size=1024, patch_size=16)
    config = SimpleNamespace(vision_config=vision)
    (own,) = layout(config, {"image_sizes": torch.tensor([[64, 96], [32, 32]])}, runs)
    assert torch.equal(own[:, 0], torch.arange(2).repeat_interleave(torch.tensor([24, 4])))
    assert own[23].tolist() == [0, 0, 3, 5]
    assert layout(config, {}, runs) is None
    for size in (None, [32, 64]):
        config.vision_config = SimpleNamespace(model_type="timm", image_size=size, patch_size=16)
        (own,) = layout(config, {}, runs)
        assert (own[:, 1:] == -1).all()


def test_pictures_are_of_grids_that_lie_on_the_whole_image() -> None:
    grids = {}
    for model_type in ("llava", "qwen2_5_vl", "internvl"):
        model = ZOO[model_type].build("sdpa")
        with tp.prune(model, tp.build_strategy("random"), tp.Schedule()) as trace:
            forward(model, ZOO[model_type].batch(model))
        kept = kept_tokens(trace, 0, len(trace.places[0]))
        grids[model_type] = kept["framing"], kept["grids"]
    assert grids == {
        "llava": ("centre", [[4, 4]]),
        "qwen2_5_vl": ("whole", [[2, 3]]),
        "internvl": (None, []),
    }
