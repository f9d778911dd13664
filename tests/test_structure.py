"""The structure of the package: imports go one way, files stay small, no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokenprune

PACKAGE = Path(tokenprune.__file__).parent
CORE = {
    "tensors": set(),
    "schedule": set(),
    "trace": set(),
    "cost": {"strategy"},
    "strategy": {"tensors"},
    "levels": {"tensors"},
    "record": {"levels", "tensors"},
    "masks": set(),
    "projection": {"tensors"},
    "adapters": {"projection", "tensors"},
    "published": {"schedule", "strategy"},
    "passes": {
        *("adapters", "levels", "masks", "projection", "record", "schedule", "strategy", "trace")
    },
    "side": {"levels", "masks", "passes", "tensors"},
    "views": {"passes", "side", "strategy", "tensors"},
    "losses": {"passes", "tensors"},
    "engine": {
        *("adapters", "levels", "losses", "passes", "record", "schedule", "side", "strategy"),
        *("tensors", "trace", "views"),
    },
}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenprune"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tokenprune.")}
    return found


@pytest.mark.parametrize("name", CORE)
def test_core_imports_go_one_way(name: str) -> None:
    assert imports(PACKAGE / f"{name}.py") <= CORE[name]


@pytest.mark.parametrize("path", sorted((PACKAGE / "strategies").glob("[a-z]*.py")), ids=str)
def test_strategies_know_tensors_and_views_only(path: Path) -> None:
    assert imports(path) <= {"strategy", "tensors"}


def test_everything_above_uses_the_public_api() -> None:
    internal = {"engine", "levels", "losses", "passes", "record", "side", "tensors", "views"}
    above = [p for p in PACKAGE.rglob("*.py") if p.stem not in CORE and p.stem != "__init__"]
    for path in above:
        if path.parent.name != "strategies":
            assert not imports(path) & internal, path


def test_the_engine_names_no_model_and_no_strategy() -> None:
    source = (PACKAGE / "engine.py").read_text().lower()
    for name in (*tokenprune.available(), "llava", "llama", "qwen", "gemma"):
        assert name not in source.replace("random(", "").replace("_random", "")


def test_importing_is_light() -> None:
    code = (
        "import sys, tokenprune;"
        "heavy = {'pytorch_lightning', 'hydra', 'matplotlib', 'pandas', 'datasets'};"
        "print(heavy & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_environment_variables_and_no_asides() -> None:
    for path in PACKAGE.rglob("*.py"):
        # Hydra's own switch for tracebacks is the one exception.
        text = path.read_text().replace('os.environ.get("HYDRA_FULL_ERROR")', "")
        assert "os.environ" not in text, path
        assert "TODO" not in text, path
