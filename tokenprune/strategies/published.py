"""A method exactly as its paper's released code runs it.

CDPruner's relevance is an exception: released, it is asked of a CLIP text tower, which nobody but
the user can name (`build_strategy("cdpruner", relevance="clip", ...)`); here of the decoder's own
embeddings.
"""

from __future__ import annotations

from tokenprune.schedule import Schedule
from tokenprune.strategy import PerStage, PruningStrategy, build_strategy, strategy_class


def published(name: str, num_layers: int) -> tuple[PruningStrategy, Schedule, str]:
    """Strategy, schedule and position policy of a published method.

    Args:
        name: A registered strategy; of a composed method, its first stage. Baselines without a
            paper run on PyramidDrop's schedule.
        num_layers: Decoder layers of the model.

    Raises:
        KeyError: If the name is unknown.
        ValueError: If the strategy has no published run, or it does not fit `num_layers`.
    """
    cls = strategy_class(name)
    run = cls.published(num_layers)
    schedule = getattr(Schedule, run.schedule)(**run.options)
    schedule.check_depth(num_layers)
    if run.strategies:
        own = tuple(build_strategy(name, **fields) for name, fields in run.strategies)
        return PerStage(own), schedule, run.positions
    return cls(), schedule, run.positions
