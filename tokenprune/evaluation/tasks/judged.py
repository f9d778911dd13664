"""What the tasks in this folder ask, and how they judge answers; lmms-eval reads it beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

Document = Mapping[str, Any]


def picture(document: Document) -> list[Any]:
    """The image of a document."""
    return [document["image"].convert("RGB")]


def question(document: Document, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """Its question, between what the task puts before and after."""
    given = lmms_eval_specific_kwargs
    return f"{given['pre_prompt']}{document['question']}{given['post_prompt']}"


def one_question_a_row(dataset: Any) -> Any:
    """OCR-VQA has a list of questions and one of answers for each cover.

    Images stay the bytes that they are: mapped as pictures they would be compressed once more.
    """
    as_pictures = dataset.features["image"]

    def split(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        covers = zip(batch["image"], batch["questions"], batch["answers"], strict=True)
        rows = [
            (image, *pair)
            for image, qs, answers in covers
            for pair in zip(qs, answers, strict=True)
        ]
        return {
            "image": [row[0] for row in rows],
            "question": [row[1] for row in rows],
            "answer": [row[2] for row in rows],
        }

    as_bytes = dataset.cast_column("image", type(as_pictures)(decode=False))
    rows = as_bytes.map(split, batched=True, remove_columns=dataset.column_names)
    return rows.cast_column("image", as_pictures)


def equal(document: Document, results: Sequence[str]) -> dict[str, float]:
    """1 if it is the answer; case and surrounding spaces do not count."""
    own, right = (text.strip().lower() for text in (results[0], document["answer"]))
    return {"accuracy": float(own == right)}


def _chinese() -> Any:
    return import_module("lmms_eval.tasks.mmbench.cn_utils")


def chinese_question(document: Document, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """As lmms-eval's own task in Chinese asks it."""
    return str(_chinese().mmbench_doc_to_text(document, lmms_eval_specific_kwargs))


def circular(document: Document, results: Sequence[str]) -> dict[str, Any]:
    """What judging all turns of a question together needs."""
    return {
        "gpt_eval_score": _chinese().mmbench_process_results(document, results)["gpt_eval_score"]
    }


def circular_share(results: Sequence[Mapping[str, Any]], args: Any) -> float:
    """Share of questions that are answered rightly in all turns of their options, of 100."""
    judge = _chinese().mmbench_evaluator
    share, _, _ = judge.eval_result(results, eval_method="static")
    return 100 * float(share)
