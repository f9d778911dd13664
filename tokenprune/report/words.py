"""Runs in words: what was found, in one sentence, and what budgets and numbers are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from tokenprune.report.groups import Group, cost_column, settings_of
from tokenprune.report.intervals import Interval, apart
from tokenprune.runs.methods import UNPRUNED, Run
from tokenprune.runs.paired import Difference
from tokenprune.runs.proportions import ALPHA

Paired = Callable[[Group, Group], Difference | None]


def finding(groups: Sequence[Group], paired: Paired = lambda best, second: None) -> str:
    """One sentence: the best strategy at the tightest budget that the strategies share.

    Args:
        groups: All there are.
        paired: Two of them, question by question; None where that is not known, and the sentence
            goes by their own intervals.
    """
    settings = settings_of(groups)
    setting = max(settings, key=lambda name: sum(group.setting == name for group in groups))
    inside = [group for group in groups if group.setting == setting]
    pruned = [group for group in inside if group.first.strategy != UNPRUNED]
    whole = next((group for group in inside if group.first.strategy == UNPRUNED), None)
    reference = f"the unpruned model {percent(whole.accuracy)}" if whole else ""
    if not pruned:
        return f"{reference[0].upper()}{reference[1:]} of the questions right; no pruned run yet."

    budgets: dict[tuple[str, ...], list[Group]] = {}
    for group in pruned:
        budgets.setdefault(group.first.budget, []).append(group)
    shared = max(len({g.series for g in members}) for members in budgets.values())
    common = [m for m in budgets.values() if len({g.series for g in m}) == shared]
    column = cost_column(groups)
    tightest = min(common, key=lambda m: (m[0].mean(column) if column else None) or 0.0)
    ranked = sorted(tightest, key=lambda group: -group.accuracy.value)
    best, others = ranked[0], ranked[1:]

    share = best.mean("tflops_ratio")
    cost = "At the tightest budget" if share is None else f"With {100 * share:.0f} % of the FLOPs"
    sentence = (
        f"{cost} ({budget_words(best.first)}), {best.series} gets "
        f"{percent(best.accuracy, '95 % interval ')} of the questions right"
    )
    if others:
        second = others[0]
        difference = paired(best, second)
        sentence += ", " + (
            _lead(best, second)
            if difference is None
            else _paired_lead(second, difference, len(others))
        )
    named = {best.series, *(other.series for other in others[:1])}
    random = next((g for g in others if g.first.strategy == "random"), None)
    rest = []
    if random is not None and random.series not in named:
        rest.append(f"random gets {percent(random.accuracy)}")
    if reference:
        rest.append(reference)
    where = f" ({setting})" if len(settings) > 1 else ""
    return sentence + "".join(f"; {part}" for part in rest) + f"{where}."


def _lead(best: Group, second: Group) -> str:
    """How two groups stand, by the intervals of each by itself."""
    distinct = apart(best.accuracy, second.accuracy)
    level = best.accuracy.value == second.accuracy.value
    lead = "level with" if level else "clearly ahead of" if distinct else "ahead of"
    overlap = ", though their intervals overlap" if distinct is False and not level else ""
    return f"{lead} {second.series} with {percent(second.accuracy)}{overlap}"


def _paired_lead(second: Group, difference: Difference, num_others: int) -> str:
    """How two groups stand, by their answers to the same questions.

    The best of several was looked for, so the interval is corrected for as many (Bonferroni).
    """
    low, high = difference.interval(ALPHA / num_others)
    lead = "ahead of" if low > 0 else "not told apart from"
    corrected = f", corrected for {num_others} comparisons" if num_others > 1 else ""
    by_image = "" if difference.num_images is None else ", by image"
    return (
        f"{lead} {second.series} with {percent(second.accuracy)}: question by question "
        f"{100 * difference.value:+.1f} points (95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}{corrected}{by_image})"
    )


def percent(interval: Interval, name: str = "") -> str:
    """In words, with the interval in brackets; `name` says there what the numbers are."""
    text = f"{100 * interval.value:.1f} %"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({name}{100 * interval.low:.1f}\u2060–\u2060{100 * interval.high:.1f})"


def budget_words(run: Run) -> str:
    """The schedule and its budget in words; of a smaller picture its share of the pixels."""
    pixels = f"{short(str(100 * run.scale))} % of the pixels"
    if run.scale < 1 and not run.text("schedule"):
        return pixels
    words = [run.text("schedule") or "schedule unknown"]
    if run.number("lam") is not None:
        words.append(f"λ = {short(run.text('lam'))}")
        if run.text("num_stages"):
            words.append(f"{short(run.text('num_stages'))} stages")
    elif run.text("layers"):
        words.append(f"layer {run.text('layers').strip('[]()')}")
        words.append(f"keep {run.text('keeps').strip('[]()')}")
    if run.scale < 1:
        words.append(pixels)
    return ", ".join(words)


def family(run: Run, among: Sequence[Run] = ()) -> str:
    """What the points of a curve share: the schedule without its budget.

    Args:
        run: The run in question.
        among: Others; where a schedule of the same name cuts elsewhere, the layers are named.
    """
    name = run.text("schedule") or budget_words(run)
    if run.number("lam") is not None and run.text("num_stages"):
        name += f", {short(run.text('num_stages'))} stages"
    layers = {r.text("layers") for r in among if family(r) == name} | {run.text("layers")}
    return f"{name} at {run.text('layers').strip('[]()')}" if len(layers) > 1 else name


def short(text: str) -> str:
    """A number with at most four significant digits, whole ones in full; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        return text
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def flops_unit(values: Iterable[float | None]) -> tuple[float, str]:
    """The factor from tera to the unit in which the largest value reads well."""
    largest = max((value for value in values if value is not None), default=1.0)
    for factor, unit in ((1.0, "TFLOPs"), (1e3, "GFLOPs"), (1e6, "MFLOPs")):
        if largest * factor >= 0.5:
            return factor, unit
    return 1e6, "MFLOPs"
