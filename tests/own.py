"""What users write for themselves, as files: a strategy, its configs, a package that offers it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tokenprune import strategies, strategy
from tokenprune.strategy import registry

#: A strategy in the module `own_norm`, registered by nobody.
NORM = """
from dataclasses import dataclass

from tokenprune.strategy import ScoreStrategy


@dataclass(frozen=True)
class Norm(ScoreStrategy):
    '''Keeps the tokens with the largest hidden states.'''

    power: float = 2.0

    def __post_init__(self):
        if self.power <= 0:
            raise ValueError(f"power must be above 0, not {self.power}")

    def score(self, view):
        return view.hidden.float().norm(p=self.power, dim=-1)
"""
#: The same, registered as `own_norm`.
REGISTERED = NORM.replace("import ScoreStrategy", "import ScoreStrategy, register").replace(
    "@dataclass", '@register("own_norm")\n@dataclass'
)
#: What `strategy=own` is with the folder of `configs`.
WHOLE = """\
# @package _global_
# The norm, on a schedule of its own.

defaults:
  - override /schedule: one_shot

strategy:
  _target_: own_norm.Norm
  power: 3.0
schedule:
  layer: 1
"""
#: By each, the first cause of it and a part of what says so.
BROKEN = {
    "no module": ({}, "No module named 'own_broken'"),
    "no class": ({"own_broken.py": NORM.replace("Norm(", "Nrm(")}, "own_broken has no 'Norm'"),
    "an import in it": (
        {"own_broken.py": "import json\nimport no_such_package\n"},
        "ModuleNotFoundError: No module named 'no_such_package' (own_broken.py, line 2)",
    ),
    "an import far in it": (
        {
            "own_broken.py": "import own_inside\n",
            "own_inside.py": "try:\n    import no_such_package\n"
            "except ImportError as error:\n    raise RuntimeError('reinstall\\nit') from error\n",
        },
        "RuntimeError: reinstall it (own_inside.py, line 4), after ModuleNotFoundError: No module",
    ),
    "an error in it": ({"own_broken.py": "1 / 0\n"}, "ZeroDivisionError: division by zero (own_b"),
    "its syntax": (
        {"own_broken.py": "x = 1\ndef f(:\n"},
        "SyntaxError: invalid syntax (own_broken",
    ),
    "an end in it": ({"own_broken.py": "raise SystemExit('no key')"}, "SystemExit: no key"),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process import what is in a folder, anew, and forget it with the test."""
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    for name in strategies.names():
        strategy.strategy_class(name)  # or it would be forgotten with what is registered here
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def configs(folder: Path) -> Path:
    """A folder with `strategy=own`, a whole file, and `strategy=own_short`."""
    short = "# The norm, in a short file.\n_target_: own_norm.Norm\npower: 3.0\n"
    return write(folder, {"strategy/own.yaml": WHOLE, "strategy/own_short.yaml": short})


def offer(folder: Path, entries: str, package: str = "norm-package") -> Path:
    """An installed package that offers strategies.

    Args:
        folder: Of the packages.
        entries: Lines of the group `tokenprune.strategies`.
        package: Its name.
    """
    home = f"{package.replace('-', '_')}-1.0.dist-info"
    return write(
        folder,
        {
            f"{home}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
            f"{home}/entry_points.txt": f"[tokenprune.strategies]\n{entries}\n",
        },
    )
