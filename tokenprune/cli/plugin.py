"""What lmms-eval is told of us: it loads this at every start, so nothing heavy is imported here."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model that `lmms-eval --model tokenprune` names, as lmms-eval describes models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "tokenprune",
        simple_class_path="tokenprune.cli.harness.Simple",
        chat_class_path="tokenprune.cli.harness.Chat",
    )
