"""The order of training samples: new in every epoch, shared by processes, taken up anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    ) -> None:
        # A `DistributedSampler`, so that Lightning leaves it as it is and calls `set_epoch`.
        super().__init__(range(length), processes, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.length, self.batch_size, self.start = length, batch_size, start
        self.epoch = start[0]  # workers fetch before the trainer sets the first epoch

    def __len__(self) -> int:
        return len(self._share(list(range(self.length))))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        share = self._share(torch.randperm(self.length, generator=generator).tolist())
        seen = self.start[1] if self.epoch == self.start[0] else 0
        return iter(share[seen * self.batch_size :])

    def _share(self, order: list[int]) -> list[int]:
        own = order[self.rank :: self.num_replicas]
        steps = math.ceil(self.length / (self.batch_size * self.num_replicas))
        lacks_one = len(own) <= (steps - 1) * self.batch_size
        return own + order[:1] if lacks_one else own
