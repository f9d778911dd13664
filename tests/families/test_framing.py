"""Which part of an image its grids lie on, held to the image processors of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compatibility import exists
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from zoo import ZOO
from zoo.checks import forward

import tokenprune as tp
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.families.adapter import adapter_of
from tokenprune.report import pictures

FRAMED = [name for name in ZOO if exists(ZOO[name]) and adapter_of(name).framing is not None]
#: Width and height.
SIZES = [(300, 200), (150, 460)]

pytestmark = pytest.mark.filterwarnings("ignore")  # processors warn of much that is their affair


def processor_of(model_type: str) -> Any:
    """The type's image processor with its class's own settings; None where there is none here."""
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or ()
    names = named.values() if isinstance(named, dict) else named
    for name in [names] if isinstance(names, str) else names:
        try:
            return getattr(transformers, name)()
        except (AttributeError, ImportError, TypeError):  # of a library that is not installed
            continue
    return None


def picture(width: int, height: int, of: str) -> Image.Image:
    """Black, white, or brighter from left to right (`"x"`) or from top to bottom (`"y"`)."""
    x, y = torch.linspace(0, 255, width).expand(height, -1), torch.linspace(0, 255, height)
    values = {"black": x * 0, "white": x * 0 + 255, "x": x, "y": y[:, None].expand(-1, width)}[of]
    return Image.fromarray(values.round().byte().numpy()).convert("RGB")


def pixels(processor: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of what a processor makes of an image: which is no padding, and from where it is, 0 to 1."""
    found = {}
    for of in ("black", "white", "x", "y"):
        given = processor(images=[picture(*size, of)], return_tensors="pt")
        values = given.get("pixel_values", given.get("pixel_values_images"))
        values = values if isinstance(values, Tensor) else values[0]
        if values.dim() == 5:  # the first tile is the whole image
            values = values[:, 0]
        if "image_position_ids" in given:  # tables of patches are filled up
            values = values[(given["image_position_ids"] >= 0).all(-1)]
        found[of] = values
    span = found["white"] - found["black"]
    real = span.abs() > 1e-3
    own = [(found[of] - found["black"]) / span.where(real, torch.ones(())) for of in ("x", "y")]
    return real, own[0], own[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model_type", FRAMED)
@pytest.mark.share(6)
def test_grids_lie_where_the_processor_takes_pixels_from(model_type, size) -> None:
    processor = processor_of(model_type)
    if processor is None:
        pytest.skip(f"no image processor of {model_type} without further libraries")
    real, x, y = pixels(processor, size)
    framing = adapter_of(model_type).framing
    shown = [(0.0, 1.0), (0.0, 1.0)]
    if framing == "centre":
        half = min(size) / max(size) / 2
        shown[size[1] > size[0]] = (0.5 - half, 0.5 + half)
    for own, (low, high) in zip((x, y), shown, strict=True):
        assert own[real].min() == pytest.approx(low, abs=0.02)
        assert own[real].max() == pytest.approx(high, abs=0.02)
    if framing != "padded":
        assert real.all()
        return
    (side, _) = real.shape[-2:]
    thick = round(side * min(size) / max(size))
    rest = (side - thick) // 2
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[rest : rest + thick] = True
    expected = expected if size[0] > size[1] else expected.T
    assert (real != expected).float().mean() < 0.02  # a few rows of pixels more or less


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model_type", ["llava", "deepseek_vl", "janus", "chameleon"])
def test_pictures_show_what_the_processor_does(model_type, size) -> None:
    """What is drawn beneath a grid, made as large, is what the model is shown."""
    processor = processor_of(model_type)
    real, x, y = pixels(processor, size)
    framing = adapter_of(model_type).framing
    for of, theirs in (("x", x), ("y", y)):
        drawn = pictures.seen(picture(*size, of), [(8, 8)], framing)
        drawn = drawn.convert("L").resize(theirs.shape[:-3:-1], Image.Resampling.BILINEAR)
        ours = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
        ours = ours.view(theirs.shape[-2:]).float() / 255
        is_real = real[0, 0]
        assert (ours - theirs[0, 0])[is_real].abs().quantile(0.98) < 0.02


@pytest.mark.parametrize("model_type", ["llava_next", "hunyuan_vl", "emu3"])
def test_newlines_are_no_column_of_a_picture(model_type) -> None:
    """Drawn as one they would push all patches of a row aside."""
    model = ZOO[model_type].build("sdpa")
    with tp.prune(model, tp.build_strategy("random"), tp.Schedule()) as trace:
        forward(model, ZOO[model_type].batch(model))
    kept = kept_tokens(trace, 0, len(trace.places[0]))
    number = adapter_of(model_type).newlines[0]
    places = [own for own in kept["places"] if own[:2] == [0, number]]
    rows, columns = kept["grids"][number]
    assert [own[2:] for own in places] == [
        [row, column if column < columns else -1]
        for row in range(rows)
        for column in range(columns + 1)
    ]
    image = Image.new("RGB", (90, 60))
    pictures.panels(image, kept["grids"], kept["places"], [(0, range(len(kept["places"])))])
