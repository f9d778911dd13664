"""What `tokenprune flops` prints and draws: the cost of a schedule, layer by layer."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenprune as tp
from tokenprune import cost
from tokenprune.cost.figures import Workload
from tokenprune.cost.solver import Solution
from tokenprune.runs import results
from tokenprune.runs.tables import print_table

_BAR = 16


def layers(workload: Workload, schedule: tp.Schedule) -> list[dict[str, Any]]:
    """One mapping per layer: tokens, GFLOPs of layer and scoring, 10⁶ bytes of cache.

    GFLOPs are exact ones, causal attention counted as half, where the formula knows the layers, and
    PyramidDrop's elsewhere.
    """
    shape = workload.shape
    lengths = workload.lengths(schedule)
    cuts = [stage.layer for stage in schedule.stages]
    convention = "exact" if "exact" in workload.conventions else "pyramiddrop"
    rows = []
    before = workload.num_visual
    for layer, length in enumerate(lengths):
        whole = cost.flops(shape, [length] * shape.num_layers, workload.num_text, convention)
        scoring = 0.0
        if layer in cuts and workload.strategy is not None:
            own = workload.strategy.at(cuts.index(layer))
            scoring = cost.rows_flops(shape, own, before, workload.num_text)
        rows.append(
            {
                "layer": layer,
                "cut": layer in cuts,
                "visual": length,
                "tokens": length + workload.num_text,
                "gflops": whole / shape.num_layers / 1e9,
                "scoring_gflops": scoring / 1e9,
                "kv_mb": cost.kv_bytes(
                    shape, [length] * shape.num_layers, workload.num_text, dtype=workload.dtype
                )
                / shape.num_layers
                / 1e6
                if shape.caches_alike
                else None,
            }
        )
        before = length
    return rows


def summary(workload: Workload, schedule: tp.Schedule) -> list[tuple[str, str, str, str]]:
    """Name of a figure, its unpruned and pruned value, and their ratio."""
    pruned, whole = workload.figures(schedule), workload.figures(tp.Schedule())
    found: list[tuple[str, float, float, str]] = [
        ("visual tokens, mean over layer inputs", whole.avg_tokens, pruned.avg_tokens, ".2f"),
        (
            "visual tokens, mean over layer outputs",
            whole.avg_tokens_outputs,
            pruned.avg_tokens_outputs,
            ".2f",
        ),
        ("visual tokens, last layer", whole.final_tokens, pruned.final_tokens, "d"),
    ]
    names = {
        "pyramiddrop": "prefill TFLOPs as PyramidDrop counts",
        "fastv": "prefill TFLOPs as FastV counts",
        "exact": "prefill TFLOPs, exact, with scoring",
    }
    found += [(names[c], whole.tflops[c], pruned.tflops[c], ".4g") for c in workload.conventions]
    if "exact" in workload.conventions:
        scoring = sum(float(row["scoring_gflops"]) for row in layers(workload, schedule))
        logits = 2 * workload.shape.hidden_size * workload.shape.vocab_size / 1e9
        before, after = (
            cost.decode_flops(workload.shape, f.lengths, workload.num_text) / 1e9
            for f in (whole, pruned)
        )
        found += [
            ("of these, scoring (GFLOPs)", 0.0, scoring, ".4g"),
            ("vocabulary, per row of logits (GFLOPs)", logits, logits, ".4g"),
            ("decoding a token after it (GFLOPs)", before, after, ".4g"),
        ]
    if whole.kv_mb is not None and pruned.kv_mb is not None:
        found.append((f"keys and values (MB, {workload.dtype})", whole.kv_mb, pruned.kv_mb, ".4g"))
    return [
        (name, format(a, form), format(b, form), f"{100 * b / a:.1f} %" if a else "")
        for name, a, b, form in found
    ]


def solved(solution: Solution) -> Iterator[str]:
    """Lines that say what a budget came to."""
    name, value = solution.solved
    low, high = solution.possible
    off = solution.got - solution.asked
    yield f"asked     {solution.target} = {solution.asked:g}"
    yield f"solved    {name} = {value}"
    yield f"got       {solution.target} = {solution.got:.6g} ({off:+.3g}; counts are integers)"
    yield f"possible  {low:.4g} to {high:.4g}"
    yield f"the same  schedule.{name}={str(value).replace(' ', '')}, without the budget"


def to_csv(workload: Workload, schedule: tp.Schedule) -> str:
    """The layers as CSV, with all digits."""
    rows = layers(workload, schedule)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "cut": int(row["cut"])} for row in rows)
    return text.getvalue()


def show(workload: Workload, schedule: tp.Schedule, title: str) -> None:
    """Prints the table of layers, with a bar of each one's share, and the summary."""
    most = cost.flops(
        workload.shape,
        [workload.num_visual] * workload.shape.num_layers,
        workload.num_text,
        "exact" if "exact" in workload.conventions else "pyramiddrop",
    )
    most /= workload.shape.num_layers * 1e9
    cells = []
    for row in layers(workload, schedule):
        share = row["gflops"] / most if most else 0.0
        cells.append(
            [
                f"{'✂ ' if row['cut'] else ''}{row['layer']}",
                str(row["visual"]),
                str(row["tokens"]),
                f"{row['gflops']:.4g}",
                f"{row['scoring_gflops']:.3g}" if row["scoring_gflops"] else "",
                "" if row["kv_mb"] is None else f"{row['kv_mb']:.4g}",
                f"{'█' * round(_BAR * share):<{_BAR}} {100 * share:>3.0f} %",
            ]
        )
    columns = ("layer", "visual", "tokens", "GFLOPs", "scoring", "KV MB", "of unpruned")
    print_table(title, (), columns, cells)
    values = ("unpruned", "pruned", "ratio")
    print_table("", ("figure",), values, summary(workload, schedule))


def draw(workload: Workload, schedule: tp.Schedule, title: str, path: Path) -> Path:
    """Draws tokens and exact GFLOPs over the layers.

    Args:
        workload: The decoder and the sample.
        schedule: The schedule.
        title: Stands above.
        path: A picture file that matplotlib can write, such as .png or .pdf.

    Raises:
        ValueError: If matplotlib does not know the kind of file.
        OSError: If it cannot be written; names it.
    """
    from matplotlib.figure import Figure

    rows = layers(workload, schedule)
    numbers = [row["layer"] for row in rows]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    axes[0].step(numbers, [row["visual"] for row in rows], where="mid", color="tab:blue")
    axes[0].fill_between(
        numbers, [row["visual"] for row in rows], step="mid", alpha=0.2, color="tab:blue"
    )
    axes[0].set_ylabel("visual tokens")
    axes[0].set_ylim(0, workload.num_visual * 1.05)
    axes[1].bar(numbers, [row["gflops"] for row in rows], label="layer", color="tab:gray")
    axes[1].bar(
        numbers,
        [row["scoring_gflops"] for row in rows],
        bottom=[row["gflops"] for row in rows],
        label="scoring",
        color="tab:red",
    )
    axes[1].set_ylabel("GFLOPs")
    axes[1].set_xlabel("decoder layer")
    axes[1].legend(frameon=False, loc="upper right")  # where pruning leaves room
    figure.suptitle(title)
    form = path.suffix.lstrip(".").lower()
    if form not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"flops.output: expected a picture file, got {str(path)!r}. Use a name that ends in "
            ".png or .pdf."
        )
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=150)
    results.write_bytes(path, content.getvalue())
    return path
