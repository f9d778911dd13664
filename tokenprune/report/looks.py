"""How strategies look in every figure: colours, markers, order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenprune.runs.methods import UNPRUNED

# Print colours. In the page they are CSS variables with a second value for dark mode (`THEME`).
INK, SOFT, GRID, SURFACE = "#1c1c1a", "#5f5e5a", "#e4e3de", "#ffffff"


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn in every figure: two colours, and a marker for print in grey."""

    light: str
    dark: str
    marker: str
    dashed: bool = False


# Okabe and Ito's colour-blind-safe hues, with lighter steps for dark surfaces.
LOOKS = {
    "pyramiddrop": Look("#0072b2", "#56b0ee", "o"),
    "fastv": Look("#d55e00", "#f58a3c", "s"),
    "uniform": Look("#00916a", "#2cc79b", "D"),
    "random": Look("#77766f", "#a9a8a0", "v", dashed=True),
}
FURTHER_LOOKS = (
    Look("#b0528b", "#df93c0", "^"),
    Look("#a87b00", "#e6b84a", "P"),
    Look("#2e93bb", "#7fd0f2", "X"),
    Look("#7d5a3c", "#c9a184", "p"),
    Look("#5b54b5", "#a7a1f0", "h"),
    Look("#8a2432", "#e27a88", "*"),
)
THEME = {INK: "#ecebe6", SOFT: "#a8a79f", GRID: "#373733", SURFACE: "#1a1a18"}


def order(strategies: Sequence[str]) -> list[str]:
    """Published methods first, the two baselines without instruction last; no repeats."""
    first, last = ("pyramiddrop", "fastv"), ("uniform", "random")
    names = sorted(set(strategies) - {UNPRUNED})
    middle = [name for name in names if name not in first + last]
    return [n for n in first if n in names] + middle + [n for n in last if n in names]


def looks(strategies: Sequence[str]) -> dict[str, Look]:
    """The look of each strategy: fixed for the shipped ones, further ones by their order."""
    further = [name for name in order(strategies) if name not in LOOKS]
    result = {name: LOOKS[name] for name in order(strategies) if name in LOOKS}
    for number, name in enumerate(further):
        result[name] = FURTHER_LOOKS[number % len(FURTHER_LOOKS)]
    return result
