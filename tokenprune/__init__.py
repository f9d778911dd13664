"""Visual token pruning for any Hugging Face vision-language model."""

from tokenprune import cost, strategies
from tokenprune.engine.attach import POSITIONS, Handle, attach, prune
from tokenprune.engine.trace import Trace, TracedStage
from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.anatomy import visual_mask
from tokenprune.families.positions import fixed_positions
from tokenprune.families.projection import Projected
from tokenprune.schedule import Schedule, Stage
from tokenprune.strategies.published import published
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
    "fixed_positions",
    "prune",
    "published",
    "register",
    "register_adapter",
    "strategies",
    "visual_mask",
]
