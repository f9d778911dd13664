"""The progress bar of a run."""

from __future__ import annotations

from pytorch_lightning.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's, for trainings that steps end as well.

    Where no epoch is the last, Lightning's counts up to epoch -2, and takes the steps that are left
    for batches.
    """

    @property
    def total_train_batches(self) -> int | float:
        trainer = self.trainer
        if trainer.max_epochs != -1:
            return super().total_train_batches
        left = trainer.max_steps - trainer.global_step
        return min(trainer.num_training_batches, left * trainer.accumulate_grad_batches)

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs != -1:
            return super()._get_train_description(current_epoch)
        # As wide as the description that it takes turns with.
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))
