"""One Slurm for all tests of a run: `make test-cluster`. Each test has it to itself, and idle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint import save_checkpoint
from slurm import NODES, Slurm, absent, cluster


@pytest.fixture(scope="session")
def _slurm() -> Iterator[Slurm]:
    missing = absent()
    assert not missing, f"expected {missing} to be installed. apt-get install slurm-wlm munge"
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as slurm:
        yield slurm


@pytest.fixture
def slurm(_slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A cluster on which nothing runs, in an empty folder; its commands work in the test itself."""
    for name, value in _slurm.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield _slurm
    _slurm.cancel_all()
    for name in NODES:
        if name not in _slurm.nodes:
            _slurm.start_node(name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
