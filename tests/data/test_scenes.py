"""Generated scenes and their questions."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tokenprune.data import SceneDataset
from tokenprune.data.scenes import COLOURS, KINDS, SYMBOLS


def test_scenes_are_the_same_for_the_same_seed_split_and_index():
    first, second = (SceneDataset("test", 40, seed=3)[17] for _ in range(2))
    assert first.turns == second.turns
    assert first.id == second.id
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.mode == "RGB"


def test_splits_and_seeds_have_no_scene_in_common():
    streams = [("train", 0), ("validation", 0), ("test", 0), ("test", 1)]
    scenes = [SceneDataset(split, 300, seed=seed) for split, seed in streams]
    shown = [{str(own.scene(index)) for index in range(300)} for own in scenes]
    assert len(set().union(*shown)) == sum(map(len, shown)) == 1200


def _answer(question: str, scene) -> str:
    """Answers a question from the description of its scene, without the generator's help."""
    by_symbol = {item.symbol: item for item in scene.items}
    by_colour = {item.colour: item for item in scene.items}
    if match := re.fullmatch(r"Which symbol is (\w+)\?", question):
        return by_colour[match[1]].symbol
    if match := re.fullmatch(r"Which colour is (\w+)\?", question):
        return by_symbol[match[1]].colour
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        found = any((item.colour, item.symbol) == match.groups() for item in scene.items)
        return "yes" if found else "no"
    if match := re.fullmatch(r"Is (\w+) (left of|above) (\w+)\?", question):
        a, b = by_colour[match[1]], by_colour[match[3]]
        holds = a.column < b.column if match[2] == "left of" else a.row < b.row
        return "yes" if holds else "no"
    assert question == "What does the sign say?"
    return " ".join(scene.signs[0].text)


@pytest.mark.parametrize("num_turns", [1, 7])
def test_answers_agree_with_the_scene(num_turns):
    scenes = SceneDataset("train", 400, num_turns=num_turns)
    for index in range(400):
        scene, questions = scenes.scene(index)
        assert len(questions) == num_turns
        for question in questions:
            assert question.turn.answer == _answer(question.turn.question, scene)
        symbols = [item.symbol for item in scene.items]
        colours = [item.colour for item in scene.items]
        assert len(set(symbols)) == len(symbols)
        assert len(set(colours)) == len(colours)
        assert set(symbols) <= set(SYMBOLS)
        assert set(colours) <= set(COLOURS)


def test_kinds_and_answers_are_balanced():
    scenes = SceneDataset("test", 2000)
    turns = [scenes.scene(index)[1][0].turn for index in range(2000)]
    assert Counter(turn.kind for turn in turns) == dict.fromkeys(KINDS, 400)
    for kind in ("exist", "relation"):
        share = sum(turn.answer == "yes" for turn in turns if turn.kind == kind) / 400
        assert 0.42 < share < 0.58
    for kind, answers in (("read", SYMBOLS), ("colour", COLOURS)):
        counts = Counter(turn.answer for turn in turns if turn.kind == kind)
        assert set(counts) == set(answers)
        assert max(counts.values()) < 3 * 400 / len(answers)


def test_colours_of_objects_can_be_seen_where_the_scene_says():
    scenes = SceneDataset("test", 5)
    for index in range(5):
        scene, _ = scenes.scene(index)
        image = scenes[index].image
        for item in scene.items:
            box = (item.column * 16, item.row * 16, item.column * 16 + 16, item.row * 16 + 16)
            pixels = list(image.crop(box).get_flattened_data())
            near = [
                all(abs(a - b) <= 14 for a, b in zip(pixel, COLOURS[item.colour], strict=True))
                for pixel in pixels
            ]
            assert sum(near) >= 4, (index, item)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "SceneDataset.split: expected one of .*'test'.*, got 'dev'. Each"),
        ({"num_samples": "forty"}, "SceneDataset.num_samples: expected an integer, got 'forty'"),
        ({"seed": 1.5}, "SceneDataset.seed: expected an integer, got 1.5"),
        ({"num_samples": 0}, "expected num_samples and num_turns >= 1, got 0 and 1. Ask"),
        ({"min_objects": 9}, "max_objects <= 8 .*, got 9 and 8. Change"),
        ({"kinds": ["count"]}, r"expected some of .*, got \['count'\]. Name"),
    ],
)
def test_bad_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(**({"split": "test", "num_samples": 3} | arguments))
