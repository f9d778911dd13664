"""Fixed surroundings: no test depends on what is set, installed or writable around it."""

from __future__ import annotations

import faulthandler
import importlib.util
import math
import os
import shutil
import signal
import site
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Cases of a test that run by default, at most.
MOST = 8
#: Files whose cases all do, but for shares.
WHOLE = {"test_golden.py", "test_hunt.py"}
#: Variables that stay: where programs are found, and what a processor's kernels are chosen by.
KEPT = {"LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONPYCACHEPREFIX", "TMPDIR", "VIRTUAL_ENV"}
KEPT_STARTS = ("ATEN_", "COV", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "PYTEST_")
#: The folder of a whole run, which processes that share its work are told.
HOME = "PYTEST_HOME_OF_RUN"


# A job in the background ignores Ctrl-C, and so would every child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _surround() -> str | None:
    """Replaces the environment, also of children, before anything that reads it is imported.

    Returns:
        A folder to remove in the end, if this process has made it.
    """
    spec = importlib.util.find_spec("tokenprune")
    assert spec is not None, "expected tokenprune to be installed, got none. Run make install."
    assert spec.origin is not None
    home = os.environ.get(HOME)
    made = tempfile.mkdtemp(prefix="tokenprune-tests-") if home is None else None
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_STARTS)
    }
    # One thread each: tiny models gain nothing by more, and several processes share the cores.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    home = str(home or made)
    fixed = {
        HOME: home,
        "HOME": home,
        "USER": "tester",
        "PYTHONUSERBASE": site.getuserbase(),  # which a home would decide
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(spec.origin).parents[1])]),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "COLUMNS": "120",
        "LINES": "50",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # where nobody answers
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis",
        # Small models are asked in words that they do not know: commands say so, see tests/data.
        "PYTHONWARNINGS": "ignore:collate:UserWarning",
        "TORCHDYNAMO_DISABLE": "1",  # flex_attention runs uncompiled: compiling takes minutes
    }
    os.environ.clear()
    os.environ.update(threads | kept | fixed)
    time.tzset()
    return made


_made = _surround()
sys.path.insert(0, str(TESTS))


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    # Before the settings of pyproject.toml hold: of a checkout that cannot be written to.
    warnings.filterwarnings("ignore", category=pytest.PytestCacheWarning)

    from hypothesis import HealthCheck, settings

    # The same examples everywhere, however slow the machine is. `--hypothesis-profile=search`
    # draws others.
    common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("fixed", derandomize=True, **common)
    settings.register_profile("search", max_examples=500, print_blob=True, **common)
    settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--draw", type=float, default=1.0, help="share of the tests, by the seed of their order"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `share(n)` one case in n runs by default, the others by `make test-all`.

    And of any test in a room no more than `MOST`, but of what published code gave. Which ones looks
    like chance and is the same everywhere, so that of each way some are tried. `--draw` takes other
    tests every time.
    """
    if (share := config.getoption("draw")) < 1:
        seed = config.getoption("randomly_seed", 0)
        items.sort(key=lambda item: zlib.crc32(f"{seed} {item.nodeid}".encode()))
        config.hook.pytest_deselected(items=items[(number := math.ceil(share * len(items))) :])
        del items[number:]
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("matrix"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for own in cases.values():
        share, path = own[0].get_closest_marker("share"), own[0].path
        whole = path.parent == TESTS or path.name in WHOLE
        number = math.ceil(len(own) / (share.args[0] if share else 1))
        own.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in own[number if whole else min(number, MOST) :]:
            item.add_marker(pytest.mark.matrix)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)
    # Whatever else the end waits for, it comes.
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    """What a test does to the process ends with it; chance starts the same for each."""
    environment, folder = dict(os.environ), Path.cwd()
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
