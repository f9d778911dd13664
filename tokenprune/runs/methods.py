"""Runs as methods: a strategy at a budget, over its seeds, and which methods may be compared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.runs import results

UNPRUNED = "unpruned"
#: The baseline that gives the unpruned model a smaller picture: `data.image_scale` below 1.
DOWNSAMPLE = results.DOWNSAMPLE
# Entries of a config in which the seeds of one experiment may differ, and those without effect on
# the answers. `data.seed` orders training samples; `data.test.seed` asks other questions.
SEEDS = ("seed", "strategy.seed", "data.seed")
NO_EFFECT = (
    *results.ASIDE,
    *("num_pictures", "data.num_workers", "device", "ckpt_path", "graphs"),
)
# What a method is, told by its row: a budget is the schedule that it asked for.
OWN = ("strategy", "schedule", "positions", "budget", "data.image_scale")
# Entries of a schedule that its row in results.csv tells, as its budget.
BUDGET = ("lam", "num_stages", "layers", "layer", "keep", "stages", "num_layers", "_target_")


@dataclass(frozen=True)
class Run:
    """A row of results.csv, by column name, and the folder that holds the run's other files."""

    values: Mapping[str, str]
    folder: Path | None
    #: The run's resolved config by dotted key; empty where it is not known.
    config: Mapping[str, str] = field(default_factory=dict)
    #: Marks of the contents of its model and data, from versions.json.
    contents: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, str], folder: Path | None) -> Run:
        """A row with what its folder tells; what cannot be read there is left out."""
        if folder is None:
            return cls(values, None)
        return cls(values, folder, _config(folder), _contents(folder))

    def text(self, column: str) -> str:
        return self.values.get(column, "").strip()

    def number(self, column: str) -> float | None:
        try:
            value = float(self.text(column))
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def file(self, name: str) -> Path | None:
        """A file of the run's, where it is there."""
        path = self.folder / name if self.folder else None
        return path if path is not None and path.is_file() else None

    @property
    def strategy(self) -> str:
        name = self.text("strategy")
        return UNPRUNED if name in ("none", "") else name

    @property
    def scale(self) -> float:
        """Share of the pictures' pixels that the model was given."""
        return self.number("image_scale") or 1.0

    @property
    def bare(self) -> str:
        """The strategy without the fields that were changed."""
        return self.strategy.partition("(")[0]

    @property
    def budget(self) -> tuple[str, ...]:
        """What the runs of several strategies must share to be compared."""
        own = tuple(self.text(c) for c in ("schedule", "lam", "num_stages", "layers", "keeps"))
        return (*own, self.text("image_scale")) if self.strategy == DOWNSAMPLE else own

    @property
    def cuts(self) -> tuple[str, str]:
        """Where tokens are dropped, and what is kept there, whatever the schedule is called."""
        return self.text("layers"), self.text("keeps")

    @property
    def circumstances(self) -> dict[str, str]:
        """All but strategy, schedule, positions and seeds: model, data, how answers are made."""
        own = {"model": self.text("model"), "data": self.text("data")}
        marks = {f"contents of {key}": value for key, value in self.contents.items()}
        return own | _without(self.config, OWN) | marks

    @property
    def variant(self) -> dict[str, str]:
        """What tells runs of one strategy at one budget apart, seeds left out."""
        if self.strategy in (UNPRUNED, DOWNSAMPLE):
            return {}
        own = {"positions": self.text("positions")}
        if self.scale != 1:
            own["image_scale"] = self.text("image_scale")
        inside = {k: v for k, v in self.config.items() if k.startswith(("strategy.", "schedule."))}
        return own | {
            key.split(".", 1)[1]: value
            for key, value in _without(inside, ()).items()
            if not key.startswith("schedule.") or key.split(".")[1] not in BUDGET
        }


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone.

    Attributes:
        runs: They, in the order of their rows.
        series: What it is called: the strategy, and in what it differs from others of that name.
        setting: What its runs have in common besides strategy and budget. Only methods of one
            setting are compared.
    """

    runs: tuple[Run, ...]
    series: str
    setting: str

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def num_seeds(self) -> int:
        return len({run.text("seed") for run in self.runs})

    def mean(self, column: str) -> float | None:
        """Mean of a column over the runs that have it."""
        values = [v for run in self.runs if (v := run.number(column)) is not None]
        return math.fsum(values) / len(values) if values else None


def read_runs(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs of rows as `results.collect` gives them."""
    return [Run.read(as_text(row), folder / str(row["run"])) for row in rows]


def mixed(runs: Sequence[Run]) -> list[str]:
    """A sentence for each thing in which rows of one table are of two kinds: devices, contents."""
    told = []
    on = Counter(device for run in runs if (device := run.text("device")))
    if len(on) > 1:
        told.append(
            f"device: runs on {_counts(on)}; their times are not to be compared, and answers may "
            "differ by rounding"
        )
    for key in dict.fromkeys(key for run in runs for key in run.contents):
        marks: dict[str, Counter[str]] = {}
        for run in runs:
            if key in run.contents and key in run.config:
                marks.setdefault(run.config[key], Counter())[run.contents[key][:8]] += 1
        told += [
            f"{key}: {path} had other contents for some runs: {_counts(own)}; only those of the "
            "same are compared"
            for path, own in marks.items()
            if len(own) > 1
        ]
    return told


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} ({number})" for name, number in counter.items())


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as results.csv has it."""
    return {name: "" if value is None else str(value) for name, value in row.items()}


def gather(runs: Sequence[Run]) -> list[Method]:
    """Methods in the order of first appearance; runs without an accuracy are left out."""
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
    methods = []
    for (setting, strategy, _, variant), members in gathered.items():
        told = [
            value if key == "positions" else f"{key}={value}"
            for key, value in variant
            if key in mentioned[strategy] and value
        ]
        series = f"{strategy} ({', '.join(told)})" if told else strategy
        methods.append(Method(tuple(members), series, setting))
    return methods


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
    left_out = (*SEEDS, *NO_EFFECT, *groups)
    decisive = {f"trainer.{name}" for name in results.DECISIVE_TRAINER}
    return {
        key: value
        for key, value in config.items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
        and (not key.startswith("trainer.") or key in decisive)
    }


def _config(folder: Path) -> dict[str, str]:
    """A run's resolved config by dotted key; empty where there is none to read."""
    try:
        return dict(_flat(results.read_config(folder)))
    except (OSError, ValueError):
        return {}  # the report shows it as it is


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _contents(folder: Path) -> dict[str, str]:
    """Marks of the files of a model, of data and of tasks, by the key that names them."""
    try:
        known = json.loads((folder / results.VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = known.items() if isinstance(known, dict) else ()
    marked = ("model.", "data.", "include_path")
    return {key: str(value) for key, value in found if key.startswith(marked)}
