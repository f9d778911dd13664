"""Data sets of a few rows for benchmarks of lmms-eval, with the columns that their tasks read.

Each task has a script: what is answered to each of its questions, so that scores are known by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (192, 192), (40 * number % 256, 90, 160))


@dataclass(frozen=True)
class Made:
    """A benchmark in small.

    Attributes:
        sets: Rows by name of a data set, its config and its split.
        script: The answer to each prompt; also what the prompts must be.
        score: The value that its paper prints, as a share of the best, worked out by hand.
        metrics: Further values of the report, by hand.
        right: How many of its questions are answered rightly, by themselves.
    """

    sets: dict[tuple[str, str | None, str], list[dict[str, Any]]]
    script: dict[str, str]
    score: float
    metrics: dict[str, float]
    right: int | None = None


def _people(answer: str, count: int, other: str = "dog") -> list[str]:
    return [answer] * count + [other] * (10 - count)


def _vqa_rows(
    asked: list[tuple[str, list[str]]], as_mappings: bool = False
) -> list[dict[str, Any]]:
    return [
        {
            "image": picture(number),
            "question": question,
            "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)]
            if as_mappings
            else answers,
            "question_id": number,
            "answer": answers[0],
            "ocr_tokens": ["x"],
        }
        for number, (question, answers) in enumerate(asked)
    ]


# Soft accuracy with ten answers of which 0, 1, 2, 3 or more are the one given: 0, .3, .6, .9, 1.
_SOFT = [
    ("what is it?", _people("a cat", 4)),
    ("which animal?", _people("cat", 2)),
    ("how many?", _people("two", 1)),
    ("what word?", _people("stop", 10)),
]
_SOFT_SAID = ["The cat.", "cat", "2", "go"]
_SOFT_SCORE = (1 + 0.6 + 0.3 + 0) / 4


def _soft(name: str, split: str, tail: str, capital: bool, as_mappings: bool = False) -> Made:
    asked = [question.capitalize() if capital else question for question, _ in _SOFT]
    return Made(
        {(name, None, split): _vqa_rows(_SOFT, as_mappings)},
        {f"{question}{tail}": said for question, said in zip(asked, _SOFT_SAID, strict=True)},
        _SOFT_SCORE,
        {"exact_match": _SOFT_SCORE},
    )


def _anls(config: str) -> Made:
    rows = [
        ("q1", ["20 May 1990"], "20 may  1990"),  # case and spaces do not count: 1
        ("q2", ["Smith"], "Smyth"),  # one of five letters: .8
        ("q3", ["yes", "abcdef"], "abcxyz"),  # half of six letters: .5
        ("q4", ["total"], "nothing"),  # too far: 0
    ]
    return Made(
        {
            ("lmms-lab-encoder/DocVQA", config, "validation"): [
                {"image": picture(n), "question": q, "answers": answers, "questionId": str(n)}
                for n, (q, answers, _) in enumerate(rows)
            ]
        },
        {f"{question}{WORD}": said for question, _, said in rows},
        (1 + 0.8 + 0.5 + 0) / 4,
        {},
    )


def _yes_no(name: str) -> Made:
    """True positives 2, false positives 1, false negatives 1, one answer that is neither."""
    rows = [
        ("Is there a cat?", "yes", "yes"),
        ("Is there a dog?", "yes", "Yes"),
        ("Is there a cow?", "no", "yes"),
        ("Is there a hen?", "yes", "no"),
        ("Is there a bee?", "no", "no"),
        ("Is there an ant?", "no", "No."),  # not the word alone: wrong, and neither
    ]
    return Made(
        {
            (name, None, "test"): [
                {"image": picture(n), "question": q, "answer": right, "question_id": str(n)}
                | {"id": str(n), "image_source": str(n), "category": "random"}
                for n, (q, right, _) in enumerate(rows)
            ]
        },
        {f"{question}{WORD}": said for question, _, said in rows},
        2 / 3,
        {
            "pope_accuracy": 3 / 6,
            "pope_precision": 2 / 3,
            "pope_recall": 2 / 3,
            "pope_f1_score": 2 / 3,
        },
    )


def _mme() -> Made:
    """Pairs: both right 100 + 100, one right 50 + 0; categories are averages over images."""
    rows = [
        ("count", "a", "Is there one?", "Yes", "yes"),
        ("count", "a", "Are there two?", "No", "No."),
        ("count", "b", "Is it one?", "Yes", "Yes, it is"),
        ("count", "b", "Is it two?", "No", "yes"),
        ("OCR", "c", "Is it A?", "Yes", "maybe"),
        ("OCR", "c", "Is it B?", "No", "no"),
        ("code_reasoning", "d", "Is it C?", "Yes", "yes"),
        ("code_reasoning", "d", "Is it D?", "No", "n"),
    ]
    return Made(
        {
            ("lmms-lab-encoder/MME", None, "test"): [
                {"image": picture(n), "category": kind, "question_id": image, "answer": right}
                | {"question": f"{question} Please answer yes or no."}
                for n, (kind, image, question, right, _) in enumerate(rows)
            ]
        },
        {f"{question}{WORD}": said for _, _, question, _, said in rows},
        (125 + 50) / 2000,
        {"mme_perception_score": (200 + 50) / 2 + 50, "mme_cognition_score": 200},
        right=6,
    )


def _mmbench(config: str, tail: str) -> Made:
    """A question counts if all its turns are right: one of two."""
    turns = [
        (0, "A", ["left", "right"], "A"),
        (1_000_000, "B", ["right", "left"], "B. right"),
        (1, "A", ["up", "down"], "A"),
        (1_000_001, "B", ["down", "up"], "A"),
    ]
    sentences = {0: "Where is it?", 1: "Which way?"}
    rows, script = [], {}
    for number, right, options, said in turns:
        question = sentences[number % 1_000_000]
        rows.append(
            {"image": picture(number % 7), "question": question, "answer": right, "index": number}
            | {"hint": "look" if number % 1_000_000 else "nan", "source": "s", "split": "dev"}
            | {"A": options[0], "B": options[1], "C": "nan", "D": "nan", "E": "nan"}
            | {"category": "place", "L2-category": "sense"}
        )
        listed = f"There are several options:\nA. {options[0]}\nB. {options[1]}"
        hint = "look " if number % 1_000_000 else "nan " if config == "cn" else ""
        script[f"{hint}{question} {listed}\n{tail}"] = said
    return Made({("lmms-lab-encoder/MMBench", config, "dev"): rows}, script, 0.5, {}, right=3)


def _seed() -> Made:
    rows = [("image", "A", "A"), ("image", "B", "b."), ("video", "C", "C. r"), ("image", "D", "A")]
    options = "\nA. p\nB. q\nC. r\nD. s"
    return Made(
        {
            ("lmms-lab-encoder/SEED-Bench", None, "test"): [
                {"image": [picture(n)] * (3 if kind == "video" else 1), "question": f"q{n}?"}
                | {"choice_a": "p", "choice_b": "q", "choice_c": "r", "choice_d": "s"}
                | {"answer": right, "data_type": kind, "question_id": str(n)}
                for n, (kind, right, _) in enumerate(rows)
            ]
        },
        {f"q{n}?{options}{LETTER}": said for n, (_, _, said) in enumerate(rows)},
        2 / 3,
        {"seed_image": 2 / 3, "seed_video": 1.0, "seed_all": 3 / 4},
        right=3,
    )


def _ranked() -> Made:
    """SEED-Bench's rows once more; what is likeliest is right for one image, and for the video."""
    said = {"q0?": "p", "q1?": "s", "q2?": "r", "q3?": "q"}  # right are p, q, r and s
    return Made(
        _seed().sets, {f"{question} Answer :": text for question, text in said.items()}, 2 / 4, {}
    )


def _science() -> Made:
    rows = [(0, "", "A"), (1, "It is cold.", "B. ice"), (2, "", "the third"), (1, "", "b")]
    script = {}
    for n, (_, hint, said) in enumerate(rows):
        context = f"Context: {hint}\n" if hint else ""
        script[f"{context}q{n}?\nA. fire\nB. ice\nC. air{LETTER}"] = said
    return Made(
        {
            ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test"): [
                {"image": picture(n), "question": f"q{n}?", "choices": ["fire", "ice", "air"]}
                | {"answer": right, "hint": hint}
                for n, (right, hint, _) in enumerate(rows)
            ]
        },
        script,
        3 / 4,
        {},
    )


def _mmstar() -> Made:
    """The mean over finer categories, of which one has three questions and one a single one."""
    rows = [
        ("math", "geometry", "A", "A"),
        ("math", "geometry", "B", "(B)"),
        ("math", "geometry", "C", "D"),
        ("math", "numeric commonsense and calculation", "D", "C"),
    ]
    return Made(
        {
            ("Lin-Chen/MMStar", None, "val"): [
                {"image": picture(n), "question": f"q{n}? Options: A: 1, B: 2", "answer": right}
                | {"category": kind, "l2_category": finer, "index": n}
                for n, (kind, finer, right, _) in enumerate(rows)
            ]
        },
        {f"q{n}? Options: A: 1, B: 2{LETTER[:-1]}": said for n, (_, _, _, said) in enumerate(rows)},
        (2 / 3 + 0) / 2,
        {"math": (2 / 3 + 0) / 2},
    )


def _chart() -> Made:
    rows = [
        ("human_test", "100", "104"),  # within 5 %
        ("human_test", "100", "106"),
        ("augmented_test", "12%", "0.12"),
        ("augmented_test", "blue", "Blue"),
        ("augmented_test", "0", "0.0"),  # of nothing there are no 5 %: compared as text
    ]
    return Made(
        {
            ("lmms-lab-encoder/ChartQA", None, "test"): [
                {"image": picture(n), "question": f"q{n}?", "answer": right, "type": kind}
                for n, (kind, right, _) in enumerate(rows)
            ]
        },
        {
            f"q{n}?\nAnswer the question with a single word.": said
            for n, (_, _, said) in enumerate(rows)
        },
        3 / 5,
        {"relaxed_human_split": 1 / 2, "relaxed_augmented_split": 2 / 3},
    )


def _gqa() -> Made:
    rows = [("red", "Red."), ("left", "right"), ("yes", "yes"), ("a dog", "dog")]
    return Made(
        {
            ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev"): [
                {"imageId": str(n), "question": f"q{n}?", "answer": right, "id": str(n)}
                for n, (right, _) in enumerate(rows)
            ],
            ("lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev"): [
                {"id": str(n), "image": picture(n)} for n in range(len(rows))
            ],
        },
        {f"q{n}?{WORD}": said for n, (_, said) in enumerate(rows)},
        2 / 4,
        {},
    )


def _covers() -> Made:
    said = {"Who wrote it?": " jane DOE ", "What is the title?": "The Sea", "Is it a comic?": "No"}
    return Made(
        {
            ("howard-hou/OCR-VQA", None, "test"): [
                {"image": picture(1), "questions": ["Who wrote it?", "What is the title?"]}
                | {"answers": ["Jane Doe", "Sea"]},
                {"image": picture(2), "questions": ["Is it a comic?"], "answers": ["no"]},
            ]
        },
        {f"{question}{WORD}": answer for question, answer in said.items()},
        2 / 3,
        {},
    )


_UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
TASKS: dict[str, Made] = {
    "vqav2_val": _soft("lmms-lab-encoder/VQAv2", "validation", WORD, False, as_mappings=True),
    "gqa": _gqa(),
    "vizwiz_vqa_val": _soft("lmms-lab-encoder/VizWiz-VQA", "val", _UNSURE + WORD, True),
    "scienceqa_img": _science(),
    "textvqa_val": _soft("lmms-lab-encoder/textvqa", "validation", WORD, True),
    "pope": _yes_no("lmms-lab-encoder/POPE"),
    "mme": _mme(),
    "mmbench_en_dev_static": _mmbench("en", LETTER),
    "mmbench_cn_dev_static": _mmbench("cn", "\n请直接使用所提供的选项字母作为答案回答。"),
    "seedbench": _seed(),
    "docvqa_val": _anls("DocVQA"),
    "infovqa_val": _anls("InfographicVQA"),
    "chartqa": _chart(),
    "ocrvqa": _covers(),
    "mmstar": _mmstar(),
}


#: Tasks in which options are ranked by their likelihood: the likeliest one of each question.
RANKED: dict[str, Made] = {"seedbench_ppl": _ranked()}


def write(folder: Path) -> dict[tuple[str, str | None], dict[str, str]]:
    """All data sets as parquet files: their paths by split, by name and config."""
    found: dict[tuple[str, str | None], dict[str, str]] = {}
    for made in TASKS.values():
        for (name, config, split), rows in made.sets.items():
            path = folder / f"{name.replace('/', '--')}-{config}-{split}.parquet"
            Dataset.from_list(rows).to_parquet(path)
            found.setdefault((name, config), {})[split] = str(path)
    return found


def reader(files: dict[tuple[str, str | None], dict[str, str]]) -> Any:
    """What stands in for `datasets.load_dataset`: knows these data sets and no network."""

    def load(
        path: str, name: str | None = None, split: str | None = None, **_: Any
    ) -> Dataset | DatasetDict:
        return load_dataset("parquet", data_files=files[path, name], split=split)

    return load
