"""Which schedule meets a budget: one target, a family of schedules, one solution.

A target is a figure of one sample: visual tokens averaged over the layers, FLOPs, bytes. A family
leaves one thing open: a pyramid's lam, a single cut's keep, or the layers of the cuts. Token counts
are integers, so a family reaches some figures and no others: the nearest one is taken, and what is
reported is what its real counts give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from tokenprune.cost.compute import CONVENTIONS
from tokenprune.cost.figures import Figures, Workload
from tokenprune.schedule import Schedule
from tokenprune.strategy import unknown_name

TARGETS = ("avg_tokens", "avg_tokens_outputs", "final_tokens", "tflops", "flops_ratio", "kv_mb")
#: Choices of layers that `solve` looks through, at most; five cuts of 32 layers are 170 000.
MOST_CHOICES = 500_000
#: Layers are spread evenly as far as the figure stays this close to the best that there is.
CLOSE = 0.005


@dataclass(frozen=True)
class Dial:
    """Schedules with one open fraction: the larger it is, the more tokens stay.

    Attributes:
        name: What is open, `"lam"` or `"keep"`.
        build: Makes the schedule of a fraction.
        least: Smallest fraction that `build` takes.
    """

    name: str
    build: Callable[[float], Schedule]
    least: float


@dataclass(frozen=True)
class Places:
    """Schedules with open layers.

    Attributes:
        name: What is open, `"layers"`.
        num_cuts: Cuts to place.
        layers: Layers to place them at.
        build: Makes the schedule of some layers, ascending.
    """

    name: str
    num_cuts: int
    layers: range
    build: Callable[[tuple[int, ...]], Schedule]


def pyramid(layers: Sequence[int], rounding: str = "floor") -> Dial:
    """Pyramids that cut at these layers; lam is open."""
    return Dial("lam", lambda lam: Schedule.pyramid(
        layers=layers, lam=lam, rounding=rounding), 1e-9)  # fmt: skip


def one_shot(layer: int, rounding: str = "nearest") -> Dial:
    """Single cuts at this layer; keep is open."""
    return Dial("keep", lambda keep: Schedule.one_shot(layer, keep, rounding), 0.0)


def pyramid_layers(
    num_layers: int, num_stages: int, lam: float, rounding: str = "floor", first_layer: int = 1
) -> Places:
    """Pyramids with this lam and number of stages; the layers of the cuts are open.

    Args:
        num_layers: Decoder layers of the model.
        num_stages: Stages, one more than the number of cuts.
        lam: Keep ratio per stage.
        rounding: See `tokenprune.Schedule`.
        first_layer: No cut comes before it: FastV needs a layer to look at.
    """
    return Places(
        "layers",
        num_stages - 1,
        range(first_layer, num_layers),
        lambda layers: Schedule.pyramid(layers=layers, lam=lam, rounding=rounding),
    )


def one_shot_layer(
    num_layers: int, keep: float, rounding: str = "nearest", first_layer: int = 1
) -> Places:
    """Single cuts that keep this fraction; the layer is open."""
    return Places(
        "layer",
        1,
        range(first_layer, num_layers),
        lambda layers: Schedule.one_shot(layers[0], keep, rounding),
    )


# ------------------------------------------------------------------------------------- the solver


@dataclass(frozen=True)
class Solution:
    """The schedule of a family that comes nearest to a target.

    Attributes:
        schedule: The schedule.
        solved: What was open, and its value: `("lam", 0.53)`.
        target: Name of the target.
        asked: Its value as asked.
        got: What the schedule's real token counts give.
        possible: Least and most that the family can give.
        workload: What it was solved for.
    """

    schedule: Schedule
    solved: tuple[str, Any]
    target: str
    asked: float
    got: float
    possible: tuple[float, float]
    workload: Workload

    @cached_property
    def figures(self) -> Figures:
        """All figures of the schedule."""
        return self.workload.figures(self.schedule)


def solve(
    workload: Workload,
    family: Dial | Places,
    target: str,
    value: float,
    convention: str = "pyramiddrop",
) -> Solution:
    """The schedule of a family whose figure is nearest to `value`; the cheaper of two.

    Args:
        workload: The decoder and the sample.
        family: What is open.
        target: One of `TARGETS`: mean visual tokens over layer inputs or outputs, tokens of the
            last layer, prefill TFLOPs or their fraction of the unpruned, 10⁶ bytes of cache.
        value: What it should be.
        convention: How TFLOPs are counted, see `tokenprune.cost.flops`.

    Raises:
        KeyError: If the target or the convention is unknown.
        ValueError: If no schedule of the family gives that: says what is possible.
    """
    if target not in TARGETS:
        raise unknown_name("budget", target, list(TARGETS))
    if convention not in CONVENTIONS:
        raise unknown_name("budget.convention", convention, list(CONVENTIONS))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"budget.{target}: expected a number, got {value!r}. Set budget.{target}=192."
        )

    def figure(schedule: Schedule) -> float:
        return workload.figure(schedule, target, convention)

    search = _turn if isinstance(family, Dial) else _place
    schedule, solved, possible = search(workload, family, figure, target, value)  # type: ignore
    return Solution(
        schedule, (family.name, solved), target, value, figure(schedule), possible, workload
    )


Found = tuple[Schedule, Any, tuple[float, float]]


def _turn(
    workload: Workload,
    family: Dial,
    figure: Callable[[Schedule], float],
    target: str,
    value: float,
) -> Found:
    """By bisection: figures rise with the fraction, in steps."""
    low, high = family.least, 1.0
    possible = (figure(family.build(low)), figure(family.build(high)))
    _check_possible(target, value, possible, f"{family.name} in [0, 1]")

    @cache
    def counts(fraction: float) -> tuple[int, ...]:
        return workload.lengths(family.build(fraction))

    if value >= possible[1]:
        low = high
    elif value <= possible[0]:
        high = low
    while counts(low) != counts(high) and high - low > 1e-13:
        middle = (low + high) / 2
        if figure(family.build(middle)) <= value:
            low = middle
        else:
            high = middle
    below, above = (figure(family.build(end)) for end in (low, high))
    best = low if abs(value - below) <= abs(above - value) else high
    fraction = _short(counts, best, family.least)
    return family.build(fraction), fraction, possible


def _short(counts: Callable[[float], tuple[int, ...]], best: float, least: float) -> float:
    """The fraction with the fewest decimals that gives the same token counts."""
    wanted = counts(best)

    def edge(inside: float, outside: float) -> float:
        if counts(outside) == wanted:
            return outside
        while abs(outside - inside) > 1e-13:
            middle = (inside + outside) / 2
            if counts(middle) == wanted:
                inside = middle
            else:
                outside = middle
        return inside

    start, end = edge(best, least), edge(best, 1.0)
    for digits in range(13):
        scale = float(f"1e{digits}")
        middle = round((start + end) / 2 * scale) / scale
        for short in (middle, math.ceil(start * scale) / scale):
            if max(start, least) <= short <= end and counts(short) == wanted:
                return short
    return best


def _place(
    workload: Workload,
    family: Places,
    figure: Callable[[Schedule], float],
    target: str,
    value: float,
) -> Found:
    """By trying all layers; among those that are about as near, the most even stages."""
    number = math.comb(len(family.layers), family.num_cuts)
    if number > MOST_CHOICES:
        raise ValueError(
            f"budget.solve=layers: expected at most {MOST_CHOICES} ways to place the cuts, got "
            f"{number}. Choose fewer stages."
        )
    choices = itertools.combinations(family.layers, family.num_cuts)
    found = [(layers, figure(family.build(layers))) for layers in choices]
    if not found:
        raise ValueError(
            f"budget.solve=layers: expected layers for {family.num_cuts} cuts, got "
            f"{len(family.layers)}. Choose fewer stages."
        )
    possible = min(f for _, f in found), max(f for _, f in found)
    _check_possible(target, value, possible, "these stages")
    nearest = min(abs(f - value) for _, f in found)
    allowed = max(nearest, CLOSE * abs(value))
    ends = family.layers.stop

    def order(choice: tuple[tuple[int, ...], float]) -> tuple[float, ...]:
        layers, reached = choice
        steps = [b - a for a, b in itertools.pairwise((0, *layers, ends))]
        return (sum(step**2 for step in steps), abs(reached - value), reached, *layers)

    layers, _ = min((choice for choice in found if abs(choice[1] - value) <= allowed), key=order)
    solved = layers[0] if family.name == "layer" else list(layers)
    return family.build(layers), solved, possible


def _check_possible(target: str, value: float, possible: tuple[float, float], what: str) -> None:
    low, high = possible
    slack = 1e-9 * max(1.0, abs(high))
    if not low - slack <= value <= high + slack:
        raise ValueError(
            f"budget.{target}: expected {low:.4g} to {high:.4g}, which is what {what} can give, "
            f"got {value:g}. Move the cuts, or choose another schedule."
        )
