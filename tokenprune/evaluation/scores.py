"""What lmms-eval's tasks come to: one number a task, between 0 and 1, and one a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tokenprune.evaluation.metrics import exact
from tokenprune.runs.images import share_interval

#: Which of a task's metrics papers print, and its best value. Tasks that are not here: the first
#: metric that they list, of which 1 is the best.
PRINTED: Mapping[str, tuple[str, float]] = {
    "pope": ("pope_f1_score", 1.0),
    "mme": ("mme_perception_score", 2000.0),
    "mmbench_en_dev": ("gpt_eval_score", 100.0),
    "mmbench_en_dev_static": ("gpt_eval_score", 100.0),
    "mmbench_cn_dev_static": ("gpt_eval_score", 100.0),
    "mmbench_cn_dev": ("gpt_eval_score", 100.0),
    "seedbench": ("seed_image", 1.0),
    "mmstar": ("average", 1.0),
    "chartqa": ("relaxed_overall", 1.0),
}


#: What lmms-eval logs of any question; all else are the task's metrics.
_LOGGED = (
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts"),
    *("doc_hash", "input_media"),
)
#: What MMBench's aggregation needs of a question, whose turns it judges together.
_MMBENCH = {"prediction", "answer", "index", "A", "B", "C", "D"}


def task_score(
    task: str, metrics: Mapping[str, Any], listed: Sequence[str]
) -> tuple[str, float | None]:
    """The metric that stands for a task, and its value as a share of the best.

    Args:
        task: Its name.
        metrics: What lmms-eval gives for it, by `metric,filter`.
        listed: Its metrics in the order in which the task lists them.

    Returns:
        No value where the metric has none, or one that is no share.
    """
    name, best = PRINTED.get(task, ("".join(listed[:1]), 1.0))
    found = [value for key, value in metrics.items() if key.split(",")[0] == name]
    value = found[0] if found else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return name, None
    share = float(value) / best
    return name, share if 0 <= share <= 1 else None


def question_score(sample: Mapping[str, Any], name: str, answer: str) -> float:
    """How well a question was answered, between 0 and 1, as its task judges.

    A task's metric may be a number for each question, or what its aggregation needs: then a score
    or a label beside the right one. Where the metric does not speak of a question (MME's perception
    of one about cognition, SEED-Bench's images of a video), another one of the task does. A
    question of which none says anything counts as right if its answer is the target's text.

    Args:
        sample: As lmms-eval logs it.
        name: The task's metric.
        answer: What was said, see `said` and `likeliest`.
    """
    value = sample.get(name)
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    others = [own for key, own in sample.items() if key not in (name, *_LOGGED)]
    judged = [_judged(own) for own in (value, *others) if isinstance(own, Mapping)]
    scores = [score for score in judged if score is not None]
    if scores:
        return scores[0]
    target = sample["target"]
    accepted = target if isinstance(target, list) else [target]
    return exact(answer, [str(one) for one in accepted])


def _judged(record: Mapping[str, Any]) -> float | None:
    """The score in a metric's record of a question; None if it has none."""
    score = record.get("score")
    if isinstance(score, int | float):
        return min(1.0, max(0.0, float(score)))
    if set(record) >= _MMBENCH:
        return _option(record)
    labels = [record[key] for key in ("pred", "prediction") if key in record]
    if not labels or record.get("answer") is None:
        return None
    return exact(str(labels[0]), [str(record["answer"])])


def _option(record: Mapping[str, Any]) -> float:
    """1 if lmms-eval reads MMBench's right option from the answer, by its rules alone."""
    judge = import_module("lmms_eval.tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    read = import_module("lmms_eval.tasks._task_utils.mcq_extract").extract_mcq_answer
    said = str(record["prediction"])
    options = {letter: record[letter] for letter in "ABCD" if not _missing(record[letter])}
    letter = judge.can_infer(said, dict(options)) or read(said, choices=sorted(options))
    return float(letter == record["answer"])


def _missing(option: object) -> bool:
    """MMBench has nothing, or no number, where a question has no such option."""
    return option is None or option != option


def said(sample: Mapping[str, Any]) -> str:
    """The answer to a question, as the task's filters left it."""
    answer = sample["filtered_resps"][0]
    while isinstance(answer, list | tuple):
        answer = answer[0] if answer else ""
    return str(answer)


def likeliest(ranked: Sequence[tuple[str, str, float]]) -> str:
    """The option that a model finds likeliest.

    Args:
        ranked: Of each option what was asked, what continues it, and the loss. Options are the
            continuations, or, where there is one continuation alone, what was asked.
    """
    asked, continued, _ = min(ranked, key=lambda option: option[2])
    alone = len(ranked) > 1 and len({option[1] for option in ranked}) == 1
    return asked if alone else continued


def interval(
    scores: Sequence[float], share: float, averaged: bool, pictures: Sequence[str | None] = ()
) -> tuple[float | None, float | None]:
    """95 % interval of a task's value; none where it is no mean of the questions' scores.

    Args:
        scores: Of the questions.
        share: The task's value.
        averaged: Whether its metric is a mean over questions: F1 and points may happen to equal
            theirs.
        pictures: A mark of each question's image, see `runs.images`.
    """
    if not averaged or not scores or abs(sum(scores) / len(scores) - share) > 1e-9:
        return None, None
    return share_interval(scores, pictures)
