"""One page from a folder of runs: `build` writes `report.html` and its figures.

The page is self-contained (styles, script and pictures inside it, nothing fetched) and everything
that came from a data set, a model or a config is escaped. It is read from the files that an
evaluation writes, so a report can be made anywhere, and again, without the model.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from tokenprune.report import charts, pictures, summary
from tokenprune.report.charts import Axis, Point
from tokenprune.report.summary import UNPRUNED, Group, Run

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parents[1] / "assets" / "report"
NUM_PICTURES = 5
PANEL_PIXELS = 288  # twice the width on the page, for sharp screens

# name in results.csv: (heading, how it is shown, what it is)
COLUMNS: dict[str, tuple[str, str, str]] = {
    "strategy": (
        "strategy",
        "text",
        "The rule that decides which visual tokens survive a cut. none: the unpruned model.",
    ),
    "schedule": (
        "schedule",
        "text",
        "How many survive at which layer. pyramid: the fraction λ^s after cut s; one_shot: one "
        "cut; explicit: a list of cuts.",
    ),
    "lam": ("λ", "number", "The fraction of the visual tokens that each cut of a pyramid keeps."),
    "num_stages": (
        "stages",
        "number",
        "The number of parts into which the cuts divide the decoder, one more than there are cuts.",
    ),
    "layers": ("layers", "text", "The decoder layers before which tokens are dropped, from 0."),
    "keeps": (
        "keep",
        "text",
        "The fraction of the sample's original visual tokens alive after each of these cuts.",
    ),
    "positions": (
        "positions",
        "text",
        "original: survivors keep their position indices; renumbered: they close ranks.",
    ),
    "seed": ("seed", "number", "The seed of the run."),
    "num_samples": ("questions", "number", "The number of questions asked."),
    "accuracy": ("right (%)", "percent", "The share of the questions answered right."),
    "ci_low": ("from (%)", "percent", "Lower end of the 95 % interval of accuracy (Wilson)."),
    "ci_high": ("to (%)", "percent", "Upper end of that interval."),
    "tflops": (
        "FLOPs",
        "flops",
        "Floating-point operations on visual tokens in all decoder layers, mean per question, by "
        "PyramidDrop's formula: 4nd² + 2n²d + 3ndm per layer with n visual tokens, width d and "
        "feed-forward width m. In results.csv in units of 10¹².",
    ),
    "tflops_ratio": ("of unpruned (%)", "percent", "tflops relative to the unpruned model."),
    "avg_tokens": (
        "mean tokens",
        "number",
        "Visual tokens that a decoder layer processes, mean over layers and questions.",
    ),
    "final_tokens": ("final tokens", "number", "Visual tokens in the last decoder layer, mean."),
    "prefill_ms": (
        "prefill (ms)",
        "number",
        "Wall time from the prompt to the first token, per question of a batch, in milliseconds; "
        "the median over batches, on the machine of the run.",
    ),
    "kv_mb": (
        "KV cache (MB)",
        "number",
        "Key-value cache of the whole prompt, mean, in 10⁶ bytes.",
    ),
    "num_visual": ("visual tokens", "number", "Visual tokens before any cut, mean."),
    "model": ("model", "text", "The checkpoint that was evaluated."),
    "data": ("data", "text", "The data that was asked about."),
    "run": ("run", "text", "The folder of the run, relative to this page."),
}


@dataclass(frozen=True)
class Drawing:
    """A figure in the page, for wide and narrow screens; `width` is that of the wide one."""

    heading: str
    caption: str
    alt: str
    wide: str
    narrow: str
    width: int


@dataclass(frozen=True)
class PanelView:
    """A stage's picture in the page."""

    title: str
    alt: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class StrategyView:
    """A strategy's answer to a pictured question, and what it kept."""

    strategy: str
    label: str
    prediction: str
    correct: bool | None
    score: float | None
    panels: tuple[PanelView, ...]

    @property
    def is_partial(self) -> bool:
        """Whether its metric calls it neither right nor wrong, as VQA's may."""
        return self.score is not None and 0 < self.score < 1

    @property
    def verdict(self) -> str:
        """A word, or the score."""
        if self.is_partial:
            return f"{self.score:.2g}"
        return {True: "right", False: "wrong", None: "not scored"}[self.correct]


@dataclass(frozen=True)
class SampleView:
    """A pictured question."""

    kind: str
    question: str
    answer: str
    whole: PanelView
    unpruned: StrategyView | None
    strategies: tuple[StrategyView, ...]


@dataclass(frozen=True)
class Cell:
    """A value in a table: the words shown, what it sorts by, and its tint in [0, 1]."""

    text: str
    value: str = ""
    note: str = ""
    tint: float = 0.0
    best: bool = False


@dataclass
class Page:
    """What the template shows."""

    title: str
    finding: str
    facts: list[tuple[str, str]]
    drawings: list[Drawing] = field(default_factory=list)
    samples: list[SampleView] = field(default_factory=list)
    samples_caption: str = ""
    notes: list[str] = field(default_factory=list)


def build(folder: Path) -> Path:
    """Writes `report.html` and `figures/` into a folder of runs, and returns the page's path.

    Args:
        folder: A sweep (`results.csv` with its run folders) or a single run (`metrics.json`).

    Raises:
        ValueError: If the folder holds no results, or a file of a run cannot be read.
    """
    folder = Path(folder)
    columns, runs = summary.load(folder)
    groups = summary.average(runs)
    page = Page(title=_title(folder), finding=summary.finding(groups), facts=_facts(runs))

    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    axes = _axes(groups)
    looks = charts.looks([group.first.strategy for group in groups])
    for number, model in enumerate(summary.settings_of(groups)):
        suffix = f"_{number + 1}" if number else ""
        inside = [group for group in groups if group.setting == model]
        name = f" ({model})" if len(summary.settings_of(groups)) > 1 else ""
        page.drawings += _draw(page, figures, inside, axes.get(model), looks, suffix, name)
    _gallery(page, figures, groups)

    html = (
        _environment()
        .get_template("report.html")
        .render(
            page=page,
            matrices=[
                m
                for model in summary.settings_of(groups)
                if (m := _matrix(groups, model)) is not None
            ],
            table=_table(columns, runs),
            definitions=_definitions(columns),
            versions=_versions(runs),
            config=_config(runs),
            looks=looks,
            seeds=max(group.num_seeds for group in groups),
            style=_asset("report.css"),
            script=_asset("report.js"),
            script_hash=_hash(_asset("report.js")),
        )
    )
    target = folder / "report.html"
    _write(target, html.encode("utf-8"))
    for note in page.notes:
        log.warning("report: %s", note)
    return target


def _draw(
    page: Page,
    figures: Path,
    groups: Sequence[Group],
    axis: tuple[Axis, Callable[[Group], float | None]] | None,
    drawn: Mapping[str, charts.Look],
    suffix: str,
    name: str,
) -> list[Drawing]:
    """Accuracy against cost, overall and per kind, for one model."""
    if axis is None:
        page.notes.append(
            f"No curves{name}: no run has tflops, avg_tokens or final_tokens, so there is no cost "
            "to draw accuracy against."
        )
        return []
    scale, cost = axis
    points = [
        Point(
            strategy=group.first.strategy,
            series=group.series,
            panel=summary.family(group.first, [other.first for other in groups]),
            cost=cost(group),
            accuracy=group.accuracy,
            kinds=group.kinds,
        )
        for group in groups
    ]
    points = [point for point in points if point.cost is not None]
    strategies = {point.strategy for point in points}
    if UNPRUNED not in strategies:
        page.notes.append(f"No unpruned run{name}: the reference line is missing from the curves.")
    if "random" not in strategies:
        page.notes.append(f"No run of random{name}: the baseline is missing from the curves.")

    seeds = max(group.num_seeds for group in groups)
    bars = "Bars are 95 % intervals" + (
        f" over questions and up to {seeds} seeds. " if seeds > 1 else " over the questions. "
    )
    _, lone, _ = charts.split(points)
    star = "Star and dotted line: the unpruned model." if UNPRUNED in strategies else ""
    hollow = "Hollow marks are schedules with a single budget. " if lone else ""
    caption = (
        f"{bars}Strategies at one budget cost the same; their points are drawn side by side. "
        f"{hollow}{star}"
    )
    drawings = [
        _drawing(
            figures,
            f"accuracy{suffix}",
            f"Accuracy against cost{name}",
            caption,
            f"Line chart of right answers against {scale.quantity}. " + _spoken(points),
            drawn,
            lambda narrow: charts.accuracy_figure(points, scale, drawn, narrow),
        )
    ]
    kinds = list(dict.fromkeys(kind for point in points for kind in point.kinds))
    if kinds:
        halves = [
            (interval.high - interval.low) / 2
            for point in points
            for interval in point.kinds.values()
            if interval.low is not None and interval.high is not None
        ]
        spread = (
            f" A point is uncertain by about ± {100 * statistics.median(halves):.0f} percentage "
            "points (95 %)."
            if halves
            else ""
        )
        drawings.append(
            _drawing(
                figures,
                f"kinds{suffix}",
                f"Accuracy per question kind{name}",
                f"The same runs, question kind by question kind.{spread}",
                f"Small multiples of right answers against {scale.quantity} for the question kinds "
                + ", ".join(kinds)
                + ".",
                drawn,
                lambda narrow: charts.kinds_figure(points, scale, drawn, narrow),
            )
        )
    else:
        page.notes.append(f"No accuracy per question kind{name}: the runs do not report any.")
    return drawings


def _drawing(
    figures: Path,
    name: str,
    heading: str,
    caption: str,
    alt: str,
    drawn: Mapping[str, charts.Look],
    draw: Callable[[bool], Figure],
) -> Drawing:
    """Writes PNG and SVG of a figure, and makes its two versions for the page."""
    figure = draw(False)
    svg = charts.save(figure, "svg")
    _write(figures / f"{name}.svg", svg)
    _write(figures / f"{name}.png", charts.save(figure, "png"))
    small = charts.save(draw(True), "svg")
    large, narrow = (
        _data_uri("image/svg+xml", charts.themed(text.decode("utf-8"), drawn).encode("utf-8"))
        for text in (svg, small)
    )
    pixels = round(96 * float(figure.get_figwidth()))
    return Drawing(heading, caption, alt, large, narrow, pixels)


def _spoken(points: Sequence[Point]) -> str:
    """The range of every series, for those who cannot see the curve."""
    parts = []
    for series in dict.fromkeys(point.series for point in points):
        values = [point.accuracy.value for point in points if point.series == series]
        low, high = 100 * min(values), 100 * max(values)
        between = f"{low:.1f} %" if len(values) == 1 else f"{low:.1f} % to {high:.1f} %"
        parts.append(f"{series}: {between}")
    return "; ".join(parts) + "."


def _axes(
    groups: Sequence[Group],
) -> dict[str, tuple[Axis, Callable[[Group], float | None]]]:
    """The horizontal axis of each model, and what reads a group's place on it."""
    result = {}
    for model in summary.settings_of(groups):
        inside = [group for group in groups if group.setting == model]
        column = summary.cost_column(inside)
        if column is None:
            continue
        factor, label = 1.0, COLUMNS[column][0]
        if column == "tflops":
            factor, unit = _flops_unit(group.mean(column) for group in inside)
            label = f"{unit} of the visual tokens per question"
        whole = next((g.mean(column) for g in inside if g.first.strategy == UNPRUNED), None)
        if whole:
            whole *= factor
        result[model] = (Axis(label, whole), _reader(column, factor))
    return result


def _reader(column: str, factor: float) -> Callable[[Group], float | None]:
    def read(group: Group) -> float | None:
        value = group.mean(column)
        return None if value is None else value * factor

    return read


def _flops_unit(values: Iterable[float | None]) -> tuple[float, str]:
    """The factor from tera to the unit in which the largest value reads well."""
    largest = max((value for value in values if value is not None), default=1.0)
    for factor, unit in ((1.0, "TFLOPs"), (1e3, "GFLOPs"), (1e6, "MFLOPs")):
        if largest * factor >= 0.5:
            return factor, unit
    return 1e6, "MFLOPs"


def _gallery(page: Page, figures: Path, groups: Sequence[Group]) -> None:
    """The kept-token pictures at one schedule, the same questions for every strategy."""
    pictured: dict[tuple[str, ...], list[tuple[Group, list[dict[str, Any]]]]] = {}
    for group in groups:
        records = _kept(group.first)
        if records and group.first.strategy != UNPRUNED:
            key = (group.setting, *group.first.budget)
            pictured.setdefault(key, []).append((group, records))
    if not pictured:
        page.notes.append("No pictures of kept tokens: no run has a kept.json with stages.")
        return

    def telling(members: list[tuple[Group, list[dict[str, Any]]]]) -> tuple[float, ...]:
        run, records = members[0][0].first, members[0][1]
        final = len(records[0]["stages"][-1]["kept"]) / max(1, len(records[0]["places"]))
        # Most strategies, most stages, and about the eighth that PyramidDrop's own schedule leaves.
        return (len(members), run.number("num_stages") or 0.0, -abs(math.log(max(final, 1e-3) * 8)))

    members = max(pictured.values(), key=telling)
    ranks = charts.order([group.first.strategy for group, _ in members])
    members = sorted(members, key=lambda pair: ranks.index(pair[0].first.strategy))
    run, setting = members[0][0].first, members[0][0].setting
    unpruned = [g.first for g in groups if g.first.strategy == UNPRUNED and g.setting == setting]
    whole = next(iter(unpruned), None)
    # The first question of each kind, then more in order: no choice by outcome.
    shared = [
        record
        for record in members[0][1]
        if all(any(r["id"] == record["id"] for r in records) for _, records in members)
    ]
    firsts = {record.get("kind", ""): record for record in reversed(shared)}
    chosen = [record for record in shared if record is firsts[record.get("kind", "")]]
    chosen += [record for record in shared if record not in chosen]
    answers = {
        source.folder: _predictions(source, {record["id"] for record in chosen[:NUM_PICTURES]})
        for source in [run, *(group.first for group, _ in members), *([whole] if whole else [])]
    }
    for record in chosen[:NUM_PICTURES]:
        try:
            sample = _sample(figures, len(page.samples) + 1, record, members, whole, answers)
        except (OSError, ValueError) as error:
            page.notes.append(f"No picture for question {record['id']}: {error}")
        else:
            page.samples.append(sample)
    page.samples_caption = (
        f"Schedule: {summary.budget_words(run)}. "
        "The first question of each kind comes first; none is chosen by outcome. "
        "Faded patches are dropped: from the named layer on, the decoder no longer sees them."
    )


def _sample(
    figures: Path,
    number: int,
    record: Mapping[str, Any],
    members: Sequence[tuple[Group, list[dict[str, Any]]]],
    whole: Run | None,
    answers: Mapping[Path | None, Mapping[str, Mapping[str, Any]]],
) -> SampleView:
    """One question: its image, and what each strategy kept of it and answered."""
    run = members[0][0].first
    assert run.folder is not None, "records come from a run's folder"
    path = summary.inside(run.folder, str(record["image"]))
    if path is None or not path.is_file():
        raise ValueError(f"expected an image inside the run's folder, got {record['image']}.")
    with Image.open(path) as opened:
        image = opened.convert("RGB")

    views, rows = [], []
    first: list[pictures.Panel] = []
    for group, records in members:
        own = next(r for r in records if r["id"] == record["id"])
        stages = [(int(stage["layer"]), stage["kept"]) for stage in own["stages"]]
        drawn = pictures.panels(image, own["grids"], own["places"], stages, PANEL_PIXELS)
        first = first or drawn
        answer = answers[group.first.folder].get(str(record["id"]), own)
        view = _strategy_view(group.first.strategy, group.series, answer, drawn[1:])
        views.append(view)
        rows.append(
            (
                f"{group.series}: {view.prediction} ({view.verdict})",
                [(panel.title, pictures.stack(panel.images)) for panel in drawn[1:]],
            )
        )
    unpruned = None
    if whole is not None and str(record["id"]) in answers[whole.folder]:
        unpruned = _strategy_view(UNPRUNED, UNPRUNED, answers[whole.folder][str(record["id"])], [])
    question, answer_text = str(record["question"]), str(record["answer"])
    figure = charts.kept_figure(first[0].images[0], rows, question, f"Answer: {answer_text}")
    for kind in ("png", "svg"):
        _write(figures / f"kept_{number}.{kind}", charts.save(figure, kind))
    return SampleView(
        kind=str(record.get("kind", "")),
        question=question,
        answer=answer_text,
        whole=_panel_view(first[0], "The whole image"),
        unpruned=unpruned,
        strategies=tuple(views),
    )


def _strategy_view(
    strategy: str, label: str, answer: Mapping[str, Any], drawn: Sequence[pictures.Panel]
) -> StrategyView:
    correct, score = answer.get("correct"), answer.get("score")
    return StrategyView(
        strategy=strategy,
        label=label,
        prediction=str(answer.get("prediction", "")),
        correct=None if correct is None else bool(correct),
        score=None if score is None else float(score),
        panels=tuple(_panel_view(panel, f"{label}, tokens alive from") for panel in drawn),
    )


def _panel_view(panel: pictures.Panel, prefix: str) -> PanelView:
    sources = []
    for picture in panel.images:
        stream = io.BytesIO()
        # Full chroma: patch borders are the message.
        picture.save(stream, format="JPEG", quality=90, subsampling=0)
        sources.append(_data_uri("image/jpeg", stream.getvalue()))
    return PanelView(panel.title, f"{prefix} {panel.title}", tuple(sources))


def _matrix(groups: Sequence[Group], model: str) -> dict[str, Any] | None:
    """λ against stages: a row per strategy, so that a column compares them at one budget."""
    inside = [
        group
        for group in groups
        if group.setting == model
        and group.first.number("lam") is not None
        and group.first.number("num_stages") is not None
    ]
    among = [group.first for group in inside]

    def place(group: Group) -> tuple[float, str, float]:
        stages, lam = group.first.number("num_stages"), group.first.number("lam")
        assert stages is not None, "only runs with stages are in the matrix"
        assert lam is not None, "only runs with λ are in the matrix"
        words = summary.family(group.first, among).removeprefix(f"{group.first.text('schedule')}, ")
        return stages, words, lam

    keys = sorted({place(group) for group in inside})
    if len(keys) < 2:
        return None
    values = [group.accuracy.value for group in inside]
    low, width = min(values), (max(values) - min(values)) or 1.0
    series = {group.series: group.first.strategy for group in inside}
    rows = []
    for strategy in charts.order(list(series.values())):
        for name in sorted(name for name in series if series[name] == strategy):
            cells = []
            for key in keys:
                at = [group for group in inside if place(group) == key]
                own = next((group for group in at if group.series == name), None)
                if own is None:
                    cells.append(Cell("–"))
                    continue
                top = max(group.accuracy.value for group in at)
                cells.append(
                    Cell(
                        text=f"{100 * own.accuracy.value:.1f}",
                        value=repr(own.accuracy.value),
                        note=summary.percent(own.accuracy),
                        tint=(own.accuracy.value - low) / width,
                        best=len(at) > 1 and own.accuracy.value == top,
                    )
                )
            rows.append((name, strategy, cells))
    shares = []
    for key in keys:
        ratios = [g.mean("tflops_ratio") for g in inside if place(g) == key]
        known = [ratio for ratio in ratios if ratio is not None]
        shares.append(f"{100 * statistics.fmean(known):.0f}" if known else "–")
    heads = [words for _, words, _ in keys]
    return {
        "model": model if len(summary.settings_of(groups)) > 1 else "",
        "heads": [(head, heads.count(head)) for head in dict.fromkeys(heads)],
        "lams": [f"{lam:g}" for _, _, lam in keys],
        "shares": shares,
        "rows": rows,
    }


def _table(columns: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """All runs. What is the same in every run goes above the table, what no run has is left out."""
    used = [name for name in columns if any(run.text(name) for run in runs)]
    constant = [
        name for name in used if len({run.text(name) for run in runs}) == 1 and name != "accuracy"
    ]
    if len(runs) == 1:
        constant = []
    factor, unit = _flops_unit(run.number("tflops") for run in runs)
    shown = [name for name in used if name not in constant]

    def cell(run: Run, name: str) -> Cell:
        text, number = run.text(name), run.number(name)
        style = _column(name)[1]
        if number is None or style == "text":
            return Cell(text or "–", text)
        if style == "percent":
            return Cell(f"{100 * number:.1f}", text)
        return Cell(summary.short(repr(number * factor if style == "flops" else number)), text)

    def heading(name: str) -> str:
        return unit if _column(name)[1] == "flops" else _column(name)[0]

    return {
        "heads": [(name, heading(name), _column(name)[1] != "text") for name in shown],
        "rows": [(run.strategy, [cell(run, name) for name in shown]) for run in runs],
        "constant": [(heading(name), cell(runs[0], name)) for name in constant],
    }


def _column(name: str) -> tuple[str, str, str]:
    """Heading, style and definition of a column of results.csv."""
    if name in COLUMNS:
        return COLUMNS[name]
    if name.startswith("accuracy_"):
        kind = name.removeprefix("accuracy_")
        return f"{kind} (%)", "percent", f"accuracy over the questions of kind {kind}."
    return name, "number", "Written by the run; not described here."


def _definitions(columns: Sequence[str]) -> list[tuple[str, str, str]]:
    return [(name, _column(name)[0], _column(name)[2]) for name in columns]


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    strategies = charts.order([run.strategy for run in runs])
    facts = [("runs", str(len(runs))), ("strategies", ", ".join(strategies) or "none")]
    for column, label in (
        ("num_samples", "questions per run"),
        ("model", "model"),
        ("data", "data"),
    ):
        values = sorted({run.text(column) for run in runs} - {""}, key=lambda v: (len(v), v))
        if values:
            facts.append((label, ", ".join(summary.short(value) for value in values)))
    return facts


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every version that any run was made with; several values where the runs differ."""
    versions: dict[str, list[str]] = {}
    for run in runs:
        path = run.folder / "versions.json" if run.folder else None
        if path is not None and path.is_file():
            for name, value in summary.read_object(path).items():
                text = value if isinstance(value, str) else json.dumps(value)
                if text not in versions.setdefault(name, []):
                    versions[name].append(text)
    return [(name, ", ".join(values)) for name, values in versions.items()]


def _config(runs: Sequence[Run]) -> tuple[str, str] | None:
    """The first run's resolved config, with the run's name."""
    for run in runs:
        path = run.folder / "config.yaml" if run.folder else None
        if path is not None and path.is_file():
            return run.text("run"), path.read_text(encoding="utf-8", errors="replace")
    return None


def _kept(run: Run) -> list[dict[str, Any]]:
    """The records of a run's kept.json that have stages and places to draw."""
    path = run.folder / "kept.json" if run.folder else None
    if path is None or not path.is_file():
        return []
    records = summary.read_json(path)
    needed = {"id", "question", "answer", "image", "grids", "places", "stages"}
    if not isinstance(records, list) or any(
        not isinstance(record, dict) or not needed <= set(record) for record in records
    ):
        raise ValueError(
            f"report: expected a list of records with {sorted(needed)} in {path}, got something "
            "else. Run that evaluation again."
        )
    return [record for record in records if record["stages"]]


def _predictions(run: Run, ids: set[Any]) -> dict[str, dict[str, Any]]:
    """The wanted lines of a run's predictions.jsonl by id; empty where there is no such file."""
    path = run.folder / "predictions.jsonl" if run.folder else None
    if path is None or not path.is_file():
        return {}
    wanted = {str(name) for name in ids}
    result: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"report: expected JSON in line {number} of {path}, got {error}. "
                    "Run that evaluation again."
                ) from error
            if str(record.get("id")) in wanted:
                result[str(record["id"])] = record
    return result


def _title(folder: Path) -> str:
    return f"Visual token pruning: {folder.resolve().name}"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    """A style or script of ours, which the template must not escape."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _hash(script: Markup) -> str:
    """The page's security policy runs this script and no other."""
    digest = hashlib.sha256(str(script).encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _write(path: Path, data: bytes) -> None:
    """In one piece: a reader finds the old file or the new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    os.replace(partial, path)
