"""A strategy that notes what it is shown, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import tokenprune as tp
from tokenprune.strategy import DecoderKeys, Entered, Need, Normed

DECODER = (
    *(
        tp.DecoderRows(queries, source)
        for queries in ("last", "all", "text")
        for source in ("next", "previous")
    ),
    DecoderKeys("next"),
    DecoderKeys("previous"),
    tp.Change(),
    tp.Projected(),
    Entered(),
    Normed(),
    tp.Text(),
)
TOWER = (
    *(tp.VisionRows(layer, queries) for layer in (0, -2, -1) for queries in ("class", "all")),
    tp.VisionRows(-1, "class", "one"),
    *(tp.VisionStates(layer, what) for layer in (0, -1) for what in ("hidden", "keys", "queries")),
)


@dataclass(frozen=True)
class Witness(tp.ScoreStrategy):
    """Keeps what its place says, and notes what the view shows."""

    wants: tuple[Need, ...] = ()
    notes: list[tuple[int, list[dict[Any, Any]]]] = field(
        default_factory=list, compare=False, repr=False
    )

    def needs(self) -> tuple[Need, ...]:
        return self.wants

    def score(self, view: tp.TokenView) -> Tensor:
        rows = [self._row(view, row) for row in range(len(view.valid))]
        self.notes.append((view.layer, rows))
        return ((view.positions - view.positions[:, :1]) * 37 % 101).float()

    def _row(self, view: tp.TokenView, row: int) -> dict[Any, Any]:
        """What exists of a row; that the rest is zero is seen here."""
        count = int(view.valid[row].sum())
        assert view.valid[row, :count].all(), "valid entries come first"
        seen: dict[Any, Any] = {
            "positions": view.positions[row, :count],
            "hidden": view.hidden[row, :count],
            "places": view.places[row, :count],
            "original": int(view.num_original[row]),
        }
        text = view.text if tp.Text() in self.wants else None
        words = None if text is None else int(text.valid[row].sum())
        for need in self.wants:
            if isinstance(need, tp.DecoderRows):
                rows = view.attend(need.queries, need.source)[row]
                if need.queries == "text" and words is not None:
                    assert not rows[:, words:].any(), "text that does not exist"
                    rows = rows[:, :words]
                seen[need] = rows[..., :count]
            elif isinstance(need, DecoderKeys | Normed):
                both = view.normed if isinstance(need, Normed) else view.keys(need.source)
                seen[need] = (both.visual[row, :count], None if words is None
                              else both.text[row, :words])  # fmt: skip
            elif isinstance(need, tp.VisionRows):
                rows = view.vision_rows(need.layer, need.queries, need.heads)[row]
                seen[need] = rows[:, :count].T
                seen["patches"] = view.has_patches[row, :count]
                seen["tiles"] = view.tiles[row, :count]
            elif isinstance(need, tp.VisionStates):
                seen[need] = view.vision_states(need.layer, need.what)[row, :count]
        if tp.Change() in self.wants:
            seen[tp.Change()] = view.change[row, :count]
        if tp.Projected() in self.wants:
            seen[tp.Projected()] = view.projected[row, :count]
        if Entered() in self.wants:
            seen[Entered()] = view.entered[row, : seen["original"]]
        if text is not None:
            own = text.valid[row]
            seen[tp.Text()] = (text.embeddings[row][own], text.follows[row][own],
                               text.positions[row][own])  # fmt: skip
        return seen
