"""The batches of one step of the optimiser, whose loss is one mean over all supervised tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Window:
    """What is known of the batches of one step of the optimiser.

    Args:
        reference: Losses are divided by it until the step's number of supervised tokens is known:
            any number does, but float16 wants one of that size.
        loss: Any tensor of the device that counts.
    """

    def __init__(self, reference: Tensor, loss: Tensor) -> None:
        self.reference = reference
        #: Loss over all supervised tokens, their number, batches without any.
        self.sums = torch.zeros(3, device=loss.device)

    @classmethod
    def open(cls, over_processes: Callable[[Tensor], Tensor], guess: int, loss: Tensor) -> Window:
        """A window at its first batch; `guess` is this process's share of the tokens."""
        guesses = torch.tensor([float(guess)], device=loss.device)
        return cls(over_processes(guesses)[0].clamp_min(1), loss)

    def add(self, loss: Tensor, num_supervised: int) -> None:
        numbers = [float(num_supervised), float(num_supervised == 0)]
        self.sums += torch.cat([loss.reshape(1), torch.tensor(numbers, device=loss.device)])
