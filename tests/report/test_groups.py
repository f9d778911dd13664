"""Runs averaged over seeds: what is compared with what, intervals, and the finding in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from html_page import Reader
from synthetic_sweep import edit_table, plan, write_run, write_sweep

from tokenprune.report.groups import Group, average
from tokenprune.report.intervals import Interval, student
from tokenprune.report.page import build
from tokenprune.report.reading import load
from tokenprune.report.words import finding
from tokenprune.runs.methods import Run
from tokenprune.runs.paired import compare


def test_seeds_are_averaged_and_do_not_narrow_the_interval(tmp_path: Path) -> None:
    write_sweep(
        tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), seeds=(0, 1, 2),
        unpruned=False, published=False, num_pictures=0,
    )  # fmt: skip
    _, runs = load(tmp_path)
    (group,) = average(runs)
    values = [run.number("accuracy") for run in runs]
    assert group.accuracy.value == pytest.approx(sum(v for v in values if v is not None) / 3)
    assert group.accuracy.low is not None
    widths = [(run.number("accuracy") or 0) - (run.number("ci_low") or 0) for run in runs]
    assert group.accuracy.value - group.accuracy.low >= sum(widths) / 3


def test_position_policies_of_one_strategy_are_two_series(tmp_path: Path) -> None:
    for positions in ("original", "renumbered"):
        for keep in (0.3, 0.5):
            settings = plan("fastv", "explicit", [2], [keep], positions=positions, seed=0)
            write_run(tmp_path, settings, num_pictures=0)
    _, runs = load(tmp_path)
    series = {group.series for group in average(runs)}
    assert series == {"fastv (original)", "fastv (renumbered)"}
    build(tmp_path)


def configure(folder: Path, name: str, **config: Any) -> None:
    (folder / name / "config.yaml").write_text(json.dumps(config))


def runs_with(folder: Path, configs: list[dict[str, Any]], **settings: Any) -> list[Group]:
    """Groups of runs that are alike but for their configs."""
    common = plan("fastv", "pyramid", [2, 4], [0.5, 0.25], lam=0.5, num_stages=3, **settings)
    for number, config in enumerate(configs):
        row = write_run(folder, {**common, "seed": number}, num_pictures=0)
        configure(folder, row["run"], **config)
    return average(load(folder)[1])


@pytest.mark.matrix
def test_only_seeds_are_averaged(tmp_path: Path) -> None:
    seeds = [
        {"seed": i, "strategy": {"name": "fastv", "seed": i}, "data": {"path": "a", "seed": i}}
        for i in range(3)
    ]
    (group,) = runs_with(tmp_path / "seeds", seeds)
    assert (group.num_seeds, group.setting) == (3, "tiny")

    data = [{"data": {"path": path, "test": {"seed": i}}} for i, path in enumerate("ab")]
    data += [{"data": {"path": "b", "test": {"seed": 1}}, "max_new_tokens": 4}]
    groups = runs_with(tmp_path / "data", data)
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert groups[0].setting == "tiny, data.path=a, data.test.seed=0"
    assert groups[2].setting == "tiny, data.path=b, data.test.seed=1, max_new_tokens=4"
    assert "max_new_tokens=4" in Reader(build(tmp_path / "data").read_text()).text

    rounding = [{"schedule": {"lam": 0.5, "rounding": way}} for way in ("floor", "nearest")]
    groups = runs_with(tmp_path / "rounding", rounding)
    series = {"fastv (rounding=floor)", "fastv (rounding=nearest)"}
    assert {group.series for group in groups} == series


def test_models_and_data_go_by_the_names_in_the_table() -> None:
    def run(data: str, **config: str) -> Run:
        values = {"strategy": "fastv", "model": "tiny", "data": data, "accuracy": "0.5"}
        return Run(values, None, config)

    groups = average([run("a", **{"data.path": "/long/a"}), run("b")])
    assert [group.setting for group in groups] == ["tiny, data=a", "tiny, data=b"]


# From any table of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (9, 2.2622),
        (10, 2.2281),
        (29, 2.0452),
        (120, 1.9799),
    ],
)
def test_quantiles_of_student(degrees: int, quantile: float) -> None:
    assert student(degrees) == pytest.approx(quantile, abs=5e-5)


def test_kinds_called_like_the_interval_are_shown(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), num_stages=(4,), num_pictures=0)

    def rename(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["accuracy_low"] = row["accuracy_read"]

    edit_table(tmp_path, rename)
    groups = average(load(tmp_path)[1])
    assert "low" in groups[0].kinds
    assert groups[0].accuracy.low is not None


@pytest.mark.parametrize(
    ("best", "second", "words"),
    [
        ((0.9, 0.85, 0.94), (0.5, 0.4, 0.6), "fastv gets 90.0 % (95 % interval 85.0–94.0) of the "
         "questions right, clearly ahead of random with 50.0 % (40.0–60.0)."),
        ((0.6, 0.5, 0.7), (0.5, 0.4, 0.6), "ahead of random with 50.0 % (40.0–60.0), though their "
         "intervals overlap."),
        ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), "level with random with 50.0 % (40.0–60.0)."),
        ((0.6, None, None), (0.5, None, None), "gets 60.0 % of the questions right, ahead of "
         "random with 50.0 %."),
    ],
)  # fmt: skip
def test_finding_says_no_more_than_the_intervals_do(
    best: tuple[float, ...], second: tuple[float, ...], words: str
) -> None:
    common = {"schedule": "one_shot", "layers": "2", "keeps": "0.5"}
    groups = [
        Group((Run({"strategy": name, **common}, None),), name, "", Interval(*values), {})
        for name, values in (("fastv", best), ("random", second))
    ]
    sentence = finding(groups).replace("\xa0", " ").replace("\u2060", "")
    assert sentence.endswith(words)


@pytest.mark.parametrize(
    ("wins", "losses", "words"),
    [
        # Own intervals of .9 and .8 of 100 overlap, yet no question is lost.
        (10, 0, "ahead of random with 80.0 % (70.0–90.0): question by question +10.0 points (95 % "
         "interval +4.2 to +18.6)."),
        (3, 1, "not told apart from random with 80.0 % (70.0–90.0): question by question +2.0 "
         "points (95 % interval -4.3 to +9.0)."),
    ],
)  # fmt: skip
def test_finding_goes_by_the_same_questions(wins: int, losses: int, words: str) -> None:
    groups = [
        Group((Run({"strategy": name, "schedule": "one_shot"}, None),), name, "", accuracy, {})
        for name, accuracy in (
            ("fastv", Interval(0.9, 0.8, 0.95)),
            ("random", Interval(0.8, 0.7, 0.9)),
        )
    ]
    first = [1.0] * wins + [0.0] * losses + [1.0] * (100 - wins - losses)
    second = [0.0] * wins + [1.0] * losses + [1.0] * (100 - wins - losses)
    found = compare([first], [second])
    sentence = finding(groups, lambda best, other: found)
    sentence = sentence.replace("\xa0", " ").replace("\u2060", "")
    assert sentence.endswith(words)
    found = compare([first], [second], [str(place // 2) for place in range(100)])
    assert finding(groups, lambda best, other: found).endswith(", by image).")


def test_the_best_of_many_is_corrected_for_as_many() -> None:
    groups = [
        Group((Run({"strategy": n, "schedule": "one_shot"}, None),), n, "", Interval(v), {})
        for n, v in (("fastv", 0.9), ("pool", 0.8), ("random", 0.7), ("uniform", 0.6))
    ]
    found = compare([[1.0] * 7 + [1.0] * 93], [[0.0] * 7 + [1.0] * 93])
    alone, among = (finding(g, lambda best, other: found) for g in (groups[:2], groups))
    assert "ahead of pool" in alone
    assert "corrected" not in alone
    assert "corrected for 3 comparisons" in among
    assert found.interval(0.05 / 3)[0] < found.interval()[0]
