"""Visual token pruning for any Hugging Face vision-language model.

Names are loaded when they are first used: torch alone takes a second, which schedules, costs and
`tokenprune --help` do without.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes a moment to load
if TYPE_CHECKING:
    from tokenprune import cost, strategies
    from tokenprune.engine.attach import Handle, attach, prune
    from tokenprune.engine.graphs import Graphs
    from tokenprune.engine.trace import Trace, TracedStage
    from tokenprune.families.adapter import Adapter, register_adapter
    from tokenprune.families.anatomy import visual_mask
    from tokenprune.families.positions import fixed_positions
    from tokenprune.families.projection import QueriesAndKeys
    from tokenprune.families.tower import Patches, Tower
    from tokenprune.schedule import Schedule, Stage
    from tokenprune.strategies.published import published
    from tokenprune.strategy import (
        LOGITS,
        POSITIONS,
        AttentionStrategy,
        BeforeProjector,
        Change,
        DecoderKeys,
        DecoderRows,
        Entered,
        Need,
        Normed,
        PerStage,
        Projected,
        PruningStrategy,
        Published,
        Question,
        RandomNumbers,
        ScoreStrategy,
        Selection,
        Text,
        TextView,
        TokensAndText,
        TokenView,
        Videos,
        VisionRows,
        VisionStates,
        Words,
        available,
        build_strategy,
        register,
    )

__version__ = "0.1.0"

__all__ = [
    "LOGITS",
    "POSITIONS",
    "Adapter",
    "AttentionStrategy",
    "BeforeProjector",
    "Change",
    "DecoderKeys",
    "DecoderRows",
    "Entered",
    "Graphs",
    "Handle",
    "Need",
    "Normed",
    "Patches",
    "PerStage",
    "Projected",
    "Published",
    "PruningStrategy",
    "Question",
    "QueriesAndKeys",
    "RandomNumbers",
    "Schedule",
    "ScoreStrategy",
    "Selection",
    "Stage",
    "Text",
    "TextView",
    "TokenView",
    "TokensAndText",
    "Tower",
    "Trace",
    "TracedStage",
    "Videos",
    "VisionRows",
    "VisionStates",
    "Words",
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

#: Which file has which of them, as above; `cost` and `strategies` are rooms.
_NAMES = {
    "engine.attach": ("Handle", "attach", "prune"),
    "engine.graphs": ("Graphs",),
    "engine.trace": ("Trace", "TracedStage"),
    "families.adapter": ("Adapter", "register_adapter"),
    "families.anatomy": ("visual_mask",),
    "families.positions": ("fixed_positions",),
    "families.projection": ("QueriesAndKeys",),
    "families.tower": ("Patches", "Tower"),
    "schedule": ("Schedule", "Stage"),
    "strategies.published": ("published",),
    "strategy": (
        *("LOGITS", "POSITIONS", "AttentionStrategy", "BeforeProjector", "Change"),
        *("DecoderKeys", "DecoderRows", "Entered"),
        *("Need", "Normed", "PerStage", "Projected", "PruningStrategy", "Published"),
        *(
            "Question",
            "RandomNumbers",
            "ScoreStrategy",
            "Selection",
            "Text",
            "TextView",
            "TokensAndText",
        ),
        *("TokenView", "Videos", "VisionRows", "VisionStates", "Words"),
        *("available", "build_strategy", "register"),
    ),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # with this function a module has any name, to a type checker

    def __getattr__(name):
        """A public name that was not used before."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
        value = getattr(home, name) if name in _HOMES else home
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """What there is, loaded or not."""
    return sorted({*globals(), *__all__})
