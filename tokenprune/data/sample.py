"""What a data set yields: an image and the questions asked about it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Turn:
    """One question with its answer; `kind` groups turns in the metrics."""

    question: str
    answer: str
    kind: str = "all"


@dataclass(frozen=True)
class Sample:
    """An RGB image and at least one turn; data sets for evaluation have exactly one."""

    id: str
    image: Image.Image
    turns: tuple[Turn, ...]
