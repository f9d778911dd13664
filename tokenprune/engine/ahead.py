"""What was said of images that were encoded ahead of the call that shows them, as `generate` does.

Such a call has their features, but neither pixels nor sizes.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tokenprune.families.inputs import facts


class Ahead:
    """What the calls that made features were told, by the object that the features came in."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], dict[str, Any]]] = {}

    def noted(
        self, features: Callable[..., Any], open_call: Callable[[], Any]
    ) -> Callable[..., Any]:
        """A method that makes features, and notes what it is told.

        Args:
            features: The model's own method.
            open_call: The call under way, which is told itself, if there is one.
        """
        parameters = inspect.signature(features)

        @functools.wraps(features)
        def method(*args: Any, **kwargs: Any) -> Any:
            output = features(*args, **kwargs)
            if not torch.compiler.is_compiling() and open_call() is None:
                self._keep(output, facts(parameters.bind(*args, **kwargs).arguments))
            return output

        return method

    def _keep(self, output: Any, said: dict[str, Any]) -> None:
        try:
            key, known = id(output), self._known
            known[key] = weakref.ref(output, lambda _: known.pop(key, None)), said
        except TypeError:  # a tuple: nothing hands it on to another call
            return

    def said(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What was said of the features among a call's inputs."""
        found: dict[str, Any] = {}
        for output in (inputs.get("mm_encoder_outputs") or {}).values():
            reference, said = self._known.get(id(output), (lambda: None, {}))
            if output is not None and reference() is output:
                found |= said
        return found

    def forget(self) -> None:
        """Forgets all that was said."""
        self._known.clear()
