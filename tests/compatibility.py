"""Runs every check of the zoo and writes docs/compatibility.csv and docs/compatibility.md.

`python tests/compatibility.py [model type ...]` renews the rows of these types, or all.
`tests/families/test_compatibility.py` holds the table to what the code does.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from zoo import REFUSED, ZOO, Specimen
from zoo.checks import CHECKS, EXACT, Check, outcome
from zoo.flash import attention, stand_in
from zoo.tower import TOWER_CHECKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = DOCS / "compatibility.csv"
COLUMNS = ("model_type", "attention", "mode", "outcome")
#: Implementations that not every machine or type has, and the types they are shown on.
OTHERS = {
    "flex_attention": ("llava", "llava_next", "gemma3"),
    "flash_attention_2": ("llava", "llava_next", "qwen2_5_vl"),
}
#: Implementations that every type is checked under, and its vision tower too.
KINDS = ("eager", "sdpa")
#: flex_attention: forward passes only; without its compiler, it has no gradients on a CPU.
NOT_OF_FLEX = ("scores", "training", "static_cache")

#: What checks find that is neither exact nor refused.
FACTS = ("yes", "no", "one", "several", "-")

Row = tuple[str, str, str, str]


def cells() -> list[tuple[str, str]]:
    """Model types of this transformers, and attention implementations to check them under."""
    found = [(name, kind) for name in ZOO if exists(ZOO[name]) for kind in KINDS]
    return found + [(name, kind) for kind, names in OTHERS.items() for name in names]


def exists(specimen: Specimen) -> bool:
    return hasattr(transformers, specimen.model_class)


@contextmanager
def built(model_type: str, kind: str) -> Iterator[PreTrainedModel]:
    with ExitStack() as stack:
        if kind == "flash_attention_2":
            stack.enter_context(stand_in())
            model = ZOO[model_type].build("eager")
            stack.enter_context(attention(model, kind))
        else:
            model = ZOO[model_type].build(kind)
        yield model


def rows(model_type: str, kind: str) -> list[Row]:
    """Outcome of every check for a model type under an attention implementation."""
    found = []
    with built(model_type, kind) as model:
        checks = {**CHECKS, **TOWER_CHECKS} if kind in KINDS else CHECKS
        for name, check in checks.items():
            if kind == "flex_attention" and name in NOT_OF_FLEX:
                continue
            found.append((model_type, kind, name, outcome(ZOO[model_type], model, check)))
    return found


def refused_rows() -> list[Row]:
    return [
        (name, "any", "any", f"refused: {one.said()}")
        for name, one in REFUSED.items()
        if hasattr(transformers, one.model_class)
    ]


def read() -> list[Row]:
    with TABLE.open(newline="") as file:
        return [(r["model_type"], r["attention"], r["mode"], r["outcome"])
                for r in csv.DictReader(file)]  # fmt: skip


def write(table: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(table)
    (DOCS / "compatibility.md").write_text(page(table))


def page(table: list[Row]) -> str:
    """The table for readers: a line per model type, reasons as numbered notes below."""
    notes: dict[str, int] = {}

    def cell(outcomes: list[str]) -> str:
        parts = []
        for one in dict.fromkeys(outcomes):
            if one in FACTS:
                parts.append(one)
            elif one.startswith(EXACT):
                parts.append(one.removeprefix(EXACT).strip() or EXACT)
            else:
                parts.append(f"[{notes.setdefault(one, len(notes) + 1)}]")
        return " ".join(parts) or "-"

    proven = [row for row in table if row[1] != "any"]
    types = list(dict.fromkeys(row[0] for row in proven))

    def lines(checks: Iterable[str]) -> str:
        found = []
        for name in types:
            own = [cell([o for t, k, m, o in proven if (t, m) == (name, check) and k in KINDS])
                   for check in checks]  # fmt: skip
            found.append(f"| `{name}` | " + " | ".join(own) + " |")
        return "\n".join(found)

    whole, towers = lines(CHECKS), lines(TOWER_CHECKS)
    others = []
    for kind, names in OTHERS.items():
        for name in names:
            own = [cell([o for t, k, m, o in proven if (t, k, m) == (name, kind, check)])
                   for check in CHECKS]  # fmt: skip
            others.append(f"| `{name}` | {kind} | " + " | ".join(own) + " |")
    head, head_towers = (
        " | ".join(check.replace("_", " ") for check in checks) for checks in (CHECKS, TOWER_CHECKS)
    )
    rule = " --- |" * (len(CHECKS) + 1)
    refused = [
        f"| `{name}` | {reason.removeprefix('refused: ')} |"
        for name, kind, _, reason in table
        if kind == "any"
    ]

    def says(checks: Mapping[str, Check]) -> str:
        return "\n".join(
            f"* **{name.replace('_', ' ')}**: {' '.join((check.__doc__ or '').split())}"
            for name, check in checks.items()
        )

    return PAGE.format(
        num=len(proven_types(table)),
        version=transformers.__version__,
        says=says(CHECKS),
        head=f"| model type | {head} |\n|{rule}",
        lines=whole,
        says_towers=says(TOWER_CHECKS),
        head_towers=f"| model type | {head_towers} |\n|{' --- |' * (len(TOWER_CHECKS) + 1)}",
        towers=towers,
        head_others=f"| model type | attention | {head} |\n|{rule} --- |",
        others="\n".join(others),
        notes="\n".join(f"{number}. {text}" for text, number in notes.items()),
        refused="\n".join(refused),
    )


def proven_types(table: list[Row]) -> list[str]:
    """Types that are exact in forward passes, generation and training, eager and sdpa."""
    outcomes = {row[:3]: row[3] for row in table}
    modes = ("identity", "drop_is_mask", "greedy", "training")
    return [
        name
        for name in dict.fromkeys(row[0] for row in table)
        if all(outcomes.get((name, k, m)) == EXACT for k in ("eager", "sdpa") for m in modes)
    ]


PAGE = """# Which models, which attention, which way to generate

{num} model types of transformers {version} are exact in forward passes, generation and
training, each proven on a tiny random model built from its config, with images through its own
vision tower. Written by `python tests/compatibility.py`; `make test-all` fails when the code and
this page differ. The [CSV](compatibility.csv) has a row per model type, attention and mode.

What a column says:

{says}

`exact` holds for `eager` and `sdpa` attention; a number is the note that says what is refused, and
why. Features that a model adds between its first layers (DeepStack) follow tokens that are left.

{head}
{lines}

## Vision towers

For strategies that read the tower (`VisionRows`, `VisionStates`):

{says_towers}

{head_towers}
{towers}

## Other attention implementations

`flex_attention` runs without its compiler. `flash_attention_2` runs transformers' own code around a
stand-in of the package's kernels, written in plain PyTorch.

{head_others}
{others}

## Notes

{notes}

## Refused

| model type | reason |
| --- | --- |
{refused}

A type that is in neither table was not tried: an ordinary layout needs nothing
([add a model](add_a_model.md)), and `tokenprune verify` proves it on your own weights.
"""


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:]
    table = read() if TABLE.exists() and names else []
    table = [row for row in table if row[1] != "any" and row[0] not in names]
    for model_type, kind in cells():
        if not names or model_type in names:
            table += rows(model_type, kind)
            print(model_type, kind, flush=True)
    order = {name: number for number, name in enumerate(ZOO)}
    table.sort(key=lambda row: order[row[0]])
    write(table + refused_rows())


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    main()
