"""Files of runs and sweeps, and which runs a sweep has."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
from importlib import metadata
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

import tokenprune
from tokenprune.runs import results
from tokenprune.runs.sweeps import expand, run_name, run_names, sweep_name
from tokenprune.runs.tabulation import finish_sweep

MARKS = {"torch": "2", "data.path": "old", "device": "cpu"}
CONFIG = {"seed": 0, "model": {"path": "tiny"}, "strategy": None, "layers": [1, 2]}
METRICS = {
    "strategy": "fastv",
    "schedule": "pyramid",
    "lam": 0.5,
    "num_stages": 3,
    "layers": [2, 4],
    "keeps": [0.5, 0.25],
    "positions": "original",
    "seed": 0,
    "model": "tiny",
    "num_samples": 4,
    "accuracy": 0.75,
    "accuracy_low": 0.3,
    "accuracy_high": 0.95,
    "kinds": {"read": {"accuracy": 0.5}, "text": {"accuracy": 1.0}},
    "avg_tokens": 80.0,
    "final_tokens": 36.0,
    "tflops": 0.1,
    "tflops_ratio": 0.5,
    "prefill_ms": 1.5,
    "kv_mb": 0.2,
    "num_visual": 144.0,
}


def write(folder: Path, **changes: object) -> None:
    results.write_run(
        folder=folder,
        config=CONFIG,
        metrics=METRICS | changes,
        predictions=[{"id": "a", "answer": "é"}],
        kept=[],
        images={"images/a.png": Image.new("RGB", (4, 4))},
        versions=MARKS,
    )


def test_what_is_imported_makes_no_other_run(tmp_path: Path) -> None:
    write(tmp_path)
    assert results.changes(tmp_path, CONFIG | {"imports": ["mine"]}, MARKS) == []
    assert results.changes(tmp_path, CONFIG | {"seed": 1}, MARKS) == ["seed"]


def test_a_run_is_complete_with_its_own_config_only(tmp_path: Path) -> None:
    assert results.changes(tmp_path, CONFIG, MARKS) is None
    write(tmp_path)
    assert results.changes(tmp_path, CONFIG, MARKS) == []
    assert results.changes(tmp_path, CONFIG | {"seed": 1}, MARKS) == ["seed"]
    assert results.changes(tmp_path, CONFIG, MARKS | {"torch": "9"}) == ["torch"]
    # What it logs to, and where it goes on from, make it no other run: its folder may have moved.
    elsewhere = {"logger": {"save_dir": "/elsewhere"}, "ckpt_path": "last"}
    assert results.changes(tmp_path, CONFIG | elsewhere, MARKS) == []
    assert results.changes(tmp_path, CONFIG, MARKS | {"data.path": "new"}) == ["data.path"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "images",
        "kept.json",
        "metrics.json",
        "predictions.jsonl",
        "versions.json",
    ]
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())


def test_by_what_an_evaluation_is_done_makes_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "trainer", {"devices": 1, "precision": None})
    write(tmp_path)
    for trainer, changed in (
        ({"devices": 4, "strategy": "ddp", "precision": None}, []),
        ({"devices": 1, "precision": "bf16-mixed"}, ["trainer"]),
        ({"devices": 1, "limit_predict_batches": 2}, ["trainer"]),
    ):
        assert results.changes(tmp_path, CONFIG | {"trainer": trainer}, MARKS) == changed
    # What a training does depends on all of it.
    other = CONFIG | {"trainer": {"devices": 4, "precision": None}}
    assert results.changes(tmp_path, other, MARKS, results.CONFIG) == ["trainer"]


def test_another_run_of_the_same_name(tmp_path: Path) -> None:
    """It is another by what its config has; newer packages and files make the same run anew."""
    other = CONFIG | {"model": {"path": "small"}}
    assert results.others(tmp_path, other, True) == []
    write(tmp_path)
    assert results.others(tmp_path, CONFIG | {"logger": None, "later": 1}, True) == []
    assert results.others(tmp_path, other, True) == ["model"]
    assert results.others(tmp_path, {"seed": 0}, True) == ["layers", "model"]  # another command's
    places = {results.beside(tmp_path / "none", own, True) for own in (CONFIG, other)}
    assert len(places) == 2
    assert all(place.parent == tmp_path and "none-" in place.name for place in places)
    # By what an evaluation is done makes no other.
    run = CONFIG | {"trainer": {"devices": 1}}
    (tmp_path / "config.yaml").write_text("trainer: {devices: 2}")
    assert results.others(tmp_path, run, True) == []
    assert results.others(tmp_path, run, False) == ["trainer"]
    assert results.beside(tmp_path, run, True) == results.beside(
        tmp_path, run | {"trainer": {"devices": 2}, "logger": "csv"}, True
    )


def test_a_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    """By a reader of our own: OmegaConf's takes ten milliseconds, of each run, for each table."""
    texts = ["1e-5", "2020-01-01", "yes", "null", "~", "01", "1_000", "0x1", "12:30", "1e5", "<<"]
    texts += ["", "=", ".5", "1.", "a: b\n- c", "é图", "${a}", "'q'", "[1]", "2020-01-01 10:00:00"]
    config = {"text": texts, "numbers": [1, 1.0, 1e-5, 1e22, True, None], "inside": {"_x": {}}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    assert results.read_config(tmp_path) == config
    assert all(isinstance(text, str) for text in results.read_config(tmp_path)["text"])
    for content in ("a: [", "- a"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"config\.yaml: expected a run's config in "):
            results.others(tmp_path, config, True)


def test_a_training_from_another_checkpoint_is_another_one(tmp_path: Path) -> None:
    write(tmp_path)
    for start in (None, "last", "auto"):
        assert results.changes(tmp_path, CONFIG | {"ckpt_path": start}, MARKS) == []
    theirs = CONFIG | {"ckpt_path": "/a.ckpt"}
    assert results.changes(tmp_path, theirs, MARKS) == ["ckpt_path"]
    names = [run_name(["seed=0", f"ckpt_path={p}"]) for p in ("last", "auto", "null", "/a", "/b")]
    assert names[:3] == ["seed=0"] * 3
    assert len(set(names)) == 3


def test_the_order_of_overrides_makes_no_other_run() -> None:
    job = ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.3", "seed=1", "positions=original"]
    (name,) = {run_name(order) for order in itertools.permutations(job)}
    assert name == "fastv,pyramid,lam=0.3,positions=original,seed=1"


def test_a_run_that_was_not_timed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    entry = results.row(METRICS | {"prefill_ms": None}, "a")
    results.print_table([entry], "title")
    assert " ms" not in capsys.readouterr().out


def test_a_checkpoint_of_shards_is_something_to_go_on_from(tmp_path: Path) -> None:
    config, marks = {"seed": 0}, {"tokenprune": "1"}
    (tmp_path / results.CONFIG).write_text("seed: 0\n")
    (tmp_path / results.VERSIONS).write_text(json.dumps(marks))
    assert results.changes(tmp_path, config, marks, "last.ckpt") is None
    (tmp_path / "last.ckpt").mkdir()
    assert results.changes(tmp_path, config, marks, "last.ckpt") == []


def test_a_run_from_before_pictures_could_be_smaller_had_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "data", {"batch_size": 4})
    write(tmp_path)
    for scale, changed in ((1.0, []), (0.5, ["data"])):
        asked = CONFIG | {"data": {"batch_size": 4, "image_scale": scale}}
        assert results.changes(tmp_path, asked | {"baseline": "fastv"}, MARKS) == changed


@pytest.mark.parametrize("last", ["config.yaml", "metrics.json"])
def test_f1_a_run_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    real = results.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    before = Path(tmp_path, "new")
    monkeypatch.setattr(results, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(before)
    assert results.changes(before, CONFIG, MARKS) is None
    assert list(before.iterdir()) == []
    monkeypatch.setattr(results, "write_bytes", real)
    write(before)
    whole = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    monkeypatch.setattr(results, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(before, accuracy=0.25)
    assert results.changes(before, CONFIG, MARKS) == []
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == whole


def test_f3_a_table_has_the_runs_of_all_that_share_its_folder(tmp_path: Path) -> None:
    """Whichever sweep writes last, whatever ends while another one writes."""
    write(tmp_path / "b")
    finish_sweep(tmp_path, ["b"])
    write(tmp_path / "a")
    written: list[list[str]] = []

    def writes(rows: list[dict[str, object]]) -> None:
        written.append([str(row["run"]) for row in rows])
        if len(written) == 1:
            write(tmp_path / "c")  # another sweep's

    rows = results.settle(lambda: results.collect(tmp_path), writes)
    assert written == [["a", "b"], ["a", "b", "c"]]
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    finish_sweep(tmp_path, ["c"])
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["c", "a", "b"]


@pytest.mark.parametrize("limit", [results._WHOLE, 1])
def test_the_contents_of_model_and_data_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(results, "_WHOLE", limit)  # large folders are read at their ends
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows.write_text("one")
    config = {
        "model": {"path": str(model), "name_or_path": None},
        "data": {"path": "not/here", "test": {"train_path": str(rows), "split": str(rows)}},
    }
    first = results.fingerprint(config)
    assert set(first) == {"tokenprune", "torch", "transformers"} | {
        "model.path",
        "data.test.train_path",
    }
    os.utime(rows, (1, 1))
    assert results.fingerprint(config) == first
    rows.write_text("two")
    (model / "model.safetensors").write_bytes(b"0")
    second = results.fingerprint(config)
    assert {key for key in first if first[key] != second[key]} == {
        "model.path",
        "data.test.train_path",
    }
    assert "model.path" in results.fingerprint({"model": {"path": "tiny"}})


@pytest.mark.parametrize(
    ("strategy", "published"),
    [("fastv", "original"), ("pyramiddrop", "renumbered"), (None, "original")],
)
def test_a_run_that_was_asked_for_the_published_positions_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str | None, published: str
) -> None:
    """As configs did that had no positions=auto yet."""
    target = {"_target_": "tokenprune.build_strategy", "name": strategy}
    asked = CONFIG | {"strategy": strategy and target, "positions": "auto"}
    for positions in ("original", "renumbered"):
        monkeypatch.setitem(CONFIG, "positions", positions)
        monkeypatch.setitem(CONFIG, "strategy", asked["strategy"])
        write(tmp_path)
        expected = [] if positions == published else ["positions"]
        assert results.changes(tmp_path, asked, MARKS) == expected
        assert results.changes(tmp_path, asked | {"positions": positions}, MARKS) == []
    # What another policy was asked for is another run, whatever was published.
    monkeypatch.setitem(CONFIG, "positions", "auto")
    write(tmp_path)
    assert results.changes(tmp_path, asked, MARKS) == []
    assert results.changes(tmp_path, asked | {"positions": published}, MARKS) == ["positions"]


def test_a_stranger_s_package_of_our_name_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the package index `tokenprune` is another project, which may be installed as well."""
    (tmp_path / "tokenprune-9.9.dist-info").mkdir()
    about = tmp_path / "tokenprune-9.9.dist-info" / "METADATA"
    about.write_text("Metadata-Version: 2.1\nName: tokenprune\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.version("tokenprune") == "9.9"
    assert results.fingerprint({})["tokenprune"] == tokenprune.__version__
    write(tmp_path / "run")
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["tokenprune"] == tokenprune.__version__


def test_runs_on_two_machines_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "before")  # runs of earlier versions do not say
    write(tmp_path / "here", device="cpu")
    finish_sweep(tmp_path)
    assert "device" not in capsys.readouterr().out
    write(tmp_path / "there", device="NVIDIA H200")
    finish_sweep(tmp_path)
    said = capsys.readouterr().out
    assert "device: runs on cpu (1), NVIDIA H200 (1); their times are not to be compared" in said
    assert " device " in said.split("device:")[0]  # a column
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["device"] for row in csv.DictReader(file)] == ["", "cpu", "NVIDIA H200"]


def test_kinds_do_not_pass_for_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", kinds={"low": {"accuracy": 1.0}, "high": {"accuracy": 0.0}})
    rows = results.collect(tmp_path)
    assert (rows[0]["ci_low"], rows[0]["ci_high"]) == (0.3, 0.95)
    assert (rows[0]["accuracy_low"], rows[0]["accuracy_high"]) == (1.0, 0.0)
    results.print_table([*rows, rows[0] | {"data": "other.jsonl"}], "interval from the run")
    assert "other.jsonl" in capsys.readouterr().out  # said where runs differ in it
    with results.write_table(tmp_path, rows).open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert (read["ci_low"], read["accuracy_low"]) == ("0.3", "1.0")


def test_table_is_tidy(tmp_path: Path) -> None:
    write(tmp_path / "first")
    unpruned = {"strategy": "none", "schedule": None, "lam": None, "layers": None, "keeps": None}
    write(tmp_path / "second", **unpruned, kinds={"text": {"accuracy": 0.25}})
    (tmp_path / "third").mkdir()  # interrupted
    rows = results.collect(tmp_path, ["second", "first", "third", "first"])
    path = results.write_table(tmp_path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["run"] for row in read] == ["second", "first"]
    assert list(read[0])[:9] == [*results.COLUMNS[:9]]
    assert read[1]["layers"] == "2 4"
    assert read[1]["keeps"] == "0.5 0.25"
    assert (read[0]["lam"], read[0]["accuracy_read"], read[0]["accuracy_text"]) == ("", "", "0.25")
    assert (read[1]["accuracy_read"], read[1]["accuracy_text"]) == ("0.5", "1.0")


def test_finish_sweep_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish_sweep(tmp_path, ["run"])  # training leaves no metrics
    assert not (tmp_path / "results.csv").exists()
    assert capsys.readouterr().out == ""
    write(tmp_path / "run")
    finish_sweep(tmp_path, ["run"])
    printed = capsys.readouterr().out
    assert "pyramid λ=0.5, 3 stages" in printed
    assert "75.0 %" in printed
    assert (tmp_path / "results.csv").is_file()


def test_cuts_without_lam_are_spelt_out() -> None:
    entry = results.row(METRICS | {"schedule": "explicit", "lam": None}, "run")
    assert results._schedule(entry) == "explicit, 0.5 at 2, 0.25 at 4"


def test_pictures_stay_in_their_folder_and_apart() -> None:
    ids = ["../../etc/passwd", "a/b", "a_b", "图一", "图二", "", "...", "x" * 300, "\ud800"]
    paths = [Path(results.image_name(3, name)) for name in ids]
    assert len(set(paths)) == len(ids)
    assert results.image_name(1, "a") != results.image_name(2, "a")
    for path in paths:
        assert path.parent == Path("images")
        assert path.suffix == ".png"
        assert len(path.name) < 40


def test_grids_expand_one_after_another() -> None:
    grids = [{"strategy": "none"}, {"strategy": "a,b", "schedule.lam": "0.3,0.5", "x": 1}]
    jobs = expand(grids, ["seed=1,2"])
    assert jobs[:2] == [["strategy=none", "seed=1"], ["strategy=none", "seed=2"]]
    assert jobs[2] == ["strategy=a", "schedule.lam=0.3", "x=1", "seed=1"]
    assert len(jobs) == 2 + 8


def test_the_command_line_wins_over_grids() -> None:
    grids = [{"strategy": "none"}, {"strategy": "a,b", "lam": "0.3,0.5"}]
    assert expand(grids, ["strategy=c", "lam=0.7"]) == [["strategy=c", "lam=0.7"]]
    assert expand([], ["strategy=c,d"]) == [["strategy=c"], ["strategy=d"]]


def test_patterns_stand_among_values() -> None:
    def choices(group: str) -> list[str]:
        return ["dart", "random", "rest"] if group == "strategy" else []

    found = expand([], ["strategy=fastv,glob(r*),random"], choices)
    assert found == [["strategy=fastv"], ["strategy=random"], ["strategy=rest"]]
    assert expand([], ["strategy=glob([d*,fastv])"], choices) == [["strategy=dart"]]
    with pytest.raises(
        ValueError, match=r"expected a pattern that fits some of .*got 'glob\(x\*\)'"
    ):
        expand([], ["strategy=fastv,glob(x*)"], choices)
    with pytest.raises(ValueError, match=r"seed: expected values separated by commas, got 'glob"):
        expand([], ["seed=1,glob(x*)"], choices)


def test_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="lam: expected values separated by commas"):
        expand([], ["lam=interval(0,1)"])


def test_names_of_runs_are_stable_and_distinct() -> None:
    job = ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.3", "schedule.num_stages=4"]
    assert run_name(job) == "fastv,pyramid,lam=0.3,num_stages=4"
    assert run_name(["experiment=ablation", *job]) == run_name(job)
    assert run_name([]) == "default"
    paths = [run_name([f"model.path=/a/{name}"]) for name in ("b?", "b*", "x" * 300)]
    assert len(set(paths)) == 3
    assert all(len(path) <= 120 and "/" not in path for path in paths)
    assert run_name(["strategy=random", "strategy.seed=1"]) != run_name(
        ["strategy=random", "seed=1"]
    )
    assert run_names([["strategy=a"], ["schedule=a"], ["x=1"]])[2] == "x=1"
    assert len(set(run_names([["strategy=a"], ["schedule=a"]]))) == 2
    assert run_name(["seed=1", "ckpt_path=last"]) == run_name(["seed=1"])
    assert sweep_name(["a=1", "b=2"]) == sweep_name(["b=2", "a=1"]) != sweep_name(["a=1"])
