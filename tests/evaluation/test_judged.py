"""Tasks that lmms-eval lacks, by the functions that their YAML names."""

from __future__ import annotations

import io

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

from tokenprune.evaluation.tasks.judged import one_question_a_row

COVERS = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "questions": Sequence(Value("string")),
        "answers": Sequence(Value("string")),
    }
)


def cover(seed: int) -> bytes:
    """A picture that a second compression would change."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pictures.fromarray(noise).save(file, format="JPEG", quality=95)
    return file.getvalue()


def test_every_question_of_a_cover_has_its_very_picture() -> None:
    covers = [cover(0), cover(1)]
    rows = one_question_a_row(
        Dataset.from_dict(
            {
                "image": [{"bytes": own, "path": None} for own in covers],
                "image_id": ["a", "b"],
                "questions": [["who?", "what?"], ["which?"]],
                "answers": [["Ada", "prose"], ["first"]],
            },
            features=COVERS,
        )
    )
    assert sorted(rows.column_names) == ["answer", "image", "question"]
    assert rows["question"][:] == ["who?", "what?", "which?"]
    assert rows["answer"][:] == ["Ada", "prose", "first"]
    for row, number in zip(rows, (0, 0, 1), strict=True):
        own = Pictures.open(io.BytesIO(covers[number]))
        assert np.array_equal(np.asarray(row["image"]), np.asarray(own))
