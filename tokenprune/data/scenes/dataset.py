"""Procedural visual question answering: pictures of coloured symbols, in two levels.

Every object fills about one patch of the level's model, so a dropped patch takes its evidence
along; the questions differ in how much evidence they need and of which sort. `easy`, 12 x 12
cells of 16 pixels, 6 to 8 objects, for the model `tiny`:

| kind       | question                  | answer     | evidence                                |
|------------|---------------------------|------------|-----------------------------------------|
| `read`     | Which symbol is red?      | K          | one patch                               |
| `colour`   | Which colour is K?        | red        | one patch                               |
| `exist`    | Is there a red K?         | yes, no    | one patch; "no" needs the right one too |
| `relation` | Is red left of blue?      | yes, no    | two patches and where they are          |
| `text`     | What does the sign say?   | K 7        | two patches, two answer tokens          |

`hard`, 24 x 24 cells of 14 pixels (576 tokens, as LLaVA-1.5), 6 to 30 objects, for the model
`small`; its `relation` compares two symbols, its signs have four to six glyphs, and there are

| kind       | question                            | answer      | evidence                   |
|------------|-------------------------------------|-------------|----------------------------|
| `count`    | How many are red?                   | none to six | up to six patches          |
| `compare`  | Are there more red than blue?       | yes, no     | up to twelve patches       |
| `steps`    | Which symbol shares colour with K?  | M           | two patches, one by one    |

A scene depends on (level, seed, split, index) alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from tokenprune.data.sample import Sample
from tokenprune.data.scenes import easy, hard
from tokenprune.data.scenes.pictures import COLOURS, Question, Scene, draw_scene

LEVELS = {"easy": easy, "hard": hard}
SPLITS = ("train", "validation", "test")


class SceneDataset(Dataset[Sample]):
    """Scenes with questions, the same for the same (seed, split, index) on every machine.

    Args:
        split: `train`, `validation` or `test`: disjoint streams of scenes.
        num_samples: length of the data set.
        seed: another seed gives other scenes.
        num_turns: questions per image; with one, the kinds take turns and are balanced.
        min_objects: fewest coloured symbols per scene, of the level `easy` alone; 6 unless given.
        max_objects: most of them, at most one per colour; 8 unless given.
        kinds: the question kinds to ask; all of the level unless given.
        level: `easy` or `hard`.
        max_alike: most objects of one colour, of the level `hard` alone; 6 unless given.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: str,
        num_samples: int,
        seed: int = 0,
        num_turns: int = 1,
        min_objects: int | None = None,
        max_objects: int | None = None,
        kinds: Sequence[str] | None = None,
        level: str = "easy",
        max_alike: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(
                f"SceneDataset.split: expected one of {list(SPLITS)}, got {split!r}. "
                "Each is a stream of scenes of its own."
            )
        if level not in LEVELS:
            raise ValueError(
                f"SceneDataset.level: expected one of {list(LEVELS)}, got {level!r}. Each goes "
                "with a model: easy with tiny, hard with small."
            )
        strange = {"min_objects": min_objects, "max_objects": max_objects}
        if level == "easy":
            strange = {"max_alike": max_alike}
        for name, value in strange.items():
            if value is not None:
                raise ValueError(
                    f"SceneDataset.{name}: expected none at level={level}, got {value!r}. "
                    "min_objects and max_objects shape easy scenes, max_alike hard ones."
                )
        min_objects, max_objects, max_alike = (
            most if value is None else value
            for value, most in ((min_objects, 6), (max_objects, 8), (max_alike, hard.MAX_ALIKE))
        )
        counts = {"num_samples": num_samples, "num_turns": num_turns, "seed": seed}
        counts |= {"min_objects": min_objects, "max_objects": max_objects, "max_alike": max_alike}
        for name, value in counts.items():
            if not isinstance(value, int):
                raise ValueError(
                    f"SceneDataset.{name}: expected an integer, got {value!r}. Write it in digits."
                )
        if num_samples < 1 or num_turns < 1:
            raise ValueError(
                "SceneDataset: expected num_samples and num_turns >= 1, "
                f"got {num_samples} and {num_turns}. Ask for at least one of each."
            )
        if not 1 <= min_objects <= max_objects <= len(COLOURS):
            raise ValueError(
                f"SceneDataset: expected 1 <= min_objects <= max_objects <= {len(COLOURS)} (one "
                f"object per colour), got {min_objects} and {max_objects}. Change one of them."
            )
        if not 0 <= max_alike <= hard.MAX_ALIKE:
            raise ValueError(
                f"SceneDataset: expected 0 <= max_alike <= {hard.MAX_ALIKE}, got {max_alike}. "
                "Answers count to six."
            )
        known = LEVELS[level].KINDS
        kinds = known if kinds is None else kinds
        unknown = [kind for kind in kinds if kind not in known]
        if unknown or not kinds:
            raise ValueError(
                f"SceneDataset.kinds: expected some of {list(known)}, got "
                f"{list(kinds)}. Name at least one, and only these."
            )
        self.split = split
        self.num_samples = num_samples
        self.seed = seed
        self.num_turns = num_turns
        self.min_objects = min_objects
        self.max_objects = max_objects
        self.kinds = tuple(kinds)
        self.level = level
        self.max_alike = max_alike

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        scene, questions, rng = self._make(index)
        image = draw_scene(rng, scene, LEVELS[self.level].STYLE)
        turns = tuple(question.turn for question in questions)
        stream = "" if self.level == "easy" else f"{self.level}-"
        name = f"{stream}{self.split}-{self.seed}-{index}"
        return Sample(id=name, images=(image,), turns=turns)

    def scene(self, index: int) -> tuple[Scene, list[Question]]:
        """What sample `index` shows and asks, without drawing it."""
        scene, questions, _ = self._make(index)
        return scene, questions

    def _make(self, index: int) -> tuple[Scene, list[Question], random.Random]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"SceneDataset: expected 0 <= index < {self.num_samples}, got {index}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        if self.level == "easy":
            scene = easy.make_scene(rng, rng.randint(self.min_objects, self.max_objects))
        else:
            scene = hard.make_scene(rng, self.max_alike)
        if self.num_turns == 1:
            kinds = [self.kinds[index % len(self.kinds)]]
        else:
            # Every kind once, then more of those that can ask something new; a scene has one sign.
            again = [kind for kind in self.kinds if kind != "text"] or list(self.kinds)
            kinds = list(self.kinds) + [rng.choice(again) for _ in range(self.num_turns)]
            kinds = kinds[: self.num_turns]
            rng.shuffle(kinds)
        return scene, [LEVELS[self.level].ask(rng, scene, kind) for kind in kinds], rng
