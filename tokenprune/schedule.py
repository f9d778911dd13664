"""How many visual tokens survive at which decoder layer.

The only place where a fraction becomes an integer. A schedule knows layers, fractions and rounding;
it knows no tensors, no model and no strategy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDINGS = ("floor", "nearest")


@dataclass(frozen=True)
class Stage:
    """One cut: from decoder layer `layer` on, the fraction `keep` of the original tokens is alive.

    Args:
        layer: 0-based index of the first layer that runs on the shortened sequence.
        keep: Fraction of the sample's *original* visual tokens alive after the cut, in [0, 1].

    Raises:
        ValueError: If `layer` is not an integer >= 0 or `keep` lies outside [0, 1].
    """

    layer: int
    keep: float

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(
                f"Stage.layer: expected an integer >= 0, got {self.layer!r}. "
                "Layers count from 0, and a cut happens before its layer runs."
            )
        _check_fraction("Stage.keep", self.keep, allow_zero=True)


@dataclass(frozen=True)
class Schedule:
    """The ordered cuts of a run, and the rule that rounds their token counts.

    Args:
        stages: Cuts with strictly rising layers and never rising `keep`; may be empty.
        rounding: `"floor"` is `int(n * keep)`, as in PyramidDrop's released code; `"nearest"` is
            Python's `round(n * keep)` (half to even), as in FastV's. There is no minimum of one:
            7 tokens at 0.125 leave 0.

    Raises:
        ValueError: If the stages are out of order or the rounding is unknown.
    """

    stages: tuple[Stage, ...] = ()
    rounding: str = "floor"

    def __post_init__(self) -> None:
        stages = tuple(self.stages)
        object.__setattr__(self, "stages", stages)
        for stage in stages:
            if not isinstance(stage, Stage):
                raise ValueError(
                    f"Schedule.stages: expected Stage objects, got {stage!r}. "
                    "Write Stage(layer=8, keep=0.5)."
                )
        layers = [stage.layer for stage in stages]
        if any(late <= early for early, late in itertools.pairwise(layers)):
            raise ValueError(
                f"Schedule.stages: expected strictly rising layers, got {layers}. "
                "Sort the stages by layer."
            )
        keeps = [stage.keep for stage in stages]
        if any(late > early for early, late in itertools.pairwise(keeps)):
            raise ValueError(
                f"Schedule.stages: expected keep never to rise, got {keeps}. "
                "A dropped token cannot come back; keep counts from the original tokens."
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"Schedule.rounding: expected one of {list(ROUNDINGS)}, got {self.rounding!r}. "
                'Use "floor" for int(n * keep) or "nearest" for round(n * keep).'
            )

    @classmethod
    def pyramid(
        cls,
        num_layers: int | None = None,
        num_stages: int | None = None,
        lam: float = 0.5,
        layers: Sequence[int] | None = None,
        rounding: str = "floor",
    ) -> Schedule:
        """Keeps lam**s after the s-th cut: PyramidDrop's shape (arXiv 2410.17247, §3.2).

        Args:
            num_layers: Decoder layers of the model. Cuts fall at `num_layers * s // num_stages`
                for s = 1..num_stages-1, unless `layers` is given.
            num_stages: Stages, one more than the number of cuts.
            lam: Keep ratio per stage, in (0, 1].
            layers: Explicit layers of the cuts; `num_stages` then follows, or is checked.
            rounding: See `Schedule`.

        Raises:
            ValueError: If the arguments contradict each other or leave the layers undefined.
        """
        _check_fraction("Schedule.pyramid.lam", lam, allow_zero=False)
        if num_layers is not None:
            _check_count("Schedule.pyramid.num_layers", num_layers)
        if num_stages is not None:
            _check_count("Schedule.pyramid.num_stages", num_stages)
        if layers is not None:
            layers = tuple(layers)
            if num_stages is not None and num_stages != len(layers) + 1:
                raise ValueError(
                    f"Schedule.pyramid: expected one cut fewer than stages, got num_stages="
                    f"{num_stages} with layers={list(layers)}. Leave num_stages out."
                )
        else:
            if num_layers is None or num_stages is None:
                raise ValueError(
                    "Schedule.pyramid: expected num_layers and num_stages, or layers, got "
                    f"num_layers={num_layers}, num_stages={num_stages}, layers=None. "
                    "Say where to cut."
                )
            if num_stages > num_layers:
                raise ValueError(
                    f"Schedule.pyramid.num_stages: expected at most num_layers={num_layers}, got "
                    f"{num_stages}. Every stage needs a layer of its own."
                )
            layers = tuple(num_layers * s // num_stages for s in range(1, num_stages))
        # 0.6 ** 3 is 0.21599999999999997 in binary: int(125 * that) is 26 where 27 is meant.
        stages = tuple(Stage(layer, round(lam**s, 12)) for s, layer in enumerate(layers, start=1))
        schedule = cls(stages=stages, rounding=rounding)
        if num_layers is not None:
            schedule.check_depth(num_layers)
        return schedule

    @classmethod
    def one_shot(cls, layer: int, keep: float, rounding: str = "nearest") -> Schedule:
        """Cuts once, before `layer`, to `keep`: FastV's shape (arXiv 2403.06764, §4)."""
        return cls(stages=(Stage(layer, keep),), rounding=rounding)

    @classmethod
    def explicit(
        cls,
        stages: Sequence[tuple[int, float]],
        rounding: str = "floor",
        of_layers: int | None = None,
        num_layers: int | None = None,
    ) -> Schedule:
        """Cuts given one by one, as `(layer, keep)`.

        Args:
            stages: The cuts, in order.
            rounding: See `Schedule`.
            of_layers: Decoder layers of the model that the cuts are meant for. A shallower one is
                cut at the same depth, rounded up to a layer; of two cuts at one layer the later
                stays.
            num_layers: Decoder layers of the model; while they are unknown nothing is moved.

        Raises:
            ValueError: If the stages are refused, or lie beyond `of_layers`.
        """
        schedule = cls(tuple(Stage(layer, keep) for layer, keep in stages), rounding)
        if of_layers is not None:
            _check_count("Schedule.explicit.of_layers", of_layers)
            schedule.check_depth(of_layers)
        if of_layers is None or num_layers is None or num_layers >= of_layers:
            return schedule
        moved = {-(-s.layer * num_layers // of_layers): s.keep for s in schedule.stages}
        return cls(tuple(Stage(layer, keep) for layer, keep in moved.items()), rounding)

    def count(self, stage: int, num_visual: int) -> int:
        """Visual tokens alive after cut number `stage` (0-based) of `num_visual` original ones."""
        exact = num_visual * self.stages[stage].keep
        return min(num_visual, int(exact) if self.rounding == "floor" else round(exact))

    def lengths(self, num_layers: int, num_visual: int) -> list[int]:
        """Visual tokens that each of `num_layers` layers processes, after a cut at that layer.

        Raises:
            ValueError: If a cut lies beyond the model or `num_visual` is negative.
        """
        _check_count("Schedule.lengths.num_layers", num_layers)
        if isinstance(num_visual, bool) or not isinstance(num_visual, int) or num_visual < 0:
            raise ValueError(
                f"Schedule.lengths.num_visual: expected an integer >= 0, got {num_visual!r}. "
                "Give the number of visual tokens of one sample."
            )
        self.check_depth(num_layers)
        alive, lengths, cuts = num_visual, [], {s.layer: i for i, s in enumerate(self.stages)}
        for layer in range(num_layers):
            if layer in cuts:
                alive = min(alive, self.count(cuts[layer], num_visual))
            lengths.append(alive)
        return lengths

    def check_depth(self, num_layers: int) -> None:
        """Raises ValueError if a cut lies at or beyond layer `num_layers`."""
        beyond = [stage.layer for stage in self.stages if stage.layer >= num_layers]
        if beyond:
            raise ValueError(
                f"Schedule.stages: expected layers below {num_layers}, the model's number of "
                f"decoder layers, got {beyond}. Layers count from 0."
            )


def _check_fraction(where: str, value: object, *, allow_zero: bool) -> None:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if not (0 < number <= 1 or (allow_zero and number == 0)):
        interval = "[0, 1]" if allow_zero else "(0, 1]"
        raise ValueError(
            f"{where}: expected a number in {interval}, got {value!r}. "
            "It is the fraction that stays, never the fraction removed."
        )


def _check_count(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: expected an integer >= 1, got {value!r}. Count from one.")
