"""A hunt over whole conversations: whatever a call brings, each row is what it is alone.

A case is drawn from a seed: a family, rows of text and images over several turns, pads and holes,
masks, positions, labels, a cache and what is done to it, a strategy and its cuts (`tests/hunt`).
What is refused must be refused for a reason that the case gives.

By hand: `PYTHONPATH=tests python tests/engine/test_hunt.py --cases 10000 --seed 1`.
"""

from __future__ import annotations

import argparse
import collections
import time
import traceback

import pytest
import torch

from hunt import beasts, verdict
from hunt.cases import draw_case

CASES = 200


@pytest.mark.parametrize("number", range(CASES))
def test_hunt(number: int) -> None:
    case = draw_case(f"0:{number}")
    try:
        verdict.check(case)
    except Exception as error:
        error.add_note(str(case))
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Hunts for silent wrong answers of the engine.")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--zoo", action="store_true", help="calls of any model type instead")
    parser.add_argument("--show", action="store_true", help="print cases that go wrong")
    options = parser.parse_args()
    draw, check = (beasts.draw_beast, beasts.check) if options.zoo else (draw_case, verdict.check)
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    faults, start = [], time.monotonic()
    for number in range(options.first, options.first + options.cases):
        seed = f"{options.seed}:{number}"
        try:
            outcomes[check(draw(seed))] += 1
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            faults.append(seed)
            outcomes["FAULT"] += 1
            print(f"fault {seed}: {words}", flush=True)
            if options.show:
                print(draw(seed), traceback.format_exc(limit=-3), sep="\n", flush=True)
        if (number + 1) % 500 == 0:
            print(f"{number + 1} cases, {time.monotonic() - start:.0f} s", flush=True)
    for outcome, count in outcomes.most_common():
        print(f"{count:6d}  {outcome}")
    print(f"seed {options.seed}: {options.cases} cases, {len(faults)} faults {faults[:50]}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
