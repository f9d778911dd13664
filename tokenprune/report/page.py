"""One page from a folder of runs: `build` writes `report.html` and its figures.

The page is self-contained (styles, script and pictures inside it, nothing fetched) and everything
that came from a data set, a model or a config is escaped. It is read from the files that an
evaluation writes, so a report can be made anywhere, and again, without the model.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from tokenprune.report import front, reading, tables, words
from tokenprune.report.groups import average, settings_of
from tokenprune.report.looks import looks, order
from tokenprune.runs import results
from tokenprune.runs.methods import Run

if TYPE_CHECKING:
    from tokenprune.report.differences import Differences
    from tokenprune.report.figures import Drawing
    from tokenprune.report.pictured import SampleView

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parents[1] / "assets" / "report"


@dataclass
class Page:
    """What the template shows."""

    title: str
    finding: str
    facts: list[tuple[str, str]]
    drawings: list[Drawing] = field(default_factory=list)
    samples: list[SampleView] = field(default_factory=list)
    samples_caption: str = ""
    differences: Differences | None = None
    notes: list[str] = field(default_factory=list)


def build(folder: Path, baselines: Sequence[str] = ()) -> Path:
    """Writes `report.html` and `figures/` into a folder of runs, and returns the page's path.

    Args:
        folder: A sweep (`results.csv` with its run folders) or a single run (`metrics.json`).
        baselines: Strategies or runs to compare with besides the unpruned model and `random`; none
            takes the sweep's own comparisons, where it has written them.

    Raises:
        ValueError: If the folder holds no results, a file of a run cannot be read, or there is no
            such baseline.
    """
    folder = Path(folder)
    columns, runs = reading.load(folder)
    # NumPy and Matplotlib take their time: not for a folder without results.
    from tokenprune.report import compared, differences, figures, gallery, pictured
    from tokenprune.runs import comparisons

    groups = average(runs)
    comparisons.check_baselines(groups, baselines)

    finding = words.finding(groups, comparisons.difference_of)
    page = Page(title=_title(folder), finding=finding, facts=_facts(runs))

    drawn = looks([group.first.strategy for group in groups])
    settings = settings_of(groups)
    beside = folder / "figures"
    for number, setting in enumerate(settings):
        suffix = f"_{number + 1}" if number else ""
        inside = [group for group in groups if group.setting == setting]
        name = f" ({setting})" if len(settings) > 1 else ""
        page.drawings += figures.draw(beside, inside, drawn, suffix, name, page.notes)
    if (shown := pictured.choose(groups)) is None:
        page.notes.append("No pictures of kept tokens: no run has a kept.json with stages.")
    else:
        page.samples, page.samples_caption = gallery.draw(beside, shown, page.notes)
        page.differences = differences.find(shown, page.notes)
    pairs, split, missing = compared.read_tables(folder, groups, baselines)
    page.notes += missing

    html = (
        _environment()
        .get_template("report.html")
        .render(
            page=page,
            matrices=[m for one in settings if (m := tables.matrix(groups, one)) is not None],
            front=front.front_table(groups),
            compared=compared.comparison_table(pairs) if pairs else None,
            split=compared.difficulty_table(split) if split else None,
            table=tables.table(columns, runs),
            definitions=tables.definitions(columns),
            versions=reading.versions(runs),
            config=reading.first_config(runs),
            looks=drawn,
            seeds=max(group.num_seeds for group in groups),
            style=_asset("report.css"),
            script=_asset("report.js"),
            script_hash=_hash(_asset("report.js")),
        )
    )
    target = folder / "report.html"
    results.write_text(target, html)
    for note in page.notes:
        log.warning("report: %s", note)
    return target


def _title(folder: Path) -> str:
    return f"Visual token pruning: {folder.resolve().name}"


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    strategies = order([run.strategy for run in runs])
    facts = [("runs", str(len(runs))), ("strategies", ", ".join(strategies) or "none")]
    for column, label in (
        ("num_samples", "questions per run"),
        ("model", "model"),
        ("data", "data"),
    ):
        values = sorted({run.text(column) for run in runs} - {""}, key=lambda v: (len(v), v))
        if values:
            facts.append((label, ", ".join(words.short(value) for value in values)))
    return facts


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
