"""GPU hours of a whole table, by the cost model: docs/scale.md keeps what this works out.

`python tests/cost/test_scale.py` writes it there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tokenprune import Schedule, cost

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
START, END = "<!-- Generated: python tests/cost/test_scale.py -->", "<!-- End -->"
#: Questions of the tasks of `benchmark=paper`, as their data sets have them.
QUESTIONS = {
    "VQAv2": 214_354, "GQA": 12_578, "VizWiz": 4_319, "ScienceQA": 2_017, "TextVQA": 5_000,
    "POPE": 9_000, "MME": 2_374, "MMBench": 4_329, "MMBench-CN": 4_329, "SEED": 17_990,
    "DocVQA": 5_349, "InfoVQA": 2_801, "ChartQA": 2_500, "OCRVQA": 3_072, "MMStar": 1_500,
}  # fmt: skip
STRATEGIES, BUDGETS = 30, (192, 128, 64)
#: Text of a prompt and tokens of an answer, on average; both generous.
TEXT, ANSWER = 64, 8
#: CLIP ViT-L/14 at 336 pixels, 577 positions, two per multiply-add, and its projector.
TOWER = {"LLaVA-1.5-7B": 0.38e12, "LLaVA-NeXT-7B": 5 * 0.38e12}
MODELS = {"LLaVA-1.5-7B": ("llava-1.5-7b", 576), "LLaVA-NeXT-7B": ("llava-next-7b", 2_880)}
#: What a GPU does of this in a second: 40 % of an A100's 312 TFLOP/s.
SPEED = 0.4 * 312e12
#: Of a run: start, weights, data.
START_UP = 120.0


def seconds(model: str, lengths: Sequence[int]) -> float:
    """A question's time: vision tower, prefill and answer."""
    name, _ = MODELS[model]
    shape = cost.find_preset(name).shape
    prefill = cost.flops(shape, lengths, num_text=TEXT, convention="exact")
    answer = ANSWER * cost.decode_flops(shape, lengths, num_text=TEXT)
    return (TOWER[model] + prefill + answer) / SPEED


def unpruned(model: str) -> float:
    name, num_visual = MODELS[model]
    return seconds(model, [num_visual] * cost.find_preset(name).shape.num_layers)


def pruned(model: str, average: int) -> float:
    """At a budget of so many tokens on average, of 576; the same share where there are more."""
    name, num_visual = MODELS[model]
    num_layers = cost.find_preset(name).shape.num_layers
    keep = (average / 576 * num_layers - 2) / (num_layers - 2)
    return seconds(model, Schedule.one_shot(2, max(keep, 0)).lengths(num_layers, num_visual))


def hours(model: str, questions: int) -> dict[str, float]:
    """GPU hours of the table, in several ways to run it."""
    own, num = unpruned(model), STRATEGIES * len(BUDGETS)
    short = sum(pruned(model, average) for average in BUDGETS) * STRATEGIES
    runs = 15 * START_UP
    return {
        "each with its own unpruned run": (questions * (short + num * own) + 2 * num * runs) / 3600,
        "one unpruned run for all": (questions * (short + own) + (num + 1) * runs) / 3600,
        "one method at one budget": (questions * short / num + runs) / 3600,
        "the unpruned model": (questions * own + runs) / 3600,
    }


def text() -> str:
    """What the page says."""
    whole, few = sum(QUESTIONS.values()), sum(min(n, 5_000) for n in QUESTIONS.values())
    ways = list(hours("LLaVA-1.5-7B", 1))
    lines = [f"| GPU hours | {' | '.join(ways)} |", "| --- |" + " --- |" * len(ways)]
    for model in MODELS:
        for words, questions in (("all questions", whole), ("at most 5 000 a task", few)):
            found = [_short(value) for value in hours(model, questions).values()]
            lines.append(f"| {model}, {words}: {_short(questions)} | {' | '.join(found)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}".replace(",", " ")


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(f"{START}\n\n(.*)\n\n{END}", page, re.DOTALL)
    assert found is not None
    assert found[1] == text()


@pytest.mark.parametrize("model", MODELS)
def test_pruning_and_sharing_save(model: str) -> None:
    costs = [unpruned(model), *(pruned(model, average) for average in BUDGETS)]
    assert costs == sorted(costs, reverse=True)
    own, shared, *_ = hours(model, sum(QUESTIONS.values())).values()
    assert shared < 0.6 * own


def test_every_task_of_the_paper_counts() -> None:
    file = PAGE.parents[1] / "configs" / "benchmark" / "paper.yaml"
    assert len(re.findall(r"^  - ", file.read_text(), re.MULTILINE)) == len(QUESTIONS) == 15


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    new = re.sub(f"{START}.*{END}", f"{START}\n\n{text()}\n\n{END}", page, flags=re.DOTALL)
    PAGE.write_text(new, encoding="utf-8")
