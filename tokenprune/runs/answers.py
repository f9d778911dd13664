"""Answers of a run, as its predictions.jsonl has them: what was asked, and the score of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.runs import results


@dataclass(frozen=True)
class Answers:
    """Scores of a run.

    Attributes:
        asked: The same for two runs that were asked the same, in the same order: a digest of ids,
            questions and answers that count as right.
        scores_Q: Score of each answer, between 0 and 1.
    """

    asked: str
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
    scores = []
    for record in read_lines(path):
        asked = [record.get(key) for key in ("id", "question", "answer")]
        digest.update(json.dumps(asked).encode() + b"\n")
        score = record.get("score", record.get("correct"))  # it may say right and wrong alone
        if not isinstance(score, int | float):
            return None
        scores.append(float(score))
    if not scores:
        return None
    return Answers(digest.hexdigest(), np.array(scores))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines.

    Raises:
        ValueError: A line is no JSON object.
    """
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name}: expected JSON in line {number} of {path}, got {error}. "
                    "Run that evaluation again."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path.name}: expected JSON objects in {path}, got {type(record).__name__} in "
                    f"line {number}. Run that evaluation again."
                )
            yield record
