"""Shared by the tests of data sets."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory):
    """What `datasets` keeps goes where the tests' own files go."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
            patch.setattr(datasets.config, name, root / name.lower())
        yield
