"""The order of training samples: new in every epoch, shared by processes, taken up anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DistributedSampler


class EpochShuffle(DistributedSampler[int]):
    """One process's share of an order that is new in every epoch: the same for (seed, epoch).

    Step k of an epoch trains on the same samples however many processes share them: entries
    k * batch_size * processes onwards of the order, dealt out in turn. No sample is repeated, but
    where the last step has fewer samples than there are processes: those without one take the
    epoch's first.

    `len` is that of a whole epoch: Lightning counts on from the batches of before.

    Args:
        length: Number of samples.
        batch_size: Samples per batch of one process.
        seed: Another seed gives other orders.
        processes: How many share an epoch.
        rank: Which of them this is.
        start: An epoch, and how many of its batches an interrupted training has seen.
        sizes: Of the samples: steps then have samples of similar size, which pads less and lets
            processes wait less. They are sorted within 50 steps, whose order is drawn.
        accumulated: Batches of one process that make a step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        *,
        processes: int = 1,
        rank: int = 0,
        start: tuple[int, int] = (0, 0),
        sizes: Sequence[int] | None = None,
        accumulated: int = 1,
    ) -> None:
        # A `DistributedSampler`, so that Lightning leaves it as it is and calls `set_epoch`.
        super().__init__(range(length), processes, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.length, self.batch_size, self.start = length, batch_size, start
        self.sizes, self.step = sizes, batch_size * processes * accumulated
        self.epoch = start[0]  # workers fetch before the trainer sets the first epoch

    def __len__(self) -> int:
        return len(self._share(list(range(self.length))))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.sizes is not None:
            order = grouped(order, self.sizes, self.step, generator)
        share = self._share(order)
        seen = self.start[1] if self.epoch == self.start[0] else 0
        return iter(share[seen * self.batch_size :])

    def _share(self, order: list[int]) -> list[int]:
        own = order[self.rank :: self.num_replicas]
        steps = math.ceil(self.length / (self.batch_size * self.num_replicas))
        lacks_one = len(own) <= (steps - 1) * self.batch_size
        return own + order[:1] if lacks_one else own


#: Steps within which samples are sorted: many enough to be alike, few enough to stay random.
_SORTED_STEPS = 50


def grouped(
    order: Sequence[int], sizes: Sequence[int], step: int, generator: torch.Generator
) -> list[int]:
    """An order in which the samples of a step are of similar size; a step that lacks some is last.

    Args:
        order: Of all samples.
        sizes: Of each.
        step: Samples of a step, whoever does it.
        generator: Draws the order of the steps.
    """
    found: list[int] = []
    for start in range(0, len(order), _SORTED_STEPS * step):
        block = order[start : start + _SORTED_STEPS * step]
        block = sorted(block, key=lambda sample: -sizes[sample])
        steps = [block[i : i + step] for i in range(0, len(block), step)]
        whole = [own for own in steps if len(own) == step]
        for number in torch.randperm(len(whole), generator=generator).tolist():
            found += whole[number]
        found += steps[-1] if len(steps) > len(whole) else []
    return found
