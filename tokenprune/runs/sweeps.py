"""Which runs a sweep consists of, and what their folders are called."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

_LONGEST_NAME = 120  # most file systems end at 255 bytes


def expand(grids: Sequence[Mapping[str, object]], arguments: Sequence[str]) -> list[list[str]]:
    """Overrides of every run: the product of each grid, one grid after another.

    Args:
        grids: Maps overrides to values; several values are separated by commas.
        arguments: Overrides from the command line, which win over every grid.

    Raises:
        ValueError: If a value asks for a sweep that is no list.
    """
    parser = OverridesParser.create()
    given = parser.parse_overrides(list(arguments))
    own = {override.get_key_element().lstrip("+~") for override in given}
    jobs: list[list[str]] = []
    for grid in grids or [{}]:
        lines = [f"{key}={value}" for key, value in grid.items() if key.lstrip("+~") not in own]
        axes: list[list[str]] = []
        for override in [*parser.parse_overrides(lines), *given]:
            key = override.get_key_element()
            if override.is_discrete_sweep():
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            elif override.is_sweep_override():
                raise ValueError(
                    f"{key}: expected values separated by commas, got {override.input_line!r}. "
                    "Intervals need hydra/sweeper=optuna."
                )
            elif override.is_delete():
                axes.append([override.input_line or key])
            else:
                axes.append([f"{key}={override.get_value_element_as_str()}"])
        for job in itertools.product(*axes):
            if list(job) not in jobs:
                jobs.append(list(job))
    return jobs


def run_name(overrides: Sequence[str]) -> str:
    """Folder of a run: its overrides, so that the same run finds the same folder again."""
    # Where a training goes on from does not make it another one.
    left_out = r"[+]*(experiment|hydra|ckpt_path)\b"
    parts = [part for part in overrides if not re.match(left_out, part)]
    # strategy=fastv, schedule=pyramid, schedule.lam=0.3 -> fastv,pyramid,lam=0.3; but not
    # strategy.seed=1 -> seed=1, which is another run.
    pattern = r"^(strategy=|schedule[=.])"
    short = ",".join(re.sub(pattern, "", part.lstrip("+")) for part in parts)
    safe = re.sub(r"[^\w.,=+-]", "_", short)
    if safe != short or len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 9]}-{_digest(parts)}"
    return safe or "default"


def run_names(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Folders of a sweep's runs, each with one of its own."""
    names = [run_name(job) for job in jobs]
    return [
        name if names.count(name) == 1 else f"{name}-{_digest(job)}"
        for name, job in zip(names, jobs, strict=True)
    ]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b(",".join(parts).encode(), digest_size=4).hexdigest()


def sweep_name(overrides: Sequence[str]) -> str:
    """Folder of a sweep that has no name of its own; the order of its overrides is no matter."""
    key = "\n".join(sorted(overrides))
    return f"sweep-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
