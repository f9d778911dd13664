"""Questions whose pictures the runs kept: at which schedule they are shown, and how."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.report import canvas, pictures
from tokenprune.report.groups import Group
from tokenprune.report.looks import order
from tokenprune.report.reading import inside, kept_records, predictions
from tokenprune.runs.methods import UNPRUNED, Run

PANEL_PIXELS = 288  # twice the width on the page, for sharp screens
Record = dict[str, Any]


@dataclass(frozen=True)
class PanelView:
    """A stage's picture in the page."""

    title: str
    alt: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class StrategyView:
    """A strategy's answer to a pictured question, and what it kept."""

    strategy: str
    label: str
    prediction: str
    correct: bool | None
    score: float | None
    panels: tuple[PanelView, ...]

    @property
    def is_partial(self) -> bool:
        """Whether its metric calls it neither right nor wrong, as VQA's may."""
        return self.score is not None and 0 < self.score < 1

    @property
    def verdict(self) -> str:
        """A word, or the score."""
        if self.is_partial:
            return f"{self.score:.2g}"
        return {True: "right", False: "wrong", None: "not scored"}[self.correct]


@dataclass(frozen=True)
class SampleView:
    """A pictured question."""

    kind: str
    question: str
    answer: str
    whole: PanelView
    unpruned: StrategyView | None
    strategies: tuple[StrategyView, ...]


@dataclass(frozen=True)
class Pictured:
    """Methods at one schedule whose runs kept pictures.

    Attributes:
        members: Each with the records of its first run's kept.json, in the order of `looks.order`.
        whole: The unpruned run of the same setting.
    """

    members: tuple[tuple[Group, list[Record]], ...]
    whole: Run | None

    @property
    def first(self) -> Run:
        return self.members[0][0].first

    @property
    def groups(self) -> list[Group]:
        return [group for group, _ in self.members]

    @cached_property
    def shared(self) -> list[Record]:
        """The first member's records of the questions that all members have pictures of."""
        ids = [{record["id"] for record in records} for _, records in self.members]
        return [record for record in self.members[0][1] if all(record["id"] in own for own in ids)]

    @cached_property
    def answers(self) -> Mapping[Path | None, Mapping[str, Record]]:
        """By a run's folder and a question's id, what the run answered to shared questions."""
        wanted = {record["id"] for record in self.shared}
        runs = [*(group.first for group in self.groups), *([self.whole] if self.whole else [])]
        return {run.folder: predictions(run, wanted) for run in runs}

    def answer(self, group: Group, record: Record) -> Record:
        """What a method answered; its pictured record where there is no more."""
        records = next(own for member, own in self.members if member is group)
        kept = next(own for own in records if own["id"] == record["id"])
        return self.answers[group.first.folder].get(str(record["id"]), kept)

    def view(
        self, record: Record, stages: slice
    ) -> tuple[SampleView, list[list[pictures.Panel]], pictures.Panel]:
        """A question: its view, each member's panels, and the whole image.

        Args:
            record: Of `shared`.
            stages: Which of the cuts are shown.

        Raises:
            ValueError: Its picture is not to be read, or cannot be drawn.
        """
        image = _open(self.first, str(record["image"]))
        views, drawn = [], []
        whole_panel: pictures.Panel | None = None
        for group, records in self.members:
            own = next(r for r in records if r["id"] == record["id"])
            panels = pictures.panels(image, size=PANEL_PIXELS, **pictures.drawing(own, stages))
            whole_panel = whole_panel or panels[0]
            drawn.append(panels[1:])
            answer = self.answer(group, record)
            views.append(strategy_view(group.first.strategy, group.series, answer, panels[1:]))
        assert whole_panel is not None, "there is a member, or nothing is pictured"
        unpruned = None
        if self.whole is not None and str(record["id"]) in self.answers[self.whole.folder]:
            answer = self.answers[self.whole.folder][str(record["id"])]
            unpruned = strategy_view(UNPRUNED, UNPRUNED, answer, [])
        sample = SampleView(
            kind=str(record.get("kind", "")),
            question=str(record["question"]),
            answer=str(record["answer"]),
            whole=_panel_view(whole_panel, "The whole image"),
            unpruned=unpruned,
            strategies=tuple(views),
        )
        return sample, drawn, whole_panel


def choose(groups: Sequence[Group]) -> Pictured | None:
    """The schedule that is pictured: the one with most methods and stages; None where none is."""
    pictured: dict[tuple[str, ...], list[tuple[Group, list[Record]]]] = {}
    for group in groups:
        records = kept_records(group.first)
        if records and group.first.strategy != UNPRUNED:
            key = (group.setting, *group.first.budget)
            pictured.setdefault(key, []).append((group, records))
    if not pictured:
        return None

    def telling(members: list[tuple[Group, list[Record]]]) -> tuple[float, ...]:
        run, records = members[0][0].first, members[0][1]
        final = len(records[0]["stages"][-1]["kept"]) / max(1, len(records[0]["places"]))
        # Most strategies, most stages, and about the eighth that PyramidDrop's own schedule leaves.
        return (len(members), run.number("num_stages") or 0.0, -abs(math.log(max(final, 1e-3) * 8)))

    members = max(pictured.values(), key=telling)
    ranks = order([group.first.strategy for group, _ in members])
    members = sorted(members, key=lambda pair: ranks.index(pair[0].first.strategy))
    setting = members[0][0].setting
    unpruned = [g.first for g in groups if g.first.strategy == UNPRUNED and g.setting == setting]
    return Pictured(tuple(members), next(iter(unpruned), None))


def strategy_view(
    strategy: str, label: str, answer: Mapping[str, Any], drawn: Sequence[pictures.Panel]
) -> StrategyView:
    """A strategy's answer with its panels."""
    correct, score = answer.get("correct"), answer.get("score")
    return StrategyView(
        strategy=strategy,
        label=label,
        prediction=str(answer.get("prediction", "")),
        correct=None if correct is None else bool(correct),
        score=None if score is None else float(score),
        panels=tuple(_panel_view(panel, f"{label}, tokens alive from") for panel in drawn),
    )


def _panel_view(panel: pictures.Panel, prefix: str) -> PanelView:
    sources = []
    for picture in panel.images:
        stream = io.BytesIO()
        # Full chroma: patch borders are the message.
        picture.save(stream, format="JPEG", quality=90, subsampling=0)
        sources.append(canvas.data_uri("image/jpeg", stream.getvalue()))
    return PanelView(panel.title, f"{prefix} {panel.title}", tuple(sources))


def _open(run: Run, name: str) -> Image.Image:
    """A picture in a run's folder."""
    assert run.folder is not None, "records come from a run's folder"
    path = inside(run.folder, name)
    if path is None or not path.is_file():
        raise ValueError(f"expected an image inside the run's folder, got {name}.")
    with Image.open(path) as opened:
        return opened.convert("RGB")
