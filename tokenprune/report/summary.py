"""The runs of a folder, averaged over seeds, and what they say in one sentence.

Reads what an evaluation wrote (see `results.py`) and draws nothing.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tokenprune.runs import results

UNPRUNED = "unpruned"
# Entries of a config in which the seeds of one experiment may differ, and those without effect on
# the answers. `data.seed` orders training samples; `data.test.seed` asks other questions.
SEEDS = ("seed", "strategy.seed", "data.seed")
NO_EFFECT = ("logger", "num_pictures", "data.num_workers", "trainer.callbacks")
# Entries of a schedule that its row in results.csv tells, as its budget.
BUDGET = ("lam", "num_stages", "layers", "layer", "keep", "stages", "num_layers", "_target_")


@dataclass(frozen=True)
class Interval:
    """A share of right answers with its 95 % interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Run:
    """A row of results.csv, by column name, and the folder that holds the run's other files."""

    values: Mapping[str, str]
    folder: Path | None
    #: The run's resolved config by dotted key; empty where it is not known.
    config: Mapping[str, str] = field(default_factory=dict)

    def text(self, column: str) -> str:
        return self.values.get(column, "").strip()

    def number(self, column: str) -> float | None:
        try:
            value = float(self.text(column))
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    @property
    def strategy(self) -> str:
        name = self.text("strategy")
        return UNPRUNED if name in ("none", "") else name

    @property
    def budget(self) -> tuple[str, ...]:
        """What the runs of several strategies must share to be compared."""
        return tuple(self.text(c) for c in ("schedule", "lam", "num_stages", "layers", "keeps"))

    @property
    def circumstances(self) -> dict[str, str]:
        """All but strategy, schedule, positions and seeds: model, data, how answers are made."""
        own = {"model": self.text("model"), "data": self.text("data")}
        return own | _without(self.config, ("strategy", "schedule", "positions"))

    @property
    def variant(self) -> dict[str, str]:
        """What tells runs of one strategy at one budget apart, seeds left out."""
        if self.strategy == UNPRUNED:
            return {}
        own = {"positions": self.text("positions")}
        inside = {k: v for k, v in self.config.items() if k.startswith(("strategy.", "schedule."))}
        return own | {
            key.split(".", 1)[1]: value
            for key, value in _without(inside, ()).items()
            if not key.startswith("schedule.") or key.split(".")[1] not in BUDGET
        }


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, with their mean accuracy."""

    runs: tuple[Run, ...]
    series: str
    accuracy: Interval
    kinds: Mapping[str, Interval]
    #: What the runs have in common besides strategy and budget: only such groups are compared.
    setting: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def num_seeds(self) -> int:
        return len({run.text("seed") for run in self.runs})

    def mean(self, column: str) -> float | None:
        values = [v for run in self.runs if (v := run.number(column)) is not None]
        return statistics.fmean(values) if values else None


def load(folder: Path) -> tuple[list[str], list[Run]]:
    """The columns and rows of `results.csv`, or the same from the runs' `metrics.json`.

    Raises:
        ValueError: If there is neither, or no row has an accuracy.
    """
    table = folder / "results.csv"
    if not folder.is_dir():
        raise ValueError(
            f"report: expected a folder with results, got {folder}, which is not a folder. "
            "Give the output folder of an evaluation or a sweep."
        )
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, restkey="", restval="")
            rows = [{k: v for k, v in row.items() if k} for row in reader]
            columns = [name for name in reader.fieldnames or [] if name]
        where = str(table)
    else:
        files = [folder / "metrics.json"]
        if not files[0].is_file():
            files = sorted(folder.glob("**/metrics.json"))
        rows = [
            _row(read_object(file), file.parent.relative_to(folder).as_posix()) for file in files
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        where = str(folder)
        if not rows:
            raise ValueError(
                f"report: expected results.csv or a run's metrics.json in {folder}, got neither. "
                "Run `tokenprune eval` first, and give its output folder."
            )
    places = [inside(folder, row.get("run", "")) for row in rows]
    runs = [Run(row, place, _config(place)) for row, place in zip(rows, places, strict=True)]
    if not any(run.number("accuracy") is not None for run in runs):
        raise ValueError(
            f"report: expected rows with a column accuracy in {where}, got {len(runs)} rows with "
            f"columns {columns}. Run the evaluation again, or give another folder."
        )
    return columns, runs


def average(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs that differ in their seed alone, in the order of first appearance.

    The seeds ask about the same questions, so the interval over questions does not shrink with
    their number: it is the mean of the runs' own intervals, widened in quadrature by the 95 %
    interval (Student's t) of the mean over seeds.
    """
    scored = [run for run in runs if run.number("accuracy") is not None]
    settings = _settings(scored)
    gathered: dict[tuple[Any, ...], list[Run]] = {}
    for run, setting in zip(scored, settings, strict=True):
        key = (setting, run.strategy, run.budget, tuple(sorted(run.variant.items())))
        gathered.setdefault(key, []).append(run)
    # A position policy or a rounding is worth a mention only where a budget has it both ways.
    variants: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for key in gathered:
        variants.setdefault(key[:-1], []).append(dict(key[-1]))
    mentioned: dict[str, set[str]] = {}
    for (_, strategy, _), several in variants.items():
        mentioned.setdefault(strategy, set()).update(_differing(several))

    groups = []
    for (setting, strategy, _, variant), members in gathered.items():
        details = [_kind_details(run) for run in members]
        kinds = {
            kind: _mean(
                [
                    (run.number(f"accuracy_{kind}"), *detail.get(kind, (None, None)))
                    for run, detail in zip(members, details, strict=True)
                ]
            )
            for kind in _kinds(members)
        }
        accuracy = _mean(
            [(r.number("accuracy"), r.number("ci_low"), r.number("ci_high")) for r in members]
        )
        assert accuracy is not None, "runs without an accuracy were left out above"
        told = [
            value if key == "positions" else f"{key}={value}"
            for key, value in variant
            if key in mentioned[strategy] and value
        ]
        series = f"{strategy} ({', '.join(told)})" if told else strategy
        present = {kind: interval for kind, interval in kinds.items() if interval}
        groups.append(Group(tuple(members), series, accuracy, present, setting))
    return groups


def _settings(runs: Sequence[Run]) -> list[str]:
    """Each run's circumstances in words: its model, and in what else the runs differ."""
    own = [run.circumstances for run in runs]
    differing = _differing(own)
    # Two names of one choice; the shorter one is a column of results.csv.
    for group in ("model", "data"):
        if len({one[group] for one in own}) == len({_part(one, group) for one in own}):
            differing = [key for key in differing if not key.startswith(f"{group}.")]
    return [
        ", ".join(
            [one["model"], *(f"{k}={one[k]}" for k in differing if k != "model" and k in one)]
        )
        for one in own
    ]


def _part(circumstances: Mapping[str, str], group: str) -> tuple[tuple[str, str], ...]:
    """A group's own entries and its name."""
    return tuple(item for item in circumstances.items() if item[0].split(".")[0] == group)


def _differing(several: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys under which not all have the same."""
    keys = dict.fromkeys(key for one in several for key in one)
    return [key for key in keys if len({one.get(key) for one in several}) > 1]


def _without(config: Mapping[str, str], groups: Sequence[str]) -> dict[str, str]:
    """A config without seeds, what has no effect, and whole groups."""
    left_out = (*SEEDS, *NO_EFFECT, *groups, "ckpt_path")
    return {
        key: value
        for key, value in config.items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def _config(folder: Path | None) -> dict[str, str]:
    """The resolved config of a run by dotted key; empty where there is none to read."""
    path = folder / results.CONFIG if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # whatever the readers of YAML make of something else
        return {}  # the report shows it as it is
    return dict(_flat(loaded)) if isinstance(loaded, dict) else {}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def finding(groups: Sequence[Group]) -> str:
    """One sentence: the best strategy at the tightest budget that the strategies share."""
    settings = settings_of(groups)
    setting = max(settings, key=lambda name: sum(group.setting == name for group in groups))
    inside = [group for group in groups if group.setting == setting]
    pruned = [group for group in inside if group.first.strategy != UNPRUNED]
    whole = next((group for group in inside if group.first.strategy == UNPRUNED), None)
    reference = f"the unpruned model {percent(whole.accuracy)}" if whole else ""
    if not pruned:
        return f"{reference[0].upper()}{reference[1:]} of the questions right; no pruned run yet."

    budgets: dict[tuple[str, ...], list[Group]] = {}
    for group in pruned:
        budgets.setdefault(group.first.budget, []).append(group)
    shared = max(len({g.series for g in members}) for members in budgets.values())
    common = [m for m in budgets.values() if len({g.series for g in m}) == shared]
    column = cost_column(groups)
    tightest = min(common, key=lambda m: (m[0].mean(column) if column else None) or 0.0)
    ranked = sorted(tightest, key=lambda group: -group.accuracy.value)
    best, others = ranked[0], ranked[1:]

    share = best.mean("tflops_ratio")
    cost = "At the tightest budget" if share is None else f"With {100 * share:.0f} % of the FLOPs"
    sentence = (
        f"{cost} ({budget_words(best.first)}), {best.series} gets "
        f"{percent(best.accuracy, '95 % interval ')} of the questions right"
    )
    if others:
        second = others[0]
        apart = _apart(best.accuracy, second.accuracy)
        level = best.accuracy.value == second.accuracy.value
        lead = "level with" if level else "clearly ahead of" if apart else "ahead of"
        sentence += f", {lead} {second.series} with {percent(second.accuracy)}"
        sentence += ", though their intervals overlap" if apart is False and not level else ""
    named = {best.series, *(other.series for other in others[:1])}
    random = next((g for g in others if g.first.strategy == "random"), None)
    rest = []
    if random is not None and random.series not in named:
        rest.append(f"random gets {percent(random.accuracy)}")
    if reference:
        rest.append(reference)
    where = f" ({setting})" if len(settings) > 1 else ""
    return sentence + "".join(f"; {part}" for part in rest) + f"{where}."


def _apart(best: Interval, second: Interval) -> bool | None:
    """Whether the 95 % intervals are disjoint; None where one is unknown."""
    if best.low is None or second.high is None:
        return None
    return best.low > second.high


def percent(interval: Interval, name: str = "") -> str:
    """In words, with the interval in brackets; `name` says there what the numbers are."""
    text = f"{100 * interval.value:.1f} %"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({name}{100 * interval.low:.1f}\u2060–\u2060{100 * interval.high:.1f})"


def budget_words(run: Run) -> str:
    """The schedule and its budget in words."""
    words = [run.text("schedule") or "schedule unknown"]
    if run.number("lam") is not None:
        words.append(f"λ = {short(run.text('lam'))}")
        if run.text("num_stages"):
            words.append(f"{short(run.text('num_stages'))} stages")
    elif run.text("layers"):
        words.append(f"layer {run.text('layers').strip('[]()')}")
        words.append(f"keep {run.text('keeps').strip('[]()')}")
    return ", ".join(words)


def family(run: Run, among: Sequence[Run] = ()) -> str:
    """What the points of a curve share: the schedule without its budget.

    Args:
        run: The run in question.
        among: Others; where they cut a pyramid of as many stages elsewhere, the layers are named.
    """
    name = run.text("schedule") or "schedule unknown"
    if run.number("lam") is None or not run.text("num_stages"):
        return name
    alike = [r for r in among if family(r) == family(run) and r.number("lam") is not None]
    layers = {r.text("layers") for r in alike} | {run.text("layers")}
    where = f" at {run.text('layers').strip('[]()')}" if len(layers) > 1 else ""
    return f"{name}, {short(run.text('num_stages'))} stages{where}"


def _mean(values: Sequence[tuple[float | None, float | None, float | None]]) -> Interval | None:
    """The mean of (value, low, high) over seeds with its interval, see `average`."""
    present = [(value, low, high) for value, low, high in values if value is not None]
    if not present:
        return None
    mean = statistics.fmean(value for value, _, _ in present)
    number = len(present)
    seeds = 0.0
    if number > 1:
        spread = statistics.stdev(value for value, _, _ in present)
        seeds = student(number - 1) * spread / math.sqrt(number)
    downs = [value - low for value, low, _ in present if low is not None]
    ups = [high - value for value, _, high in present if high is not None]
    if len(downs) < number or len(ups) < number:
        return Interval(mean)
    down = math.hypot(statistics.fmean(downs), seeds)
    up = math.hypot(statistics.fmean(ups), seeds)
    return Interval(mean, max(0.0, mean - down), min(1.0, mean + up))


def student(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, by bisection of its closed form.

    Abramowitz & Stegun, 26.7.3 (odd degrees of freedom) and 26.7.4 (even ones).
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term = total = 0.0 if degrees == 1 else math.cos(angle) if odd else 1.0
        for k in range(2 + odd, degrees, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            total += term
        share = math.sin(angle) * total
        return 2 / math.pi * (angle + share) if odd else share

    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return low


def cost_column(groups: Sequence[Group]) -> str | None:
    """The column that accuracy is drawn against: FLOPs, or tokens where a run has no FLOPs."""
    for column in ("tflops", "avg_tokens", "final_tokens"):
        if any(
            group.mean(column) is not None for group in groups if group.first.strategy != UNPRUNED
        ) or all(group.mean(column) is not None for group in groups):
            return column
    return None


def _kind_details(run: Run) -> dict[str, tuple[float | None, float | None]]:
    """(low, high) per kind from a run's metrics.json; results.csv has no room for them."""
    path = run.folder / "metrics.json" if run.folder else None
    if path is None or not path.is_file():
        return {}
    kinds = read_object(path).get("kinds") or {}
    return {kind: (entry.get("low"), entry.get("high")) for kind, entry in kinds.items()}


def _kinds(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(
        name for run in runs for name in run.values if name.startswith("accuracy_")
    )
    return [name.removeprefix("accuracy_") for name in names]


def settings_of(groups: Sequence[Group]) -> list[str]:
    """The settings in the order of first appearance."""
    return list(dict.fromkeys(group.setting for group in groups))


def _row(metrics: Mapping[str, Any], run: str) -> dict[str, str]:
    """metrics.json as the row that results.csv would have."""
    values = results.row(metrics, run)
    return {name: "" if value is None else str(value) for name, value in values.items()}


def short(text: str) -> str:
    """A number with at most four significant digits, whole ones in full; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        return text
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def inside(folder: Path, relative: str) -> Path | None:
    """`folder / relative`, or None where that leads out of the folder."""
    root = folder.resolve()
    path = (root / relative).resolve()
    return path if path.is_relative_to(root) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where there is something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"report: expected a JSON object in {path}, got {type(value).__name__}. "
            "Run that evaluation again."
        )
    return value


def read_json(path: Path) -> Any:
    """The JSON in a file; ValueError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"report: expected JSON in {path}, got {error}. Run that evaluation again."
        ) from error
