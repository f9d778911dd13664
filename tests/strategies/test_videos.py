"""What methods for videos keep of videos whose pixels are known, on all types that see them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from zoo import ZOO
from zoo.checks import forward
from zoo.specimen import VIDEO

import tokenprune as tp
from tokenprune.families.adapter import adapter_of

WITH_VIDEOS = [
    name
    for name, specimen in ZOO.items()
    if "video" in specimen.pictures and adapter_of(name).layout is not None
]
#: Types that are given frames as images, and one that sees a video as a whole.
AS_IMAGES = ("internvl", "smolvlm")
WITH_FRAMES = [name for name in WITH_VIDEOS if name not in (*AS_IMAGES, "kimi_k25")]
pytestmark = pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair


def kept(model, inputs: dict[str, Tensor], strategy: tp.PruningStrategy, keep: float) -> Tensor:
    """Places of the tokens kept of the first row."""
    with tp.prune(model, strategy, tp.Schedule.one_shot(0, keep)) as trace:
        forward(model, inputs)
    places: Tensor = trace.places[0][trace.stages[0].kept[0]]
    return places


@pytest.mark.parametrize("model_type", [*WITH_FRAMES, *AS_IMAGES])
@pytest.mark.share(6)
def test_evs_keeps_the_first_frame_and_then_what_has_changed(model_type: str) -> None:
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    images = model_type in AS_IMAGES
    prompt = (2, "image", "image", "image", 4) if images else (2, "video", 4)
    inputs = specimen.batch(model, (prompt,))
    pixels = inputs["pixel_values" if images else "pixel_values_videos"]
    strategy = tp.build_strategy("evs", frames="images" if images else "grids")
    pixels.fill_(0.3)
    places = kept(model, inputs, strategy, 1.0)
    frames = places[:, 0 if images else 1]
    last, size = int(frames.max()), int((frames == 0).sum())
    no_frame = int((frames < 0).sum())
    assert last > 0
    first = kept(model, inputs, strategy, (size + no_frame) / len(frames))
    assert (first == places[(frames <= 0)]).all()
    pixels.view(-1)[-pixels.numel() // (4 * (last + 1)) :] = -0.9  # at the end of the last frame
    more = kept(model, inputs, strategy, (size + no_frame + 1) / len(frames))
    assert set(more[:, 0 if images else 1].tolist()) - {-1} == {0, last}


@dataclass(frozen=True)
class Told(tp.ScoreStrategy):
    """Notes which tokens are said to be of videos."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def needs(self) -> tuple[tp.Need, ...]:
        return (tp.Videos(),)

    def score(self, view: tp.TokenView) -> Tensor:
        self.seen.append(view.of_videos)
        return -view.positions.float()


@pytest.mark.parametrize("model_type", WITH_FRAMES)
@pytest.mark.share(6)
def test_tokens_of_videos_are_told_from_those_of_images(model_type: str) -> None:
    """At the first cut and at a later one, which has dropped the last tokens."""
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    prompts = ((1, "video", 2, "image", 3), (4, "image", 1), (5,), (3, "video", 1))
    inputs, strategy = specimen.batch(model, prompts), Told()
    with tp.prune(model, strategy, tp.Schedule.pyramid(layers=[3, 5], lam=0.6)) as trace:
        forward(model, inputs)
    expected = []
    marks = tp.visual_mask(model, inputs["input_ids"])
    for ids, visual in zip(inputs["input_ids"], marks, strict=True):
        expected.append((ids == VIDEO)[visual])
    assert any(own.any() for own in expected)
    first, later = strategy.seen
    for row, own in enumerate(expected):
        assert torch.equal(first[row, : len(own)], own)
        kept = trace.stages[0].kept[row]
        assert torch.equal(later[row, : len(kept)], own[kept])


def test_a_call_of_videos_alone_says_so_by_their_sizes() -> None:
    """Where ids cannot tell them: embeddings are given."""
    specimen = ZOO["qwen2_vl"]
    model = specimen.build("sdpa")
    for prompt, is_video in (((2, "video", 4), True), ((2, "image", 4), False)):
        inputs = specimen.batch(model, (prompt,))
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
        strategy = Told()
        mask = tp.visual_mask(model, ids)
        with tp.prune(model, strategy, tp.Schedule.one_shot(2, 0.5), visual_mask=mask):
            forward(model, inputs)
        assert strategy.seen[0].all() if is_video else not strategy.seen[0].any()
