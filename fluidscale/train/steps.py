"""Steps and the parts in which a process computes them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AfterStep(Callback):
    """A callback that hears of whole steps: Lightning's batch is one part of what a process computes of a step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after_step(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when step number `trainer.global_step` (from 1) has been made."""
        raise NotImplementedError
