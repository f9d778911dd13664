"""The larger model that ships with the package: what it answers, and that pruning shows on it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp
from tokenprune.data.collate import PromptCollator
from tokenprune.data.scenes import SceneDataset
from tokenprune.runs.budgets import known_model
from tokenprune.runs.models import SHIPPED

NUM_SCENES = 48  # six of each kind


@pytest.fixture(scope="module")
def small():
    folder = SHIPPED["small"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def right(small, *pruning) -> float:
    """Share of exact answers on unseen scenes."""
    model, processor = small
    scenes, collate = SceneDataset("test", NUM_SCENES, level="hard"), PromptCollator(processor)
    handle = tp.attach(model, *pruning) if pruning else None
    hits = 0
    for start in range(0, NUM_SCENES, 24):
        batch = collate([scenes[i] for i in range(start, start + 24)])
        with torch.no_grad():
            output = model.generate(**batch["inputs"], max_new_tokens=8, do_sample=False)
        new = output[:, batch["inputs"]["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        for sample, text in zip(batch["samples"], texts, strict=True):
            hits += text.strip() == sample.turns[0].answer
    if handle is not None:
        handle.remove()
    return hits / NUM_SCENES


def test_size_and_shape(small) -> None:
    model, processor = small
    (weights,) = SHIPPED["small"].glob("*.safetensors")
    assert weights.stat().st_size < 8e6
    batch = PromptCollator(processor)([SceneDataset("test", 1, level="hard")[0]])
    assert tp.visual_mask(model, batch["inputs"]["input_ids"]).sum() == 576
    shape, num_visual = known_model("small")
    assert (shape.num_layers, num_visual) == (model.config.text_config.num_hidden_layers, 576)


@pytest.mark.parametrize(
    ("strategy", "low", "high"),
    [
        (None, 0.85, 1.0),  # 97 % of 2 000
        ("random", 0.0, 0.7),  # an eighth of the tokens
    ],
)
def test_it_answers_and_needs_its_tokens(small, strategy, low, high) -> None:
    pruning = (tp.build_strategy(strategy), tp.Schedule.one_shot(0, 0.125)) if strategy else ()
    assert low <= right(small, *pruning) <= high
