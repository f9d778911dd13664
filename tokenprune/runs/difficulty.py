"""difficulty.csv: right answers on the questions that a smaller picture answers, and on the others.

Many questions of a benchmark can be answered from a smaller picture, which says nothing about how
well a method chooses. Liao et al., 2025 (VTC-Bench, arXiv 2510.07143) therefore split the questions
that the unpruned model gets right by whether it also does with a down-sampled picture of the same
budget: *easy* ones, and *hard* ones, where only choosing can help.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np

from tokenprune.runs.comparisons import (
    ALL,
    METHOD,
    Left,
    nearest_downsample,
    pictures_of,
    scores_of,
    share_of,
)
from tokenprune.runs.images import share_interval
from tokenprune.runs.methods import UNPRUNED, Method

TABLE = "difficulty.csv"
COLUMNS = (
    *("method", *METHOD, "num_seeds", "token_share", "downsample_scale"),
    *("questions", "num_questions", "num_wrong", "num_easy", "easy", "easy_low", "easy_high"),
    *("num_hard", "hard", "hard_low", "hard_high", "model", "data", "run", "downsample_run"),
)
#: Baselines that choose nothing: each budget is to have them.
BASELINES = ("pool", "random")
_RIGHT = 0.5  # scores from here on count as right, as in predictions.jsonl


def split_by_difficulty(methods: Sequence[Method]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of difficulty.csv, and a sentence for each thing that is missing.

    A down-sampled run is in it as well: it gets all easy questions of its own split right and no
    hard one, by what the words mean.

    Args:
        methods: As `gather` makes them.
    """
    rows: list[dict[str, Any]] = []
    left = Left()
    for method in methods:
        inside = [other for other in methods if other.setting == method.setting]
        whole = next((other for other in inside if other.first.strategy == UNPRUNED), None)
        scaled = nearest_downsample(method, inside)
        if scaled is None or method is whole:
            continue
        split = [] if whole is None else _split(method, whole, scaled)
        rows += split
        if whole is None:
            left.add("Not split by difficulty, for there is no unpruned run", method.series)
        elif not split:
            left.add("Not split by difficulty, for questions or scores differ", method.series)
    budgets = dict.fromkeys((row["layers"], row["keeps"]) for row in rows if row["layers"])
    for name in BASELINES:
        there = {(r["layers"], r["keeps"]) for r in rows if r["method"].partition(" ")[0] == name}
        for layers, keeps in (own for own in budgets if own not in there):
            left.add(f"Split without {name}, which chooses nothing", f"keep {keeps} at {layers}")
    return rows, left.sentences()


def _split(method: Method, whole: Method, scaled: Method) -> list[dict[str, Any]]:
    """A row for each part of the questions (`Scores.parts`); none where these are not the same."""
    found = [scores_of(own) for own in (method, whole, scaled)]
    known = [own for own in found if own is not None]
    if len(known) < len(found) or len({own.asked for own in known}) > 1:
        return []
    score_Q, whole_Q, scaled_Q = (own.scores_SQ.mean(0) for own in known)
    right_Q, easy_Q = whole_Q >= _RIGHT, scaled_Q >= _RIGHT
    rows = []
    for questions, part_Q in min((own.parts for own in known), key=lambda own: ALL in own).items():
        row: dict[str, Any] = {
            "method": method.series,
            **{name: method.first.text(name) for name in METHOD},
            "num_seeds": method.num_seeds,
            "token_share": share_of(method),
            "downsample_scale": scaled.first.scale,
            "questions": questions,
            "num_questions": int(part_Q.sum()),
            "num_wrong": int((part_Q & ~right_Q).sum()),
        }
        groups = {"easy": part_Q & right_Q & easy_Q, "hard": part_Q & right_Q & ~easy_Q}
        for name, group_Q in groups.items():
            number, scores = int(group_Q.sum()), score_Q[group_Q].tolist()
            row |= {f"num_{name}": number}
            if number:
                low, high = share_interval(scores, list(compress(pictures_of(known), group_Q)))
                row |= {
                    name: float(np.sum(score_Q[group_Q])) / number,
                    f"{name}_low": low,
                    f"{name}_high": high,
                }
        row |= {name: method.first.text(name) for name in ("model", "data", "run")}
        rows.append(row | {"downsample_run": scaled.first.text("run")})
    return rows
