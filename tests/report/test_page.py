"""The report's page: what it shows, that it is safe to open, and what it refuses."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Reader
from PIL import Image
from synthetic_sweep import edit_table, gradient, plan, rewrite, write_run, write_sweep

from tokenprune.report.page import build

ATTACK = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_sweep(folder, lams=(0.3, 0.5), num_pictures=2)
    build(folder)
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Reader:
    return Reader((sweep / "report.html").read_text(encoding="utf-8"))


def test_build_writes_the_page_and_every_figure(sweep: Path) -> None:
    names = {path.name for path in (sweep / "figures").iterdir()}
    stems = ("accuracy", "kinds", "kept_1", "kept_2")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for path in (sweep / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 600
    for path in (sweep / "figures").glob("*.svg"):
        ElementTree.fromstring(path.read_bytes())
    assert not list(sweep.glob("**/.*"))  # drafts


def test_table_shows_every_value_of_results_csv(sweep: Path, page: Reader) -> None:
    with (sweep / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    shown = [row for row in page.rows if row]
    assert [dict(zip(page.columns, row, strict=True)) for row in shown] == [
        {name: row[name] for name in page.columns} for row in rows
    ]
    hidden = set(rows[0]) - set(page.columns)
    assert hidden == {"seed", "num_samples", "num_visual", "model"}  # the same in every run
    assert "questions 500" in re.sub(r"\s+", " ", page.text)
    for name in rows[0]:
        assert name in page.text  # defined


def test_finding_is_computed_from_the_tightest_common_budget(sweep: Path, page: Reader) -> None:
    with (sweep / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    tightest = [row for row in rows if (row["lam"], row["num_stages"]) == ("0.3", "4")]
    best = max(tightest, key=lambda row: float(row["accuracy"]))
    whole = next(row for row in rows if row["strategy"] == "none")
    sentence = page.text.replace("\xa0", " ").replace("\u2060", "")
    assert f"(pyramid, λ = 0.3, 4 stages), {best['strategy']} gets" in sentence
    low, high = (100 * float(best[f"ci_{end}"]) for end in ("low", "high"))
    accuracy = 100 * float(best["accuracy"])
    assert f"{accuracy:.1f} % (95 % interval {low:.1f}–{high:.1f}) of the questions" in sentence
    assert f"the unpruned model {100 * float(whole['accuracy']):.1f} %" in sentence


@pytest.mark.matrix
def test_page_fetches_nothing_and_runs_only_its_own_script(sweep: Path, page: Reader) -> None:
    assert page.addresses()
    assert all(address.startswith("data:image/") for address in page.addresses())
    html = (sweep / "report.html").read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    assert "aria-sort" in script[0]
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(attrs for tag, attrs in page.tags if "http-equiv" in attrs)["content"] or ""
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_page_is_accessible(page: Reader) -> None:
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    heads = [attrs for _, attrs in page.tags if "data-column" in attrs]
    buttons = [attrs for tag, attrs in page.tags if tag == "button"]
    assert len(heads) == len(buttons)
    assert all(head.get("aria-sort") == "none" for head in heads)
    assert "prefers-color-scheme:dark" in page.drawings()[0]


def test_same_input_gives_the_same_bytes(sweep: Path) -> None:
    def read() -> dict[str, bytes]:
        made = [sweep / "report.html", *(sweep / "figures").iterdir()]
        return {path.name: path.read_bytes() for path in made}

    before = read()
    build(sweep)
    assert read() == before


def test_text_from_data_models_and_configs_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>sweep & co"
    folder.mkdir()
    write_sweep(folder, strategies=("random",), lams=(0.3, 0.5), num_stages=(4,), num_pictures=1)

    def attack_row(rows: list[dict[str, str]]) -> list[str]:
        for row in rows:
            old = folder / row["run"]
            row["run"] = f"{row['run'][-40:]}<img src=x onerror=alert(1)>"
            shutil.move(old, folder / row["run"])
            row["model"] = row["schedule"] = ATTACK
            row[f"accuracy_{ATTACK}"] = row["accuracy_read"]
            row["accuracy_$\\frac$ __"] = row["accuracy_read"]
            if row["strategy"] == "fastv":
                row["strategy"] = f'"{ATTACK}'
        return list(rows[0])

    def attack_record(records: list[dict[str, Any]]) -> None:
        for name in ("question", "answer", "prediction", "kind", "id"):
            records[0][name] = f"{name} {ATTACK} $\\frac$"

    edit_table(folder, attack_row)
    for path in folder.glob("*/kept.json"):
        rewrite(path, attack_record)
        line = json.dumps({"id": f"id {ATTACK} $\\frac$", "prediction": ATTACK, "correct": False})
        (path.parent / "predictions.jsonl").write_text(line + "\n")
        (path.parent / "config.yaml").write_text(f"</pre>{ATTACK}")
        (path.parent / "versions.json").write_text(json.dumps({ATTACK: ATTACK}))

    html = build(folder).read_text(encoding="utf-8")
    reader = Reader(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert all(address.startswith("data:image/") for address in reader.addresses())
    for name in ("question", "answer", "prediction", "kind"):
        assert ATTACK in reader.text, name
    figures = [path.read_text() for path in (folder / "figures").glob("*.svg")]
    for svg in [*reader.drawings(), *figures]:
        tree = ElementTree.fromstring(svg)
        assert not [element for element in tree.iter() if element.tag.endswith("script")]
    assert ATTACK in "".join("".join(ElementTree.fromstring(svg).itertext()) for svg in figures)


def test_a_score_between_right_and_wrong_is_told(tmp_path: Path) -> None:
    """As VQA's metric gives: six of ten people said so, or three."""
    settings = plan("fastv", "one_shot", [2], [0.5], num_stages=2, positions="original", seed=0)
    write_run(tmp_path, settings, num_pictures=4)
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
    pictured = [record["id"] for record in json.loads((run / "kept.json").read_text())]
    lines = (run / "predictions.jsonl").read_text().splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    for own, score in zip(pictured, (0.6, 0.3, 1.0, 0.0), strict=True):
        records[own] |= {"score": score, "correct": score >= 0.5}
    text = "".join(json.dumps(record) + "\n" for record in records.values())
    (run / "predictions.jsonl").write_text(text)
    reader = Reader(build(run).read_text(encoding="utf-8"))
    for verdict in ("score 0.6", "score 0.3", "✓ right", "✗ wrong"):
        assert reader.text.count(verdict) == 1, verdict
    trees = map(ElementTree.parse, sorted((run / "figures").glob("kept_*.svg")))
    drawn = "".join("".join(tree.getroot().itertext()) for tree in trees)
    assert "(0.6)" in drawn


def test_pictures_outside_the_run_are_not_read(tmp_path: Path) -> None:
    write_sweep(
        tmp_path, strategies=("random",), lams=(0.5,), published=False, unpruned=False,
        num_stages=(4,), num_pictures=1,
    )  # fmt: skip
    gradient().save(tmp_path / "secret.png")
    for path in tmp_path.glob("*/kept.json"):
        rewrite(path, lambda records: records[0].update(image="../secret.png"))
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "expected an image inside the run" in html
    assert "image/jpeg" not in html


def test_single_run(tmp_path: Path) -> None:
    settings = plan("fastv", "one_shot", [2], [0.5], num_stages=2, positions="renumbered", seed=0)
    write_run(tmp_path, settings, num_pictures=1)
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
    reader = Reader(build(run).read_text(encoding="utf-8"))
    assert "fastv gets" in reader.text
    assert len(reader.drawings()) == 4  # two figures for wide and for narrow screens
    assert "No unpruned run" in reader.text
    assert (run / "figures" / "kept_1.png").is_file()


def test_pictures_of_a_method_that_merges_are_coloured(tmp_path: Path) -> None:
    """Every dropped token went into the first one kept: its patch's colour covers most of them."""

    def merge(records: list[dict[str, Any]]) -> None:
        for stage in records[0]["stages"]:
            alive = set(stage["kept"])
            first = min(alive)
            stage["into"] = [n if n in alive else first for n in range(records[0]["num_visual"])]

    shares = []
    for merges in (False, True):
        folder = tmp_path / str(merges)
        settings = plan("pool", "one_shot", [2], [0.25], num_stages=2, seed=0)
        write_run(folder, settings, num_pictures=1)
        (path,) = folder.glob("*/kept.json")
        if merges:
            rewrite(path, merge)
        page = build(path.parent).read_text(encoding="utf-8")
        assert "patches of one colour are in the token whose patch is framed in it" in page
        with Image.open(path.parent / "figures" / "kept_1.png") as picture:
            red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=int), 2, 0)
        shares.append(float(((red > green + 30) & (green > blue + 30)).mean()))
    assert shares[0] < 0.01 < 0.05 < shares[1]


def test_unpruned_run_alone(tmp_path: Path) -> None:
    write_run(tmp_path, plan("none", None, [], [], seed=0), num_pictures=1)
    assert "no pruned run yet" in build(tmp_path).read_text(encoding="utf-8")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), num_pictures=0)
    edit_table(tmp_path, lambda rows: ["strategy", "schedule", "accuracy"])
    for path in tmp_path.glob("*/*"):
        if path.is_file():
            path.unlink()
    text = Reader(build(tmp_path).read_text(encoding="utf-8")).text
    assert "no run has tflops, avg_tokens or final_tokens" in text
    assert "No pictures of kept tokens" in text


@pytest.mark.parametrize("content", [None, "", "strategy,accuracy\n", "strategy\nrandom\n"])
def test_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ValueError, match=r"^report: expected .*, got .*\. .*\.$"):
        build(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"results.csv"}


def test_missing_folder_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is not a folder"):
        build(tmp_path / "nothing")
    write_run(tmp_path, plan("random", "pyramid", [4], [0.5], seed=0), num_pictures=1)
    next(tmp_path.glob("*/kept.json")).write_text("[{")
    with pytest.raises(ValueError, match=r"expected JSON in .*kept\.json"):
        build(tmp_path)
