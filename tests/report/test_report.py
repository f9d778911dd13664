"""The report of a sweep: what it shows, that it is safe to open, and what it refuses."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from synthetic_sweep import gradient, plan, write_run, write_sweep

from tokenprune.report import charts, pictures, summary
from tokenprune.report import page as report
from tokenprune.report.charts import Axis, Point
from tokenprune.report.summary import Interval

ATTACK = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Collects what the tests ask about a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.columns: list[str] = []
        self.text = ""
        self._in_runs = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "table":
            self._in_runs = named.get("id") == "runs"
        if self._in_runs and tag == "tr":
            self.rows.append([])
        if "data-column" in named:
            self.columns.append(named["data-column"] or "")
        if "data-value" in named:
            self.rows[-1].append(named["data-value"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def addresses(self) -> list[str]:
        names = ("src", "srcset", "href", "data", "action")
        return [attrs[name] or "" for _, attrs in self.tags for name in names if name in attrs]

    def drawings(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        return [
            base64.b64decode(address.removeprefix(prefix)).decode()
            for address in self.addresses()
            if address.startswith(prefix)
        ]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_sweep(folder, lams=(0.3, 0.5), num_pictures=2)
    report.build(folder)
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Reader:
    return Reader((sweep / "report.html").read_text(encoding="utf-8"))


def rewrite(path: Path, change: Any) -> None:
    """Applies `change` to the value in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_table(folder: Path, change: Any) -> None:
    """Applies `change` to the rows of results.csv; it returns the columns to keep."""
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = change(rows) or list(rows[0])
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_build_writes_the_page_and_every_figure(sweep: Path) -> None:
    names = {path.name for path in (sweep / "figures").iterdir()}
    stems = ("accuracy", "kinds", "kept_1", "kept_2")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for path in (sweep / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 600
    for path in (sweep / "figures").glob("*.svg"):
        ElementTree.fromstring(path.read_bytes())
    assert not list(sweep.glob("**/*.part"))


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
    report.build(sweep)
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

    html = report.build(folder).read_text(encoding="utf-8")
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
    reader = Reader(report.build(run).read_text(encoding="utf-8"))
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
    html = report.build(tmp_path).read_text(encoding="utf-8")
    assert "expected an image inside the run" in html
    assert "image/jpeg" not in html


def test_single_run(tmp_path: Path) -> None:
    settings = plan("fastv", "one_shot", [2], [0.5], num_stages=2, positions="renumbered", seed=0)
    write_run(tmp_path, settings, num_pictures=1)
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
    reader = Reader(report.build(run).read_text(encoding="utf-8"))
    assert "fastv gets" in reader.text
    assert len(reader.drawings()) == 4  # two figures for wide and for narrow screens
    assert "No unpruned run" in reader.text
    assert (run / "figures" / "kept_1.png").is_file()


def test_unpruned_run_alone(tmp_path: Path) -> None:
    write_run(tmp_path, plan("none", None, [], [], seed=0), num_pictures=1)
    assert "no pruned run yet" in report.build(tmp_path).read_text(encoding="utf-8")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), num_pictures=0)
    edit_table(tmp_path, lambda rows: ["strategy", "schedule", "accuracy"])
    for path in tmp_path.glob("*/*"):
        if path.is_file():
            path.unlink()
    text = Reader(report.build(tmp_path).read_text(encoding="utf-8")).text
    assert "no run has tflops, avg_tokens or final_tokens" in text
    assert "No pictures of kept tokens" in text


def test_tokens_stand_in_for_missing_flops(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), num_stages=(4,), num_pictures=0)
    edit_table(tmp_path, lambda rows: [name for name in rows[0] if "tflops" not in name])
    report.build(tmp_path)
    assert "mean tokens" in (tmp_path / "figures" / "accuracy.svg").read_text()


@pytest.mark.parametrize("content", [None, "", "strategy,accuracy\n", "strategy\nrandom\n"])
def test_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ValueError, match=r"^report: expected .*, got .*\. .*\.$"):
        report.build(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"results.csv"}


def test_missing_folder_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is not a folder"):
        report.build(tmp_path / "nothing")
    write_run(tmp_path, plan("random", "pyramid", [4], [0.5], seed=0), num_pictures=1)
    next(tmp_path.glob("*/kept.json")).write_text("[{")
    with pytest.raises(ValueError, match=r"expected JSON in .*kept\.json"):
        report.build(tmp_path)


def test_seeds_are_averaged_and_do_not_narrow_the_interval(tmp_path: Path) -> None:
    write_sweep(
        tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), seeds=(0, 1, 2),
        unpruned=False, published=False, num_pictures=0,
    )  # fmt: skip
    _, runs = summary.load(tmp_path)
    (group,) = summary.average(runs)
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
    _, runs = summary.load(tmp_path)
    series = {group.series for group in summary.average(runs)}
    assert series == {"fastv (original)", "fastv (renumbered)"}
    report.build(tmp_path)


def configure(folder: Path, name: str, **config: Any) -> None:
    (folder / name / "config.yaml").write_text(json.dumps(config))


def runs_with(folder: Path, configs: list[dict[str, Any]], **settings: Any) -> list[summary.Group]:
    """Groups of runs that are alike but for their configs."""
    common = plan("fastv", "pyramid", [2, 4], [0.5, 0.25], lam=0.5, num_stages=3, **settings)
    for number, config in enumerate(configs):
        row = write_run(folder, {**common, "seed": number}, num_pictures=0)
        configure(folder, row["run"], **config)
    return summary.average(summary.load(folder)[1])


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
    assert "max_new_tokens=4" in Reader(report.build(tmp_path / "data").read_text()).text

    rounding = [{"schedule": {"lam": 0.5, "rounding": way}} for way in ("floor", "nearest")]
    groups = runs_with(tmp_path / "rounding", rounding)
    series = {"fastv (rounding=floor)", "fastv (rounding=nearest)"}
    assert {group.series for group in groups} == series


def test_models_and_data_go_by_the_names_in_the_table() -> None:
    def run(data: str, **config: str) -> summary.Run:
        values = {"strategy": "fastv", "model": "tiny", "data": data, "accuracy": "0.5"}
        return summary.Run(values, None, config)

    groups = summary.average([run("a", **{"data.path": "/long/a"}), run("b")])
    assert [group.setting for group in groups] == ["tiny, data=a", "tiny, data=b"]


def test_pyramids_that_cut_elsewhere_are_apart(tmp_path: Path) -> None:
    for layers in ([2, 4], [1, 6]):
        for lam in (0.3, 0.5):
            keeps = [lam, lam**2]
            settings = plan("fastv", "pyramid", layers, keeps, lam=lam, num_stages=3, seed=0)
            write_run(tmp_path, settings, num_pictures=0)
    groups = summary.average(summary.load(tmp_path)[1])
    matrix = report._matrix(groups, "tiny")
    assert matrix is not None
    assert matrix["heads"] == [("3 stages at 1 6", 2), ("3 stages at 2 4", 2)]
    ((_, _, cells),) = matrix["rows"]
    shown = sorted(cell.text for cell in cells)
    assert shown == sorted(f"{100 * group.accuracy.value:.1f}" for group in groups)
    report.build(tmp_path)
    assert "3 stages at 2 4" in (tmp_path / "figures" / "accuracy.svg").read_text()


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
    assert summary.student(degrees) == pytest.approx(quantile, abs=5e-5)


def test_kinds_called_like_the_interval_are_shown(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), num_stages=(4,), num_pictures=0)

    def rename(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["accuracy_low"] = row["accuracy_read"]

    edit_table(tmp_path, rename)
    groups = summary.average(summary.load(tmp_path)[1])
    assert "low" in groups[0].kinds
    assert groups[0].accuracy.low is not None


def test_each_model_has_its_own_figures(tmp_path: Path) -> None:
    write_sweep(tmp_path, strategies=("random",), lams=(0.3,), num_stages=(4,), num_pictures=0)

    def second_model(rows: list[dict[str, str]]) -> None:
        rows += [{**row, "model": "other/model", "tflops": "4.5"} for row in rows]

    edit_table(tmp_path, second_model)
    reader = Reader(report.build(tmp_path).read_text(encoding="utf-8"))
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"accuracy", "kinds", "accuracy_2", "kinds_2"}
    assert "Accuracy against cost (other/model)" in reader.text


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
        summary.Group(
            (summary.Run({"strategy": name, **common}, None),), name, Interval(*values), {}
        )
        for name, values in (("fastv", best), ("random", second))
    ]
    sentence = summary.finding(groups).replace("\xa0", " ").replace("\u2060", "")
    assert sentence.endswith(words)


def test_strategies_look_the_same_in_every_report() -> None:
    alone = charts.looks(["fastv"])
    among = charts.looks(["random", "zeta", "fastv", "alpha"])
    assert alone["fastv"] == among["fastv"]
    assert len({look.light for look in among.values()}) == 4
    assert charts.order(list(among)) == ["fastv", "alpha", "zeta", "random"]


def test_single_budgets_are_marks_in_every_panel() -> None:
    def point(strategy: str, panel: str, cost: float) -> Point:
        return Point(strategy, strategy, panel, cost, Interval(0.5, 0.4, 0.6))

    points = [point("random", "pyramid", 1.0), point("random", "pyramid", 2.0)]
    points += [point("fastv", "one_shot", 1.5), point(summary.UNPRUNED, "", 3.0)]
    panels, lone, unpruned = charts.split(points)
    assert list(panels) == ["pyramid"]
    assert [p.strategy for p in lone] == ["fastv"]
    assert [p.strategy for p in unpruned] == [summary.UNPRUNED]
    figure = charts.accuracy_figure(points, Axis("FLOPs", 3.0), charts.looks(["fastv"]) | {
        "random": charts.LOOKS["random"]}, narrow=False)  # fmt: skip
    assert b"fastv, one_shot" in charts.save(figure, "svg")


# Pictures.


def test_overlay_keeps_exactly_the_given_cells() -> None:
    image = gradient((96, 72))
    kept = {(0, 0), (2, 3), (1, 1)}
    picture = pictures.overlay(image, (3, 4), kept)
    for row in range(3):
        for column in range(4):
            box = (column * 24, row * 24, column * 24 + 24, row * 24 + 24)
            before, after = image.crop(box), picture.crop(box)
            same = ImageChops.difference(before, after).getbbox() is None
            assert same == ((row, column) in kept)
            if not same:
                red, green, blue = after.split()
                assert red.tobytes() == green.tobytes() == blue.tobytes()
    with pytest.raises(ValueError, match="expected cells inside 3 x 4, got row 3, column 0"):
        pictures.overlay(image, (3, 4), {(3, 0)})


def test_cells_tile_the_image_when_it_does_not_divide() -> None:
    cells = [
        pictures.box((100, 50), (7, 9), row, column) for row in range(7) for column in range(9)
    ]
    assert sum((right - left) * (low - top) for left, top, right, low in cells) == 100 * 50


@pytest.mark.parametrize("level", [0, 90, 160, 255])
def test_faded_patches_differ_from_any_background(level: int) -> None:
    image = Image.new("RGB", (8, 8), (level, level, level))
    faded = pictures.ghost(image).getpixel((0, 0))
    assert isinstance(faded, tuple)
    assert abs(faded[0] - level) > 80


def test_square_grid_shows_the_central_square_that_clip_sees() -> None:
    image = gradient((200, 100))
    assert pictures.seen(image, [(24, 24)]).tobytes() == image.crop((50, 0, 150, 100)).tobytes()
    assert pictures.seen(image, [(12, 24)]).size == (200, 100)
    assert pictures.seen(image, [(24, 24), (24, 48)]).size == (200, 100)


def test_panels_draw_each_grid_and_ignore_tokens_without_a_place() -> None:
    image = Image.new("RGB", (64, 32), (10, 20, 200))
    base = [(0, 0, row, column) for row in range(2) for column in range(2)]
    tiles = [(0, 1, row, column) for row in range(2) for column in range(4)]
    newline = [(0, 1, 0, -1), (-1, -1, -1, -1)]
    places = base + tiles + newline
    whole, stage = pictures.panels(image, [(2, 2), (2, 4)], places, [(3, [1, 4, 12, 13])], size=64)
    assert (whole.title, stage.title) == ("all 14", "layer 3: 4")
    assert len(stage.images) == 2
    blue = (10, 20, 200)
    above, below = (picture.load() for picture in stage.images)
    assert above is not None
    assert below is not None
    assert [above[x, 8] == blue for x in (8, 40)] == [False, True]
    assert [below[x, 8] == blue for x in (8, 24, 40, 56)] == [True, False, False, False]


def test_strip_has_a_panel_per_stage() -> None:
    places = [(0, 0, row, column) for row in range(4) for column in range(4)]
    strip = pictures.stages(gradient((64, 64)), [(4, 4)], places, [(2, range(8)), (4, [])], 100)
    assert strip.width == 3 * (100 + pictures.GAP) + pictures.GAP
    assert strip.height > 100


@pytest.mark.parametrize(
    ("places", "kept", "message"),
    [
        ([(-1, -1, -1, -1)], [0], "expected visual tokens with a known place"),
        ([(0, 0, 0, 0)], [1], "expected kept indices below 1, got 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    places: list[tuple[int, int, int, int]], kept: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.panels(gradient(), [(1, 1)], places, [(2, kept)])
