"""On paper: a training step and an evaluation on 1, 8 and 64 GPUs, and what spread of sizes costs.

Compute is `tokenprune.cost`'s exact count at an assumed share of the peak, communication the bytes
of FSDP over an assumed bandwidth. Image sizes are drawn, not measured: tokens of an image are
log-normal. Writes `results/steps.csv` and `results/spread.csv`.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import tokenprune as tp

MODEL = "qwen2.5-vl-7b"
PARAMETERS = 7.6e9
NUM_TEXT = 64
#: bfloat16 of an H100 or H200, and the share of it that a step gets.
FLOPS_PER_SECOND = 989e12 * 0.4
#: Bytes a second and GPU: NVLink, and 400 Gb/s a GPU between machines of 8.
WITHIN, BETWEEN = 370e9, 50e9
#: Tokens of an image: median, spread of the logarithm, and bounds.
SIZES = (1000, 0.6, 64, 4096)
ROUNDS = 200
RESULTS = Path(__file__).parent / "results"


def sizes(number: int, chance: random.Random) -> list[int]:
    """Visual tokens of so many images."""
    median, spread, low, high = SIZES
    drawn = (median * chance.lognormvariate(0, spread) for _ in range(number))
    return [int(min(high, max(low, tokens))) for tokens in drawn]


@cache
def row_flops(longest: int, lam: float | None) -> float:
    """Forward FLOPs of a row padded to `longest` visual tokens; λ of four stages, None unpruned."""
    shape = tp.cost.PRESETS[MODEL].shape
    lengths = [longest] * shape.num_layers
    if lam is not None:
        lengths = tp.Schedule.pyramid(shape.num_layers, 4, lam).lengths(shape.num_layers, longest)
    return tp.cost.flops(shape, lengths, NUM_TEXT, "exact")


def batch_flops(rows: Sequence[int], lam: float | None) -> float:
    """Of a batch, every row as long as its longest."""
    return len(rows) * row_flops(max(rows), lam)


def communication(gpus: int) -> float:
    """Seconds in which FSDP gathers weights twice in bfloat16 and scatters gradients in float32."""
    if gpus == 1:
        return 0.0
    sent = PARAMETERS * (2 * 2 + 4) * (gpus - 1) / gpus
    return sent / (WITHIN if gpus <= 8 else BETWEEN)


# -------------------------------------------------------------------------------- orders of steps


def shuffled(images: list[int], step: int) -> list[list[int]]:
    """Steps in the order of the data."""
    return [images[start : start + step] for start in range(0, len(images), step)]


def grouped(images: list[int], step: int) -> list[list[int]]:
    """Steps of images of similar size: sorted within 50 steps, as trainers group by length."""
    steps: list[list[int]] = []
    for start in range(0, len(images), 50 * step):
        steps += shuffled(sorted(images[start : start + 50 * step]), step)
    return steps


def dealt(images: list[int], step: int) -> list[list[int]]:
    """Steps in the order of the data, each sorted: a GPU's rows are alike, other GPUs' are not."""
    return [sorted(own) for own in shuffled(images, step)]


ORDERS: dict[str, Callable[[list[int], int], list[list[int]]]] = {
    "shuffled": shuffled,
    "sorted within a step": dealt,
    "sorted within 50 steps": grouped,
}


def training(gpus: int, batch: int, lam: float | None, order: str) -> tuple[float, float, float]:
    """Seconds of a step, its share of useful FLOPs, and its share of communication."""
    chance = random.Random(0)
    images = sizes(gpus * batch * ROUNDS, chance)
    seconds, useful, busy = [], 0.0, 0.0
    for step in ORDERS[order](images, gpus * batch):
        shares = [step[start : start + batch] for start in range(0, len(step), batch)]
        # Three passes; all wait for the slowest; communication hides behind compute.
        slowest = max(3 * batch_flops(rows, lam) for rows in shares)
        useful += 3 * sum(row_flops(tokens, lam) for tokens in step)
        seconds.append(max(slowest / FLOPS_PER_SECOND, communication(gpus)))
        busy += seconds[-1] * gpus * FLOPS_PER_SECOND
    return statistics.mean(seconds), useful / busy, communication(gpus) / statistics.mean(seconds)


def evaluation(gpus: int, batch: int, lam: float | None, ordered: bool) -> tuple[float, float]:
    """Seconds of the prefills of 6 400 questions, and the share of useful FLOPs."""
    images = sizes(6400, random.Random(0))
    ends = []
    for rank in range(gpus):
        own = images[rank::gpus]
        own = sorted(own) if ordered else own
        batches = [own[start : start + batch] for start in range(0, len(own), batch)]
        ends.append(sum(batch_flops(rows, lam) for rows in batches))
    useful = sum(row_flops(tokens, lam) for tokens in images)
    return max(ends) / FLOPS_PER_SECOND, useful / (gpus * max(ends))


def write(name: str, rows: list[dict[str, object]]) -> None:
    """Writes a table to the results."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Writes both tables."""
    steps: list[dict[str, object]] = []
    for gpus in (1, 8, 64):
        for lam in (None, 0.5):
            for batch in (1, 4, 16):
                for order in ORDERS:
                    seconds, useful, sent = training(gpus, batch, lam, order)
                    rate = gpus * batch / seconds
                    steps.append(
                        {"gpus": gpus, "lam": lam, "batch": batch, "order": order,
                         "seconds": f"{seconds:.3f}", "images_per_second": f"{rate:.1f}",
                         "useful": f"{useful:.3f}", "communication": f"{sent:.3f}"}
                    )  # fmt: skip
    write("steps.csv", steps)
    spread: list[dict[str, object]] = []
    for gpus in (1, 8, 64):
        for lam in (None, 0.5):
            for batch in (1, 8):
                for ordered in (False, True):
                    seconds, useful = evaluation(gpus, batch, lam, ordered)
                    spread.append(
                        {"gpus": gpus, "lam": lam, "batch": batch, "sorted": ordered,
                         "seconds": f"{seconds:.1f}", "useful": f"{useful:.3f}"}
                    )  # fmt: skip
    write("spread.csv", spread)


if __name__ == "__main__":
    main()
