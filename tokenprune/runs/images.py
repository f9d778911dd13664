"""Which questions are about the same image: what is drawn anew, and flipped, is then an image.

Questions about one image share what is easy or hard in it. Taken for independent, they make chance
look like a finding (docs/statistics.md). Shape suffixes: Q questions, I images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenprune.runs.proportions import student, wilson


def shared(pictures: Sequence[str | None]) -> bool:
    """Whether any image has several questions.

    Args:
        pictures: A mark of each question's images, see `Sample.mark`; none where it is not known,
            or where there is no image: that question stands by itself.
    """
    known = [picture for picture in pictures if picture]
    return len(set(known)) < len(known)


def num_images(pictures: Sequence[str | None]) -> int | None:
    """How many images there are; None where that is not known. Arguments as for `shared`."""
    return len({*numbered(pictures)}) if any(pictures) else None


def numbered(pictures: Sequence[str | None]) -> list[int]:
    """The number of each question's image, from 0; arguments as for `shared`."""
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(picture or place, len(numbers)) for place, picture in enumerate(pictures)
    ]


def share_interval(
    scores: Sequence[float], pictures: Sequence[str | None] = ()
) -> tuple[float, float]:
    """95 % interval of the mean of scores between 0 and 1, by image where one has several.

    Where each has its own it is Wilson's; else Wilson's of as many independent questions as vary
    as much (Kish, 1965: the design effect; Korn and Graubard, 1998), with Student's quantile. How
    images differ is estimated with two more, one all right and one all wrong, as large as the one
    that a question is about on average: few images that agree do not show that all do.

    Args:
        scores: One a question.
        pictures: As for `shared`; empty where nothing is known.
    """
    total = len(scores)
    if not shared(pictures):
        return wilson(sum(scores), total)
    sizes, sums = sums_by_image(scores, pictures)
    num_images = len(sizes)
    more = added(sizes)
    share = (sum(sums) + more) / (total + 2 * more)
    spread = (more * (1 - share)) ** 2 + (more * share) ** 2
    spread += sum((own - size * share) ** 2 for own, size in zip(sums, sizes, strict=True))
    spread *= (num_images + 2) / (num_images + 1)
    effect = spread / (total + 2 * more) / (share * (1 - share))
    independent = total / max(1.0, effect)
    mean = sum(scores) / total
    return wilson(mean * independent, independent, student(max(1, num_images - 1)))


def sums_by_image(
    values: Sequence[float], pictures: Sequence[str | None]
) -> tuple[list[int], list[float]]:
    """Of each image the number of its questions, and the sum of their values."""
    own: dict[int, list[float]] = {}
    for number, value in zip(numbered(pictures), values, strict=True):
        own.setdefault(number, []).append(value)
    return [len(several) for several in own.values()], [math.fsum(s) for s in own.values()]


def added(sizes: Sequence[int]) -> float:
    """Questions of the image that a question is about, on average."""
    return sum(size**2 for size in sizes) / sum(sizes)
