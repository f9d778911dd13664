"""What lmms-eval's tasks come to: one number a task, between 0 and 1, and one a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenprune.evaluation.metrics import exact
from tokenprune.runs.proportions import wilson

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
    name, best = PRINTED.get(task, (listed[0], 1.0))
    found = [value for key, value in metrics.items() if key.split(",")[0] == name]
    value = found[0] if found else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return name, None
    share = float(value) / best
    return name, share if 0 <= share <= 1 else None


def question_score(sample: Mapping[str, Any], name: str, answer: str) -> float:
    """How well a question was answered, between 0 and 1.

    A task's metric may be a number for each question, or what its aggregation needs: then a score
    or a label beside the right one. A question that has neither counts as right if its answer is
    the target's text.

    Args:
        sample: As lmms-eval logs it.
        name: The task's metric.
        answer: What was said, see `said` and `likeliest`.
    """
    value = sample.get(name)
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    if isinstance(value, Mapping):
        if isinstance(value.get("score"), int | float):
            return min(1.0, max(0.0, float(value["score"])))
        labels = [value[key] for key in ("pred", "prediction") if key in value]
        if labels and value.get("answer") is not None:
            return exact(str(labels[0]), [str(value["answer"])])
    others = [own for key, own in sample.items() if key.endswith("_accuracy")]
    if others and isinstance(others[0], Mapping) and "score" in others[0]:
        return float(others[0]["score"])
    target = sample["target"]
    accepted = target if isinstance(target, list) else [target]
    return exact(answer, [str(one) for one in accepted])


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


def interval(scores: Sequence[float], share: float) -> tuple[float | None, float | None]:
    """95 % interval of a task's value; none where it is no mean of the questions' scores."""
    if not scores or abs(sum(scores) / len(scores) - share) > 1e-9:
        return None, None
    return wilson(sum(scores), len(scores))
