"""The page's comparisons: differences, easy and hard questions, and where two methods differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from html_page import Reader
from synthetic_sweep import edit_table, write_sweep

from tokenprune.report import figures, gallery
from tokenprune.report.compared import (
    COMPARED,
    SPLIT,
    comparison_table,
    difficulty_table,
    read_tables,
)
from tokenprune.report.groups import average
from tokenprune.report.page import build
from tokenprune.report.reading import load
from tokenprune.runs import comparisons, difficulty, results

ATTACK = "<script>alert(1)</script>"
COMPARISON = {
    **{"method": "fastv (original)", "schedule": "one_shot", "layers": "2", "keeps": "0.1"},
    **{"against": "random", "against_method": "random", "difference": "0.031", "wins": "20"},
    **{"losses": "5", "ci_low": "0.01", "ci_high": "0.05", "holm_low": "-0.002"},
    **{
        "holm_high": "0.06",
        "test": "mcnemar",
        "p": "0.0041",
        "p_holm": "0.0001",
        "verdict": "open",
    },
    **{"model": "tiny", "data": "scenes"},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    own = {"lams": (0.1,), "num_stages": (4,), "num_pictures": 4, "published": False}
    write_sweep(folder, **own)

    def of_the_few(rows: list[dict[str, str]]) -> None:
        """Accuracies of the questions that are pictured, the only ones with answers."""
        for row in rows:
            lines = (folder / row["run"] / "predictions.jsonl").read_text().splitlines()
            row["accuracy"] = str(sum(json.loads(line)["correct"] for line in lines) / len(lines))

    edit_table(folder, of_the_few)
    with pytest.MonkeyPatch.context() as patch:  # drawing takes its time, and has its own tests
        patch.setattr(figures, "draw", lambda *arguments: [])
        patch.setattr(gallery, "NUM_PICTURES", 0)
        build(folder)
    return folder


def texts(row: tuple[str, tuple[object, ...]]) -> list[str]:
    return [cell.text for cell in row[1]]  # type: ignore[attr-defined]


def test_a_comparison_is_shown_in_points() -> None:
    table = comparison_table([COMPARISON, COMPARISON | {"against": "x", "verdict": "better"}])
    assert [head.name for head in table.heads] == list(COMPARED)
    assert all(head.meaning for head in table.heads)
    assert {head.name for head in table.heads if head.filters} == {
        *("method", "budget", "against", "test", "verdict"),
    }
    assert texts(table.rows[0]) == [
        *("fastv (original)", "one_shot, layer 2, keep 0.1", "random", "+3.1", "+1.0 to +5.0"),
        *("-0.2 to +6.0", "20", "5", "mcnemar", "0.004", "< .001", "open"),
    ]
    assert [table.rows[number][1][-1].tone for number in (0, 1)] == ["", "right"]
    assert texts(table.rows[1])[2] == "x: random"
    several = comparison_table([COMPARISON, COMPARISON | {"model": "other"}])
    assert several.heads[-1].name == "model"
    assert texts(several.rows[1])[-1] == "other"


def test_a_split_is_shown_with_its_intervals() -> None:
    row = {
        **{"method": "downsample", "image_scale": "0.25", "token_share": "0.25"},
        **{"downsample_scale": "0.25", "num_easy": "30", "easy": "0.9", "easy_low": "0.8"},
        **{"easy_high": "0.95", "num_hard": "0", "hard": "", "model": "m", "data": "d"},
    }
    table = difficulty_table([row])
    assert [head.name for head in table.heads] == list(SPLIT)
    shown = [text.replace("\u2060", "").replace("\xa0", " ") for text in texts(table.rows[0])]
    assert shown == [
        *("downsample", "25 % of the pixels", "25", "25", "30", "90.0 % (80.0–95.0)", "0", "–"),
    ]


def test_the_page_compares_what_the_runs_answered(sweep: Path) -> None:
    html = (sweep / "report.html").read_text(encoding="utf-8")
    body = html.partition('id="comparisons"')[2].partition("</table>")[0]
    rows, _ = comparisons.compare_methods(average(load(sweep)[1]))
    assert body.count("<tr>") == 1 + len(rows) == 1 + 4 + 3
    for row in rows:
        assert f"{100 * row['difference']:+.1f}" in body
    assert 'id="difficulty"' not in html  # no smaller picture was asked about


def test_the_page_takes_what_the_sweep_has_written(tmp_path: Path) -> None:
    """It is escaped as all else is."""
    folder = tmp_path / "own"
    write_sweep(folder, strategies=("fastv",), lams=(0.1,), num_stages=(4,), num_pictures=0)
    written = COMPARISON | {"against": ATTACK, "verdict": ATTACK, "method": ATTACK}
    results.write_rows(folder / comparisons.TABLE, comparisons.COLUMNS, [written])
    split = {"method": ATTACK, "num_easy": ATTACK, "easy": "0.5", "hard": ATTACK}
    results.write_rows(folder / difficulty.TABLE, difficulty.COLUMNS, [split])
    html = build(folder).read_text(encoding="utf-8")
    reader = Reader(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert reader.text.count(ATTACK) == 5  # "by the other's name: the other" is one of them
    assert 'id="difficulty"' in html


def test_asked_for_another_baseline_it_compares_anew(sweep: Path) -> None:
    methods = average(load(sweep)[1])
    written = [COMPARISON | {"against": "of the sweep"}]
    results.write_rows(sweep / comparisons.TABLE, comparisons.COLUMNS, written)
    assert read_tables(sweep, methods, [])[0][0]["against"] == "of the sweep"
    rows, split, missing = read_tables(sweep, methods, ["fastv"])
    (sweep / comparisons.TABLE).unlink()
    assert {row["against"] for row in rows} == {"unpruned", "random", "fastv"}
    assert (split, missing) == ([], [])
    with pytest.raises(ValueError, match=r"baseline: expected .*, got 'nothing'\."):
        build(sweep, ["nothing"])


def test_two_methods_are_looked_at_side_by_side(sweep: Path) -> None:
    html = (sweep / "report.html").read_text(encoding="utf-8")
    section = html.partition('id="differences"')[2].partition("</section>")[0]
    names = re.findall(r"<option value=\"\d\"[^>]*>([^<]*)</option>", section)
    assert names == ["pyramiddrop", "fastv", "uniform", "random"] * 2
    assert section.count(" selected>") == 2
    articles = section.split("<article")[1:]
    answers = {}
    for run in sweep.glob("strategy=*"):
        lines = (run / "predictions.jsonl").read_text().splitlines()
        strategy = run.name.partition("strategy=")[2].partition(",")[0]
        answers[strategy] = [record["correct"] for record in map(json.loads, lines)]
    own = [answers[name] for name in names[:4]]
    expected = [outcome for outcome in zip(*own, strict=True) if len(set(outcome)) == 2]
    assert expected  # or the made-up sweep says nothing
    shown = [tuple(map(int, re.findall(r'data-right="(\d)"', part))) for part in articles]
    assert shown == [tuple(map(int, outcome)) for outcome in expected]
    for part in articles:  # the whole picture, and what each method leaves of it
        assert part.count("data:image/jpeg") == 5
    wins = json.loads(re.search(r'data-wins="([^"]*)"', html)[1])  # type: ignore[index]
    assert wins == [[sum(a > b for a, b in zip(x, y, strict=True)) for y in own] for x in own]
    assert 'data-questions="4"' in html


def test_filters_are_for_tables_that_are_there(sweep: Path) -> None:
    html = (sweep / "report.html").read_text(encoding="utf-8")
    bars = re.findall(r'data-table="(\w+)"', html)
    assert bars == ["comparisons", "runs"]
    for name in bars:
        head = html.partition(f'id="{name}"')[2].partition("</thead>")[0]
        assert head.count("data-filter") >= 3


def test_hundreds_of_runs_stay_one_page(tmp_path: Path) -> None:
    """All rows are there to be chosen from; what is said does not grow with them."""
    write_sweep(tmp_path, lams=(0.3,), num_stages=(4,), num_pictures=0)

    def many(rows: list[dict[str, str]]) -> None:
        rows += [{**row, "seed": str(seed), "run": ""} for seed in range(1, 61) for row in rows[:4]]

    edit_table(tmp_path, many)
    html = build(tmp_path).read_text(encoding="utf-8")
    reader = Reader(html)
    assert len([row for row in reader.rows if row]) == 246
    assert len(html) < 2_500_000
    (missing,) = re.findall(r"<h2>What is missing</h2>(.*?)</section>", html, re.DOTALL)
    assert missing.count("<li>") < 6
