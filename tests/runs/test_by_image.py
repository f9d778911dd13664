"""Questions that share an image: by hand, and how often chance is taken for a finding."""

from __future__ import annotations

import numpy as np
import pytest

from tokenprune.runs.images import num_images, numbered, share_interval, shared
from tokenprune.runs.paired import compare, sandwich
from tokenprune.runs.proportions import student, wilson
from tokenprune.runs.signs import sign_p


def test_which_questions_share_an_image() -> None:
    assert not shared([])
    assert not shared(["a", "b", None, None])  # of what is not known each stands by itself
    assert shared(["a", None, "a"])
    assert numbered(["a", None, "b", "a", None]) == [0, 1, 2, 0, 3]
    assert num_images(["a", None, "b", "a"]) == 3
    assert num_images([None, None]) is None


def test_where_each_has_its_own_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    pictures = [str(place) for place in range(80)]
    for seeds in (1, 3):
        first = (rng.random((seeds, 80)) < 0.7).astype(float)
        second = (rng.random((1, 80)) < 0.5).astype(float)
        found = compare(first, second, pictures)
        assert found == compare(first, second) == compare(first, second, [None] * 80)
        assert found.num_images is None
    scores = first[0].tolist()
    assert share_interval(scores, pictures) == wilson(sum(scores), 80) == share_interval(scores)


def test_an_interval_by_image_by_hand() -> None:
    """Of three images of two questions, one all right, one half, one all wrong."""
    scores, pictures = [1.0, 1, 1, 0, 0, 0], ["a", "a", "b", "b", "c", "c"]
    # With one more all right and one all wrong: sums 2 1 0 2 0 of 2 each, about 1 on average:
    # (1 + 0 + 1 + 1 + 1) 5/4 = 5 for 10 questions; independent ones would have 10 / 4.
    assert share_interval(scores, pictures) == wilson(1.5, 3.0, student(2))
    # Wins less losses: 2 0 -1, with 2 and -2 of 10 questions; about 2 (.1) each.
    found = sandwich([2, 2, 2], [2, 0, -1])
    spread = (1.8**2 + 0.2**2 + 1.2**2 + 1.8**2 + 2.2**2) * 5 / 4
    assert (found.mean, found.error) == pytest.approx((0.1, spread**0.5 / 10))
    low, high = found.interval(0.05)
    assert (high - low) / 2 == pytest.approx(student(2) * found.error)


def test_signs_are_those_of_images() -> None:
    first = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 1, 1.0]])
    second = np.array([[0, 0, 0, 0, 0, 0, 1, 0, 1, 1.0]])
    pictures = [*"aaaabbcccd"]
    found = compare(first, second, pictures)
    assert (found.test, found.num_images) == ("permutation by image", 4)
    assert (found.wins, found.losses, found.num_questions) == (6, 1, 10)
    assert found.p == sign_p(np.array([4.0, 2, -1, 0])) == pytest.approx(0.5)
    assert compare(first, second).p == pytest.approx(0.125)  # as if they were independent
    order = np.random.default_rng(0).permutation(10)
    mixed = compare(first[:, order], second[:, order], [pictures[place] for place in order])
    assert mixed.interval() == pytest.approx(found.interval())
    assert mixed.p == found.p
    other = compare(second, first, pictures)
    assert other.interval() == pytest.approx([-end for end in found.interval()[::-1]])


@pytest.mark.parametrize("scores", [[1.0] * 8, [0.0] * 8])
@pytest.mark.parametrize("pictures", [["a"] * 8, [*"aaaabbbb"]])
def test_few_images_that_agree_show_little(scores: list[float], pictures: list[str]) -> None:
    found = compare([scores], [[0.5] * 8], pictures)
    assert found.p >= 0.5
    low, high = found.interval()
    assert low < 0 < high
    low, high = share_interval(scores, pictures)
    own = wilson(sum(scores), 8)
    assert (low, high) != own
    assert low <= own[0] <= own[1] <= high


def alike(rng: np.random.Generator, images: int, each: int, share: float) -> np.ndarray:
    """Right and wrong answers of which those about an image have much in common."""
    chance = rng.beta(share / 2, (1 - share) / 2, (images, 1))
    return (rng.random((images, each)) < chance).astype(float).reshape(1, -1)


def test_no_difference_is_called_one_in_five_of_a_hundred_cases() -> None:
    """300 images of 4 questions; taken for 1200 independent ones, a fifth and more are."""
    rng = np.random.default_rng(1)
    pictures = np.repeat(np.arange(300), 4).astype(str).tolist()
    tests, outside, naive = 0, 0, 0
    for _ in range(300):
        first, second = alike(rng, 300, 4, 0.7), alike(rng, 300, 4, 0.7)
        found = compare(first, second, pictures)
        low, high = found.interval()
        tests += found.p <= 0.05
        outside += not low <= 0 <= high
        naive += compare(first, second).p <= 0.05
    # 15 are to be expected, and 26 or more in one of 250 suites.
    assert tests <= 26
    assert outside <= 26
    assert naive >= 50


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_accuracy_lies_in_its_interval(share: float) -> None:
    rng = np.random.default_rng(2)
    pictures = [*np.repeat(np.arange(100), 4).astype(str), *map(str, range(100, 150))]
    inside = naive = 0
    for _ in range(300):
        scores = [*alike(rng, 100, 4, share)[0], *alike(rng, 50, 1, share)[0]]
        low, high = share_interval(scores, pictures)
        inside += low <= share <= high
        low, high = wilson(sum(scores), 450)
        naive += low <= share <= high
    assert inside >= 275
    assert naive <= 270
