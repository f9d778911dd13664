"""What the cost model says of a run, to stand beside what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune import Schedule, cost
from tokenprune.bench.load import Load


@dataclass(frozen=True)
class Theory:
    """Tokens, FLOPs and cache bytes by arithmetic alone.

    Attributes:
        shape: Sizes of the decoder.
        schedule: How many visual tokens survive.
        load: What the model is given.
        logits: Of which positions training makes logits: `all`, `supervised` or `full`.
        bytes_per_value: Of the key-value cache.
        counted: Visual tokens that each layer was seen to process, where the image decides how many
            stay and the schedule says only how many at most.
    """

    shape: cost.DecoderShape
    schedule: Schedule
    load: Load
    logits: str
    bytes_per_value: int
    counted: tuple[int, ...] | None = None

    def lengths(self) -> list[int]:
        """Visual tokens that each layer of the pruned model processes."""
        if self.counted is not None:
            return list(self.counted)
        return self.schedule.lengths(self.shape.num_layers, self.load.num_visual)

    def flops(self, measure: str, pruned: bool) -> float:
        """FLOPs of one row, causal attention as half, without the scoring.

        Training: of the forward pass. The backward pass costs twice that in either variant; under
        LoRA less, without the weights' gradients, which makes the ratio about 1 % larger.

        Raises:
            ValueError: If the cost model does not know the model's layers.
        """
        lengths = self.lengths() if pruned else [self.load.num_visual] * self.shape.num_layers
        shape, num_text = self.shape, self.load.num_text
        if measure == "decode":
            return cost.decode_flops(shape, lengths, num_text)
        projected = 1
        if measure == "train":
            whole, survivors = self.load.num_visual + num_text, lengths[-1] + num_text
            counts = {"all": survivors, "supervised": self.load.num_labels, "full": whole}
            projected = counts[self.logits] if pruned else whole
        terms = cost.exact(shape, lengths, num_text, num_logits=projected)
        return terms.layers + terms.vocabulary

    def cache_bytes(self) -> int:
        """Bytes of the pruned cache after the prefill."""
        row = cost.kv_bytes(self.shape, self.lengths(), self.load.num_text, self.bytes_per_value)
        return row * self.load.batch_size
