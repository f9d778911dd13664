"""What a data set yields: images and a conversation about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

#: Stands in a question where an image belongs, as in LLaVA's data.
IMAGE = "<image>"


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        question: May hold one `IMAGE` per image of its own.
        answer: What training teaches.
        kind: Groups turns in the metrics.
        accepted: Answers that count as right; empty where only `answer` does. A text may occur
            several times, once for each person who gave it.
        system: What the model is told before the question, by a system message; of the first turn.
    """

    question: str
    answer: str
    kind: str = "all"
    accepted: tuple[str, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Sample:
    """RGB images and at least one turn; evaluation asks the last, the others come before it.

    Questions hold one `IMAGE` per image, or none: then all images come before the first question.
    """

    id: str
    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    @cached_property
    def mark(self) -> str | None:
        """The same for the same images, by which questions about them are known; None of none."""
        digest = hashlib.blake2b(digest_size=8)
        for image in self.images:
            digest.update(repr(image.size).encode() + image.tobytes())
        return digest.hexdigest() if self.images else None


def num_places(turns: Sequence[Turn]) -> int:
    """How many images the questions ask for by a placeholder."""
    return sum(turn.question.count(IMAGE) for turn in turns)
