"""Generated scenes and their questions."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tokenprune.data import SceneDataset
from tokenprune.data.scenes import COLOURS, SYMBOLS, easy, hard


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


def _hard_answer(question: str, scene) -> str:
    """As `_answer`, where colours and symbols may occur several times."""
    words = question.removesuffix("?").split()
    shown = [(item.colour, item.symbol) for item in scene.items]
    times = Counter(colour for colour, _ in shown)
    place = {item.symbol: (item.row, item.column) for item in scene.items}
    match words:
        case ["Which", "symbol", "is", colour]:
            (answer,) = [symbol for own, symbol in shown if own == colour]
        case ["Which", "colour", "is", symbol]:
            (answer,) = [colour for colour, own in shown if own == symbol]
        case ["Is", "there", "a", colour, symbol]:
            answer = "yes" if (colour, symbol) in shown else "no"
        case ["Is", first, *words, second]:
            axis = {"left of": 1, "above": 0}[" ".join(words)]
            for symbol in (first, second):
                assert sum(own == symbol for _, own in shown) == 1
            answer = "yes" if place[first][axis] < place[second][axis] else "no"
        case ["How", "many", "are", colour]:
            answer = ["none", "one", "two", "three", "four", "five", "six"][times[colour]]
        case ["Are", "there", "more", first, "than", second]:
            assert times[first] != times[second]
            answer = "yes" if times[first] > times[second] else "no"
        case ["Which", "symbol", "shares", "colour", "with", symbol]:
            (colour,) = [colour for colour, own in shown if own == symbol]
            (answer,) = [own for other, own in shown if other == colour and own != symbol]
        case _:
            assert question == "What does the sign say?"
            answer = " ".join(scene.signs[0].text)
    return answer


def _cells(scene) -> list[tuple[int, int]]:
    """(row, column) of everything that a question may ask about."""
    items = [(item.row, item.column) for item in scene.items]
    return items + [cell for sign in scene.signs for cell in sign.cells]


def _pixels_near(image, item, cell: int, tolerance: int) -> int:
    """Pixels of an object's cell whose colour is its own, give or take."""
    left, top = item.column * cell, item.row * cell
    pixels = image.crop((left, top, left + cell, top + cell)).get_flattened_data()
    own = COLOURS[item.colour]
    return sum(
        all(abs(a - b) <= tolerance for a, b in zip(pixel, own, strict=True)) for pixel in pixels
    )


@pytest.mark.parametrize("max_alike", [0, 6])
def test_answers_agree_with_hard_scenes(max_alike):
    scenes = SceneDataset("train", 300, num_turns=11, level="hard", max_alike=max_alike)
    lengths = Counter()
    for index in range(300):
        scene, questions = scenes.scene(index)
        cells = _cells(scene)
        assert len(set(cells)) == len(cells)
        assert all(0 <= place < 24 for cell in cells for place in cell)
        assert {question.turn.kind for question in questions} == set(hard.KINDS)
        for question in questions:
            assert question.turn.answer == _hard_answer(question.turn.question, scene)
            assert set(question.cells) <= set(cells)
        lengths[len(scene.items)] += 1
        assert len(scene.signs[0].text) in (4, 5, 6)
    assert set(lengths) == {6} if max_alike == 0 else max(lengths) > 24


def test_evidence_of_hard_questions_is_where_they_say():
    """Two objects for two steps, as many as are counted, all glyphs of a sign."""
    scenes = SceneDataset("test", 400, level="hard")
    for index in range(400):
        _, (question,) = scenes.scene(index)
        number = {"read": 1, "colour": 1, "relation": 2, "steps": 2}.get(question.turn.kind)
        if question.turn.kind == "count":
            number = hard.NUMBERS.index(question.turn.answer)
        if question.turn.kind == "text":
            number = len(question.turn.answer.split())
        assert number is None or len(question.cells) == number, question


def test_hard_kinds_and_answers_are_balanced():
    scenes = SceneDataset("test", 4000, level="hard")
    turns = [scenes.scene(index)[1][0].turn for index in range(4000)]
    assert Counter(turn.kind for turn in turns) == dict.fromkeys(hard.KINDS, 500)
    for kind in ("exist", "relation", "compare"):
        share = sum(turn.answer == "yes" for turn in turns if turn.kind == kind) / 500
        assert 0.42 < share < 0.58, kind
    counts = Counter(turn.answer for turn in turns if turn.kind == "count")
    assert set(counts) == set(hard.NUMBERS)
    assert max(counts.values()) < 0.3 * 500
    for kind in ("read", "steps"):
        counts = Counter(turn.answer for turn in turns if turn.kind == kind)
        assert set(counts) == set(SYMBOLS)


def test_hard_pictures_have_a_patch_for_each_cell():
    """Strokes of small glyphs are hardly a pixel wide: their colours come out mixed."""
    scenes = SceneDataset("test", 3, level="hard")
    for index in range(3):
        scene, _ = scenes.scene(index)
        image = scenes[index].image
        assert image.size == (336, 336)
        for item in scene.items:
            assert _pixels_near(image, item, 14, 60) >= 3, (index, item)
    assert scenes[0].id != SceneDataset("test", 3)[0].id


def test_kinds_and_answers_are_balanced():
    scenes = SceneDataset("test", 2000)
    turns = [scenes.scene(index)[1][0].turn for index in range(2000)]
    assert Counter(turn.kind for turn in turns) == dict.fromkeys(easy.KINDS, 400)
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
            assert _pixels_near(image, item, 16, 14) >= 4, (index, item)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "SceneDataset.split: expected one of .*'test'.*, got 'dev'. Each"),
        ({"num_samples": "forty"}, "SceneDataset.num_samples: expected an integer, got 'forty'"),
        ({"seed": 1.5}, "SceneDataset.seed: expected an integer, got 1.5"),
        ({"num_samples": 0}, "expected num_samples and num_turns >= 1, got 0 and 1. Ask"),
        ({"min_objects": 9}, "max_objects <= 8 .*, got 9 and 8. Change"),
        ({"kinds": ["count"]}, r"expected some of .*, got \['count'\]. Name"),
        ({"level": "harder"}, "SceneDataset.level: expected one of .*'hard'.*, got 'harder'. Each"),
        ({"level": "hard", "max_alike": 7}, "expected 0 <= max_alike <= 6, got 7. Answers"),
        ({"level": "hard", "min_objects": 3}, "min_objects: expected none at level=hard, got 3"),
        ({"max_alike": 3}, "max_alike: expected none at level=easy, got 3"),
    ],
)
def test_bad_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(**({"split": "test", "num_samples": 3} | arguments))
