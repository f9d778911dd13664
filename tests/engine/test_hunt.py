"""A hunt over whole calls: whatever a call brings, the unmodified model makes the same of each row.

A case is drawn from a seed (`tests/hunt`): a family, rows of text and images over several turns,
pads and holes, masks, positions, labels, a cache and what is done to it, a strategy and its cuts, a
way to generate or to train; or a call of any model type of the zoo. Some are had in other ways as
well: rows packed end to end, prefills replayed as graphs, words drawn by chance or guessed by an
assistant. What is refused must be refused for a reason that the case gives.

By hand: `PYTHONPATH=tests python tests/engine/test_hunt.py --cases 10000 --seed 1 [--zoo]`.
"""

from __future__ import annotations

import argparse
import collections
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hunt import beasts, cage, draw, verdict

#: How often the few cases of each day are had in other ways; those of a hunt are had more often.
SELDOM = 0.25
#: Of the zoo, those that others' tests import as well.
FEW = ("gemma3", "internvl", "qwen2_5_vl", "smolvlm")


def hunt(case: Any, check: Callable[[Any, float], list[str]], often: float = 1.0) -> None:
    try:
        check(case, often)
    except Exception as error:
        error.add_note(str(case))
        raise


@pytest.mark.parametrize("number", range(120))
@pytest.mark.share(2)
def test_hunt(number: int) -> None:
    hunt(draw.draw_case(f"0:{number}"), verdict.check, SELDOM)


@pytest.mark.parametrize("number", range(10))
def test_hunt_in_the_zoo(number: int) -> None:
    hunt(beasts.draw_beast(f"0:{number}", FEW), cage.check, SELDOM)


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(120, 1000))
def test_hunt_further(number: int) -> None:
    hunt(draw.draw_case(f"0:{number}"), verdict.check)


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(400))
def test_hunt_in_the_whole_zoo(number: int) -> None:
    hunt(beasts.draw_beast(f"1:{number}"), cage.check)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hunts for silent wrong answers of the engine.")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--zoo", action="store_true", help="calls of any model type instead")
    parser.add_argument("--show", action="store_true", help="print cases that go wrong")
    options = parser.parse_args()
    drawn: Callable[[str], Any] = beasts.draw_beast if options.zoo else draw.draw_case
    check: Callable[[Any], list[str]] = cage.check if options.zoo else verdict.check
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    faults, start = [], time.monotonic()
    for number in range(options.first, options.first + options.cases):
        seed = f"{options.seed}:{number}"
        try:
            outcomes.update(check(drawn(seed)))
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            faults.append(seed)
            outcomes["FAULT"] += 1
            print(f"fault {seed}: {words}", flush=True)
            if options.show:
                print(drawn(seed), traceback.format_exc(limit=-3), sep="\n", flush=True)
        if (number + 1) % 500 == 0:
            print(f"{number + 1} cases, {time.monotonic() - start:.0f} s", flush=True)
    for outcome, count in outcomes.most_common():
        print(f"{count:6d}  {outcome}")
    print(f"seed {options.seed}: {options.cases} cases, {len(faults)} faults {faults[:50]}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
