"""The end of a sweep: its tables, written and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.runs import results, tables


def listed(baseline: object) -> list[str]:
    """The names under a config's key `baseline`: none, one, or several.

    Raises:
        ValueError: It is something else.
    """
    names = [] if baseline is None else [baseline] if isinstance(baseline, str) else baseline
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"baseline: expected the name of a strategy or a run, or a list of them, got "
            f"{baseline!r}. Write baseline=fastv, or baseline=[fastv,pool]."
        )
    return list(names)


def finish_sweep(
    folder: Path, runs: Sequence[str] = (), baseline: object = None
) -> list[dict[str, Any]]:
    """Writes the tables of a sweep's folder and prints them, the comparisons in short: the rows.

    Training leaves none.

    Args:
        folder: The sweep's folder, which others may share.
        runs: Sub-folders of this sweep's runs, which come first.
        baseline: What is compared with besides `comparisons.ALWAYS`: see `listed`.

    Raises:
        ValueError: `baseline` names nothing that is there; the tables are written without it.
    """
    from tokenprune.runs import comparisons, difficulty, methods  # with numpy

    baselines = listed(baseline)
    found: list[Any] = []
    notes: list[str] = []

    def collects() -> list[dict[str, Any]]:
        whole = [path.parent for path in folder.rglob(f"*/{results.METRICS}")]
        needed = (results.CONFIG, results.VERSIONS)
        others = [path for path in whole if all((path / name).is_file() for name in needed)]
        names = sorted(str(path.relative_to(folder)) for path in others)
        return results.collect(folder, [*runs, *names])

    def writes(rows: Sequence[Mapping[str, Any]]) -> None:
        results.write_table(folder, rows)
        own_runs = methods.read_runs(folder, rows)
        there = methods.gather(own_runs)
        compared, missing = comparisons.compare_methods(there, baselines)
        split, more = difficulty.split_by_difficulty(there)
        for module, own in ((comparisons, compared), (difficulty, split)):
            if own or (folder / module.TABLE).exists():  # else there is nothing to say
                results.write_rows(folder / module.TABLE, module.COLUMNS, own)
        found[:], notes[:] = [there, compared], [*missing, *more, *methods.mixed(own_runs)]

    rows = results.settle(collects, writes)
    if not rows:
        return rows
    results.print_table(rows, f"{len(rows)} runs: {folder / results.TABLE}")
    there, compared = found
    if compared:
        told = (*comparisons.FIRST, *baselines)
        print_comparisons(compared, str(folder / comparisons.TABLE), told)
    for note in notes:
        print(note)
    comparisons.check_baselines(there, baselines)
    return rows


def print_comparisons(rows: Sequence[Mapping[str, Any]], place: str, told: Sequence[str]) -> None:
    """Prints at how many budgets each method is better, worse, or neither for certain.

    Args:
        rows: Of comparisons.csv.
        place: Where that is.
        told: With what each method's comparisons have a line; with others all methods share one.
    """
    keys = ("model", "data", "questions", "method", "against")
    several = [name for name in keys[:3] if len({row[name] for row in rows}) > 1]
    cells = []
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        named = row if row["against"] in told else {**row, "method": "all"}
        lines.setdefault(tuple(str(named[name]) for name in keys), []).append(row)
    for key, own in lines.items():
        least, most = (100 * end(row["difference"] for row in own) for end in (min, max))
        verdicts = [row["verdict"] for row in own]
        cells.append(
            [
                *(value for name, value in zip(keys, key, strict=True) if name in several),
                *key[3:],
                str(len(own)),
                *(str(verdicts.count(name)) for name in ("better", "worse", "open")),
                f"{least:+.1f}" if least == most else f"{least:+.1f} to {most:+.1f}",
            ]
        )
    images = {row["num_images"] for row in rows} - {""}
    by = " (by image, where one has several)" if images else ""
    title = f"question by question{by}, after Holm's correction: {place}"
    numbers = ("budgets", "better", "worse", "open", "difference (points)")
    tables.print_table(title, (*several, "method", "against"), numbers, cells)
