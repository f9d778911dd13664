"""The page's gallery: pictured questions, what each strategy kept and answered."""

from __future__ import annotations

from pathlib import Path

from tokenprune.report import canvas, pictures
from tokenprune.report.pictured import Pictured, Record, SampleView
from tokenprune.report.strips import kept_figure
from tokenprune.report.words import budget_words
from tokenprune.runs import results

NUM_PICTURES = 8


def draw(folder: Path, pictured: Pictured, notes: list[str]) -> tuple[list[SampleView], str]:
    """The kept-token pictures at one schedule, the same questions for every strategy.

    Args:
        folder: Where the files go.
        pictured: What there is to show.
        notes: Gets a sentence for each thing that is missing.

    Returns:
        The pictured questions, and what to say of them.
    """
    samples: list[SampleView] = []
    for record in first_of_each_kind(pictured.shared)[:NUM_PICTURES]:
        try:
            samples.append(_sample(folder, len(samples) + 1, record, pictured))
        except (OSError, ValueError) as error:
            notes.append(f"No picture for question {record['id']}: {error}")
    return samples, (
        f"Schedule: {budget_words(pictured.first)}. "
        "The first question of each kind comes first; none is chosen by outcome. "
        "Faded patches are dropped: from the named layer on, the decoder no longer sees them. Of a "
        "method that merges, patches of one colour are in the token whose patch is framed in it."
    )


def first_of_each_kind(records: list[Record]) -> list[Record]:
    """The first question of each kind, then the others in order: no choice by outcome."""
    firsts = {record.get("kind", ""): record for record in reversed(records)}
    chosen = [record for record in records if record is firsts[record.get("kind", "")]]
    return chosen + [record for record in records if record not in chosen]


def _sample(folder: Path, number: int, record: Record, pictured: Pictured) -> SampleView:
    """One question, with its figure."""
    sample, drawn, whole = pictured.view(record, slice(None))
    rows = [
        (
            f"{view.label}: {view.prediction} ({view.verdict})",
            [(panel.title, pictures.stack(panel.images)) for panel in panels],
        )
        for view, panels in zip(sample.strategies, drawn, strict=True)
    ]
    figure = kept_figure(whole.images[0], rows, sample.question, f"Answer: {sample.answer}")
    for kind in ("png", "svg"):
        results.write_bytes(folder / f"kept_{number}.{kind}", canvas.save(figure, kind))
    return sample
