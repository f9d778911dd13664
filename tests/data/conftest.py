"""Shared by the tests of data sets."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory):
    """What `datasets` keeps goes where the tests' own files go."""
    import datasets

    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
            patch.setattr(datasets.config, name, root / name.lower())
        yield


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path_factory):
    """A folder, and the address at which this machine serves its files."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        pytest.skip("nothing is fetched where Hugging Face's libraries are told to be offline")
    folder = tmp_path_factory.mktemp("served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)
