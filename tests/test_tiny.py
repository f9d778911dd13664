"""The model that ships with the package: small, loadable by transformers, and really trained."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp
from tokenprune.cli.main import main
from tokenprune.data.collate import ConversationCollator, PromptCollator
from tokenprune.data.scenes import SceneDataset
from tokenprune.runs.models import SHIPPED

NUM_SCENES = 120


@pytest.fixture(scope="module")
def tiny():
    folder = SHIPPED["tiny"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def answers(tiny, pruning=None) -> dict[str, float]:
    """Exact match per kind on unseen scenes."""
    model, processor = tiny
    scenes, collate = SceneDataset("test", NUM_SCENES), PromptCollator(processor)
    right = defaultdict(list)
    handle = tp.attach(model, *pruning) if pruning else None
    for start in range(0, NUM_SCENES, 40):
        batch = collate([scenes[i] for i in range(start, start + 40)])
        output = model.generate(**batch["inputs"], max_new_tokens=4, do_sample=False)
        new = output[:, batch["inputs"]["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        for sample, text in zip(batch["samples"], texts, strict=True):
            (turn,) = sample.turns
            right[turn.kind].append(text.strip() == turn.answer)
    if handle is not None:
        handle.remove()
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def test_size_and_shape(tiny) -> None:
    model, processor = tiny
    weights = list(SHIPPED["tiny"].glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) < 12e6
    assert not list(SHIPPED["tiny"].glob("*.bin"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.text_config.num_hidden_layers >= 8
    batch = PromptCollator(processor)([SceneDataset("test", 1)[0]])
    assert tp.visual_mask(model, batch["inputs"]["input_ids"]).sum() >= 144


def test_pruning_it_is_exact(capsys) -> None:
    assert main(["verify"]) == 0
    assert "drop = mask, decoding" in capsys.readouterr().out


@pytest.mark.matrix
def test_it_answers_and_pruning_matters(tiny) -> None:
    unpruned = answers(tiny)
    assert all(right >= 0.9 for right in unpruned.values()), unpruned
    harsh = tp.Schedule.one_shot(layer=2, keep=0.1)
    guided = mean(answers(tiny, (tp.build_strategy("pyramiddrop"), harsh)).values())
    chance = mean(answers(tiny, (tp.build_strategy("random"), harsh)).values())
    assert mean(unpruned.values()) > chance + 0.2
    assert guided > chance + 0.2


@pytest.mark.matrix
def test_renumbered_positions_do_not_lose_it(tiny) -> None:
    published = answers(tiny, tp.published("pyramiddrop", num_layers=8))
    assert mean(published.values()) > 0.9, published


def test_it_knows_all_words_of_its_questions_and_answers(tiny, recwarn) -> None:
    _, processor = tiny
    scenes, tokenizer = SceneDataset("test", NUM_SCENES), processor.tokenizer
    inputs = ConversationCollator(processor)([scenes[i] for i in range(NUM_SCENES)])["inputs"]
    assert not (inputs["input_ids"] == tokenizer.unk_token_id).any()
    assert not recwarn
