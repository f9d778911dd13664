"""Figures and the table of λ: what is drawn where, on which axis, and how strategies look."""

from __future__ import annotations

from pathlib import Path

from html_page import Reader
from synthetic_sweep import edit_table, plan, write_run, write_sweep

from tokenprune.report.canvas import save
from tokenprune.report.charts import accuracy_figure
from tokenprune.report.groups import average
from tokenprune.report.intervals import Interval
from tokenprune.report.looks import LOOKS, looks, order
from tokenprune.report.page import build
from tokenprune.report.points import Axis, Point, split
from tokenprune.report.reading import load
from tokenprune.report.tables import matrix
from tokenprune.runs.methods import UNPRUNED


def test_tokens_stand_in_for_missing_flops(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), num_stages=(4,), num_pictures=0)
    edit_table(tmp_path, lambda rows: [name for name in rows[0] if "tflops" not in name])
    build(tmp_path)
    assert "mean tokens" in (tmp_path / "figures" / "accuracy.svg").read_text()


def test_pyramids_that_cut_elsewhere_are_apart(tmp_path: Path) -> None:
    for layers in ([2, 4], [1, 6]):
        for lam in (0.3, 0.5):
            keeps = [lam, lam**2]
            settings = plan("fastv", "pyramid", layers, keeps, lam=lam, num_stages=3, seed=0)
            write_run(tmp_path, settings, num_pictures=0)
    groups = average(load(tmp_path)[1])
    found = matrix(groups, "tiny")
    assert found is not None
    assert found["heads"] == [("3 stages at 1 6", 2), ("3 stages at 2 4", 2)]
    ((_, _, cells),) = found["rows"]
    shown = sorted(cell.text for cell in cells)
    assert shown == sorted(f"{100 * group.accuracy.value:.1f}" for group in groups)
    build(tmp_path)
    assert "3 stages at 2 4" in (tmp_path / "figures" / "accuracy.svg").read_text()


def test_single_cuts_elsewhere_are_apart_and_smaller_pictures_stand_in_every_panel(
    tmp_path: Path,
) -> None:
    for layer in (0, 2):
        for keep in (0.1, 0.5):
            write_run(tmp_path, plan("fastv", "one_shot", [layer], [keep], seed=0), num_pictures=0)
    for scale in (0.5, 0.1, 0.25):
        own = plan("downsample", None, [], [], seed=0, image_scale=scale)
        write_run(tmp_path, own, num_pictures=0)
    html = build(tmp_path).read_text(encoding="utf-8")
    svg = (tmp_path / "figures" / "accuracy.svg").read_text()
    assert ("one_shot at 0" in svg, "one_shot at 2" in svg) == (True, True)
    assert svg.count(">downsample<") == 1  # in the legend, once
    assert "the unpruned model on pictures of 50, 25 and 10 % of the pixels" in html
    places = {group.first.budget for group in average(load(tmp_path)[1])}
    assert len(places) == 7  # three pictures are three budgets


def test_each_model_has_its_own_figures(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), num_pictures=0)

    def second_model(rows: list[dict[str, str]]) -> None:
        rows += [{**row, "model": "other/model", "tflops": "4.5"} for row in rows]

    edit_table(tmp_path, second_model)
    reader = Reader(build(tmp_path).read_text(encoding="utf-8"))
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"accuracy", "kinds", "accuracy_2", "kinds_2"}
    assert "Accuracy against cost (other/model)" in reader.text


def test_strategies_look_the_same_in_every_report() -> None:
    alone = looks(["fastv"])
    among = looks(["random", "zeta", "fastv", "alpha"])
    assert alone["fastv"] == among["fastv"]
    assert len({look.light for look in among.values()}) == 4
    assert order(list(among)) == ["fastv", "alpha", "zeta", "random"]


def test_single_budgets_are_marks_in_every_panel() -> None:
    def point(strategy: str, panel: str, cost: float) -> Point:
        return Point(strategy, strategy, panel, cost, Interval(0.5, 0.4, 0.6))

    points = [point("random", "pyramid", 1.0), point("random", "pyramid", 2.0)]
    points += [point("fastv", "one_shot", 1.5), point(UNPRUNED, "", 3.0)]
    panels, lone, unpruned = split(points)
    assert list(panels) == ["pyramid"]
    assert [p.strategy for p in lone] == ["fastv"]
    assert [p.strategy for p in unpruned] == [UNPRUNED]
    figure = accuracy_figure(points, Axis("FLOPs", 3.0), looks(["fastv"]) | {
        "random": LOOKS["random"]}, narrow=False)  # fmt: skip
    assert b"fastv, one_shot" in save(figure, "svg")
