"""What holds for every test: no file needs another, and processes are new ones that end."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: What is run by hand, and is no test.
SCRIPTS = {TESTS / "wheel.py", *(TESTS / "mutants").glob("*.py")}
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path not in {*SCRIPTS, Path(__file__)}]
#: `processes.py` alone starts processes.
STARTERS = re.compile(r"(subprocess(?!\.(PIPE|DEVNULL)$)|multiprocessing|concurrent\.futures\.pro)")
FORKS = re.compile(r"\bos\.fork|ddp_(fork|notebook)|start_method\W+fork\b|get_context\(.fork\b")


def imports(path: Path) -> set[str]:
    """What a file imports, as `module` or `module.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_file_stands_alone_and_forks_nothing_that_may_have_run_torch(path: Path) -> None:
    found = imports(path)
    assert not {name for name in found if name.startswith("test_")}
    if path.name != "processes.py":
        assert not {name for name in found if STARTERS.match(name)}
    assert not FORKS.search(path.read_text(encoding="utf-8"))
