"""What a server of forks imports: all that its forks need, and a deaf ear for schedulers.

A server ignores Ctrl-C of itself. It has to outlive a SIGTERM to its group, too: a server that is
gone cannot tell how its forks end. They hear it as any process does.
"""

from __future__ import annotations

import os
import signal

import trainings  # noqa: F401

_SERVER = os.getpid()


def _hear() -> None:
    if os.getppid() == _SERVER:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_hear)
