"""A sweep as an evaluation leaves it, made up: plausible numbers, real pictures, no model."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.data.scenes import SceneDataset, easy

GRID, KINDS = easy.STYLE.grid, easy.KINDS
NUM_LAYERS, NUM_VISUAL, NUM_SAMPLES = 8, GRID * GRID, 500
STRATEGIES = ("pyramiddrop", "fastv", "random", "uniform")
# How well a strategy finds the evidence, 0 (blind) to 1.
SKILL = {"pyramiddrop": 0.9, "fastv": 0.6, "random": 0.0, "uniform": 0.12}
NEED = {"read": 0.5, "colour": 0.45, "exist": 0.2, "relation": 0.6, "text": 1.0}
COLUMNS = [
    *("strategy", "schedule", "lam", "num_stages", "layers", "keeps", "positions", "seed"),
    *("num_samples", "accuracy", "ci_low", "ci_high"),
    *(f"accuracy_{kind}" for kind in KINDS),
    *("tflops", "tflops_ratio", "avg_tokens", "final_tokens", "prefill_ms", "kv_mb"),
    *("num_visual", "model", "run"),
]


def write_sweep(
    folder: Path,
    *,
    strategies: Sequence[str] = STRATEGIES,
    lams: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
    num_stages: Sequence[int] = (2, 4),
    seeds: Sequence[int] = (0,),
    unpruned: bool = True,
    published: bool = True,
    num_pictures: int = 5,
) -> list[dict[str, Any]]:
    """Writes results.csv and the run folders; returns the rows."""
    plans: list[dict[str, Any]] = []
    for stages in num_stages:
        for lam in lams:
            for strategy in strategies:
                layers = [NUM_LAYERS * s // stages for s in range(1, stages)]
                keeps = [round(lam**s, 12) for s in range(1, stages)]
                plans.append(plan(strategy, "pyramid", layers, keeps, lam=lam, num_stages=stages))
    if published:
        plans.append(plan("fastv", "one_shot", [2], [0.5], num_stages=2, positions="renumbered"))
    if unpruned:
        plans.append(plan("none", None, [], []))
    rows = [
        write_run(folder, {**settings, "seed": seed}, num_pictures)
        for settings in plans
        for seed in seeds
    ]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def plan(
    strategy: str, schedule: str | None, layers: list[int], keeps: list[float], **more: Any
) -> dict[str, Any]:
    settings = {"lam": None, "num_stages": None, "positions": "original", **more}
    return {
        **{"strategy": strategy, "schedule": schedule, "layers": layers, "keeps": keeps},
        **settings,
    }


def write_run(folder: Path, settings: dict[str, Any], num_pictures: int) -> dict[str, Any]:
    """One run: config, predictions, versions, kept tokens, and metrics last; returns its row."""
    strategy, layers, keeps = settings["strategy"], settings["layers"], settings["keeps"]
    name = ",".join(f"{k}={v}" for k, v in settings.items() if v not in (None, []))
    run = folder / name.replace(" ", "")
    (run / "images").mkdir(parents=True)
    rng = random.Random(name)
    tokens = [
        math.floor(
            NUM_VISUAL
            * next((k for at, k in zip(layers[::-1], keeps[::-1], strict=True) if layer >= at), 1.0)
        )
        for layer in range(NUM_LAYERS)
    ]
    average = sum(tokens) / NUM_LAYERS
    kinds, predictions = {}, []
    per_kind = NUM_SAMPLES // len(KINDS)
    for kind in KINDS:
        loss = NEED[kind] * (1 - average / NUM_VISUAL) ** 2 * (1.25 - SKILL.get(strategy, 1.0))
        chance = 0.5 if kind in ("exist", "relation") else 0.08
        share = max(chance, 0.97 - 0.9 * loss) if strategy != "none" else 0.97
        right = sum(rng.random() < share for _ in range(per_kind))
        low, high = wilson(right, per_kind)
        kinds[kind] = {
            **{"accuracy": right / per_kind, "low": low, "high": high},
            "num_samples": per_kind,
        }
    kept = []
    scenes = SceneDataset("test", max(1, num_pictures))
    for index in range(num_pictures):
        sample = scenes[index]
        cells = scenes.scene(index)[1][0].cells
        turn = sample.turns[0]
        correct = rng.random() < kinds[turn.kind]["accuracy"]
        record = {
            **{"id": sample.id, "kind": turn.kind, "question": turn.question},
            **{"answer": turn.answer, "prediction": turn.answer if correct else "blue"},
        }
        predictions.append({**record, "correct": correct})
        sample.image.save(run / "images" / f"{sample.id}.png")
        kept.append(
            {
                **record,
                "image": f"images/{sample.id}.png",
                "grids": [[GRID, GRID]],
                "places": [[0, 0, row, column] for row in range(GRID) for column in range(GRID)],
                "num_visual": NUM_VISUAL,
                "stages": choose(rng, strategy, layers, keeps, cells),
            }
        )
    write_json(run / "kept.json", kept)
    lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
    (run / "predictions.jsonl").write_text(lines, encoding="utf-8")
    (run / "config.yaml").write_text(f"strategy: {strategy}\nseed: {settings['seed']}\n")
    write_json(run / "versions.json", {"python": "3.11.7", "torch": "2.13.0", "device": "cpu"})
    total = per_kind * len(KINDS)
    right = round(sum(entry["accuracy"] * per_kind for entry in kinds.values()))
    low, high = wilson(right, total)
    whole = cost([NUM_VISUAL] * NUM_LAYERS)
    metrics = {
        **settings,
        **{"model": "tiny", "num_samples": total, "accuracy": right / total},
        **{"accuracy_low": low, "accuracy_high": high, "kinds": kinds},
        **{"visual_tokens_per_layer": tokens, "avg_tokens": average, "final_tokens": tokens[-1]},
        **{"tflops": cost(tokens), "tflops_ratio": cost(tokens) / whole},
        **{"prefill_ms": 6 + 10 * cost(tokens) / whole + rng.random(), "kv_mb": average / 100},
        "num_visual": NUM_VISUAL,
    }
    write_json(run / "metrics.json", metrics)
    row = {column: metrics.get(column) for column in COLUMNS}
    row |= {"ci_low": low, "ci_high": high}
    row |= {f"accuracy_{kind}": entry["accuracy"] for kind, entry in kinds.items()}
    row["layers"] = " ".join(map(str, layers)) or None
    row["keeps"] = " ".join(map(str, keeps)) or None
    row["run"] = run.name
    return {name: "" if value is None else value for name, value in row.items()}


def choose(
    rng: random.Random,
    strategy: str,
    layers: list[int],
    keeps: list[float],
    cells: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    """Nested choices: near the evidence for a skilful strategy, evenly for `uniform`."""
    skill = SKILL.get(strategy, 0.0)

    def score(token: int) -> float:
        row, column = divmod(token, GRID)
        near = max(math.exp(-math.dist((row, column), cell)) for cell in cells)
        if strategy == "uniform":
            return (token * 0.6180339887) % 1
        return skill * near + 0.4 * (1 - skill) * noise[token] + 0.05 * noise[token]

    noise = [rng.random() for _ in range(NUM_VISUAL)]
    ranked = sorted(range(NUM_VISUAL), key=score, reverse=True)
    return [
        {"layer": layer, "kept": sorted(ranked[: math.floor(NUM_VISUAL * keep)])}
        for layer, keep in zip(layers, keeps, strict=True)
    ]


def cost(tokens: Sequence[int], d: int = 128, m: int = 352) -> float:
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens) / 1e12


def wilson(right: int, total: int) -> tuple[float, float]:
    p, z = right / total, 1.959964
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return centre - half, centre + half


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def gradient(size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A picture without two equal patches."""
    image = Image.new("RGB", size)
    image.putdata(
        [(x % 256, y % 256, (x * 7 + y * 3) % 256) for y in range(size[1]) for x in range(size[0])]
    )
    return image


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
