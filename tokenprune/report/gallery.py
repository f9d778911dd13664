"""The page's gallery: pictured questions, what each strategy kept and answered."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.report import canvas, pictures
from tokenprune.report.groups import Group
from tokenprune.report.looks import order
from tokenprune.report.reading import inside, kept_records, predictions
from tokenprune.report.strips import kept_figure
from tokenprune.report.words import budget_words
from tokenprune.runs import results
from tokenprune.runs.methods import UNPRUNED, Run

NUM_PICTURES = 5
PANEL_PIXELS = 288  # twice the width on the page, for sharp screens


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


def draw(folder: Path, groups: Sequence[Group], notes: list[str]) -> tuple[list[SampleView], str]:
    """The kept-token pictures at one schedule, the same questions for every strategy.

    Args:
        folder: Where the files go.
        groups: Of all settings.
        notes: Gets a sentence for each thing that is missing.

    Returns:
        The pictured questions, and what to say of them.
    """
    pictured: dict[tuple[str, ...], list[tuple[Group, list[dict[str, Any]]]]] = {}
    for group in groups:
        records = kept_records(group.first)
        if records and group.first.strategy != UNPRUNED:
            key = (group.setting, *group.first.budget)
            pictured.setdefault(key, []).append((group, records))
    if not pictured:
        notes.append("No pictures of kept tokens: no run has a kept.json with stages.")
        return [], ""

    def telling(members: list[tuple[Group, list[dict[str, Any]]]]) -> tuple[float, ...]:
        run, records = members[0][0].first, members[0][1]
        final = len(records[0]["stages"][-1]["kept"]) / max(1, len(records[0]["places"]))
        # Most strategies, most stages, and about the eighth that PyramidDrop's own schedule leaves.
        return (len(members), run.number("num_stages") or 0.0, -abs(math.log(max(final, 1e-3) * 8)))

    members = max(pictured.values(), key=telling)
    ranks = order([group.first.strategy for group, _ in members])
    members = sorted(members, key=lambda pair: ranks.index(pair[0].first.strategy))
    run, setting = members[0][0].first, members[0][0].setting
    unpruned = [g.first for g in groups if g.first.strategy == UNPRUNED and g.setting == setting]
    whole = next(iter(unpruned), None)
    # The first question of each kind, then more in order: no choice by outcome.
    shared = [
        record
        for record in members[0][1]
        if all(any(r["id"] == record["id"] for r in records) for _, records in members)
    ]
    firsts = {record.get("kind", ""): record for record in reversed(shared)}
    chosen = [record for record in shared if record is firsts[record.get("kind", "")]]
    chosen += [record for record in shared if record not in chosen]
    answers = {
        source.folder: predictions(source, {record["id"] for record in chosen[:NUM_PICTURES]})
        for source in [*(group.first for group, _ in members), *([whole] if whole else [])]
    }
    samples: list[SampleView] = []
    for record in chosen[:NUM_PICTURES]:
        try:
            samples.append(_sample(folder, len(samples) + 1, record, members, whole, answers))
        except (OSError, ValueError) as error:
            notes.append(f"No picture for question {record['id']}: {error}")
    return samples, (
        f"Schedule: {budget_words(run)}. "
        "The first question of each kind comes first; none is chosen by outcome. "
        "Faded patches are dropped: from the named layer on, the decoder no longer sees them; a "
        "method that merges has averaged some of them into those that stay."
    )


def _sample(
    folder: Path,
    number: int,
    record: Mapping[str, Any],
    members: Sequence[tuple[Group, list[dict[str, Any]]]],
    whole: Run | None,
    answers: Mapping[Path | None, Mapping[str, Mapping[str, Any]]],
) -> SampleView:
    """One question: its image, and what each strategy kept of it and answered."""
    run = members[0][0].first
    assert run.folder is not None, "records come from a run's folder"
    path = inside(run.folder, str(record["image"]))
    if path is None or not path.is_file():
        raise ValueError(f"expected an image inside the run's folder, got {record['image']}.")
    with Image.open(path) as opened:
        image = opened.convert("RGB")

    views, rows = [], []
    first: list[pictures.Panel] = []
    for group, records in members:
        own = next(r for r in records if r["id"] == record["id"])
        stages = [(int(stage["layer"]), stage["kept"]) for stage in own["stages"]]
        drawn = pictures.panels(image, own["grids"], own["places"], stages, PANEL_PIXELS)
        first = first or drawn
        answer = answers[group.first.folder].get(str(record["id"]), own)
        view = _strategy_view(group.first.strategy, group.series, answer, drawn[1:])
        views.append(view)
        rows.append(
            (
                f"{group.series}: {view.prediction} ({view.verdict})",
                [(panel.title, pictures.stack(panel.images)) for panel in drawn[1:]],
            )
        )
    unpruned = None
    if whole is not None and str(record["id"]) in answers[whole.folder]:
        unpruned = _strategy_view(UNPRUNED, UNPRUNED, answers[whole.folder][str(record["id"])], [])
    question, answer_text = str(record["question"]), str(record["answer"])
    figure = kept_figure(first[0].images[0], rows, question, f"Answer: {answer_text}")
    for kind in ("png", "svg"):
        results.write_bytes(folder / f"kept_{number}.{kind}", canvas.save(figure, kind))
    return SampleView(
        kind=str(record.get("kind", "")),
        question=question,
        answer=answer_text,
        whole=_panel_view(first[0], "The whole image"),
        unpruned=unpruned,
        strategies=tuple(views),
    )


def _strategy_view(
    strategy: str, label: str, answer: Mapping[str, Any], drawn: Sequence[pictures.Panel]
) -> StrategyView:
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
