"""The Pareto front: what no other method beats in accuracy and cost at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_sweep import write_sweep

from tokenprune.report.front import front, front_table
from tokenprune.report.groups import Group, average
from tokenprune.report.intervals import Interval
from tokenprune.report.page import build
from tokenprune.report.reading import load
from tokenprune.runs.methods import Run


def group(accuracy: float, cost: float | None, setting: str = "one") -> Group:
    values: dict[str, Any] = {"strategy": "fastv", "accuracy": str(accuracy)}
    values |= {} if cost is None else {"tflops": str(cost)}
    return Group((Run(values, Path()),), "fastv", setting, Interval(accuracy), {})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_nothing_on_it_is_beaten_and_all_else_is(pairs: list[tuple[int, int]]) -> None:
    groups = [group(accuracy / 10, cost) for accuracy, cost in pairs]
    best = {(g.accuracy.value * 10, g.mean("tflops")) for g in front(groups)}

    def beaten(own: tuple[float, float]) -> bool:
        return any(a >= own[0] and c <= own[1] and (a, c) != own for a, c in pairs)

    expected = {pair for pair in pairs if not beaten(pair)}
    assert {(round(a), c) for a, c in best} == expected
    assert len(front(groups)) == len(expected)


def test_settings_and_what_has_no_cost() -> None:
    groups = [group(0.5, 1), group(0.4, 2), group(0.1, 9, "other"), group(0.9, None)]
    assert front(groups) == [groups[0], groups[2]]
    assert front_table(groups[:2]) is None


def test_the_page_has_it(tmp_path: Path) -> None:
    write_sweep(tmp_path, num_pictures=0, lams=(0.3, 0.7), num_stages=(4,))
    table = front_table(average(load(tmp_path)[1]))
    assert table is not None
    costs = [float(cells[3].value) for _, cells in table.rows]
    assert costs == sorted(costs)
    assert build(tmp_path).read_text().count("The Pareto front") == 2


@pytest.mark.parametrize("num_runs", [1, 2])
def test_no_choice_is_no_front(num_runs: int) -> None:
    assert front_table([group(0.5, 1)] * num_runs) is None
