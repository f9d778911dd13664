"""Visual token pruning for any Hugging Face vision-language model."""

from tokenprune import cost, strategies
from tokenprune.adapters import Adapter, register_adapter, visual_mask
from tokenprune.engine import POSITIONS, Handle, attach, prune
from tokenprune.projection import Projected
from tokenprune.published import published
from tokenprune.schedule import Schedule, Stage
from tokenprune.strategy import (
    AttentionRows,
    AttentionStrategy,
    PruningStrategy,
    Published,
    ScoreStrategy,
    Selection,
    TokenView,
    available,
    build_strategy,
    register,
)
from tokenprune.trace import Trace, TracedStage

__version__ = "0.1.0"

__all__ = [
    "POSITIONS",
    "Adapter",
    "AttentionRows",
    "AttentionStrategy",
    "Handle",
    "Published",
    "Projected",
    "PruningStrategy",
    "Schedule",
    "ScoreStrategy",
    "Selection",
    "Stage",
    "TokenView",
    "Trace",
    "TracedStage",
    "attach",
    "available",
    "build_strategy",
    "cost",
    "prune",
    "published",
    "register",
    "register_adapter",
    "strategies",
    "visual_mask",
]
