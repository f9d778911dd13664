"""One file per method, which has the name that the method is registered by.

A file is loaded when its method is first asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

_NO_METHOD = ("published",)


def names() -> list[str]:
    """Names of the methods: their files'."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in found if name not in _NO_METHOD and not name.startswith("_")]


def __getattr__(name: str) -> ModuleType:
    """A file that was not used before."""
    if name not in (*names(), *_NO_METHOD):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """What there is, loaded or not."""
    return sorted({*globals(), *names(), *_NO_METHOD})
