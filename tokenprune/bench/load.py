"""What the model is given: so many tokens in so many rows, where the visual ones are, labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """What the model is given.

    Attributes:
        num_visual: Visual tokens per row.
        num_text: Text tokens per row, half of them before the visual ones; of the others half have
            labels in training.
        batch_size: Rows.
        new_tokens: Tokens that decoding adds.
    """

    num_visual: int
    num_text: int
    batch_size: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.num_visual + self.num_text

    @property
    def visual_mask(self) -> Tensor:
        """Bool (B, T)."""
        mask = torch.zeros(self.batch_size, self.length, dtype=torch.bool)
        before = self.num_text // 2
        mask[:, before : before + self.num_visual] = True
        return mask

    @property
    def num_labels(self) -> int:
        """Labelled tokens per row: the answer, at the end."""
        return max(1, self.num_text // 4)
