"""Where each visual token sits in its image, held to what the model makes it of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compatibility import exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import PROMPTS, ZOO, Prompt, Specimen
from zoo.checks import forward, generate
from zoo.pixels import expected, made_of
from zoo.specimen import IMAGE, VIDEO, Picture, pixels

import tokenprune as tp
from tokenprune.families.adapter import Run, adapter_of
from tokenprune.families.anatomy import examine
from tokenprune.families.places import find_runs, in_order, of_shapes, places

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
@pytest.mark.share(4)
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
@pytest.mark.share(4)
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
            if "beams" not in specimen.unable:
                generate(model, inputs, max_new_tokens=1, num_beams=2)
                beams = [own.tolist() for own in trace.places]
                assert beams == [own for own in expected for _ in range(2)]


@pytest.mark.parametrize("model_type", WITH_VIDEOS)
@pytest.mark.share(4)
def test_rows_have_the_places_that_they_have_alone(model_type: str) -> None:
    specimen = ZOO[model_type]
    model, prompts = specimen.build("sdpa"), [*MIXED, *PROMPTS]
    together = traced(model, specimen.batch(model, prompts))
    for prompt, found in zip(prompts, together, strict=True):
        assert traced(model, specimen.batch(model, [prompt])) == [found]


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "qwen2_5_vl", "mistral3"])
def test_a_part_of_an_image_has_no_grid(model_type: str) -> None:
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    inputs, shown = specimen.batch(model, [(3, "image", 5)]), []
    strategy = tp.build_strategy("random")
    with tp.prune(model, strategy, tp.Schedule()) as trace:
        for module in (model.get_decoder(),):
            module.register_forward_hook(lambda *_: shown.append(trace))
        generate(model, inputs, max_new_tokens=1, prefill_chunk_size=6)
    assert shown
    assert all((own[:, 1:] == -1).all() for own in trace.places)
