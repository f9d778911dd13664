"""Methods with their accuracy, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenprune.report.intervals import Interval, mean_interval
from tokenprune.report.reading import kind_intervals
from tokenprune.runs.methods import UNPRUNED, Method, Run, gather


@dataclass(frozen=True)
class Group(Method):
    """A method with its mean accuracy, and that of each question kind."""

    accuracy: Interval
    kinds: Mapping[str, Interval]


def average(runs: Sequence[Run]) -> list[Group]:
    """Methods with intervals over questions and seeds, in the order of first appearance."""
    groups = []
    for method in gather(runs):
        members = method.runs
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
        assert accuracy is not None, "runs without an accuracy are no methods"
        present = {kind: interval for kind, interval in kinds.items() if interval}
        groups.append(Group(members, method.series, method.setting, accuracy, present))
    return groups


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
