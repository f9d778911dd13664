"""Answers of a run, as its predictions.jsonl has them: what was asked, and the score of each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenprune.runs import results


@dataclass(frozen=True)
class Answers:
    """Scores of a run.

    Attributes:
        asked: The same for two runs that were asked the same: a digest of ids, kinds, questions and
            answers that count as right.
        kinds: Of each question, in the order of their ids.
        pictures: A mark of each question's images; None where it is not known, see `images.shared`.
        scores_Q: Score of each answer, between 0 and 1.
    """

    asked: str
    kinds: tuple[str, ...]
    pictures: tuple[str | None, ...]
    scores_Q: NDArray[np.float64]


def read_answers(folder: Path | None) -> Answers | None:
    """The answers in a run's folder; None where there are none, or none with a score.

    Raises:
        ValueError: A line is no JSON.
    """
    path = None if folder is None else folder / results.PREDICTIONS
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)  # runs are compared with several others
def _read(path: Path, size: int, changed: int) -> Answers | None:
    digest = hashlib.blake2b(digest_size=16)
    kinds: list[str] = []
    pictures: list[str | None] = []
    scores: list[float] = []
    # Benchmarks may ask their tasks in any order.
    for record in sorted(results.read_predictions(path), key=lambda own: str(own.get("id"))):
        asked = [record.get(key) for key in ("id", "kind", "question", "answer")]
        digest.update(json.dumps(asked).encode() + b"\n")
        score = record.get("score", record.get("correct"))  # it may say right and wrong alone
        if not isinstance(score, int | float):
            return None
        kinds.append(str(record.get("kind", "")))
        pictures.append(None if (own := record.get("picture")) is None else str(own))
        scores.append(float(score))
    if not scores:
        return None
    return Answers(digest.hexdigest(), tuple(kinds), tuple(pictures), np.array(scores))
