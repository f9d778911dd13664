"""Which schedule meets a budget: one target, a family of schedules, one solution.

A target is a figure of one sample: visual tokens averaged over the layers, FLOPs, bytes. A family
leaves one thing open: a pyramid's lam, a single cut's keep, or the layers of the cuts. Token counts
are integers, so a family reaches some figures and no others: the nearest one is taken, and what is
reported is what its real counts give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tokenprune import cost
from tokenprune.schedule import Schedule
from tokenprune.strategy import AttentionRows, PruningStrategy, unknown_name

TARGETS = ("avg_tokens", "avg_tokens_outputs", "final_tokens", "tflops", "flops_ratio", "kv_mb")
#: Choices of layers that `solve` looks through, at most; five cuts of 32 layers are 170 000.
MOST_CHOICES = 500_000
#: Layers are spread evenly as far as the figure stays this close to the best that there is.
CLOSE = 0.005


@dataclass(frozen=True)
class Figures:
    """What a schedule gives on one sample.

    Attributes:
        lengths: Visual tokens of each layer.
        avg_tokens: Their mean: what FastV, PyramidDrop and VScan report.
        avg_tokens_outputs: Mean over what the layers leave: what SparseVLM's code reports.
        final_tokens: Visual tokens of the last layer.
        tflops: Prefill of the decoder layers by convention; `"exact"` includes the scoring, not the
            vocabulary projection, and is absent where its formula does not know the layers.
        flops_ratio: The same as fractions of the unpruned.
        kv_mb: Keys and values cached, in 10⁶ bytes; None where layers cache different sizes.
        kv_ratio: The same as a fraction of the unpruned.
    """

    lengths: tuple[int, ...]
    avg_tokens: float
    avg_tokens_outputs: float
    final_tokens: int
    tflops: Mapping[str, float]
    flops_ratio: Mapping[str, float]
    kv_mb: float | None
    kv_ratio: float | None


@dataclass(frozen=True)
class Workload:
    """One sample on one decoder.

    Attributes:
        shape: The decoder.
        num_visual: Visual tokens before any cut.
        num_text: Text tokens beside them; 0, as in most papers' tables, counts the visual ones
            alone.
        dtype: Type of the cached keys and values.
        rows: Attention that the strategy asks for at each cut, by layers like LLaMA's (others cost
            more to ask, see `cost.scoring_flops`).
    """

    shape: cost.DecoderShape
    num_visual: int
    num_text: int = 0
    dtype: str = "float16"
    rows: tuple[AttentionRows, ...] = ()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_visual", self.num_visual, 1),
            ("num_text", self.num_text, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"budget.{name}: expected an integer >= {least}, got {value!r}. "
                    "Give the tokens of one sample."
                )
        cost.dtype_bytes(self.dtype)

    @property
    def conventions(self) -> tuple[str, ...]:
        """Those that know the decoder's layers."""
        return tuple(c for c in cost.CONVENTIONS if c != "exact" or not self.shape.unlike)

    def lengths(self, schedule: Schedule) -> tuple[int, ...]:
        """Visual tokens of each layer."""
        return tuple(schedule.lengths(self.shape.num_layers, self.num_visual))

    def flops(self, schedule: Schedule, convention: str) -> float:
        """Prefill of the decoder layers, and of the scoring by the convention `"exact"`."""
        lengths = self.lengths(schedule)
        total = sum(self._layer(convention)(length) for length in lengths)
        if convention == "exact":
            before = (self.num_visual, *lengths)
            total += sum(
                self._scoring(before[stage.layer], request.queries)
                for stage in schedule.stages
                for request in self.rows
            )
        return total

    def figure(self, schedule: Schedule, target: str, convention: str) -> float:
        """One figure of a schedule, in the target's unit."""
        if target == "tflops":
            return self.flops(schedule, convention) / 1e12
        if target == "flops_ratio":
            return self.flops(schedule, convention) / self.flops(Schedule(), convention)
        lengths = self.lengths(schedule)
        if target == "final_tokens":
            return lengths[-1]
        if target == "kv_mb":
            return cost.kv_bytes(self.shape, lengths, self.num_text, dtype=self.dtype) / 1e6
        return cost.average_tokens(
            lengths, "outputs" if target == "avg_tokens_outputs" else "inputs"
        )

    def figures(self, schedule: Schedule) -> Figures:
        """All figures of a schedule.

        Raises:
            ValueError: If the schedule does not fit the decoder.
        """
        lengths = self.lengths(schedule)
        tera = {c: self.flops(schedule, c) / 1e12 for c in self.conventions}
        whole = {c: self.flops(Schedule(), c) / 1e12 for c in self.conventions}
        kv, whole_kv = (
            self.figure(own, "kv_mb", "") if self.shape.caches_alike else None
            for own in (schedule, Schedule())
        )
        return Figures(
            lengths=lengths,
            avg_tokens=cost.average_tokens(lengths),
            avg_tokens_outputs=cost.average_tokens(lengths, "outputs"),
            final_tokens=lengths[-1],
            tflops=tera,
            flops_ratio={c: tera[c] / whole[c] for c in tera},
            kv_mb=kv,
            kv_ratio=kv / whole_kv if kv is not None and whole_kv is not None else None,
        )

    def _layer(self, convention: str) -> Callable[[int], float]:
        """Cost of one layer by its number of visual tokens, remembered."""
        return _layer_cost(self.shape, self.num_text, convention)

    def _scoring(self, num_visual: int, queries: str) -> float:
        return cost.scoring_flops(self.shape, num_visual + self.num_text, queries)


@cache
def _layer_cost(shape: cost.DecoderShape, num_text: int, convention: str) -> Callable[[int], float]:
    @cache
    def one(length: int) -> float:
        layers = [length] * shape.num_layers
        return cost.flops(shape, layers, num_text, convention) / shape.num_layers

    return one


# --------------------------------------------------------------------------- families of schedules


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
        first_layer: No cut comes before it: FastV needs a layer to look at, DeepStack models have
            added their features by layer 3.
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
    if convention not in cost.CONVENTIONS:
        raise unknown_name("budget.convention", convention, list(cost.CONVENTIONS))
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


# -------------------------------------------------------------------------------------- in configs


def read_model(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[cost.DecoderShape, int | None]:
    """Shape of a model's decoder and visual tokens of one image; no weights are needed.

    Args:
        path: A name of `cost.PRESETS` or its Hub id, `"tiny"`, a folder with a config.json, or any
            other Hub id, whose config is fetched.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Runs code that comes with the config.

    Raises:
        ValueError: If there is no such config.
    """
    known = [p for name, p in cost.PRESETS.items() if path == name or path in p.hub_ids]
    if known and revision is None and not Path(path).is_dir():
        return known[0].shape, known[0].num_visual
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers makes of a broken file
            raise ValueError(
                f"model.path: expected a readable config.json, got {path!r}: "
                f"{str(error).splitlines()[0]}. Save it again."
            ) from error
    else:
        from tokenprune.models import load_config

        config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return cost.DecoderShape.from_config(config), cost.visual_tokens(config)


def workload(
    budget: Mapping[str, Any], model: Mapping[str, Any], strategy: PruningStrategy | None
) -> Workload:
    """The sample that a config's budget is about.

    Args:
        budget: As configs/budget/default.yaml has it.
        model: The config's model; its `path` names a preset or leads to a config.
        strategy: Whose scoring counts, or None.

    Raises:
        ValueError: If the number of visual tokens is neither given nor known.
    """
    path = model.get("path")
    if path is None:
        raise ValueError(
            "budget: expected a model with a path, whose config says its sizes, got one without. "
            "Use model=hub, or set the schedule by hand."
        )
    shape, num_visual = read_model(
        path, model.get("revision"), bool(model.get("trust_remote_code", False))
    )
    num_visual = num_visual if budget.get("num_visual") is None else budget["num_visual"]
    if num_visual is None:
        raise ValueError(
            f"budget.num_visual: expected the visual tokens of a sample, which {path!r} leaves to "
            "the image, got none. Set budget.num_visual=1280."
        )
    return Workload(
        shape,
        num_visual,
        num_text=budget.get("num_text", 0),
        dtype=budget.get("dtype", "float16"),
        rows=() if strategy is None else tuple(strategy.attention_rows()),
    )


def solve_config(
    config: Mapping[str, Any],
    shape: str,
    options: Mapping[str, Any],
    num_layers: int,
    strategy: PruningStrategy | None,
) -> Solution:
    """Solves a config's budget for what its schedule leaves open.

    Args:
        config: Has `budget`, with a target, and `model`.
        shape: Name of the `tokenprune.Schedule` constructor that the config's schedule calls.
        options: Its keyword arguments.
        num_layers: Decoder layers of the model.
        strategy: Whose scoring counts, or None.

    Raises:
        ValueError: If it cannot be solved; says why, and what is possible.
        KeyError: If a name is unknown.
    """
    budget = config["budget"]
    target = asked(budget)
    assert target is not None
    return solve(
        workload(budget, config["model"], strategy),
        family(shape, options, num_layers, budget),
        *target,
        convention=budget.get("convention", "pyramiddrop"),
    )


def asked(budget: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """A config's target and its value; None without one.

    Raises:
        ValueError: If there are two.
    """
    given = {t: budget[t] for t in TARGETS if budget is not None and budget.get(t) is not None}
    if len(given) > 1:
        raise ValueError(
            f"budget: expected one target, got {list(given)}. One of them decides the others."
        )
    return next(iter(given.items()), None)


def family(
    shape: str, options: Mapping[str, Any], num_layers: int, budget: Mapping[str, Any]
) -> Dial | Places:
    """What a config leaves open.

    Args:
        shape: Name of the `tokenprune.Schedule` constructor that the config's schedule calls.
        options: Its keyword arguments.
        num_layers: Decoder layers of the model.
        budget: As configs/budget/default.yaml has it.

    Raises:
        ValueError: If there is nothing to solve for.
    """
    opens = {"pyramid": ("lam", "layers"), "one_shot": ("keep", "layer")}
    if shape not in opens:
        raise ValueError(
            f"budget: expected schedule=pyramid or schedule=one_shot, got {shape!r}, which leaves "
            "nothing open. Choose one of them."
        )
    wanted = opens[shape][0] if budget.get("solve") is None else budget["solve"]
    if wanted not in opens[shape]:
        raise ValueError(
            f"budget.solve: expected one of {list(opens[shape])} for schedule={shape}, got "
            f"{wanted!r}. Leave it out to solve for {opens[shape][0]}."
        )
    first = budget.get("first_layer", 1)
    if wanted in ("layers", "layer") and (
        isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < num_layers
    ):
        raise ValueError(
            f"budget.first_layer: expected an integer from 0 to {num_layers - 1}, got {first!r}. "
            "Cuts come at this layer or later."
        )
    if shape == "one_shot":
        rounding = options.get("rounding", "nearest")
        if wanted == "keep":
            Schedule.one_shot(options["layer"], 1.0).check_depth(num_layers)
            return one_shot(options["layer"], rounding)
        return one_shot_layer(num_layers, options["keep"], rounding, first)
    start = Schedule.pyramid(**{**options, "num_layers": num_layers})
    rounding = options.get("rounding", "floor")
    layers = [stage.layer for stage in start.stages]
    if wanted == "lam":
        return pyramid(layers, rounding)
    return pyramid_layers(num_layers, len(layers) + 1, options.get("lam", 0.5), rounding, first)
