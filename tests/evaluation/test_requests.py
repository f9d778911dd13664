"""Requests of lmms-eval as samples and options, and scores of its samples; needs no lmms-eval."""

from __future__ import annotations

import pytest
from PIL import Image

from tokenprune.evaluation.requests import cut, from_messages, from_text, options
from tokenprune.evaluation.scores import interval, likeliest, question_score, said, task_score
from tokenprune.runs.images import share_interval
from tokenprune.runs.proportions import wilson


def test_texts_and_images_stay_in_order() -> None:
    image = Image.new("L", (4, 4))
    parts = [
        {"type": "text", "text": "first "},
        {"type": "image", "url": image},
        {"type": "text", "text": " and "},
        {"type": "image", "url": image},
    ]
    told = [
        {
            "role": "user",
            "content": [{"type": "image", "url": image}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    one = from_messages("x", [{"role": "user", "content": parts}])
    assert one.turns[0].question == "first <image> and <image>"
    assert [picture.mode for picture in one.images] == ["RGB", "RGB"]
    several = from_messages("x", told)
    assert [(turn.question, turn.answer) for turn in several.turns] == [("a", "b"), ("c", "")]
    system = {"role": "system", "content": "be brief"}
    led = from_messages("x", [system, *told])
    assert [turn.system for turn in led.turns] == ["be brief", ""]
    assert led.turns[0].question == "a"
    for blank in ("", " \n", []):
        silent = from_messages("x", [system | {"content": blank}, *told])
        assert [turn.system for turn in silent.turns] == ["", ""]
    for wrong in (
        [*told[:2], system, told[2]],
        [system, *told[:2], system, told[2]],
        [{"role": "system", "content": parts}, *told],
        [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}],
        told[:2],
    ):
        with pytest.raises(ValueError, match="lmms-eval, x: expected"):
            from_messages("x", wrong)


def test_options_of_a_task() -> None:
    said: list[str] = []
    given = {"max_new_tokens": 16, "temperature": 0, "top_p": None, "until": ["ASSISTANT:"]}
    assert options(given, said.append) == (16, ("ASSISTANT:",), {"do_sample": False})
    drawn = options({"temperature": 0.7, "num_beams": 2, "modality": "x"}, said.append)
    assert drawn == (1024, (), {"temperature": 0.7, "num_beams": 2, "do_sample": True})
    assert said == ["options of the task that are not used: modality"]
    assert cut("yes ASSISTANT: no", ("ASSISTANT:",)) == "yes"


def test_a_text_with_other_media_than_images_is_refused() -> None:
    sample = from_text("pope 0", "Is it?", [Image.new("RGBA", (2, 2))])
    assert sample.turns[0].question == "Is it?"
    assert sample.image.mode == "RGB"
    assert from_text("pope 0", "Is it?", None).images == ()
    with pytest.raises(ValueError, match="lmms-eval, pope 0: expected images, got a str"):
        from_text("pope 0", "Is it?", ["film.mp4"])


@pytest.mark.parametrize(
    ("task", "metrics", "expected"),
    [
        ("mme", {"mme_perception_score,none": 1500.0}, ("mme_perception_score", 0.75)),
        ("pope", {"pope_accuracy,none": 1.0, "pope_f1_score,none": 0.8}, ("pope_f1_score", 0.8)),
        ("mine", {"first,none": 0.25, "second,none": 1}, ("first", 0.25)),
        ("mine", {"first,none": 37.5}, ("first", None)),  # of what?
        ("mine", {"first,none": "N/A"}, ("first", None)),
        ("mine", {}, ("first", None)),
    ],
)
def test_one_number_a_task(task: str, metrics: dict[str, object], expected: object) -> None:
    assert task_score(task, metrics, ["first", "second"]) == expected


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (0.3, 0.3),
        ({"score": 1.0, "category": "x"}, 1.0),
        ({"pred": "A", "answer": "a"}, 1.0),
        ({"prediction": "A", "answer": "B"}, 0.0),
        (None, 1.0),  # by the target's text
        ([1, 2], 1.0),
    ],
)
def test_one_number_a_question(value: object, score: float) -> None:
    sample = {"m": value, "target": ["no", "yes"], "filtered_resps": [["Yes"]]}
    assert question_score(sample, "m", said(sample)) == score


def test_the_likeliest_option_is_what_was_said() -> None:
    assert likeliest([("q", "red", 2.0), ("q", "blue", 0.5), ("q", "green", 0.7)]) == "blue"
    assert likeliest([("it is red", "yes", 2.0), ("it is blue", "yes", 0.5)]) == "it is blue"
    assert likeliest([("q", "red", 2.0)]) == "red"


@pytest.mark.parametrize(
    ("records", "score"),
    [
        # MME's perception says nothing of a question about cognition.
        ({"mme_cognition_score": {"score": 1.0, "category": "code_reasoning"}}, 1.0),
        ({"mme_cognition_score": {"score": 0.0, "category": "code_reasoning"}}, 0.0),
        # SEED-Bench's images say nothing of a video.
        ({"seed_video": {"pred": "C", "answer": "C"}, "seed_all": {"pred": "C"}}, 1.0),
        ({"m": {"category": "x"}, "other": {"score": 1.0}}, 1.0),
        ({"doc": {"score": 1.0}, "token_counts": [{"score": 1.0}]}, 0.0),  # no metrics
    ],
)
def test_a_question_is_judged_by_whichever_metric_speaks_of_it(
    records: dict[str, object], score: float
) -> None:
    sample = {"target": "C", "filtered_resps": ["C. dog"]} | records
    assert question_score(sample, "m", said(sample)) == score


def test_an_interval_is_that_of_a_mean() -> None:
    assert interval([1.0, 0.0, 1.0, 1.0], 0.75, averaged=True) == wilson(3, 4)
    assert interval([1.0, 0.0, 1.0, 1.0], 2 / 3, averaged=True) == (None, None)
    assert interval([0.0, 0.0], 0.0, averaged=False) == (None, None)  # MME without a point
    assert interval([], 0.0, averaged=True) == (None, None)
    scores, pictures = [1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"]
    found = interval(scores, 0.75, averaged=True, pictures=pictures)
    assert found == share_interval(scores, pictures) != wilson(3, 4)
