"""Runs that differ in their seed alone, averaged; and which groups may be compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.report.intervals import Interval, mean_interval
from tokenprune.report.reading import UNPRUNED, Run, kind_intervals


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


def average(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs that differ in their seed alone, in the order of first appearance."""
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
        details = [kind_intervals(run) for run in members]
        kinds = {
            kind: mean_interval(
                [
                    (run.number(f"accuracy_{kind}"), *detail.get(kind, (None, None)))
                    for run, detail in zip(members, details, strict=True)
                ]
            )
            for kind in _kinds(members)
        }
        accuracy = mean_interval(
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


def _kinds(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(
        name for run in runs for name in run.values if name.startswith("accuracy_")
    )
    return [name.removeprefix("accuracy_") for name in names]


def settings_of(groups: Sequence[Group]) -> list[str]:
    """The settings in the order of first appearance."""
    return list(dict.fromkeys(group.setting for group in groups))


def cost_column(groups: Sequence[Group]) -> str | None:
    """The column that accuracy is drawn against: FLOPs, or tokens where a run has no FLOPs."""
    for column in ("tflops", "avg_tokens", "final_tokens"):
        if any(
            group.mean(column) is not None for group in groups if group.first.strategy != UNPRUNED
        ) or all(group.mean(column) is not None for group in groups):
            return column
    return None
