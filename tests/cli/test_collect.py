"""`tokenprune collect`: tables from whatever runs there are, whoever has finished them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from synthetic_sweep import write_sweep

from tokenprune.cli import main as cli

SMALL: dict[str, Any] = {"lams": [0.5], "num_stages": [2], "num_pictures": 0}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep() -> Path:
    folder = Path("sweep")
    folder.mkdir()
    write_sweep(folder, **SMALL)
    assert cli.main(["collect", "sweep"]) == 0
    return folder


def test_the_table_is_made_anew(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table(sweep)
    assert len(before) == 6
    (sweep / "results.csv").unlink()
    capsys.readouterr()
    assert cli.main(["collect", "sweep"]) == 0
    assert "6 runs: sweep/results.csv" in capsys.readouterr().out
    assert sorted(table(sweep), key=str) == sorted(before, key=str)


def test_rows_keep_their_order_and_new_ones_follow(sweep: Path) -> None:
    before = table(sweep)
    gone, last = before[0]["run"], sweep / before[-1]["run"]
    shutil.rmtree(sweep / gone)
    shutil.copytree(last, sweep / "0-first-by-name")
    assert cli.main(["collect", "sweep"]) == 0
    runs = [row["run"] for row in before if row["run"] != gone]
    assert [row["run"] for row in table(sweep)] == [*runs, "0-first-by-name"]


def test_folders_of_several_machines_become_one_table(sweep: Path) -> None:
    Path("all").mkdir()
    for name in ("here", "there"):
        shutil.copytree(sweep, Path("all", name))
    first, *others = table(sweep)
    shutil.rmtree(Path("all/here") / first["run"])
    for row in others:
        shutil.rmtree(Path("all/there") / row["run"])
    Path("all/notes").mkdir()
    Path("all/notes/metrics.json").write_text("[]")  # not a run's
    assert cli.main(["collect", "all"]) == 0
    assert {row["run"] for row in table(Path("all"))} == {
        f"there/{first['run']}",
        *(f"here/{row['run']}" for row in others),
    }


def test_measurements_have_a_table_too(capsys: pytest.CaptureFixture[str]) -> None:
    told = {"measure": "prefill", "shape": "tiny", "strategy": "fastv", "status": "out of memory"}
    for batch_size in (8, 1):
        folder = Path("benches", f"batch_size={batch_size}")
        folder.mkdir(parents=True)
        own = {"num_visual": 48, "num_text": 8, "batch_size": batch_size}
        (folder / "bench.json").write_text(json.dumps(told | own))
    assert cli.main(["collect", "benches"]) == 0
    with Path("benches/bench.csv").open(newline="") as file:
        assert [row["batch_size"] for row in csv.DictReader(file)] == ["1", "8"]
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_runs_are_told(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["collect", folder], capsys)
    assert f"collect: expected a folder with complete runs, got none below '{folder}'" in message


def test_a_baseline_that_is_not_there(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["collect", "sweep", "--baseline", "fastv"]) == 0
    assert cli.main(["collect", "sweep", "--baseline", "vscan"]) == 2
    assert "baseline: expected" in capsys.readouterr().err
