"""The structure of the package: rooms import only rooms below them, no side effects."""

from __future__ import annotations

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from processes import run

import tokenprune

PACKAGE = Path(tokenprune.__file__).parent
#: Floor of each room. A room imports rooms of lower floors only; `tokenprune` is the public API.
FLOORS = {
    "cli": 7,
    "evaluation": 6,
    "bench": 6,
    "report": 6,
    "training": 6,
    "runs": 5,
    "tokenprune": 4,
    "engine": 3,
    "strategies": 3,
    "cost": 3,
    "strategy": 2,
    "families": 2,
    "imports": 1,
    "schedule": 1,
    "tensors": 1,
    "data": 1,
}


def room(path: Path) -> str:
    """The room of a file: its folder, or itself where it lies in none."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "tokenprune" if first == "__init__" else first


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, as dotted names without `tokenprune.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenprune":
            below = node.module.partition(".")[2]
            found |= {f"{below}.{alias.name}".lstrip(".") for alias in node.names}
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                name.partition(".")[2] for name in names if name.split(".")[0] == "tokenprune"
            }
    return found


def rooms_of(path: Path) -> set[str]:
    """Rooms that a file imports; public names count as the package's."""
    firsts = {name.split(".")[0] for name in imports(path)}
    return {first if first in FLOORS else "tokenprune" for first in firsts}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    own = room(path)
    for other in rooms_of(path) - {own}:
        assert FLOORS[other] < FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {other}"


def test_imports_run_one_way() -> None:
    """Within a room as well, files can be read in an order."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in FILES
        if path.stem != "__init__"
    }

    def owner(name: str) -> str:
        """The file that a dotted name is from; empty for a package's own."""
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    arrows = {own: {*map(owner, imports(path))} - {own, ""} for own, path in files.items()}
    assert set(TopologicalSorter(arrows).static_order()) == set(files)  # or it names the circle


@pytest.mark.parametrize("path", sorted((PACKAGE / "strategies").glob("[a-z]*.py")), ids=str)
def test_strategies_know_tensors_and_views_only(path: Path) -> None:
    """And what several have in common, in files whose names begin with an underscore."""
    allowed = {"strategy", "tensors"}
    of_their_own = {"published": {"schedule"}, "prumerge_plus": {"strategies"}}
    allowed |= of_their_own.get(path.stem, set())
    own = {name.split(".")[0] for name in imports(path) if not name.startswith("strategies._")}
    assert own <= allowed


def test_everything_above_uses_the_public_api() -> None:
    for path in FILES:
        if FLOORS[room(path)] > FLOORS["tokenprune"]:
            assert not rooms_of(path) & {"engine", "tensors", "strategies"}, path


def test_the_engine_names_no_model_and_no_strategy() -> None:
    for path in sorted((PACKAGE / "engine").glob("*.py")):
        code = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
        words = {n.value for n in ast.walk(code) if isinstance(n, ast.Constant)} - docstrings(code)
        said = " ".join([*names, *map(str, words)]).lower()
        for name in (*sorted(set(tokenprune.available()) - {"random"}), "llava", "llama", "qwen"):
            assert name not in said, (path, name)


def docstrings(code: ast.Module) -> set[str]:
    """Texts that explain code, which may give examples."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(code) if isinstance(node, owners)]
    return {text for node in nodes if (text := ast.get_docstring(node, clean=False))}


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, tokenprune as tp;"
        "tp.available(), tp.cost.PRESETS, tp.Schedule.one_shot(2, 0.5), tp.POSITIONS;"
        "heavy = {'torch', 'transformers', 'numpy', 'pytorch_lightning', 'hydra', 'omegaconf',"
        "         'matplotlib', 'pandas', 'datasets', 'PIL', 'rich'};"
        "print(heavy & set(sys.modules))"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "set()"


def test_public_names_are_where_editors_look_for_them() -> None:
    """Those that load on first use are those that the package shows to type checkers."""
    code = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (shown,) = (n for n in code.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    places = {
        alias.name: node.module
        for node in shown.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tokenprune")
        for alias in node.names
    }
    assert sorted(places) == sorted(tokenprune.__all__)
    for name, place in places.items():
        home = importlib.import_module(place)
        assert getattr(tokenprune, name) is getattr(home, name), name
        assert name in dir(tokenprune)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = tokenprune.prun


def test_no_environment_variables_and_no_asides() -> None:
    for path in FILES:
        # Hydra's own switch for tracebacks is an exception, and what launchers tell processes.
        text = path.read_text().replace('os.environ.get("HYDRA_FULL_ERROR")', "")
        assert "os.environ" not in text, path
        assert "getenv" not in text or path.name == "launchers.py", path
        assert "TODO" not in text, path
