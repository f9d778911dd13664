"""The page's tables of differences question by question, and of easy and hard questions."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenprune.report.intervals import Interval
from tokenprune.report.tables import Cell, Head, Table
from tokenprune.report.words import budget_words, percent
from tokenprune.runs import comparisons, difficulty
from tokenprune.runs.methods import Method, Run, as_text

Row = Mapping[str, str]
#: What the values of a row are, by what stands above them.
COMPARED = {
    "method": "The strategy, and in what it differs from others of its name; means over its seeds.",
    "budget": "The schedule and its budget.",
    "against": "What it is compared with: the unpruned model, random tokens or another strategy at "
    "the same cuts, the smaller picture of about the same share, or a run.",
    "difference": "Mean score minus the other's, in percentage points.",
    "95 %": "Interval of that difference by itself: it holds the true one in 95 of 100 such cases.",
    "corrected": "The interval at the level at which Holm's procedure tests this comparison among "
    "all with the same: wider, the more are made.",
    "more": "Questions on which it scores more than the other.",
    "less": "Questions on which it scores less.",
    "test": "mcnemar: McNemar's exact test of right and wrong answers. permutation: of all signs "
    "that the differences might have. by image: of an image's questions together, where an image "
    "has several; so are the intervals.",
    "p": "Chance of so large a difference if there were none, by that test.",
    "p corrected": "The same after Holm's correction for all comparisons with the same.",
    "verdict": "better or worse: p corrected is at most .05 and the corrected interval does not "
    "hold 0. open: these questions do not tell, which is not the same as no difference.",
}
SPLIT = {
    "method": COMPARED["method"],
    "budget": COMPARED["budget"],
    "tokens (%)": "Share of the visual tokens that a decoder layer processes, mean over layers.",
    "picture (%)": "Share of the pixels of the smaller picture that decides what is easy: the one "
    "nearest to that share of the tokens.",
    "easy": "How many questions the unpruned model gets right on the whole and on that picture.",
    "right of easy": "Of these, what the method gets right, with a 95 % interval.",
    "hard": "How many it gets right on the whole picture alone.",
    "right of hard": "Of these, what the method gets right: where only choosing can help.",
}
_TEXTS = ("method", "budget", "against", "test", "verdict")
_TONES = {"better": "right", "worse": "wrong"}


def read_tables(
    folder: Path, methods: Sequence[Method], baselines: Sequence[str]
) -> tuple[list[Row], list[Row], list[str]]:
    """Comparisons and the split by difficulty: as the sweep wrote them, or made anew.

    Args:
        folder: Where the tables are.
        methods: All there are.
        baselines: What else is compared with; none takes what the sweep has written, if it has.

    Returns:
        Rows of comparisons.csv and difficulty.csv, and a sentence for each thing that is missing.
    """
    compared = None if baselines else _read(folder / comparisons.TABLE)
    split = _read(folder / difficulty.TABLE)
    notes: list[str] = []
    if compared is None:
        made, missing = comparisons.compare_methods(methods, baselines)
        compared = [as_text(row) for row in made]
        notes += missing
    if split is None:
        made, missing = difficulty.split_by_difficulty(methods)
        split = [as_text(row) for row in made]
        notes += missing
    return compared, split, notes


def _read(path: Path) -> list[Row] | None:
    """The rows of a CSV file; None where there is none."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            {name: value for name, value in row.items() if name}
            for row in csv.DictReader(stream, restkey="", restval="")
        ]


def comparison_table(rows: Sequence[Row]) -> Table:
    """Differences question by question; a row per comparison."""

    def cells(row: Row) -> dict[str, Cell]:
        run = Run(row, None)
        against, other = run.text("against"), run.text("against_method")
        verdict = run.text("verdict")
        return {
            "method": _text(run.text("method")),
            "budget": _text(budget_words(run)),
            "against": _text(against if other == against else f"{against}: {other}"),
            "difference": _points(run, "difference"),
            "95 %": _range(run, "ci"),
            "corrected": _range(run, "holm"),
            "more": _text(run.text("wins")),
            "less": _text(run.text("losses")),
            "test": _text(run.text("test")),
            "p": _chance(run, "p"),
            "p corrected": _chance(run, "p_holm"),
            "verdict": Cell(verdict, verdict, tone=_TONES.get(verdict, "")),
        }

    return _table("comparisons", "Differences question by question", COMPARED, rows, cells)


def difficulty_table(rows: Sequence[Row]) -> Table:
    """Right answers on easy and hard questions; a row per method."""

    def cells(row: Row) -> dict[str, Cell]:
        run = Run(row, None)
        return {
            "method": _text(run.text("method")),
            "budget": _text(budget_words(run)),
            "tokens (%)": _percent(run, "token_share"),
            "picture (%)": _percent(run, "downsample_scale"),
            "easy": _text(run.text("num_easy")),
            "right of easy": _share(run, "easy"),
            "hard": _text(run.text("num_hard")),
            "right of hard": _share(run, "hard"),
        }

    return _table("difficulty", "Easy and hard questions", SPLIT, rows, cells)


def _table(
    name: str,
    label: str,
    meanings: Mapping[str, str],
    rows: Sequence[Row],
    cells: Callable[[Row], dict[str, Cell]],
) -> Table:
    """A table of rows; model, data and parts of the questions are told where there are several."""
    places = [
        key for key in ("model", "data", "questions") if len({row.get(key) for row in rows}) > 1
    ]
    heads = [Head(n, n, n not in _TEXTS, n in _TEXTS, said) for n, said in meanings.items()]
    heads += [Head(key, key, False, True, f"The {key}.") for key in places]
    return Table(
        name=name,
        label=label,
        heads=tuple(heads),
        rows=tuple(
            (
                row.get("method", "").partition(" (")[0],
                (*cells(row).values(), *(_text(row.get(key, "")) for key in places)),
            )
            for row in rows
        ),
    )


def _text(value: str) -> Cell:
    return Cell(value or "–", value)


def _points(run: Run, name: str) -> Cell:
    """A difference in percentage points, with its sign."""
    value = run.number(name)
    return _text("") if value is None else Cell(f"{100 * value:+.1f}", repr(value))


def _range(run: Run, name: str) -> Cell:
    """An interval in percentage points; sorted by its lower end."""
    low, high = run.number(f"{name}_low"), run.number(f"{name}_high")
    if low is None or high is None:
        return _text("")
    return Cell(f"{100 * low:+.1f} to {100 * high:+.1f}", repr(low))


def _chance(run: Run, name: str) -> Cell:
    """A p, three decimals of it, and no zero."""
    value = run.number(name)
    if value is None:
        return _text("")
    return Cell(f"{value:.3f}" if value >= 0.001 else "< .001", repr(value))


def _percent(run: Run, name: str) -> Cell:
    value = run.number(name)
    return _text("") if value is None else Cell(f"{100 * value:.0f}", repr(value))


def _share(run: Run, name: str) -> Cell:
    """A share of right answers with its interval."""
    value = run.number(name)
    if value is None:
        return _text("")
    return Cell(
        percent(Interval(value, *(run.number(f"{name}_{e}") for e in ("low", "high")))), repr(value)
    )
